"""Renders a record as one self-contained HTML file: no requests, readable without scripts.

report.json -> check -> make text visible -> view of each section -> page.html
"""

from __future__ import annotations

from pathlib import Path

from unsleep.base.store import write_text
from unsleep.core import BadInput
from unsleep.pages.registry import pages

__all__ = ["report"]


def report(folder: str | Path) -> Path:
    """Render the record in a folder to the page beside it: `report.json` to `report.html`, or another page's.

    The page is written atomically; returns its path. Raises `BadInput` naming the file and the key where the
    record is missing, damaged or of another schema.
    """
    folder = Path(folder)
    page = next((page for page in pages() if page.is_of(folder)), None)
    if page is None:
        known = ", ".join(f"{page.name}.json" for page in pages() if page.name != "index")
        raise BadInput(f"{folder} contains no record to render; expected one of {known}, or folders of them")
    target = folder / f"{page.name}.html"
    write_text(target, page.html(folder))
    return target
