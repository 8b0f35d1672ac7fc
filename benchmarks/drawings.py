"""Drawings of the package's pages as SVG files of their own, in the colours of the reader's theme."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from markupsafe import Markup

from unsleep.base import store
from unsleep.pages.css import VARIABLE, Rule, sheet
from unsleep.pages.pdf import drawings

MARGIN, TITLE, LEGEND, LETTER = 16, 30, 30, 7.4
"""Space around and between drawings, heights of titles and of a legend, and width of a legend's letter, in pixels."""

OWN = (
    "text { font-family: system-ui, -apple-system, 'Segoe UI', sans-serif; font-variant-numeric: tabular-nums; }",
    ".paper { fill: var(--card); }",
    ".title { fill: var(--ink); font-size: 13px; font-weight: 600; }",
    ".legend { fill: var(--muted); font-size: 12px; }",
)


def save(path: Path, title: str, parts: Sequence[tuple[str, Markup]], columns: int = 1) -> None:
    """Write drawings, each under its title, as one SVG file, row by row."""
    root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria-label": title})
    paper = SubElement(root, "rect", {"class": "paper", "rx": "8"})
    width, top, row = 0.0, float(MARGIN), 0.0
    legends: list[Element] = []
    for number, (name, markup) in enumerate(parts):
        [drawing] = drawings(markup)
        if number % columns == 0:
            top, row, left = top + row, 0.0, float(MARGIN)
        if name:
            _text(root, "title", left, top + 14, name)
        w, h = drawing.box
        above = TITLE if name else 0
        place = {"x": _px(left), "y": _px(top + above), "width": _px(w), "height": _px(h)}
        SubElement(root, "svg", place).append(_still(drawing.svg))
        left += w + MARGIN
        width, row = max(width, left), max(row, above + h + MARGIN)
        legends += [each for each in drawing.legends if not legends]
    height = top + row
    for legend in legends:
        _legend(root, legend, height)
        height += LEGEND
    root.set("viewBox", f"0 0 {width:.0f} {height:.0f}")
    root.set("width", f"{width:.0f}")
    paper.attrib |= {"width": f"{width:.0f}", "height": f"{height:.0f}"}
    style = Element("style")
    style.text = _style(root)
    root.insert(0, style)
    ElementTree.indent(root, " ")
    path.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(path, ElementTree.tostring(root, encoding="unicode") + "\n")


def _px(value: float) -> str:
    return f"{value:.1f}"


def _text(root: Element, kind: str, x: float, y: float, words: str) -> None:
    SubElement(root, "text", {"class": kind, "x": _px(x), "y": _px(y)}).text = words


def _still(svg: Element) -> Element:
    """A drawing without links, which an image cannot follow."""
    for element in svg.iter("a"):
        element.tag = "g"
        element.attrib.clear()
    return svg


def _legend(root: Element, legend: Element, top: float) -> None:
    """The marks of a legend and what they mean, in one line."""
    at = float(MARGIN)
    for entry in legend:
        for mark in entry.iter("svg"):
            mark.attrib |= {"x": _px(at), "y": _px(top)}
            root.append(mark)
            at += 20
        words = " ".join("".join(entry.itertext()).split())
        _text(root, "legend", at, top + 12.5, words)
        at += LETTER * len(words) + 20


def _style(root: Element) -> str:
    """The rules of the pages' style sheets that apply to a drawing, and the variables that they use."""
    paths, known = list(_paths([root])), sheet()
    rules = [_written(rule) for rule in known.rules if any(rule.fits(path) for path in paths)]
    named: dict[str, str] = {}
    wanted = [name for rule in (*OWN, *rules) for name in VARIABLE.findall(rule)]
    while wanted:
        name = wanted.pop(0)
        if name not in named:
            named[name] = known.variables[name]
            wanted += VARIABLE.findall(named[name])
    values = "".join(f" {name}: {value};" for name, value in sorted(named.items()))
    return "\n".join(["", f":root {{ color-scheme: light dark;{values} }}", *OWN, *rules, ""])


def _written(rule: Rule) -> str:
    head = " ".join(part.tag + "".join(f".{name}" for name in sorted(part.classes)) for part in rule.chain)
    return f"{head} {{ {' '.join(f'{name}: {value};' for name, value in rule.values.items())} }}"


def _paths(path: list[Element]) -> Iterator[list[Element]]:
    """Every element with its ancestors."""
    yield path
    for child in path[-1]:
        yield from _paths([*path, child])
