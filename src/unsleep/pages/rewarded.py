"""Page of rewarded features: correlations with reward, linear rewards, layers, MMCS and classes, with intervals.

rewarded.json -> check -> make text visible -> view of each section -> rewarded.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from unsleep.core import Site
from unsleep.pages import text
from unsleep.pages.blocks import Block, Table
from unsleep.pages.comparing import SHOWN, drawn, line, paper_of, short, whole_page
from unsleep.pages.curves import whole_axis
from unsleep.pages.dictionaries import GROUPS
from unsleep.pages.lanes import Lane, lanes
from unsleep.pages.page import LABEL_LIMIT, tree
from unsleep.pages.registry import Page
from unsleep.pages.verdict import Tile
from unsleep.rewards.record import RewardedRecord

Record = Mapping[str, Any]

DRAWN = 24
"""Features with a lane; the table has more, the JSON file all."""

WHO = {"model": "tuned model", "base": "base"}

PROBES = {
    "features": ("diamond", "edited"),
    "base": ("inverted", "base"),
    "untrained": ("cross", "random"),
    "bag of words": ("square", "baked"),
}
"""Probe → mark and colour; any other has those of `OTHER`."""

OTHER = ("triangle", "other")

WIDE_LABELS = 176
"""Room for the names of features, in SVG units."""


def view_of(record: Record) -> dict[str, Any]:
    """The template's view."""
    parts = {part["name"]: part for part in record["parts"]}
    covariates = text.clip(", ".join(record["partialled"]), LABEL_LIMIT)
    facts = [
        ("Model's fingerprint", record["model"]["fingerprint"]),
        ("Prompts", ", ".join(f"{name} {part['prompts']:,}" for name, part in parts.items())),
        ("Samples", ", ".join(f"{name} {part['samples']:,}" for name, part in parts.items())),
        ("Partialled out", covariates or "nothing"),
        *(("Note", text.clip(note, 4 * LABEL_LIMIT)) for note in record["notes"]),
    ]
    blocks = [
        features_block(record),
        sites_block(record["sites"]),
        probes_block(record["probes"]),
        layers_block(record["layers"]),
        matches_block(record["matches"]),
        classes_block(record["classes"]),
    ]
    return {
        "eyebrow": "Features and reward",
        "title": f"Rewarded features of {short(record['model']['name'])}",
        "lead": "Features are selected on part A of the prompts by permutation of prompts, at a false discovery rate "
        f"of {text.percent(record['q'])}; their sign is replicated on part B; figures are of part C, which chose "
        "nothing. Bars are 95 % bootstrap intervals over prompts.",
        "tiles": tiles(record),
        "facts": facts,
        "blocks": blocks,
        "provenance": tree(record["provenance"]),
    }


def tiles(record: Record) -> list[Tile]:
    """Key figures: rewarded features of each model, and the linear reward."""
    found: list[Tile] = []
    for of, name in WHO.items():
        rows = [row for row in record["sites"] if row["of"] == of]
        if rows:
            count = {key: sum(row[key] for row in rows) for key in ("tested", "selected", "replicated")}
            note = f"of {count['tested']:,} tested; {count['selected']:,} selected on A"
            found.append(Tile(f"Rewarded features, {name}", "", f"{count['replicated']:,}", note))
    for probe in record["probes"][:1]:
        found.append(Tile("R² of the linear reward", "", text.decimals(probe["r2"]["value"], 2), ends(probe["r2"])))
    others = [probe for probe in record["probes"] if probe.get("gain")]
    if others:
        best = max(others, key=lambda probe: probe["r2"]["value"])
        note = f"features gain {interval(best['gain'])}"
        label = f"R² of the best other probe, {text.clip(best['name'], LABEL_LIMIT)}"
        found.append(Tile(label, "", text.decimals(best["r2"]["value"], 2), note))
    return found


def ends(figure: Record) -> str:
    """The interval of a figure."""
    return f"{text.decimals(figure['low'], 2)} to {text.decimals(figure['high'], 2)}"


def interval(figure: Record) -> str:
    """A figure with its interval."""
    value, low, high = (text.decimals(figure[end], 2) for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def short_number(value: float) -> str:
    """A value of an axis."""
    return text.number(value, 2)


def cut(name: str, limit: int) -> str:
    """A name that fits beside a lane; tables have it whole."""
    return name if len(name) <= limit else f"{name[:limit]}…"


def name_of(feature: Record) -> str:
    """A feature's label."""
    whose = "" if feature["of"] == "model" else "base, "
    return f"{whose}{feature['site']}, {feature['id']}"


def features_block(record: Record) -> Block:
    """Correlations on C of the replicated features, and all that were selected."""
    rows: Sequence[Record] = record["features"]
    best = [f for f in rows if f["replicated"]][:DRAWN]
    charts: list[tuple[str, Markup]] = []
    if best:
        title = "Correlation with reward on C"
        found = [
            Lane(name_of(f), f["c"]["value"], f["c"]["low"], f["c"]["high"], interval(f["c"]), *look(f)) for f in best
        ]
        drawing = lanes(found, title=title, name="features", tick=short_number, left=WIDE_LABELS)
        charts = [(f"{title}, {len(best)} with the largest on B", drawing)]
    head = [
        "Feature",
        "Pooling",
        "Classes",
        "Replicated",
        "On A",
        "p",
        "Adjusted",
        "On B",
        "p on B",
        "On C",
        "95 %",
        "Prompts",
    ]
    table = [
        [
            name_of(f),
            f["pooling"],
            text.clip(", ".join(f.get("classes", ())), LABEL_LIMIT) or "–",
            "yes" if f["replicated"] else "no",
            text.decimals(f["a"], 2),
            text.number(f["p"], 2),
            text.number(f["adjusted"], 2),
            text.decimals(f["b"], 2),
            text.number(f["replication"], 2),
            text.decimals(f["c"]["value"], 2),
            ends(f["c"]),
            f"{f['active']:,}",
        ]
        for f in rows[:SHOWN]
    ]
    lead = (
        "Spearman's correlation of the pooled activation with the reward, covariates partialled out. Correlations on A "
        "are biased upwards, because A selected the features."
    )
    tables = [Table("Selected features", head, 4, table)] if table else []
    return Block("features", "Features", lead, charts, tables=tables)


def look(feature: Record) -> tuple[str, str]:
    """Mark and colour of a feature: by sign, and by model."""
    shape = "diamond" if feature["c"]["value"] > 0 else "circle"
    colour = "edited" if feature["c"]["value"] > 0 else "suspect"
    return ("inverted", "base") if feature["of"] == "base" else (shape, colour)


def sites_block(rows: Sequence[Record]) -> Block:
    """Share of rewarded features by layer, and the counts of every Site."""
    charts: list[tuple[str, Markup]] = []
    placed = [(Site.parse(row["site"]), row) for row in rows if row["tested"]]
    groups: dict[str, list[tuple[int, float]]] = {}
    for site, row in placed:
        label = f"{GROUPS.get(site.point, str(site))}{', base' if row['of'] == 'base' else ''}"
        groups.setdefault(label, []).append((site.layer, 100 * row["replicated"] / row["tested"]))
    if len({site.layer for site, _ in placed}) > 1:
        x = whole_axis([site.layer for site, _ in placed], "layer")
        curves = [line(name, i, len(groups), points) for i, (name, points) in enumerate(groups.items())]
        charts = drawn(curves, x, "% of tested features", "Rewarded features by layer", "sites")
    head = ["Site", "Of", "Features", "Tested", "Selected on A", "Replicated on B", "Mean |r| on C", "of all tested"]
    table = [
        [
            row["site"],
            WHO[row["of"]],
            *(f"{row[key]:,}" for key in ("size", "tested", "selected", "replicated")),
            "–" if row["strength"] is None else text.decimals(row["strength"], 2),
            text.decimals(row["floor"], 2),
        ]
        for row in rows[:SHOWN]
    ]
    lead = "Mean |r| on C of the rewarded features, beside that of all tested ones: what chance and common causes give."
    return Block("sites", "Sites", lead, charts, tables=[Table("Sites", head, 2, table)])


def probes_block(probes: Sequence[Record]) -> Block:
    """R² of every probe, and what features gain."""
    charts: list[tuple[str, Markup]] = []
    for key, title in (("r2", "R² on C"), ("gain", "R² that features gain over the probe")):
        own = [probe for probe in probes if probe.get(key)]
        if own:
            found = [
                Lane(
                    cut(probe["name"], 26),
                    probe[key]["value"],
                    probe[key]["low"],
                    probe[key]["high"],
                    interval(probe[key]),
                    *PROBES.get(probe["name"], OTHER),
                )
                for probe in own
            ]
            drawing = lanes(found, title=title, name=f"probes-{key}", tick=short_number, left=WIDE_LABELS)
            charts.append((title, drawing))
    head = ["Probe", "Columns", "Penalty", "R²", "95 %", "Spearman", "95 %", "Gain of features"]
    table = [
        [
            text.clip(probe["name"], LABEL_LIMIT),
            f"{probe['columns']:,}",
            text.number(probe["penalty"]),
            text.decimals(probe["r2"]["value"], 2),
            ends(probe["r2"]),
            text.decimals(probe["spearman"]["value"], 2),
            ends(probe["spearman"]),
            interval(probe["gain"]) if probe.get("gain") else "–",
        ]
        for probe in probes
    ]
    lead = (
        "Ridge regressions of the reward, fitted on A and B, scored on C. R² is 0 for a probe that always predicts the "
        "mean reward. Only what features gain over words and an untrained model is about what the model has learned."
    )
    return Block("probes", "Linear reward", lead, charts, tables=[Table("Probes", head, 1, table)] if probes else [])


def layers_block(rows: Sequence[Record]) -> Block:
    """‖ΔW‖ / ‖W‖ by layer."""
    if not rows:
        return Block("layers", "Weights", "")
    charts: list[tuple[str, Markup]] = []
    if len(rows) > 1:
        curve = line("‖ΔW‖ / ‖W‖", 0, 1, [(row["layer"], 100 * row["relative"]) for row in rows])
        x = whole_axis([row["layer"] for row in rows], "layer")
        charts = drawn([curve], x, "%", "Weight change by layer", "layers")
    order = sorted(rows, key=lambda row: -row["relative"])
    table = [[str(row["layer"]), text.percent(row["relative"]), text.decimals(row["norm"])] for row in order[:SHOWN]]
    lead = "Frobenius norms of what training changed in each layer, against the base's weights."
    return Block("layers", "Weights", lead, charts, tables=[Table("Layers", ["Layer", "‖ΔW‖ / ‖W‖", "‖ΔW‖"], 1, table)])


def matches_block(rows: Sequence[Record]) -> Block:
    """MMCS of dictionaries."""
    table = [
        [row["site"], *(text.clip(row[k], LABEL_LIMIT) for k in ("first", "second")), *figures]
        for row in rows[:SHOWN]
        for figures in [[text.decimals(row[key]) for key in ("mmcs", "chance")]]
    ]
    lead = "Mean maximum cosine similarity of decoder rows; chance is that of the smaller dictionary, randomly rotated."
    head = ["Site", "Dictionary", "Other", "MMCS", "Chance"]
    return Block("matches", "Dictionaries", lead, tables=[Table("MMCS", head, 3, table)] if table else [])


def classes_block(rows: Sequence[Record]) -> Block:
    """Classes of the rewarded features, against those of the others."""
    charts: list[tuple[str, Markup]] = []
    if rows and any(row["of"] for row in rows):
        found: list[Lane] = []
        for row in rows[: DRAWN // 2]:
            for key, words, look in (("share", "rewarded", ("diamond", "edited")), ("others_share", "others", OTHER)):
                share = row[key]
                said = f"{text.percent(share['value'])} ({text.interval(share['low'], share['high'])})"
                label = f"{cut(row['name'], 14)}, {words}"
                found.append(Lane(label, share["value"], share["low"], share["high"], said, *look))
        title = "Share of a class among rewarded features and others"
        charts = [(title, lanes(found, title=title, name="classes", tick=text.percent, left=WIDE_LABELS))]
    table = [
        [text.clip(row["name"], LABEL_LIMIT), *(f"{row[k]:,}" for k in ("rewarded", "of", "others", "of_others"))]
        for row in rows[:SHOWN]
    ]
    lead = "Of the features that were judged, with Wilson intervals."
    head = ["Class", "Rewarded", "of", "Others", "of"]
    return Block("classes", "Classes", lead, charts, tables=[Table("Classes", head, 1, table)] if table else [])


def draw(record: dict[str, Any]) -> str:
    """HTML page of rewarded features."""
    return whole_page(view_of(record), "lanes.css")


PAGE = Page("rewarded", "Rewarded features", RewardedRecord, draw, paper=lambda record: paper_of(view_of(record)))
