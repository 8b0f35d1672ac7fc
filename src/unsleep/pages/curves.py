"""Line charts as inline SVG, with non-overlapping labels at the curves' ends.

Many curves are spread over several charts with equal axes, each with the other charts' curves in grey.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup

from unsleep.pages import svg, text
from unsleep.pages.svg import el
from unsleep.pages.text import Number

SHADES = 11
"""Steps of a colour scale, from shallow to deep layers."""

LEFT, RIGHT, TOP, BOTTOM = 46, 74, 14, 44
"""Plot margins in SVG units; the right one holds the labels and grows with them."""

LETTER = 7.4
"""Approximate width of a label's letter."""

HEIGHT = 280
"""Height of a chart."""

WIDE, NARROW = 460, 356
"""Width of a chart, alone or beside one other, and among more."""

GAP = 13.0
"""Minimum distance of labels."""

MOST = 12
"""Maximum labelled curves per chart."""

CROWD = 32
"""Number of points of a curve above which marks are drawn smaller."""

DIGITS = (1, 2, 5)
"""Leading digits of ticks on a logarithmic axis."""


class Dot(NamedTuple):
    """One measured point."""

    x: float
    y: float
    said: str
    """Tooltip text."""
    shape: str = "circle"
    span: tuple[float, float] | None = None
    """Estimate of y, drawn as a bar."""


class Curve(NamedTuple):
    """A line through `path`, with `dots` on it or beside it."""

    label: str
    colour: str
    """Colour class: `shade-0` … `shade-10` or a subject's."""
    path: tuple[Dot, ...]
    """Points of the line, sorted by x."""
    dots: tuple[Dot, ...]


class Axis(NamedTuple):
    """A scale from `low` to `high`."""

    low: float
    high: float
    marks: tuple[float, ...]
    name: str
    is_log: bool = False

    def share(self, value: Number) -> float:
        """Position of a value on the axis, from 0 to 1."""
        if self.is_log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axis(values: Sequence[float], name: str, *, log: bool = False, zero: bool = True) -> Axis:
    """An axis for all values: logarithmic on request where they span enough, otherwise from 0 unless `zero` is False.

    A few well-separated values become the ticks.
    """
    least, most = min(values), max(values)
    if log and least > 0 and most / least >= 2.5:
        low, high = least / 1.15, most * 1.15
        own = sorted({round(v) for v in values})
        if len(own) <= 7 and own[0] > 0 and all(b / a > 1.3 for a, b in pairwise(own)):
            return Axis(low, high, tuple(map(float, own)), f"{name} (log)", is_log=True)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [digit * 10.0**power for power in powers for digit in DIGITS]
        return Axis(low, high, tuple(m for m in marks if low <= m <= high), f"{name} (log)", is_log=True)
    low, high = svg.spread(values, zero=zero)
    return Axis(low, high, tuple(svg.ticks(low, high)), name)


def whole_axis(values: Sequence[int], name: str) -> Axis:
    """An axis of integers, such as layers."""
    low, high = min(values), max(values)
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100) if (high - low) / s <= 12), 200)
    room = max(0.4, 0.03 * (high - low))
    first = -(-low // step) * step
    return Axis(low - room, high + room, tuple(float(m) for m in range(first, high + 1, step)), name)


def charts(curves: Sequence[Curve], x: Axis, y: Axis, *, title: str, name: str, width: int) -> list[Markup]:
    """Curves in as few charts as their labels allow; `name` must be unique on the page."""
    count = math.ceil(len(curves) / MOST)
    size = math.ceil(len(curves) / max(1, count))
    return [
        chart(
            curves[i : i + size],
            [*curves[:i], *curves[i + size :]],
            (x, y),
            title=title,
            name=f"{name}-{i // size}",
            width=width,
        )
        for i in range(0, len(curves), max(1, size))
    ]


def chart(
    curves: Sequence[Curve], others: Sequence[Curve], axes: tuple[Axis, Axis], *, title: str, name: str, width: int
) -> Markup:
    """A chart of labelled curves, with others as grey lines behind them."""
    x, y = axes
    end = width - round(max(RIGHT, 16 + LETTER * max(len(curve.label) for curve in curves)))

    def place(one: Dot) -> tuple[float, float]:
        return (
            LEFT + (end - LEFT) * x.share(one.x),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y.share(one.y),
        )

    parts = frame(x, y, end)
    behind = "".join(path([place(d) for d in curve.path]) for curve in others)
    if behind:
        parts.append(el("path", d=behind, class_="behind"))
    for curve in curves:
        if len(curve.path) > 1:
            line = path([place(d) for d in curve.path])
            parts.append(el("path", el("title", curve.label), d=line, class_=f"curve {curve.colour}"))
    for curve in curves:
        for one in (d for d in curve.dots if d.span):
            low, high = (place(one._replace(y=end)) for end in one.span or ())
            bar = f"M{low[0]:.1f} {low[1]:.1f}V{high[1]:.1f}"
            parts.append(el("path", d=bar, class_=f"span {curve.colour}"))
    size = 0.6 if max(len(curve.dots) for curve in curves) <= CROWD else 0.4
    for curve in curves:
        parts += [dot(d, place(d), curve.colour, size, beaten=d not in curve.path) for d in curve.dots]
    ends = [place(curve.path[-1]) for curve in curves]
    heights = apart([b for _, b in ends], GAP, TOP, HEIGHT - BOTTOM)
    for curve, last, height in zip(curves, ends, heights, strict=True):
        parts += label(curve, last, (float(end + 14), height))
    said = "; ".join(f"{curve.label}: {', '.join(d.said for d in curve.dots)}" for curve in curves)
    return svg.figure(title, said, name, *parts, viewBox=f"0 0 {width} {HEIGHT}", class_="curves")


def path(places: Sequence[tuple[float, float]]) -> str:
    """SVG path through points."""
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)


def apart(wanted: Sequence[float], gap: Number, low: Number, high: Number) -> list[float]:
    """Positions closest to the wanted ones with at least `gap` between any two and within both ends, in the same order.

    Labels that would touch form a block, placed at the mean of its members' wanted positions.
    """
    blocks: list[tuple[float, int]] = []  # sum of the wanted first positions; members
    for place in sorted(wanted):
        total, count = place, 1
        while blocks and blocks[-1][0] / blocks[-1][1] + gap * blocks[-1][1] > total / count:
            before, members = blocks.pop()
            total, count = before + total - gap * members * count, members + count
        blocks.append((total, count))
    found: list[float] = []
    for total, count in blocks:
        found += [total / count + gap * i for i in range(count)]
    for i in range(len(found)):
        found[i] = max(found[i], low + gap * i)
    for i in reversed(range(len(found))):
        found[i] = min(found[i], high - gap * (len(found) - 1 - i))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = dict(zip(order, found, strict=True))
    return [places[i] for i in range(len(wanted))]


def frame(x: Axis, y: Axis, end: int) -> list[Markup]:
    """Grid lines, ticks and names of both axes."""
    floor = HEIGHT - BOTTOM
    out: list[Markup] = []
    for value in y.marks:
        at = floor - (floor - TOP) * y.share(value)
        out.append(el("line", x1=LEFT, x2=end, y1=at, y2=at, class_="base" if value == 0 else "grid"))
        out.append(el("text", text.number(value), x=LEFT - 7, y=at + 4, text_anchor="end"))
    if 0 not in y.marks:
        out.append(el("line", x1=LEFT, x2=end, y1=floor, y2=floor, class_="base"))
    for value in x.marks:
        at = LEFT + (end - LEFT) * x.share(value)
        out.append(el("line", x1=at, x2=at, y1=floor, y2=floor + 4, class_="tick"))
        out.append(el("text", text.number(value), x=at, y=floor + 17, text_anchor="middle"))
    middle = (TOP + floor) / 2
    turned = f"rotate(-90 11 {middle:.1f})"
    out.append(el("text", x.name, x=(LEFT + end) / 2, y=HEIGHT - 6, text_anchor="middle", class_="name"))
    out.append(el("text", y.name, x=11, y=middle, text_anchor="middle", transform=turned, class_="name"))
    return out


def dot(one: Dot, place: tuple[float, float], colour: str, size: float, *, beaten: bool) -> Markup:
    """A point with a tooltip and a larger hover area; hollow where it is off its curve."""
    shape = el("path", d=svg.MARK_PATHS[one.shape], transform=f"scale({size})", class_=f"mark {colour}")
    hit = el("circle", r=7, class_="hit")
    at = f"translate({place[0]:.1f} {place[1]:.1f})"
    kind = "lane beaten" if beaten else "lane"
    return el("g", el("title", one.said), hit, shape, transform=at, class_=kind)


def label(curve: Curve, end: tuple[float, float], place: tuple[float, float]) -> list[Markup]:
    """A curve's name in the right margin, connected to its end by a thin line."""
    leader = path([(end[0] + 5, end[1]), (place[0] - 3, place[1])])
    return [
        el("path", d=leader, class_=f"leader {curve.colour}"),
        el("text", curve.label, x=place[0], y=place[1] + 4, class_=f"label {curve.colour}"),
    ]


def pareto(dots: Sequence[Dot]) -> tuple[Dot, ...]:
    """Pareto frontier: the points that no other beats in both x and y, sorted by x, with falling y."""
    kept: list[Dot] = []
    for one in sorted(dots, key=lambda d: (d.x, d.y)):
        if not kept or one.y < kept[-1].y:
            kept.append(one)
    return tuple(kept)
