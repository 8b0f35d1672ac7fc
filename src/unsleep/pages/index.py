"""Index page of a folder of runs: a link to each page below it, with title, kind, date and verdict.

*/report.json, */patch.json, … -> their pages -> index.html
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import quote

from unsleep.base import store
from unsleep.core import BadInput
from unsleep.pages import text
from unsleep.pages.page import LABEL_LIMIT, fill, templates
from unsleep.pages.registry import Page, pages

TEMPLATE = """{% extends "base.html" %}
{% block main %}
<section id="summary" class="hero">
  <p class="eyebrow">Runs</p>
  <h1 class="text">{{ title }}</h1>
  <div class="scroll tall" tabindex="0" role="region" aria-label="Runs"><table class="grid">
    <thead><tr>{% for name in head %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
    <tbody>{% for run in runs %}<tr><th scope="row" class="text"><a href="{{ run.link }}">{{ run.title }}</a></th>
      {% for cell in run[2:] %}<td class="text">{{ cell }}</td>{% endfor %}</tr>
    {% endfor %}</tbody>
  </table></div>
</section>
{% endblock %}
"""


class Run(NamedTuple):
    """A page below the folder."""

    link: str
    title: str
    kind: str
    folder: str
    date: str
    verdict: str


@dataclass(frozen=True)
class Index(Page):
    """The page of a folder without a record of its own, but with runs below it."""

    def is_of(self, folder: Path) -> bool:
        """True if there is a page below the folder."""
        return next(found(folder), None) is not None

    def html(self, folder: Path) -> str:
        """The page; an unreadable record gets a bare link."""
        runs = sorted(
            (run_of(page, place, folder) for page, place in found(folder)), key=lambda r: r.date, reverse=True
        )
        head = ("Page", "Kind", "Folder", "Date", "Verdict")
        view = {"title": text.clip(text.visible(folder.resolve().name), LABEL_LIMIT), "runs": runs, "head": head}
        return fill(templates().from_string(TEMPLATE), "summary", {**view, "sections": []}, "page.css")


def found(folder: Path) -> Iterator[tuple[Page, Path]]:
    """Every record below the folder with a page beside it, sorted by name, without hidden folders."""
    for page in (page for page in pages() if not isinstance(page, Index)):
        for place in sorted(folder.rglob(f"{page.name}.json")):
            inside = place.relative_to(folder)
            if place.with_name(page.file).is_file() and not any(part.startswith(".") for part in inside.parts):
                yield page, place


def run_of(page: Page, place: Path, folder: Path) -> Run:
    """A record's row."""
    try:
        record = store.read_json(place)
    except BadInput:
        record = None
    drawn = place.with_name(page.file)
    link = drawn.relative_to(folder)
    created = at(record, "provenance", "created") or at(record, "result", "provenance", "created")
    said = (title_of(drawn), page.kind, str(link.parent), created[:10], label_of(record))
    return Run(quote(link.as_posix()), *(text.clip(text.visible(word), LABEL_LIMIT) for word in said))


def label_of(record: Any) -> str:
    """The verdict of a report or an audit; empty for other records."""
    return at(record, "result", "verdict", "label") or at(record, "verdict", "label")


def at(value: Any, *keys: str) -> str:
    """Text at a path of keys, empty where absent."""
    for key in keys:
        value = cast("Mapping[str, Any]", value).get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else ""


class Title(HTMLParser):
    """Parser of a page's title."""

    title, inside = "", False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Start at the head's title."""
        self.inside = tag == "title" and not self.title

    def handle_data(self, data: str) -> None:
        """Collect its text."""
        self.title += data if self.inside else ""

    def handle_endtag(self, tag: str) -> None:
        """Stop at its end."""
        self.inside = False


def title_of(page: Path) -> str:
    """A page's title, or its file name."""
    parser = Title()
    with page.open(encoding="utf-8", errors="replace") as file:
        parser.feed(file.read(10_000))
    return parser.title.removesuffix(" · unsleep report").strip() or page.name


index = Index("index", "Runs", None, str, order=1)
