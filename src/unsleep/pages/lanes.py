"""Lanes: one row per figure, with its name, its interval around a mark, and the value as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from unsleep.pages import svg
from unsleep.pages.svg import el

WIDE, LEFT, RIGHT, TOP, LANE, BOTTOM = 560, 128, 168, 8, 30, 26
"""Width of a drawing, its margins and the height of a lane, in SVG units."""

LETTER, PLOT = 6.4, 150
"""Width of a letter of the values, and of the axis at least."""


class Lane(NamedTuple):
    """A figure with its interval."""

    label: str
    value: float
    low: float
    high: float
    said: str
    """The value as text."""
    shape: str
    """Mark (`svg.MARK_PATHS`)."""
    colour: str
    """Colour class without its `c-`."""
    draws: Sequence[float] = ()
    """Small dots, such as random draws."""


def lanes(
    rows: Sequence[Lane], *, title: str, name: str, tick: Callable[[float], str], left: int = LEFT, right: int = RIGHT
) -> Markup:
    """Lanes on one axis that holds 0; `name` must be unique on the page, `tick` writes a value of the axis.

    The right margin grows with the longest value.
    """
    right = max(right, math.ceil(10 + LETTER * max((len(row.said) for row in rows), default=0)))
    wide = max(WIDE, left + right + PLOT)
    height = TOP + LANE * len(rows)
    ends = [end for row in rows for end in (row.low, row.high)]
    low, high = svg.spread([0.0, *ends, *(d for row in rows for d in row.draws)], zero=False)

    def x(value: float) -> float:
        return left + (wide - left - right) * (value - low) / (high - low)

    parts: list[Markup] = []
    marks = svg.ticks(low, high, 3)
    for mark in marks if len(marks) > 2 else svg.ticks(low, high, 6):
        parts.append(el("line", x1=x(mark), x2=x(mark), y1=TOP, y2=height, class_="grid"))
        label = tick(mark) if abs(mark) > 1e-9 else "0"
        parts.append(el("text", label, x=x(mark), y=height + 16, text_anchor="middle"))
    parts.append(el("line", x1=x(0.0), x2=x(0.0), y1=TOP, y2=height, class_="zero"))
    parts += [lane(row, TOP + LANE * (i + 0.5), x, wide - right, wide) for i, row in enumerate(rows)]
    said = "; ".join(f"{row.label}: {row.said}" for row in rows)
    return svg.figure(title, said, name, *parts, viewBox=f"0 0 {wide} {height + BOTTOM}", class_="lanes")


def lane(row: Lane, y: float, x: Callable[[float], float], end: int, wide: int) -> Markup:
    """One row: name, dots, whisker, mark and value."""
    a, b = x(row.low), x(row.high)
    return el(
        "g",
        el("title", f"{row.label}: {row.said}"),
        el("rect", x=0, y=y - LANE / 2, width=wide, height=LANE, class_="hit"),
        el("text", row.label, x=0, y=y + 4, class_="name"),
        *(el("circle", cx=x(d), cy=y, r=2.2, class_=f"draw c-{row.colour}") for d in row.draws),
        el(
            "path",
            d=f"M{a:.1f} {y:.1f}H{b:.1f}M{a:.1f} {y - 4:.1f}v8M{b:.1f} {y - 4:.1f}v8",
            class_=f"whisker c-{row.colour}",
        ),
        svg.mark(row.shape, row.colour, x(row.value), y),
        el("text", row.said, x=end + 10, y=y + 4, class_="p"),
        class_="lane",
    )
