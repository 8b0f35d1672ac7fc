"""A sample report, hostile text, and what a browser would find in a page."""

from __future__ import annotations

import copy
import json
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

from unsleep.pages.page import render

SAMPLE: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "report.json").read_text(encoding="utf-8"))
SCHEMA = json.loads(files("unsleep.pages").joinpath("result.schema.json").read_text(encoding="utf-8"))

HOSTILE = (
    "</style></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'><svg onload=alert(1)><!--"
    "{{ 7 * 7 }}{% raw %}&lt;b&gt;&#60;\x00\x1b[31m\x07\x7f\x9b\u202e\u2066\u200b\ufeff\ud800\U000e0041"
    "../../../etc/passwd\r\n\u2028javascript:alert(1) url(http://x.test)e" + "\u0301" * 6 + "W" * 500
)


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.prose: list[str] = []
        self.blocks: dict[str, str] = {}
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment got into the page: {data[:80]!r}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            self.blocks[self.open[-1]] = data
        # Labels of axes are "0 %" by right.
        elif self.open and self.open[-1] != "text":
            self.prose.append(data)

    @property
    def shapes(self) -> Counter[tuple[str, ...]]:
        return Counter((tag, *sorted(attrs)) for tag, attrs in self.elements)

    @property
    def anchors(self) -> set[str]:
        return {attrs["id"] or "" for tag, attrs in self.elements if tag == "section"}


@cache
def clean() -> Page:
    """The page of the sample as it is."""
    return Page(render(SAMPLE))


def sample(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(SAMPLE), **changes}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The sample with the value at a dotted path replaced."""
    found = sample()
    at: Any = found
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    for step in steps:
        at = at[step]
    at[last] = value
    return found
