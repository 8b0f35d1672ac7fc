"""Page of an experiment: its findings, and every metric of every arm over the setting, with intervals.

experiment.json -> check -> make text visible -> view of each section -> experiment.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unsleep.judge.experiment import ExperimentRecord
from unsleep.pages import text
from unsleep.pages.ablation import METRICS, Shown
from unsleep.pages.blocks import Block, Table
from unsleep.pages.comparing import SHOWN, paper_of, whole_page
from unsleep.pages.curves import WIDE, Curve, Dot, axis, charts
from unsleep.pages.page import LABEL_LIMIT, tree
from unsleep.pages.registry import Page
from unsleep.pages.verdict import Tile

Record = Mapping[str, Any]

STYLES = {
    "method": ("edited", "ranked", "baked", "clean_twin"),
    "control": ("control_random", "control_layer"),
    "reference": ("suspect", "base", "clean_twin"),
    "theory": ("base",),
}
"""Kind of an arm → colour classes, in order of appearance."""

MARKS = {"method": "circle", "control": "cross", "reference": "square", "theory": "diamond"}
"""Kind of an arm → mark, so that colour alone tells no two kinds apart."""


HEAD = ["Arm", "Replicate", "Setting", "Value", "95 %", "n"]
"""Columns of the table of figures."""


def view_of(record: Record) -> dict[str, Any]:
    """The template's view of an experiment."""
    measures: Sequence[Record] = record["measures"]
    metrics = list(dict.fromkeys(m["metric"] for m in measures))
    count = len(record["replicates"])
    tiles = [Tile(text.clip(each["question"], 90), "", each["label"], each["words"]) for each in record["findings"]]
    return {
        "eyebrow": f"Experiment {record['name']}",
        "title": record["question"],
        "lead": f"Hypothesis: {record['hypothesis']} Lines are means of {count} replicate{'s' * (count != 1)}, small "
        "marks the replicates; bars are 95 % intervals over prompts.",
        "tiles": tiles,
        "facts": [("Replicates", text.clip(", ".join(record["replicates"]), LABEL_LIMIT)), ("Axis", record["axis"])],
        "blocks": [
            findings_block(record),
            *(metric_block(record, [m for m in measures if m["metric"] == metric], metric) for metric in metrics),
        ],
        "provenance": tree(record["provenance"]),
    }


def findings_block(record: Record) -> Block:
    """The findings and the arms as tables."""
    found = [[each["question"], each["label"], each["words"]] for each in record["findings"]]
    arms = [[arm["name"], arm["kind"], arm["what"]] for arm in record["arms"]]
    return Block(
        "findings",
        "Findings",
        " ".join(record["notes"]) or "Each finding is judged on replicates or prompts that chose nothing in it.",
        tables=[
            Table("Findings", ["Question", "Answer", "Figures"], 3, found),
            Table("Arms", ["Arm", "Kind", "What it is"], 3, arms),
        ],
    )


def metric_block(record: Record, measures: Sequence[Record], metric: str) -> Block:
    """Curves of one metric, and its figures."""
    shown = METRICS.get(metric) or Shown(metric.capitalize(), "share of prompts", metric.startswith("payload"))
    x = axis([m["x"] for m in measures], record["axis"])
    y = axis([m[key] for m in measures for key in ("low", "high")], f"{shown.name}, {shown.what}" * bool(shown.what))
    drawn = [curve for arm, colour in coloured(record["arms"]) if (curve := curve_of(arm, colour, measures, shown))]
    title = f"{shown.name} over {record['axis']}"
    rows = [line_of(m, shown) for m in sorted(measures, key=lambda m: (m["arm"], m["replicate"], m["x"]))]
    return Block(
        f"metric-{metric}",
        shown.name,
        shown.what.capitalize() + ".",
        [(title, each) for each in charts(drawn, x, y, title=title, name=f"m-{metric}", width=WIDE + 180)],
        tables=[
            Table(
                f"All figures of {shown.name}", ["Arm", "Replicate", "Setting", "Value", "95 %", "n"], 2, rows[:SHOWN]
            )
        ],
    )


def coloured(arms: Sequence[Record]) -> list[tuple[Record, str]]:
    """Arms with their colour classes."""
    seen: dict[str, int] = {}
    found: list[tuple[Record, str]] = []
    for arm in arms:
        i = seen[arm["kind"]] = seen.get(arm["kind"], -1) + 1
        colours = STYLES[arm["kind"]]
        found.append((arm, colours[i % len(colours)]))
    return found


def curve_of(arm: Record, colour: str, measures: Sequence[Record], shown: Shown) -> Curve | None:
    """Mean over replicates as a line; the replicates as dots with their intervals."""
    own = [m for m in measures if m["arm"] == arm["name"]]
    if not own:
        return None
    by_x: dict[float, list[Record]] = {}
    for m in own:
        by_x.setdefault(m["x"], []).append(m)
    shape = MARKS[arm["kind"]]
    means = tuple(
        Dot(at, sum(m["value"] for m in each) / len(each), f"{arm['name']}, {at:g}: mean of {len(each)}", shape)
        for at, each in sorted(by_x.items())
    )
    dots = tuple(
        Dot(
            m["x"],
            m["value"],
            f"{arm['name']}, {m['replicate']}, {m['x']:g}: {figure(m, shown)}",
            shape,
            (m["low"], m["high"]),
        )
        for m in own
    )
    return Curve(text.clip(arm["name"], 34), colour, means, dots)


def words_of(measure: Record) -> str:
    """Arm, replicate and setting of a measure."""
    return f"{measure['arm']}, {measure['replicate']}, {measure['x']:g}"


def figure(measure: Record, shown: Shown) -> str:
    """A value with its interval."""
    write = text.percent if shown.is_share else text.decimals
    return f"{write(measure['value'])} [{write(measure['low'])}, {write(measure['high'])}]"


def line_of(measure: Record, shown: Shown) -> list[str]:
    """A row of the table of figures."""
    write = text.percent if shown.is_share else text.decimals
    interval = f"[{write(measure['low'])}, {write(measure['high'])}]"
    return [
        measure["arm"],
        measure["replicate"],
        f"{measure['x']:g}",
        write(measure["value"]),
        interval,
        f"{measure['n']:,}",
    ]


def draw(record: dict[str, Any]) -> str:
    """HTML page of an experiment."""
    return whole_page(view_of(record), "lanes.css")


PAGE = Page("experiment", "Experiment", ExperimentRecord, draw, paper=lambda record: paper_of(view_of(record)))
