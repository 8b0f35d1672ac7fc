"""Renders a record as one self-contained HTML file: no requests, readable without scripts.

report.json -> check -> make text visible -> view of each section -> page.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unsleep.base.records import save
from unsleep.base.store import write_text
from unsleep.core import BadInput
from unsleep.pages import latex as papers
from unsleep.pages.registry import Page, pages

__all__ = ["report"]


def report(folder: str | Path, record: Any = None, *, latex: bool = False) -> Path:
    """Render the record in a folder to the page beside it: `report.json` to `report.html`, or another page's.

    Args:
        record: written into the folder first, as JSON under its page's name.
        latex: also write `latex/paper.tex` with tables and figures, which `results/` beside it holds.

    The page is written atomically; returns its path. Raises `BadInput` naming the file and the key where the
    record is missing, damaged or of another schema, and where `latex` needs a library that is not installed.
    """
    folder = Path(folder)
    if record is not None:
        page = _page_of(record)
        save(record, folder / f"{page.name}.json")
    else:
        page = next((page for page in pages() if page.is_of(folder)), None)
    if page is None:
        known = ", ".join(f"{page.name}.json" for page in pages() if page.name != "index")
        raise BadInput(f"{folder} contains no record to render; expected one of {known}, or folders of them")
    target = folder / page.file
    write_text(target, page.html(folder))
    if latex:
        papers.write(page, folder)
    return target


def _page_of(record: Any) -> Page:
    found = next((page for page in pages() if page.record is type(record)), None)
    if found is None:
        known = ", ".join(page.record.__name__ for page in pages() if page.record is not None)
        raise BadInput(f"a {type(record).__name__} has no page; expected one of {known}")
    return found
