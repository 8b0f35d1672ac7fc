"""Inline SVG, built as escaped markup: elements, the subjects' marks, scales and ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from unsleep.pages.text import Number

MARK_PATHS = {
    "circle": "M-5.2 0a5.2 5.2 0 1 0 10.4 0a5.2 5.2 0 1 0 -10.4 0z",
    "diamond": "M0 -6.4L6.4 0L0 6.4L-6.4 0z",
    "square": "M-4.8 -4.8H4.8V4.8H-4.8z",
    "cross": "M-4.4 -4.4L4.4 4.4M4.4 -4.4L-4.4 4.4",
    "plus": "M-5.4 0H5.4M0 -5.4V5.4",
    "triangle": "M0 -5.8L5.8 4.6H-5.8z",
    "inverted": "M0 5.8L5.8 -4.6H-5.8z",
    "hexagon": "M-5.6 0L-2.8 -4.9H2.8L5.6 0L2.8 4.9H-2.8z",
    "left": "M-5.8 0L4.6 -5.8V5.8z",
    "right": "M5.8 0L-4.6 5.8V-5.8z",
    "bar": "M-6 -2.2H6V2.2H-6z",
    "post": "M-2.2 -6H2.2V6H-2.2z",
    "hourglass": "M-5 -5.4H5L-5 5.4H5z",
    "house": "M-4.8 5.2V-1.2L0 -6L4.8 -1.2V5.2z",
    "shield": "M-4.8 -5.2H4.8V1L0 6L-4.8 1z",
    "slope": "M-5.4 5.2L5.4 -5.2V5.2z",
    "step": "M-5.4 5.2V-5.2L5.4 5.2z",
    "gap": "M-5.6 -5H-1.4V5H-5.6zM1.4 -5H5.6V5H1.4z",
    "pair": "M-5.6 -4.6H5.6V-1H-5.6zM-5.6 1H5.6V4.6H-5.6z",
}
"""Outlines of the marks around their centre, in pixels."""

SUBJECT_MARKS = {
    "suspect": "circle",
    "edited": "diamond",
    "baked": "square",
    "control_random": "cross",
    "control_layer": "plus",
    "heads": "hexagon",
    "neurons": "hourglass",
    "attribution": "left",
    "direction": "right",
    "redistilled": "bar",
    "merged": "post",
    "keep_list": "shield",
    "finetuned": "slope",
    "layerwise": "pair",
    "magnitude": "gap",
    "activation": "step",
    "unlearned": "house",
    "clean_twin": "triangle",
    "base": "inverted",
}
"""Subject → shape, so that subjects are distinguishable without colour."""


def el(tag: str, *children: str, **attributes: str | Number | None) -> Markup:
    """An element with escaped attributes and children; `_` in an attribute's name stands for `-`.

    Attributes that are `None` are left out. Children that are not `Markup` are escaped.
    """
    given = {name.rstrip("_").replace("_", "-"): v for name, v in attributes.items() if v is not None}
    values = {name: f"{v:.2f}" if isinstance(v, float) else v for name, v in given.items()}
    head = "".join(f' {name}="{escape(value)}"' for name, value in values.items())
    inner = "".join(escape(child) for child in children)
    return Markup(f"<{tag}{head}>{inner}</{tag}>")


def mark(shape: str, name: str, x: str | Number = 0, y: str | Number = 0) -> Markup:
    """A mark at a position, in the colour of class `c-name`; percentages are allowed."""
    path = el("path", d=MARK_PATHS[shape], class_=f"mark c-{name}")
    return el("svg", path, x=x, y=y, width=1, height=1, class_="at")


def key(shape: str, name: str) -> Markup:
    """A standalone mark for legends."""
    path = el("path", d=MARK_PATHS[shape], class_=f"mark c-{name}")
    return el("svg", path, viewBox="-8 -8 16 16", width=16, height=16, class_="key", aria_hidden="true")


def figure(title: str, description: str, name: str, *children: str, **attributes: str | Number | None) -> Markup:
    """An SVG with accessible title and description; `name` must be unique on the page."""
    head = (el("title", title, id=f"{name}-t"), el("desc", description, id=f"{name}-d"))
    return el("svg", *head, *children, role="img", aria_labelledby=f"{name}-t {name}-d", **attributes)


def captioned(title: str, *parts: str) -> Markup:
    """Drawings under their title."""
    return el("figure", el("figcaption", el("b", title)), *parts)


def ticks(low: Number, high: Number, about: int = 4) -> list[float]:
    """Round numbers that cover `low` to `high`, about `about` of them."""
    rough = (high - low) / about
    if not rough > 0:
        return [float(low)]
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first
    return [(first + i) * step for i in range(count + 1)]


def symlog(x: Number) -> float:
    """Symmetric log scale: linear near 0, logarithmic above."""
    return math.log10(1 + x)


def spread(values: Sequence[Number], *, zero: bool) -> tuple[float, float]:
    """Ends of an axis for all values with some margin, and 0 on request."""
    low, high = float(min(values)), float(max(values))
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        room = 0.05 * abs(high) or 1.0
        return (low - room if low < 0 or not zero else 0.0), high + room
    room = 0.06 * (high - low)
    return (low if zero and low == 0 else low - room), (high if zero and high == 0 else high + room)
