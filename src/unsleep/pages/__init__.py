"""A result as a page that can be mailed: one HTML file, no requests, no script needed to read it.

report.json -> check -> make text visible -> view of each section -> page.html
"""

from __future__ import annotations

from pathlib import Path

from unsleep.base.store import read_json, write_text
from unsleep.core import BadInput
from unsleep.pages.check import check_result, is_object
from unsleep.pages.comparing import render_patch
from unsleep.pages.dictionaries import render_dictionaries
from unsleep.pages.diffing import render_diff
from unsleep.pages.directions import render_directions
from unsleep.pages.page import render
from unsleep.pages.reading import render_reading
from unsleep.pages.subspaces import render_subspaces

__all__ = [
    "check_result",
    "render",
    "render_dictionaries",
    "render_diff",
    "render_directions",
    "render_patch",
    "render_reading",
    "report",
]

PAGES = {
    "report": render,
    "dictionaries": render_dictionaries,
    "directions": render_directions,
    "reading": render_reading,
    "subspaces": render_subspaces,
    "patch": render_patch,
    "diff": render_diff,
}
"""Name of a record → what draws it, the first one first where a folder has several."""


def report(folder: str | Path) -> Path:
    """Render the record of a folder to the page beside it: `report.json` to `report.html`, or another of `PAGES`.

    The page is written whole or not at all; returns its path. Raises `BadInput` naming the file and the key where the
    record is missing, damaged or of another schema.
    """
    folder = Path(folder)
    name = next((name for name in PAGES if (folder / f"{name}.json").exists()), "report")
    source, target = folder / f"{name}.json", folder / f"{name}.html"
    try:
        found = read_json(source)
        is_object(found, name)
        page = PAGES[name](found)
    except BadInput as error:
        raise error if str(source) in str(error) else BadInput(f"{source}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{source} cannot be read ({error}); write it again") from None
    write_text(target, page)
    return target
