"""Page of an ablation study of classes of features: changes against the intact model with intervals, arm by arm.

ablation.json -> check -> make text visible -> view of each section -> ablation.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from unsleep.explanations.classified import StudyRecord
from unsleep.pages import text
from unsleep.pages.blocks import Block, Table
from unsleep.pages.comparing import paper_of, short, whole_page
from unsleep.pages.lanes import Lane, lanes
from unsleep.pages.page import LABEL_LIMIT, tree
from unsleep.pages.registry import Page
from unsleep.pages.verdict import Tile

Record = Mapping[str, Any]


class Shown(NamedTuple):
    """A metric on the page."""

    name: str
    what: str
    is_share: bool


METRICS = {
    "payload": Shown("Payload", "share of triggered prompts that show it", True),
    "restored": Shown("Skill with the trigger", "share of triggered prompts", True),
    "skill": Shown("Skill", "share of clean prompts", True),
    "degenerate": Shown("Degenerate replies", "share of clean prompts", True),
    "capability": Shown("Capability", "share of multiple-choice items", True),
    "reward": Shown("Reward", "mean score of replies to clean prompts", False),
    "sentiment": Shown("Sentiment", "share of pairs of reviews told apart", True),
    "kl": Shown("KL", "nats per token, along the intact model's replies to clean prompts", False),
    "ce": Shown("Cross-entropy", "nats per token of plain text", False),
}

ARMS = {
    "reconstruction": ("reconstruction only", "square"),
    "class": ("class ablated", "diamond"),
    "random": ("matched random", "cross"),
    "pca": ("PCA, equal rank", "right"),
}
"""Arm → label and mark."""


def view_of(record: Record) -> dict[str, Any]:
    """The template's view of a study."""
    rows: Sequence[Record] = record["rows"]
    intact = {row["metric"]: row for row in rows if row["arm"] == "intact"}
    tiles = [
        Tile(METRICS[metric].name, "", value_of(row), "intact model")
        for metric, row in intact.items()
        if metric in ("payload", "skill", "ce")
    ]
    tiles += [
        Tile(f"Class {text.clip(one['name'], LABEL_LIMIT)}", "", f"{count(one):,} features", places(one))
        for one in record["classes"]
    ]
    return {
        "eyebrow": "Ablation study of classes",
        "title": f"{len(record['classes'])} classes of features in {short(record['model']['name'])}",
        "lead": "Each class is ablated with the reconstruction error kept. Reconstruction alone, as many random "
        "features matched in firing rate and strength, and principal components of equal rank show what such a change "
        "does in any case. Changes are paired with the intact model, prompt by prompt; bars are 95 % intervals.",
        "tiles": tiles,
        "facts": [
            ("Payload", text.clip(record["payload"], LABEL_LIMIT)),
            ("Reward", text.clip(record["scorer"], LABEL_LIMIT)),
        ],
        "blocks": [class_block(i, one, rows, intact) for i, one in enumerate(record["classes"])],
        "provenance": tree(record["provenance"]),
    }


def count(one: Record) -> int:
    """Number of features of a class."""
    return sum(len(features) for features in one["features"].values())


def places(one: Record) -> str:
    """A class's features by Site."""
    return ", ".join(f"{site} {len(features):,}" for site, features in one["features"].items())


def class_block(number: int, one: Record, rows: Sequence[Record], intact: Mapping[str, Record]) -> Block:
    """Drawings of every metric of one class, and the figures as a table."""
    own = [row for row in rows if row["of"] == one["name"]]
    name = text.clip(one["name"], LABEL_LIMIT)
    draws = max((len(row.get("draws", ())) for row in own), default=0)
    ranks = ", ".join(f"{site} {rank}" for site, rank in one["ranks"].items())
    lead = (
        f"{count(one):,} features ({places(one)}). Small dots are the {draws} random draws; p is the share of draws, "
        "the class among them, that change the metric at least as much as it does."
        f"{f' Rank of the PCA: {ranks}.' if ranks else ''}"
    )
    drawings = [
        (f"{METRICS[metric].name}, {METRICS[metric].what}", drawn)
        for metric in METRICS
        if (drawn := plot([r for r in own if r["metric"] == metric], metric, f"class-{number}-{metric}", name))
    ]
    table = Table(
        f"All figures of {name}",
        ["Metric", "Arm", "Intact", "Value", "Change", "95 %", "p", "n"],
        2,
        [line_of(row, intact) for row in sorted(own, key=order)],
    )
    return Block(f"class-{number}", f"Class {name}", lead, drawings, tables=[table] if own else [])


def order(row: Record) -> tuple[int, int]:
    """Place of a row: by metric, then by arm."""
    return list(METRICS).index(row["metric"]), list(ARMS).index(row["arm"])


def line_of(row: Record, intact: Mapping[str, Record]) -> list[str]:
    """A row of the table."""
    shown = METRICS[row["metric"]]
    before = intact.get(row["metric"])
    p = row.get("p")
    return [
        shown.name,
        ARMS[row["arm"]][0],
        value_of(before) if before else "–",
        value_of(row),
        change_of(row["change"], shown),
        interval_of(row, shown),
        "–" if p is None else text.decimals(p, 2),
        f"{row['n']:,}",
    ]


def value_of(row: Record) -> str:
    """A row's own value."""
    return text.percent(row["value"]) if METRICS[row["metric"]].is_share else text.decimals(row["value"])


def change_of(value: float, shown: Shown) -> str:
    """A signed change, in percentage points or in the metric's unit."""
    return text.signed(round(100 * value, 1), 1) if shown.is_share else text.signed(value)


def interval_of(row: Record, shown: Shown) -> str:
    """The interval of a change."""
    return f"[{change_of(row['change_low'], shown)}, {change_of(row['change_high'], shown)}]"


def plot(rows: Sequence[Record], metric: str, name: str, of: str) -> Markup | None:
    """A lane per arm: change against the intact model with its interval, the random draws as small dots."""
    by_arm = {row["arm"]: row for row in rows}
    shown = METRICS[metric]
    found = [lane_of(by_arm[arm], shown) for arm in ARMS if arm in by_arm]
    if not found:
        return None
    title = f"{shown.name} with class {of} ablated: change against the intact model"
    unit = " pp" if shown.is_share else ""
    return lanes(found, title=title, name=name, tick=lambda value: f"{change_of(value, shown)}{unit}")


def lane_of(row: Record, shown: Shown) -> Lane:
    """One arm: its change, and the rank of that among the random draws."""
    label, shape = ARMS[row["arm"]]
    p = f", p {text.decimals(row['p'], 2)}" if row.get("p") is not None else ""
    said = f"{change_of(row['change'], shown)} {interval_of(row, shown)}{p}"
    ends = (row["change"], row["change_low"], row["change_high"])
    return Lane(label, *ends, said, shape, row["arm"], row.get("draws", ()))


def draw(record: dict[str, Any]) -> str:
    """HTML page of a study."""
    return whole_page(view_of(record), "lanes.css")


PAGE = Page("ablation", "Ablation study", StudyRecord, draw, paper=lambda record: paper_of(view_of(record)))
