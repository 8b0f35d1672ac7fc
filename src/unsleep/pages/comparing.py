"""Page of an activation-patching run, and the parts shared by all pages on two models.

patch.json -> check -> make text visible -> view of each section -> patch.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from unsleep.locate.patching.result import PatchRecord
from unsleep.pages import text
from unsleep.pages.blocks import Block, Paper, Table
from unsleep.pages.curves import MOST, WIDE, Axis, Curve, Dot, axis, charts, whole_axis
from unsleep.pages.dictionaries import SHAPES, grouped, shade
from unsleep.pages.heatmap import heatmap
from unsleep.pages.page import LABEL_LIMIT, filled, tree
from unsleep.pages.registry import Page
from unsleep.pages.verdict import Tile, numbers_of

SHOWN = 400
"""Maximum rows of a table on the page; the JSON file has all of them."""


def whole_page(view: dict[str, Any], *styles: str) -> str:
    """The page of a view, without empty sections."""
    blocks = [block for block in view["blocks"] if block.charts or block.maps or block.tables]
    sections = [(block.anchor, block.name) for block in blocks]
    sections += [("provenance", "Provenance")] if view["provenance"] else []
    whole = {**view, "blocks": blocks, "sections": sections}
    return filled("comparing.html", "summary", whole, "page.css", "dictionaries.css", "heatmap.css", *styles)


def paper_of(view: Mapping[str, Any]) -> Paper:
    """The LaTeX of a page with blocks."""
    return Paper(view["title"], view["lead"], numbers_of(view["tiles"]), view["blocks"])


def patch_view(record: Mapping[str, Any]) -> dict[str, Any]:
    """The template's view of a patching run."""
    blocks: list[Block] = []
    tiles: list[Tile] = []
    for i, run in enumerate(record["runs"]):
        donor, recipient = (short(run[side]["name"]) for side in ("donor", "recipient"))
        known = [g for g in run["groups"] if g["figure"] is not None]
        if known:
            best = max(known, key=lambda g: g["figure"])
            note = f"{short(best['name'])}: {interval(best)}"
            tiles.append(Tile(f"Largest effect, {donor} as donor", "", text.decimals(best["figure"], 2), note))
        for side in ("donor", "recipient"):
            if side in run["ends"] and not i:
                words = "log-probability of the payload, nats per prompt"
                tiles.append(Tile(short(run[side]["name"]), "", text.decimals(run["ends"][side], 2), words))
        lead = (
            "Effect: 0 is the unpatched recipient, 1 the donor, in mean log-probability of the payload's first "
            f"{record['tokens']} tokens over {record['prompts']:,} prompts."
        )
        blocks.append(
            Block(
                f"run-{i}",
                f"{donor} into {recipient}",
                lead,
                patch_charts(run["groups"], f"run-{i}"),
                patch_maps(run["groups"], f"map-{i}"),
                [patch_table(run["groups"])],
            )
        )
    return {
        "eyebrow": "Cross-model patching",
        "title": f"{len(record['runs'][0]['groups']) if record['runs'] else 0:,} patches of {record['level']}",
        "lead": "Activations of one model are patched into the other on the same tokens, one group at a time. Groups "
        "with a large effect carry the difference in behaviour.",
        "tiles": tiles,
        "facts": [("Payload", text.clip(text.payload_words(record) or "", LABEL_LIMIT)), *models(record["runs"][:1])],
        "blocks": blocks,
        "provenance": tree(record["provenance"]),
    }


def models(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Fingerprints of both models."""
    return [
        (f"{side.title()}'s fingerprint", run[side]["fingerprint"]) for run in runs for side in ("donor", "recipient")
    ]


def short(name: str) -> str:
    """A name shortened for a label; of a path, the last part."""
    return text.clip(name.rstrip("/").rpartition("/")[2] or name, LABEL_LIMIT)


def place_of(group: Mapping[str, Any]) -> str:
    """A group's row label: its place, or its own name for several."""
    return group["places"][0] if len(group["places"]) == 1 else group["name"]


def column_of(group: Mapping[str, Any]) -> str:
    """A group's column label: its position, and its head where it has one."""
    heads = ", ".join(map(str, group["heads"]))
    return f"{group['position']}, head {heads}" if heads else group["position"]


def patch_maps(groups: Sequence[Mapping[str, Any]], name: str) -> list[Markup]:
    """Heat map by place and position (or head), where there is more than one of either."""
    rows = list(dict.fromkeys(map(place_of, groups)))
    columns = list(dict.fromkeys(map(column_of, groups)))
    at = {(place_of(g), column_of(g)): None if g["figure"] is None else round(g["figure"], 3) for g in groups}
    values = [[at.get((row, column)) for column in columns] for row in rows]
    if len(groups) < 2 or all(v is None for line in values for v in line):
        return []
    title = "Effect by place and position"
    return [heatmap(rows, columns, values, title=title, name=name, middle=0.0)]


def patch_charts(groups: Sequence[Mapping[str, Any]], name: str) -> list[tuple[str, Markup]]:
    """Charts of effect and KL by layer, where there are several layers and one group of each at a position."""
    layers = [g["layer"] for g in groups]
    by_position = grouped(groups, lambda g: g["position"])
    alone = all(len({g["layer"] for g in own}) == len(own) for own in by_position.values())
    if len(set(layers)) < 2 or not alone or len(by_position) > MOST:
        return []
    found: list[tuple[str, Markup]] = []
    x = whole_axis(layers, "layer")
    curves = [
        line(position, i, len(by_position), [(g["layer"], g["figure"]) for g in own if g["figure"] is not None])
        for i, (position, own) in enumerate(by_position.items())
    ]
    found += drawn([c for c in curves if c.path], x, "effect", "Effect by layer", f"{name}-figure")
    own = next(iter(by_position.values()))
    names = {"kl_donor": "to donor", "kl_recipient": "to recipient"}
    curves = [line(said, i, 2, [(g["layer"], g[key]) for g in own]) for i, (key, said) in enumerate(names.items())]
    title = f"KL divergence at {own[0]['position']}, by layer"
    return found + drawn(curves, x, "nats per token", title, f"{name}-kl")


def line(label: str, number: int, count: int, points: Sequence[tuple[int, float]]) -> Curve:
    """A curve by layer, in one of `count` colours and marks."""
    shape = SHAPES[number % len(SHAPES)]
    dots = tuple(Dot(n, y, f"{label}, layer {n}: {text.decimals(y)}", shape) for n, y in sorted(points))
    return Curve(label, shade(number, 0, max(1, count - 1)), dots, dots)


def drawn(curves: Sequence[Curve], x: Axis, unit: str, title: str, name: str) -> list[tuple[str, Markup]]:
    """Curves as captioned charts; empty without curves."""
    if not curves:
        return []
    y = axis([dot.y for curve in curves for dot in curve.dots], unit)
    return [(title, part) for part in charts(curves, x, y, title=title, name=name, width=WIDE)]


def patch_table(groups: Sequence[Mapping[str, Any]]) -> Table:
    """Table of all groups."""
    with_asr = any(g.get("asr") for g in groups)
    head = ["Patched", "Effect", "95 %", "NLL per token", "KL to donor", "KL to recipient"]
    rows: list[list[str]] = []
    for g in groups[:SHOWN]:
        figure = ["–", "–"] if g["figure"] is None else [text.decimals(g["figure"]), interval(g)]
        rest = [text.decimals(g[key]) for key in ("nll", "kl_donor", "kl_recipient")]
        asr = g.get("asr")
        rest += [f"{text.percent(asr['value'])} ({text.interval(asr['low'], asr['high'])})" if asr else "–"] * with_asr
        rows.append([text.clip(g["name"], LABEL_LIMIT), *figure, *rest])
    return Table("All patches", head + ["Payload shown"] * with_asr, 1, rows)


def interval(row: Mapping[str, Any]) -> str:
    """The formatted interval of a row."""
    return f"{text.decimals(row['low'])} to {text.decimals(row['high'])}"


def draw_patch(record: dict[str, Any]) -> str:
    """HTML page of a patching run."""
    return whole_page(patch_view(record))


render_patch = Page("patch", "Patching", PatchRecord, draw_patch, paper=lambda record: paper_of(patch_view(record)))
