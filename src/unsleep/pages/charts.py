"""The report's charts as inline SVG: interval dots, the frontier and the time bars.

Charts with marks in lanes are drawn in percentages, so that they stretch with the page while
their text, which is HTML beside them, keeps its size. The frontier has a fixed view box.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from unsleep.judge.results import CURES, OTHERS, SHARES
from unsleep.pages import svg, text
from unsleep.pages.svg import el

JOURNEY = ("suspect", "edited", "baked")
"""Stages of one model, joined by a line."""

CONTROLS = ("control_random", "control_layer")
"""Control subjects."""

SERIES_MARKS = {
    "learned mask": ("diamond", "edited"),
    "ranked ablation": ("triangle", "ranked"),
    "random features": ("cross", "control_random"),
}
"""Series of the frontier → shape and colour class."""

SPARE_MARKS = (("triangle", "clean_twin"), ("plus", "control_layer"), ("circle", "suspect"), ("inverted", "base"))
"""Marks for other series, in order of appearance."""


@dataclass(frozen=True)
class Lane:
    """One subject's lane in an interval chart."""

    subject: str
    name: str
    key: Markup
    head: str
    tail: str
    group: bool
    """True at the first lane of another kind of subject."""


@dataclass(frozen=True)
class Facet:
    """Estimate chart of one panel and metric: names, a dot plot with whiskers, and formatted values."""

    panel: str
    metric: str
    better: str
    """`lower is better` or `higher is better`; empty for neither."""
    lanes: tuple[Lane, ...]
    plot: Markup
    axis: Markup


def words(row: Mapping[str, Any]) -> text.Rate:
    """A row's formatted value: a rate with its n, or nats."""
    if row["metric"] in SHARES:
        return text.rate(row["value"], row["low"], row["high"], row["n"])
    interval = f"{text.decimals(row['low'])} to {text.decimals(row['high'])}"
    return text.Rate(f"{text.decimals(row['value'])} nats", "", interval)


def kind(subject: str) -> int:
    """0 for the model before and after, 1 for controls, 2 for other repairs, 3 for references."""
    kinds = (JOURNEY, CONTROLS, (*OTHERS, *CURES))
    return next((i for i, members in enumerate(kinds) if subject in members), len(kinds))


def facet(
    rows: Sequence[Mapping[str, Any]], name: str, titles: tuple[str, str, str], names: Mapping[str, str]
) -> Facet:
    """Chart of the rows of one panel and metric, in order; `titles` are panel, metric and direction."""
    is_share = rows[0]["metric"] in SHARES
    low, high = (
        (0.0, 1.0)
        if is_share
        else svg.spread([r[k] for r in rows for k in ("low", "high")], zero=rows[0]["metric"] == "kl")
    )
    marks = [0.0, 0.25, 0.5, 0.75, 1.0] if is_share else svg.ticks(low, high)

    def across(x: text.Number) -> str:
        return f"{100 * (min(max(x, low), high) - low) / (high - low):.2f}%"

    figures = [words(r) for r in rows]
    lanes = tuple(
        Lane(
            subject=r["subject"],
            name=names[r["subject"]],
            key=svg.key(svg.SUBJECT_MARKS[r["subject"]], r["subject"]),
            head=said.head,
            tail=said.tail,
            group=i > 0 and kind(r["subject"]) != kind(rows[i - 1]["subject"]),
        )
        for i, (r, said) in enumerate(zip(rows, figures, strict=True))
    )
    description = "; ".join(f"{lane.name}: {said.full}" for lane, said in zip(lanes, figures, strict=True))
    grid = [el("line", x1=across(x), x2=across(x), y1="0", y2="100%", class_="grid") for x in marks]
    plot = svg.figure(
        f"{titles[1]}, {titles[0]}", description, name, *grid, *dots(rows, lanes, figures, across), class_="plot"
    )
    labels = [
        el("text", f"{round(100 * x)} %" if is_share else text.number(x), x=across(x), y=13, text_anchor="middle")
        for i, x in enumerate(marks)
        if i % 2 == 0 or len(marks) < 4
    ]
    return Facet(*titles, lanes, plot, el("svg", *labels, class_="axis", aria_hidden="true"))


def dots(
    rows: Sequence[Mapping[str, Any]],
    lanes: Sequence[Lane],
    figures: Sequence[text.Rate],
    across: Callable[[float], str],
) -> list[Markup]:
    """Group rules, the line from before to after, whiskers and marks; positions are percentages of the plot."""
    step = 100 / len(rows)
    heights = [f"{(i + 0.5) * step:.2f}%" for i in range(len(rows))]
    out: list[Markup] = [
        el("line", x1="0", x2="100%", y1=f"{i * step:.2f}%", y2=f"{i * step:.2f}%", class_="rule")
        for i, lane in enumerate(lanes)
        if lane.group
    ]
    journey = [i for i, lane in enumerate(lanes) if lane.subject in JOURNEY]
    for a, b in pairwise(journey):
        ends = {"x1": across(rows[a]["value"]), "x2": across(rows[b]["value"])}
        out.append(el("line", **ends, y1=heights[a], y2=heights[b], class_="journey"))
    for i, (row, lane, said) in enumerate(zip(rows, lanes, figures, strict=True)):
        colour = f"whisker c-{lane.subject}"
        ends = {"x1": across(row["low"]), "x2": across(row["high"])}
        caps = [
            el("svg", el("path", d="M0 -4V4", class_=colour), x=x, y=heights[i], width=1, height=1, class_="at")
            for x in ends.values()
        ]
        hit = el("rect", x="0", y=f"{i * step:.2f}%", width="100%", height=f"{step:.2f}%", class_="hit")
        line = el("line", **ends, y1=heights[i], y2=heights[i], class_=colour)
        dot = svg.mark(svg.SUBJECT_MARKS[lane.subject], lane.subject, across(row["value"]), heights[i])
        out.append(el("g", el("title", f"{lane.name}: {said.full}"), hit, line, *caps, dot, class_="lane"))
    return out


NAMES, FIELD, VALUES, LANE = 142, 210, 168, 22
"""Widths of a facet's columns and height of a lane where it is one drawing, in pixels."""


def standalone(one: Facet) -> Markup:
    """A facet as one drawing, with the names and values that are HTML on a page."""
    height = LANE * len(one.lanes)
    parts: list[Markup] = []
    for i, lane in enumerate(one.lanes):
        middle = LANE * (i + 0.5)
        value = ", ".join(part for part in (lane.head, lane.tail) if part)
        parts.append(el("svg", lane.key, x=0, y=middle - 8, width=16, height=16))
        parts.append(el("text", lane.name, x=22, y=middle + 4, class_="name"))
        parts.append(el("text", value, x=NAMES + FIELD + 14, y=middle + 4))
    parts.append(el("svg", one.plot, x=NAMES, y=0, width=FIELD, height=height))
    parts.append(el("svg", one.axis, x=NAMES, y=height, width=FIELD, height=18))
    title, name = f"{one.metric}, {one.panel}", f"whole-{text.clip(one.panel, 20)}-{text.clip(one.metric, 20)}"
    size = NAMES + FIELD + VALUES
    return svg.figure(title, "", name, *parts, viewBox=f"0 0 {size} {height + 20}", class_="facet")


@dataclass(frozen=True)
class Series:
    """A series of the frontier with its mark."""

    name: str
    shape: str
    colour: str
    points: tuple[Mapping[str, Any], ...]

    @property
    def key(self) -> Markup:
        """The legend's mark."""
        return svg.key(self.shape, self.colour)


def series_of(points: Sequence[Mapping[str, Any]]) -> list[Series]:
    """Points by series, each sorted by the number of features."""
    found: list[Series] = []
    spare = 0
    names = list(dict.fromkeys(str(p["series"]) for p in points))
    for name in sorted(names, key=lambda n: list(SERIES_MARKS).index(n) if n in SERIES_MARKS else len(SERIES_MARKS)):
        if name in SERIES_MARKS:
            shape, colour = SERIES_MARKS[name]
        else:
            shape, colour = SPARE_MARKS[spare % len(SPARE_MARKS)]
            spare += 1
        own = sorted((p for p in points if p["series"] == name), key=lambda p: p["features"])
        found.append(Series(text.clip(name, 80), shape, colour, tuple(own)))
    return found


WIDTH, HEIGHT = 352, 248
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 22, 40
"""View box of the frontier and its plot margins, in SVG units."""


def frontier_chart(series: Sequence[Series], metric: str, title: str, chosen: int | None) -> Markup | None:
    """Chart of `asr`, `skill` or `ce_change` against the number of features; `None` where no point has it.

    `chosen` is the number of features of the kept edit, marked by a vertical line.
    """
    shown = [(s, [p for p in s.points if p.get(metric) is not None]) for s in series]
    points = [p for _, own in shown for p in own]
    if not points:
        return None
    is_share = metric in SHARES
    low, high = (0.0, 1.0) if is_share else svg.spread([p[metric] for p in points], zero=True)
    last = svg.symlog(max(1, chosen or 0, *(p["features"] for p in points)))

    def x(features: text.Number) -> float:
        return LEFT + 16 + (WIDTH - LEFT - RIGHT - 28) * svg.symlog(features) / last

    def y(value: text.Number) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - min(max(value, low), high)) / (high - low)

    parts = [*upright(y, low, high, is_share), *along(x, last)]
    if chosen is not None:
        parts.append(chosen_line(x(chosen), chosen))
    said: list[str] = []
    for i, (one, own) in enumerate(shown):
        # Points of the same size stand beside each other; the first series stays on its place.
        shift = 6.5 * ((i + 1) // 2) * (1 if i % 2 else -1)
        parts += curve(one, own, metric, lambda f, s=shift: x(f) + s, y)
        said += [f"{one.name}, {p['features']:,} features: {point_words(p, metric)}" for p in own]
    return svg.figure(
        f"{title} against the number of removed features", "; ".join(said), f"frontier-{metric}", *parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="frontier",
    )  # fmt: skip


def upright(y: Callable[[float], float], low: float, high: float, is_share: bool) -> list[Markup]:
    """The vertical axis: grid lines and labels."""
    marks = [0.0, 0.25, 0.5, 0.75, 1.0] if is_share else svg.ticks(low, high)
    out: list[Markup] = []
    for value in marks:
        label = f"{round(100 * value)} %" if is_share else svg_tick(value, marks)
        at = y(value)
        kind_of = "base" if abs(value) < 1e-12 else "grid"
        out.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_=kind_of))
        out.append(el("text", label, x=LEFT - 6, y=at + 4, text_anchor="end"))
    return out


def svg_tick(value: float, marks: Sequence[float]) -> str:
    """A signed label with as many decimals as the tick spacing needs."""
    step = marks[1] - marks[0] if len(marks) > 1 else abs(value) or 1.0
    if abs(value) < step * 1e-6:
        return "0"
    places = next((d for d in range(7) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 6)
    return f"{value:+,.{places}f}".replace("-", "−")


def along(x: Callable[[float], float], last: float) -> list[Markup]:
    """The horizontal axis: 0 and the powers of ten."""
    floor = HEIGHT - BOTTOM
    values = [0, *(10**p for p in range(16) if svg.symlog(10**p) <= last + 1e-9)]
    # Beyond six powers of ten the labels would touch: keep every second one.
    thin = 1 if len(values) <= 7 else 2 if len(values) <= 12 else 4
    out = [
        el("text", "features removed", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle", class_="name")
    ]
    for i, value in enumerate(values):
        out.append(el("line", x1=x(value), x2=x(value), y1=floor, y2=floor + 4, class_="tick"))
        if i == 0 or (i - 1) % thin == 0:
            label = f"{value:,}" if value < 10**6 else f"1e{len(str(value)) - 1}"
            out.append(el("text", label, x=x(value), y=floor + 17, text_anchor="middle"))
    return out


def chosen_line(at: float, chosen: int) -> Markup:
    """A labelled vertical line at the kept edit."""
    anchor = "end" if at > WIDTH - 80 else "start" if at < LEFT + 60 else "middle"
    label = el("text", f"this edit: {chosen:,}", x=at, y=TOP - 8, text_anchor=anchor, class_="chosen")
    return el("g", el("line", x1=at, x2=at, y1=TOP - 4, y2=HEIGHT - BOTTOM, class_="chosen"), label)


def curve(
    series: Series,
    points: Sequence[Mapping[str, Any]],
    metric: str,
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> list[Markup]:
    """A series' line, whiskers and marks with tooltips."""
    places = [(x(p["features"]), y(p[metric])) for p in points]
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
    out = [el("path", d=path, class_=f"curve c-{series.colour}")] if len(places) > 1 else []
    for point, (a, b) in zip(points, places, strict=True):
        inner = [el("title", f"{series.name}, {point['features']:,} features: {point_words(point, metric)}")]
        low, high = point.get(f"{metric}_low"), point.get(f"{metric}_high")
        if low is not None and high is not None:
            top, bottom = y(high), y(low)
            whisker = f"M{a:.1f} {top:.1f}V{bottom:.1f}M{a - 3:.1f} {top:.1f}h6M{a - 3:.1f} {bottom:.1f}h6"
            inner.append(el("path", d=whisker, class_=f"whisker c-{series.colour}"))
        inner += [el("circle", cx=a, cy=b, r=11, class_="hit"), svg.mark(series.shape, series.colour, a, b)]
        out.append(el("g", *inner, class_="lane"))
    return out


def point_words(point: Mapping[str, Any], metric: str) -> str:
    """One point's formatted value: a rate with its n, or a change in nats."""
    value = point.get(metric)
    if value is None:
        return "not measured"
    if metric not in SHARES:
        return f"{text.signed(value)} nats"
    low, high = point.get(f"{metric}_low"), point.get(f"{metric}_high")
    if low is None or high is None or point["n"] < 1:
        return text.share(value)
    return text.rate(value, low, high, point["n"]).full


@dataclass(frozen=True)
class Stage:
    """One stage's bar."""

    name: str
    bar: Markup
    time: str
    part: str
    """Share of the total, in percent."""


def stages(items: Sequence[Mapping[str, Any]]) -> tuple[list[Stage], str]:
    """Each stage as a bar that starts where the previous one ends, and the total."""
    times = [max(0.0, float(item["seconds"])) for item in items]
    total = sum(times)
    out: list[Stage] = []
    start = 0.0
    for item, seconds in zip(items, times, strict=True):
        begin, length = (100 * start / total, 100 * seconds / total) if total else (0.0, 0.0)
        bar = el("rect", x=f"{begin:.2f}%", y="0", width=f"{max(length, 0.15):.2f}%", height="100%", rx=2, class_="bar")
        plot = el("svg", bar, class_="plot", aria_hidden="true")
        out.append(
            Stage(
                text.clip(item["name"], 80),
                plot,
                text.duration(seconds),
                text.percent(seconds / total) if total else "",
            )
        )
        start += seconds
    return out, text.duration(total)
