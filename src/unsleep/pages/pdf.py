"""Drawings of the pages as PDF: vector, fonts embedded, one drawing a file. Needs reportlab.

The pages' SVG is a small dialect (`svg.el`), so that it is painted here on reportlab's canvas: lines, rectangles,
circles, paths, text, nested viewports in percent, transforms, and the colours of the style sheets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from markupsafe import Markup

from unsleep.base import store
from unsleep.core import BadInput
from unsleep.pages.blocks import Table
from unsleep.pages.css import INHERITED, Style, colour, sheet
from unsleep.pages.text import Number

POINTS = 0.75
"""Points per CSS pixel."""

LEGENDS = {"legend-line", "heat-legend", "legend"}
"""Classes of lines that explain a drawing's marks."""

LINE, GAP = 18.0, 10.0
"""Height of a legend's line and space between its entries, in pixels."""

NUMBER = re.compile(r"[A-Za-z]|[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")

SPELLED = {"→": "->", "←": "<-", "‖": "|", "Δ": "∆", "↵": "\\n", "⇥": "\\t", "✓": "met", "✗": "not met"}
"""Characters that the font lacks → how they are written."""

Box = tuple[float, float]
"""Width and height of a viewport, in pixels."""


class Drawing(NamedTuple):
    """A drawing found in a page's markup."""

    caption: str
    svg: Element
    legends: tuple[Element, ...]

    @property
    def box(self) -> Box:
        """Size of its own view box."""
        _, _, width, height = _view_box(self.svg)
        return width, height


def check() -> None:
    """Raise `BadInput` where reportlab is not installed."""
    try:
        import_module("reportlab.pdfgen.canvas")
    except ImportError:
        raise BadInput(
            "figures are drawn with reportlab, which is not installed; pip install 'unsleep[latex]'"
        ) from None


def drawings(markup: Markup) -> list[Drawing]:
    """The drawings of some markup, outermost ones only, with its caption and legends."""
    root = _parsed(markup)
    legends = tuple(e for e in root.iter() if set((e.get("class") or "").split()) & LEGENDS)
    caption = next((" ".join("".join(e.itertext()).split()) for e in root.iter("figcaption")), "")
    return [Drawing(caption or found.findtext("title", ""), found, legends) for found in _outermost(root)]


def tables(markup: Markup) -> list[Table]:
    """The tables of some markup, such as that below a heat map, under its caption."""
    root = _parsed(markup)
    caption = next(("".join(e.itertext()) for e in root.iter("figcaption")), "")
    found: list[Table] = []
    for table in root.iter("table"):
        head, *rows = [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
        found.append(Table(caption, head, 1, rows))
    return found


def save(drawing: Drawing, path: Path) -> None:
    """Write a drawing as a PDF of one page, its legend below it; equal drawings give equal files."""
    check()
    probe = Painter(_canvas(BytesIO()))
    width, height = drawing.box
    width = max([width, *(probe.line(legend, 0.0) for legend in drawing.legends)])
    whole = height + LINE * len(drawing.legends)
    with store.writing(path):
        canvas = _canvas(str(path), pagesize=(POINTS * width, POINTS * whole), invariant=1, pageCompression=1)
        canvas.setTitle(drawing.caption)
        canvas.setCreator("unsleep")
        painter = Painter(canvas)
        canvas.transform(POINTS, 0, 0, -POINTS, 0, POINTS * whole)
        painter.paint([drawing.svg], INHERITED, drawing.box)
        for i, legend in enumerate(drawing.legends):
            painter.line(legend, height + LINE * i)
        canvas.save()


def _canvas(target: Any, **options: Any) -> Any:
    """A canvas that names no font but its own, which is embedded."""
    return import_module("reportlab.pdfgen.canvas").Canvas(target, initialFontName=fonts()[0], **options)


def _parsed(markup: Markup) -> Element:
    return ElementTree.fromstring(f"<div>{markup}</div>")


def _outermost(element: Element) -> Iterator[Element]:
    for child in element:
        if child.tag == "svg" and child.get("role") == "img":
            yield child
        else:
            yield from _outermost(child)


def _view_box(svg: Element) -> tuple[float, float, float, float]:
    left, top, width, height = map(float, (svg.get("viewBox") or "0 0 300 150").split())
    return left, top, width, height


@cache
def fonts() -> tuple[str, str]:
    """Regular and bold face, of reportlab's own, registered once."""
    metrics, faces = _font_modules()
    for name in ("Vera", "VeraBd"):
        metrics.registerFont(faces.TTFont(name, f"{name}.ttf"))
    return "Vera", "VeraBd"


def _font_modules() -> tuple[Any, Any]:
    return import_module("reportlab.pdfbase.pdfmetrics"), import_module("reportlab.pdfbase.ttfonts")


def spelled(text: str) -> str:
    """Text in characters that the font has; any other is written as its number."""
    known = _font_modules()[0].getFont(fonts()[0]).face.charToGlyph
    return "".join(c if ord(c) in known else SPELLED.get(c, f"[U+{ord(c):04X}]") for c in text)


class Painter:
    """Paints elements onto a canvas whose y axis points down."""

    def __init__(self, canvas: Any) -> None:
        self.canvas = canvas

    def paint(self, path: Sequence[Element], parent: Style, box: Box) -> None:
        """Paint the last element of a path from the root, and what is in it."""
        element = path[-1]
        style = sheet().style(path, parent)
        opacity = float(parent.get("whole-opacity", "1")) * float(style["opacity"])
        style["whole-opacity"] = str(opacity)
        self.canvas.saveState()
        self._transform(element.get("transform") or "")
        if element.tag == "svg":
            self._viewport(path, style, box)
        elif element.tag in ("g", "a"):
            self._children(path, style, box)
        elif element.tag == "text":
            self._text(element, style, box)
        elif element.tag in ("line", "rect", "circle", "path"):
            self._shape(element, style, box)
        elif element.tag not in ("title", "desc"):
            raise BadInput(f"a drawing has a <{element.tag}>, which has no PDF; expected shapes and text")
        self.canvas.restoreState()

    def line(self, legend: Element, top: float) -> float:
        """Paint a legend's marks and words in one line, and return where it ends."""
        style = sheet().style([legend], INHERITED) | {"font-size": "11px", "fill": "#59626b", "whole-opacity": "1"}
        at = 4.0
        for part in legend.iter():
            if part.tag == "svg":
                width, height = float(part.get("width") or 16), float(part.get("height") or 16)
                self.canvas.saveState()
                self.canvas.translate(at, top + (LINE - height) / 2)
                self.paint([legend, part], style, (width, height))
                self.canvas.restoreState()
                at += width + 3
            for words in (part.text if part.tag != "svg" else None, part.tail if part is not legend else None):
                if words and words.strip():
                    at += self._words(words.strip(), at, top + LINE / 2 + 4, style) + GAP
        return at

    def _children(self, path: Sequence[Element], style: Style, box: Box) -> None:
        for child in path[-1]:
            self.paint([*path, child], style, box)

    def _viewport(self, path: Sequence[Element], style: Style, box: Box) -> None:
        svg = path[-1]
        own = _length(svg.get("width", "100%"), box[0]), _length(svg.get("height", "100%"), box[1])
        if len(path) == 1:
            own = box
        self.canvas.translate(_length(svg.get("x", "0"), box[0]), _length(svg.get("y", "0"), box[1]))
        if svg.get("viewBox"):
            left, top, width, height = _view_box(svg)
            scale = min(own[0] / width, own[1] / height)
            self.canvas.translate((own[0] - scale * width) / 2, (own[1] - scale * height) / 2)
            self.canvas.scale(scale, scale)
            self.canvas.translate(-left, -top)
            own = width, height
        self._children(path, style, own)

    def _transform(self, text: str) -> None:
        for name, inside in re.findall(r"(\w+)\(([^)]*)\)", text):
            values = [float(v) for v in re.split(r"[\s,]+", inside.strip())]
            if name == "translate":
                self.canvas.translate(values[0], values[1] if len(values) > 1 else 0)
            elif name == "scale":
                self.canvas.scale(values[0], values[-1])
            elif name == "rotate":
                x, y = values[1:] if len(values) == 3 else (0.0, 0.0)
                self.canvas.translate(x, y)
                self.canvas.rotate(values[0])
                self.canvas.translate(-x, -y)
            else:
                raise BadInput(f"a drawing has the transform {name!r}; expected translate, scale or rotate")

    def _shape(self, element: Element, style: Style, box: Box) -> None:
        fill, stroke = (colour(style[key], style["color"]) for key in ("fill", "stroke"))
        if element.tag == "line":
            fill = None
        for paint, key in ((fill, "Fill"), (stroke, "Stroke")):
            if paint is not None:
                alpha = float(style["whole-opacity"]) * float(style[f"{key.lower()}-opacity"])
                getattr(self.canvas, f"set{key}ColorRGB")(*paint)
                getattr(self.canvas, f"set{key}Alpha")(alpha)
        self.canvas.setLineWidth(_length(style["stroke-width"], 1))
        self.canvas.setLineCap(("butt", "round", "square").index(style["stroke-linecap"]))
        self.canvas.setLineJoin(("miter", "round", "bevel").index(style["stroke-linejoin"]))
        if style["stroke-dasharray"] != "none":
            self.canvas.setDash([float(v) for v in re.split(r"[\s,]+", style["stroke-dasharray"])])
        path = self.canvas.beginPath()
        outline(path, element, box)
        self.canvas.drawPath(path, stroke=int(stroke is not None), fill=int(fill is not None))

    def _text(self, element: Element, style: Style, box: Box) -> None:
        x, y = _length(element.get("x", "0"), box[0]), _length(element.get("y", "0"), box[1])
        words = " ".join("".join(element.itertext()).split())
        self._words(words, x, y, style)

    def _words(self, words: str, x: float, y: float, style: Style) -> float:
        """Draw text and return its width."""
        paint = colour(style["fill"], style["color"])
        font = fonts()[int(float(style["font-weight"]) >= 600)]
        size = _length(style["font-size"], 16)
        shown = spelled(words)
        width = float(self.canvas.stringWidth(shown, font, size))
        if paint is None:
            return width
        x -= {"start": 0.0, "middle": 0.5, "end": 1.0}[style["text-anchor"]] * width
        self.canvas.saveState()
        self.canvas.translate(x, y)
        self.canvas.scale(1, -1)
        self.canvas.setFont(font, size)
        self.canvas.setFillColorRGB(*paint)
        self.canvas.setFillAlpha(float(style["whole-opacity"]))
        self.canvas.drawString(0, 0, shown)
        self.canvas.restoreState()
        return width


def _length(value: str, whole: Number) -> float:
    """A length in pixels; a percentage is of `whole`."""
    if value.endswith("%"):
        return float(value[:-1]) / 100 * whole
    return float(value.removesuffix("px"))


def outline(path: Any, element: Element, box: Box) -> None:
    """The outline of a shape, drawn into a path of the canvas."""

    def at(name: str, axis: int = 0) -> float:
        return _length(element.get(name, "0"), box[axis])

    if element.tag == "line":
        path.moveTo(at("x1"), at("y1", 1))
        path.lineTo(at("x2"), at("y2", 1))
    elif element.tag == "rect":
        path.rect(at("x"), at("y", 1), at("width"), at("height", 1))
    elif element.tag == "circle":
        path.circle(at("cx"), at("cy", 1), at("r"))
    else:
        Pen(path).follow(element.get("d") or "")


class Pen:
    """Follows the path data of SVG."""

    COUNTS: ClassVar = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "A": 7, "Z": 0}
    """Command → number of its values."""

    def __init__(self, path: Any) -> None:
        self.path = path
        self.x = self.y = 0.0
        self.start = (0.0, 0.0)

    def follow(self, data: str) -> None:
        """Draw path data."""
        tokens = NUMBER.findall(data)
        i, command = 0, ""
        while i < len(tokens):
            if tokens[i].isalpha():
                command, i = tokens[i], i + 1
            if command.upper() not in self.COUNTS:
                raise BadInput(f"a drawing's path has the command {command!r}; expected one of M, L, H, V, C, A, Z")
            count = self.COUNTS[command.upper()]
            self._step(command, [float(v) for v in tokens[i : i + count]])
            i += count
            if command in "Mm":
                command = "L" if command == "M" else "l"

    def _step(self, command: str, values: Sequence[float]) -> None:
        dx, dy = (self.x, self.y) if command.islower() else (0.0, 0.0)
        kind = command.upper()
        if kind == "Z":
            self.path.close()
            self.x, self.y = self.start
        elif kind == "C":
            a, b, c, d, e, f = values
            self.path.curveTo(dx + a, dy + b, dx + c, dy + d, dx + e, dy + f)
            self.x, self.y = dx + e, dy + f
        elif kind == "A":
            rx, _, _, large, sweep, x, y = values
            self._arc(rx, bool(large), bool(sweep), dx + x, dy + y)
        else:
            x = dx + values[0] if kind in "MLH" else self.x
            y = dy + values[-1] if kind in "MLV" else self.y
            (self.path.moveTo if kind == "M" else self.path.lineTo)(x, y)
            self.x, self.y = x, y
            if kind == "M":
                self.start = x, y

    def _arc(self, radius: float, large: bool, sweep: bool, x: float, y: float) -> None:
        """A circular arc as cubic curves, at most a quarter of a turn each."""
        half = math.hypot(x - self.x, y - self.y) / 2
        radius = max(radius, half)
        depth = math.sqrt(radius**2 - half**2) * (1 if large != sweep else -1) / (2 * half or 1.0)
        cx = (self.x + x) / 2 + depth * (self.y - y)
        cy = (self.y + y) / 2 - depth * (self.x - x)
        first, last = math.atan2(self.y - cy, self.x - cx), math.atan2(y - cy, x - cx)
        turn = (last - first) % (2 * math.pi) if sweep else -((first - last) % (2 * math.pi))
        pieces = max(1, math.ceil(abs(turn) / (math.pi / 2) - 1e-9))
        each = turn / pieces
        reach = radius * 4 / 3 * math.tan(each / 4)
        for k in range(pieces):
            a, b = first + k * each, first + (k + 1) * each
            ends = [(cx + radius * math.cos(t), cy + radius * math.sin(t)) for t in (a, b)]
            self.path.curveTo(
                ends[0][0] - reach * math.sin(a),
                ends[0][1] + reach * math.cos(a),
                ends[1][0] + reach * math.sin(b),
                ends[1][1] - reach * math.cos(b),
                *ends[1],
            )
        self.x, self.y = x, y
