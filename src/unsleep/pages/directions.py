"""Page of directions: detection by layer, cosine similarity, patching effect and ablation cost.

directions.json -> check -> make text visible -> view of each section -> directions.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from unsleep.core import Site
from unsleep.locate.directions.files import DirectionsRecord
from unsleep.pages import svg, text
from unsleep.pages.blocks import Block, Paper, Table
from unsleep.pages.curves import SHADES, WIDE, Axis, Curve, Dot, axis, chart, whole_axis
from unsleep.pages.heatmap import heatmap
from unsleep.pages.page import LABEL_LIMIT, filled, tree
from unsleep.pages.registry import Page
from unsleep.pages.svg import el
from unsleep.pages.verdict import Tile, numbers_of

SPACES = {"residual": "In the residual stream", "features": "In feature space"}
"""Space → heading of its charts."""

ROW, LEFT, RIGHT = 24, 190, 20
"""Row height and margins of the cost chart, in SVG units."""


def view_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The template's view."""
    figures: list[Mapping[str, Any]] = record["figures"]
    sites = sorted({Site.parse(f["site"]) for f in figures})
    view: dict[str, Any] = {
        "title": f"Directions at {len(sites):,} {'Site' if len(sites) == 1 else 'Sites'}",
        "model": text.clip(record["model"], LABEL_LIMIT),
        "position": text.clip(record["position"], LABEL_LIMIT),
        "best": record["best"],
        "pairs": record["patching"]["pairs"],
        "beats_chance": record["beats_chance"],
        "kept": max((f["n"] for f in figures), default=0),
        "tiles": tiles(record),
        "detection": detection(figures, record["floors"], sites),
        "cosines": cosine_map(record["cosines"]),
        "carried": carried_map(record["patching"]["carried"]),
        "erased": erased_chart(record.get("erased")),
        "erased_pairs": record.get("erased", {"pairs": 0})["pairs"],
        "costs": [strip(name, cost) for name, cost in record["costs"].items() if cost["increase"]],
        "provenance": tree(record["provenance"]),
    }
    names = {
        "detection": "Detection",
        "carried": "Patching",
        "erased": "Ablation",
        "cosines": "Cosine similarity",
        "costs": "Cost",
        "provenance": "Provenance",
    }
    view["sections"] = [(anchor, name) for anchor, name in names.items() if view[anchor]]
    return view


def tiles(record: Mapping[str, Any]) -> list[Tile]:
    """Key figures: the best detector against the random floor, and the largest patching effect."""
    found: list[Tile] = []
    judged = [f for f in record["figures"] if f["method"] != "random"]
    if judged:
        best = max(judged, key=lambda f: (f["auroc"], f["margin"]))
        floors = {(f["site"], f["space"]): f for f in record["floors"]}
        note = f"{named(best['method'])} at {best['site']}"
        found.append(Tile("Best held-out AUROC", "", text.decimals(best["auroc"]), note))
        if floor := floors.get((best["site"], best["space"])):
            found.append(
                Tile(
                    f"Best of {floor['n']:,} random directions", "", text.decimals(floor["best"]), f"at {best['site']}"
                )
            )
    carried = [
        (v, k, s)
        for s, line in record["patching"]["carried"].items()
        for k, v in line.items()
        if not k.endswith("random")
    ]
    if carried:
        share, name, site = max(carried)
        note = f"{named(name)} at {site}"
        found.append(Tile("Largest patching effect", "", f"{text.decimals(share, 2)} of the logit difference", note))
    return found


def named(method: str) -> str:
    """Display name of a method."""
    return text.clip(method.replace("_", " "), LABEL_LIMIT)


def label_of(site: Site, sites: Sequence[Site]) -> str:
    """A Site's axis label: its layer alone where all are residual."""
    return str(site.layer) if all(s.point == "resid" for s in sites) else str(site)


def detection(
    figures: Sequence[Mapping[str, Any]], floors: Sequence[Mapping[str, Any]], sites: Sequence[Site]
) -> list[tuple[str, list[Markup]]]:
    """For each space: AUROC by layer with the random floor, and AUROC and accuracy by method and Site."""
    out: list[tuple[str, list[Markup]]] = []
    for space, heading in SPACES.items():
        own = [f for f in figures if f["space"] == space]
        if not own:
            continue
        parts: list[Markup] = []
        places = [s for s in sites if any(f["site"] == str(s) for f in own)]
        resid = [s for s in places if s.point == "resid"]
        if len(resid) > 1:
            parts.append(by_layer(own, [f for f in floors if f["space"] == space], space))
        methods = list(dict.fromkeys(f["method"] for f in own))
        columns = [label_of(s, places) for s in places]
        at = {(f["method"], f["site"]): f for f in own}
        for metric, title in (("auroc", "Held-out AUROC"), ("accuracy", "Held-out accuracy")):
            values = [[at[m, str(s)][metric] if (m, str(s)) in at else None for s in places] for m in methods]
            names = [named(m) for m in methods]
            if metric == "auroc":
                floor = {f["site"]: f["best"] for f in floors if f["space"] == space}
                names.append("best of random")
                values.append([floor.get(str(s)) for s in places])
            parts.append(
                heatmap(names, columns, values, title=title, name=f"{metric}-{space}", ends=(0.0, 1.0), middle=0.5)
            )
        out.append((heading, parts))
    return out


DRAWN = ("mean difference", "logistic", "pca", "leace", "das-1")
"""Methods drawn as lines where there are more, chosen for being distinct."""


def by_layer(figures: Sequence[Mapping[str, Any]], floors: Sequence[Mapping[str, Any]], space: str) -> Markup:
    """AUROC against layer, residual Sites only, with the best and the mean of random directions.

    Of many methods, only those of `DRAWN` have a line; the heat map below has all.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for f in figures:
        if f["site"].startswith("resid") and f["method"] != "random":
            lines.setdefault(named(f["method"]), []).append((Site.parse(f["site"]).layer, f["auroc"]))
    if len(lines) > len(DRAWN):
        lines = {name: points for name, points in lines.items() if name in DRAWN} or lines
    shades = {name: f"shade-{round(i * (SHADES - 1) / max(1, len(lines) - 1))}" for i, name in enumerate(lines)}
    for key in ("best", "mean"):
        own = [(Site.parse(f["site"]).layer, f[key]) for f in floors if f["site"].startswith("resid")]
        name = f"{key} of random"
        lines[name], shades[name] = own, "c-control_random"
    curves: list[Curve] = []
    for name, points in lines.items():
        said = [(layer, v, f"{name}, layer {layer}: AUROC {text.decimals(v)}") for layer, v in sorted(points)]
        shape = "cross" if name.endswith("of random") else "circle"
        dots = tuple(Dot(float(layer), float(v), words, shape) for layer, v, words in said)
        curves.append(Curve(name, shades[name], dots, dots))
    least = min(d.y for c in curves for d in c.dots)
    low = min(0.4, least - 0.02)
    marks = tuple(m for m in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0) if m >= low)
    axes = whole_axis([int(d.x) for c in curves for d in c.dots], "layer"), Axis(low, 1.02, marks, "AUROC")
    drawing = chart(curves, [], axes, title=f"{SPACES[space]}: AUROC by layer", name=f"layers-{space}", width=2 * WIDE)
    return svg.captioned("AUROC by layer", drawing)


def erased_chart(erased: Mapping[str, Any] | None) -> Markup | None:
    """Remaining AUROC at each residual layer with the eraser there alone, against no erasure."""
    if erased is None:
        return None
    sites = {Site.parse(s): v for s, v in erased["after"].items()}
    after = {site.layer: float(value) for site, value in sites.items() if site.point == "resid"}
    if not after:
        return None
    curves: list[Curve] = []
    rows: tuple[tuple[str, str, dict[int, float]], ...] = (
        ("no ablation", "c-suspect", {layer: float(erased["before"]) for layer in after}),
        ("one direction ablated", "c-edited", after),
    )
    for label, colour, values in rows:
        said = "{}, layer {}: {} nats per token"
        dots = tuple(
            Dot(float(layer), float(v), said.format(label, layer, text.number(v)))
            for layer, v in sorted(values.items())
        )
        curves.append(Curve(label, colour, dots, dots))
    y = axis([d.y for c in curves for d in c.dots], "KL, nats per token")
    title = "KL from the model's own replies, by layer"
    drawing = chart(curves, [], (whole_axis(list(after), "layer"), y), title=title, name="erased", width=2 * WIDE)
    return svg.captioned(title, drawing)


def cosine_map(cosines: Mapping[str, Any]) -> Markup | None:
    """Cosine similarities of the directions at the best Site."""
    names = [named(n) for n in cosines["names"]]
    if len(names) < 2:
        return None
    return heatmap(names, names, cosines["values"], title="Cosine similarity of directions", name="cosines", middle=0.0)


def carried_map(carried: Mapping[str, Mapping[str, float]]) -> Markup | None:
    """Heat map of the patching effect by method and Site."""
    if not carried:
        return None
    sites = sorted(map(Site.parse, carried))
    methods = list(dict.fromkeys(m for line in carried.values() for m in line))
    return heatmap(
        [named(m) for m in methods],
        [label_of(s, sites) for s in sites],
        [[carried[str(s)].get(m) for s in sites] for m in methods],
        title="Patching effect by method and Site",
        name="carried",
        middle=0.0,
    )


def strip(ablation: str, cost: Mapping[str, Any]) -> Markup:
    """Increase of the loss for every direction, and for random subspaces of each rank, on one axis."""
    rows: list[tuple[str, list[float], str]] = [
        (named(name), [value], "c-edited") for name, value in cost["increase"].items() if not name.endswith("random")
    ]
    rows += [(f"random, rank {text.clip(rank, 8)}", v, "c-control_random") for rank, v in cost["random"].items() if v]
    low, high = svg.spread([v for _, values, _ in rows for v in values], zero=True)
    width = 2 * WIDE

    def place(value: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * (value - low) / (high - low)

    parts: list[Markup] = []
    floor = 10 + len(rows) * ROW
    for mark in svg.ticks(low, high):
        at = place(mark)
        parts.append(el("line", x1=at, x2=at, y1=6, y2=floor, class_="base" if mark == 0 else "grid"))
        parts.append(el("text", text.number(mark), x=at, y=floor + 16, text_anchor="middle"))
    for i, (name, values, colour) in enumerate(rows):
        y = 10 + i * ROW + ROW / 2
        parts.append(el("text", name, x=LEFT - 10, y=y + 4, text_anchor="end"))
        shape = "diamond" if colour == "c-edited" else "cross"
        for value in values:
            said = el("title", f"{name}: {text.signed(value, 4)} nats per token")
            path = el("path", d=svg.MARK_PATHS[shape], class_=f"mark {colour}", transform="scale(0.8)")
            where = f"translate({place(value):.1f} {y:.1f})"
            parts.append(el("g", said, el("circle", r=8, class_="hit"), path, transform=where, class_="lane"))
    said = "; ".join(f"{name}: {', '.join(text.signed(v, 4) for v in values)}" for name, values, _ in rows)
    title = f"{ablation.capitalize()} ablation: increase of the loss on plain text, nats per token"
    box = f"0 0 {width} {floor + 24}"
    drawing = svg.figure(title, said, f"cost-{text.clip(ablation, 12)}", *parts, viewBox=box, class_="curves strip")
    return svg.captioned(title, drawing)


def draw(record: dict[str, Any]) -> str:
    """HTML page of directions."""
    styles = "page.css", "dictionaries.css", "heatmap.css", "directions.css"
    return filled("directions.html", "summary", view_of(record), *styles)


def paper_of(record: Mapping[str, Any]) -> Paper:
    """The LaTeX of directions."""
    view = view_of(record)
    spaces = {"residual": "residual stream", "features": "features"}
    found = [
        [
            f["site"],
            spaces[f["space"]],
            named(f["method"]),
            f"{f['rank']}",
            *(text.decimals(f[key]) for key in ("auroc", "accuracy", "margin")),
            f"{f['n']:,}",
        ]
        for f in record["figures"]
    ]
    floors = [
        [f["site"], spaces[f["space"]], text.decimals(f["best"]), text.decimals(f["mean"]), f"{f['n']:,}"]
        for f in record["floors"]
    ]
    costs = [
        [ablation, named(name), text.signed(value, 4)]
        for ablation, cost in record["costs"].items()
        for name, value in cost["increase"].items()
    ]
    erased = record.get("erased")
    kept = [["none", text.number(erased["before"])]] if erased else []
    kept += [[site, text.number(value)] for site, value in erased["after"].items()] if erased else []
    heads = ["Site", "Space", "Method", "Rank", "AUROC", "Accuracy", "Margin", "Tokens"]
    random = ["Site", "Space", "Best", "Mean", "Directions"]
    maps = [part for _, parts in view["detection"] for part in parts]
    blocks = [
        Block(
            "detection",
            "Detection",
            f"Separation of suspicious from ordinary tokens, on {view['kept']:,} held-out tokens; AUROC 0.5 is chance.",
            maps=maps,
            tables=[Table("Detection by directions", heads, 3, found), Table("Random directions", random, 2, floors)],
        ),
        Block(
            "patching",
            "Patching",
            f"Share of the logit difference that a direction carries, in {view['pairs']} pairs.",
            maps=[view["carried"]] if view["carried"] else [],
        ),
        Block(
            "ablation",
            "Ablation",
            "One direction ablated at one layer. KL in nats per token from the model's own reply to the same prompt "
            "without the trigger.",
            maps=[view["erased"]] if view["erased"] else [],
            tables=[Table("Ablation of one direction", ["Ablated at", "KL"], 1, kept)],
        ),
        Block("cosines", "Cosine similarity", f"At {view['best']}.", maps=[view["cosines"]] if view["cosines"] else []),
        Block(
            "costs",
            "Cost",
            "Increase of the cross-entropy on plain text, in nats per token.",
            maps=view["costs"],
            tables=[Table("Cost of ablation", ["Ablation", "Direction", "Increase"], 2, costs)],
        ),
    ]
    return Paper(view["title"], "", numbers_of(view["tiles"]), blocks)


render_directions = Page("directions", "Directions", DirectionsRecord, draw, paper=paper_of)
