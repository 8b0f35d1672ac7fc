"""Command that writes the page on which results are explored: explore."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

import unsleep
from unsleep.cli.console import Bars, say
from unsleep.cli.shared import Out


def explore(folder: Annotated[Positional[Path], arg(metavar="DIR")], out: Out, json: bool = False) -> int:
    """Write the page on which features, circuits and evaluations are explored; it opens from disk.

    Args:
        folder: Folder with report.json, result.json, circuit.json or statistics of features, in it or below.
        out: Folder for the page; one made before is replaced.
        json: Print the path as JSON.
    """
    with Bars():
        path = unsleep.explore(folder, out)
    say({"explorer": str(path)}, json, f"Page in {path}; open it in a browser")
    return 0
