"""Page of trained dictionaries: quality of fit against sparsity, by Site and layer.

dictionaries.json -> check -> make text visible -> view of each section -> dictionaries.html
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple, TypeVar

from markupsafe import Markup

from unsleep.core import Site
from unsleep.dictionaries.sweep import DictionariesRecord
from unsleep.pages import svg, text
from unsleep.pages.blocks import Block, Paper, Table
from unsleep.pages.curves import MOST, NARROW, SHADES, WIDE, Axis, Curve, Dot, axis, charts, pareto, whole_axis
from unsleep.pages.page import LABEL_LIMIT, filled, tree
from unsleep.pages.registry import Page
from unsleep.pages.svg import el
from unsleep.pages.verdict import Tile, numbers_of

T = TypeVar("T")

GROUPS = {"resid": "Residual stream", "attn": "Attention output", "mlp": "MLP output"}
"""Point → title of its chart; the embedding is grouped with the residual stream."""

POINT_MARKS = {
    "resid": ("circle", "c-edited"),
    "attn": ("triangle", "c-suspect"),
    "mlp": ("square", "c-baked"),
}
"""Point → shape and colour class."""

SHAPES = ("circle", "square", "diamond", "triangle", "inverted", "cross", "plus")
"""Marks of architectures or widths, in order of appearance."""

RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Row(NamedTuple):
    """One dictionary."""

    site: Site
    name: str
    """Its Site, and a transcoder's target."""
    setting: str
    """Its variant without the seed."""
    shape: str
    measured: Mapping[str, Any]

    @property
    def depth(self) -> int:
        """Its layer; −1 for the embedding."""
        return -1 if self.site.point == "embed" else self.site.layer

    @property
    def dot(self) -> Dot:
        """Its point in the L0–FVU chart."""
        m = self.measured
        variant = f" {text.clip(m['variant'], LABEL_LIMIT)}" if m["variant"] else ""
        said = f"{self.name}{variant}: L0 {text.number(m['l0'])}, FVU {text.decimals(m['fvu'])}"
        return Dot(float(m["l0"]), float(m["fvu"]), said, self.shape)


def view_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The template's view."""
    rows, shapes = rows_of(record["dictionaries"])
    sites = list(dict.fromkeys(r.name for r in rows))
    edges: list[float] = record.get("density_edges") or []
    view: dict[str, Any] = {
        "title": f"{len(rows):,} {plural('dictionary', len(rows))} at {len(sites):,} {plural('Site', len(sites))}",
        "model": text.clip(record["model"], LABEL_LIMIT),
        "tiles": tiles(rows),
        "pareto": pareto_fronts(rows),
        "shapes": [(svg.key(shape, "other"), name) for name, shape in shapes.items()] if len(shapes) > 1 else [],
        "depth": depth_scale(rows),
        "layers": by_layer(rows),
        "table": [line_of(r) for r in rows],
        "variants": any(r.measured["variant"] for r in rows),
        "rates": f"{power_of_ten(edges[0])} to {power_of_ten(edges[-1])}" if edges else "",
        "provenance": tree(record["provenance"]),
    }
    names = {"pareto": "Pareto front", "layers": "By layer", "table": "All dictionaries", "provenance": "Provenance"}
    view["sections"] = [(anchor, name) for anchor, name in names.items() if view[anchor]]
    return view


def power_of_ten(exponent: float) -> str:
    """A power of ten as text for a table head."""
    return "1" if exponent == 0 else "10" + f"{exponent:g}".translate(RAISED)


def plural(noun: str, count: int) -> str:
    """A noun in the number that fits."""
    return noun if count == 1 else {"dictionary": "dictionaries"}.get(noun, f"{noun}s")


def rows_of(items: Sequence[Mapping[str, Any]]) -> tuple[list[Row], dict[str, str]]:
    """The dictionaries sorted by point and layer, and the legend of shapes: architectures or widths."""
    kind = "architecture" if len({item["architecture"] for item in items}) > 1 else "features"
    names = sorted({item[kind] for item in items})
    shapes = {name: SHAPES[i % len(SHAPES)] for i, name in enumerate(names)}
    found: list[Row] = []
    for item in items:
        site = Site.parse(item["site"])
        target = item.get("target")
        name = f"{site} → {Site.parse(target)}" if target else str(site)
        setting = "-".join(p for p in item["variant"].split("-") if p != f"s{item.get('seed')}")
        found.append(Row(site, name, text.clip(setting, LABEL_LIMIT), shapes[item[kind]], item))
    found.sort(key=lambda r: (list(GROUPS).index(group_of(r)), r.depth, r.name))
    label = {name: f"{name:,} features" if kind == "features" else text.clip(str(name), LABEL_LIMIT) for name in names}
    return found, {label[name]: shape for name, shape in shapes.items()}


def tiles(rows: Sequence[Row]) -> list[Tile]:
    """Key figures: the best fit, the range, the measured tokens."""
    if not rows:
        return []
    best = min(rows, key=lambda r: r.measured["fvu"])
    worst = max(rows, key=lambda r: r.measured["fvu"])
    dead = [r.measured["dead"] for r in rows]
    tokens = max(r.measured["tokens"] for r in rows)
    found = [
        Tile("Lowest FVU", "", text.decimals(best.measured["fvu"]), best.dot.said.partition(":")[0]),
        Tile("Highest FVU", "", text.decimals(worst.measured["fvu"]), worst.dot.said.partition(":")[0]),
        Tile("Dead features", "", span([text.share(min(dead)), text.share(max(dead))]), f"on {tokens:,} tokens"),
    ]
    seconds = sum({r.name: r.measured.get("seconds") or 0 for r in rows}.values())
    return [*found, Tile("Training time", "", text.duration(seconds), "")] if seconds else found


def span(ends: Sequence[str]) -> str:
    """A range, or a single value for equal ends."""
    return " to ".join(dict.fromkeys(ends))


def group_of(row: Row) -> str:
    """Chart title of a row's Site."""
    return "resid" if row.site.point == "embed" else row.site.point


def shade(place: text.Number, low: text.Number, high: text.Number) -> str:
    """Colour class of a position on a scale."""
    share = (place - low) / (high - low) if high > low else 0.5
    return f"shade-{round(share * (SHADES - 1))}"


def grouped(rows: Sequence[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    """Rows by key, in order of appearance."""
    found: dict[str, list[T]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def depth_scale(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Legend of the shades: first and last layer."""
    layers = [r.site.layer for r in rows]
    if not layers or min(layers) == max(layers):
        return None
    return {"first": min(layers), "last": max(layers), "steps": range(SHADES)}


class Chart(NamedTuple):
    """A chart with its heading."""

    title: str
    part: str
    """Number of the chart among several with the same axes."""
    drawing: Markup


def pareto_fronts(rows: Sequence[Row]) -> list[Chart]:
    """FVU against L0, one line per Site; empty where every Site has a single dictionary."""
    if not any(len(own) > 1 for own in grouped(rows, lambda r: r.name).values()):
        return []
    axes = (
        axis([r.dot.x for r in rows], "L0: active features per token", log=True),
        axis([r.dot.y for r in rows], "FVU", log=True),
    )
    layers = [r.site.layer for r in rows]
    found: dict[str, list[Curve]] = {}
    for name, own in grouped(rows, lambda r: r.name).items():
        dots = tuple(r.dot for r in own)
        curve = Curve(name, shade(own[0].site.layer, min(layers), max(layers)), pareto(dots), dots)
        found.setdefault(group_of(own[0]), []).append(curve)
    return drawn(found, axes, "FVU against L0", "pareto")


def by_layer(rows: Sequence[Row]) -> list[Chart]:
    """FVU against layer; empty for a single layer.

    One setting: one chart with a line per point. Several: a chart per point, a line per setting, averaged over seeds.
    """
    if len({r.depth for r in rows}) < 2:
        return []
    axes = whole_axis([r.depth for r in rows], "layer"), axis([r.dot.y for r in rows], "FVU")
    settings = list(dict.fromkeys(r.setting for r in rows))
    points = grouped(rows, group_of)
    if len(settings) == 1:
        found = {"all": [layer_curve(point, *POINT_MARKS[point], own) for point, own in points.items()]}
        return drawn(found if len(points) > 1 else {next(iter(points)): found["all"]}, axes, "FVU by layer", "layers")
    sizes = {setting: mean(r.dot.x for r in rows if r.setting == setting) for setting in settings}
    settings.sort(key=lambda s: (sizes[s], s))
    shades = {setting: shade(i, 0, len(settings) - 1) for i, setting in enumerate(settings)}
    found: dict[str, list[Curve]] = {}
    for point, own in points.items():
        kept = grouped(own, lambda r: r.setting)
        found[point] = [layer_curve(s, kept[s][0].shape, shades[s], kept[s]) for s in settings if s in kept]
    return drawn(found, axes, "FVU by layer", "layers")


def drawn(groups: Mapping[str, Sequence[Curve]], axes: tuple[Axis, Axis], what: str, name: str) -> list[Chart]:
    """The charts of each group of curves, with shared axes."""
    count = sum(-(-len(curves) // MOST) for curves in groups.values())
    width = WIDE if count <= 2 else NARROW
    out: list[Chart] = []
    for group, curves in groups.items():
        title = GROUPS.get(group, "All Sites")
        parts = charts(curves, *axes, title=f"{title}: {what}", name=f"{name}-{group}", width=width)
        size = -(-len(curves) // len(parts))
        for i, part in enumerate(parts):
            shown = curves[i * size : (i + 1) * size]
            out.append(Chart(title, f"{shown[0].label} to {shown[-1].label}" if len(parts) > 1 else "", part))
    return out


def layer_curve(label: str, shape: str, colour: str, rows: Sequence[Row]) -> Curve:
    """One setting's or point's FVU by layer, mean over seeds."""
    dots: list[Dot] = []
    for name, own in sorted(grouped(rows, lambda r: r.name).items(), key=lambda item: item[1][0].depth):
        fvu = mean(r.dot.y for r in own)
        seeds = f", mean of {len(own)}" if len(own) > 1 else ""
        variant = f" {own[0].setting}" if own[0].setting else ""
        dots.append(Dot(own[0].depth, fvu, f"{name}{variant}: FVU {text.decimals(fvu)}{seeds}", shape))
    return Curve(label, colour, tuple(dots), tuple(dots))


def line_of(row: Row) -> dict[str, Any]:
    """A row of the table."""
    m = row.measured
    shape = m.get("k") if m.get("k") is not None else m.get("sparsity")
    figures = [
        f"{m['features']:,}",
        "–" if shape is None else text.number(shape),
        text.decimals(m["fvu"]),
        text.decimals(m["l0"], 1),
        text.share(m["dead"]),
        text.share(m["dense"]) if m.get("dense") is not None else "–",
    ]
    return {
        "site": row.name,
        "point": GROUPS[group_of(row)],
        "variant": text.clip(m["variant"], LABEL_LIMIT) or "–",
        "architecture": text.clip(m["architecture"], LABEL_LIMIT),
        "figures": figures,
        "rates": histogram(m.get("density") or []),
    }


def histogram(counts: Sequence[int]) -> Markup:
    """Histogram of the features' firing rates."""
    if not any(counts):
        return Markup("–")
    most, step = max(counts), 7
    bars = [
        el("rect", x=i * step, y=20 - height, width=step - 1, height=height)
        for i, count in enumerate(counts)
        if (height := max(1.0, 20 * count / most) if count else 0)
    ]
    said = f"Features by firing rate, rarest first: {', '.join(f'{c:,}' for c in counts)}"
    size = len(counts) * step
    return el("svg", el("title", said), *bars, viewBox=f"0 0 {size} 20", width=size, height=20, class_="spark")


def draw(record: dict[str, Any]) -> str:
    """HTML page of trained dictionaries."""
    return filled("dictionaries.html", "summary", view_of(record), "page.css", "dictionaries.css")


def paper_of(record: Mapping[str, Any]) -> Paper:
    """The LaTeX of trained dictionaries."""
    view = view_of(record)
    names = el("p", *(el("span", key, f" {name}") for key, name in view["shapes"]), class_="legend-line")

    def charts_of(key: str) -> list[tuple[str, Markup]]:
        return [(f"{c.title} {c.part}".strip(), el("div", names, c.drawing)) for c in view[key]]

    kinds = ["Site", "Variant", "Architecture"]
    head = [*kinds, "Features", "k or cost", "FVU", "L0", "Dead", "Dense"]
    rows = [[r["site"], r["variant"], r["architecture"], *r["figures"]] for r in view["table"]]
    lead = "FVU is the fraction of variance unexplained, L0 the mean number of active features per token."
    blocks = [
        Block(
            "pareto", "Pareto front", "A line connects the Pareto-optimal dictionaries of a Site.", charts_of("pareto")
        ),
        Block("layers", "By layer", "FVU of the dictionaries over the layers.", charts_of("layers")),
        Block("table", "All dictionaries", lead, tables=[Table("Dictionaries", head, len(kinds), rows)]),
    ]
    return Paper(view["title"], lead, numbers_of(view["tiles"]), blocks)


render_dictionaries = Page("dictionaries", "Dictionaries", DictionariesRecord, draw, paper=paper_of)
