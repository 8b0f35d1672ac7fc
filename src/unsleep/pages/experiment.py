"""Page of an experiment: its findings, and every metric of every arm over the setting, with intervals.

experiment.json -> check -> make text visible -> view of each section -> experiment.html
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from markupsafe import Markup

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
    "method": ("c-edited", "c-ranked", "c-baked", "c-clean_twin"),
    "control": ("c-control_random", "c-control_layer"),
    "reference": ("c-suspect", "c-base", "c-clean_twin"),
    "theory": ("c-base",),
}
"""Kind of an arm → colour classes, in order of appearance."""

LEFT = ("restored", "capability")
"""Metrics that a repair ought to leave, drawn over the payload."""

FEWEST = 3
"""Settings, of all arms together, from which a frontier is drawn."""

MARKS = {"method": "circle", "control": "cross", "reference": "square", "theory": "diamond"}
"""Kind of an arm → mark, so that colour alone tells no two kinds apart."""


def view_of(record: Record) -> dict[str, Any]:
    """The template's view of an experiment."""
    measures: Sequence[Record] = record["measures"]
    found = Counter(m["metric"] for m in measures)
    known = [*(m for m in METRICS if m in found), *(m for m in found if m not in METRICS)]
    metrics = sorted(known, key=lambda metric: -found[metric])  # those that are of few arms come last
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
            *frontier_block(record),
            curves_block(record, metrics),
            arms_block(record),
            figures_block(record, metrics),
        ],
        "provenance": tree(record["provenance"]),
    }


def shown_as(metric: str) -> Shown:
    """A metric's name and unit; what only an experiment has is a share of prompts where it is of the payload."""
    return METRICS.get(metric) or Shown(metric.capitalize(), "share of prompts", metric.startswith("payload"))


def curves_block(record: Record, metrics: Sequence[str]) -> Block:
    """A chart of each metric."""
    x = axis([m["x"] for m in record["measures"]], record["axis"])
    drawn: list[tuple[str, Markup]] = []
    arms = coloured(labelled(record["arms"]))
    for metric in metrics:
        own, shown = [m for m in record["measures"] if m["metric"] == metric], shown_as(metric)
        y = axis([m[key] for m in own for key in ("low", "high")], shown.name, zero=metric != "ce")
        found = [curve for arm, colour in arms if (curve := curve_of(arm, colour, own, shown))]
        title, name = f"{shown.name}, {shown.what}", f"m-{metrics.index(metric)}"
        drawn += [(title, each) for each in charts(found, x, y, title=title, name=name, width=WIDE + 120)]
    lead = "Each arm over the setting; where there are many, several charts of equal axes, the other arms in grey."
    return Block("curves", "Curves", lead, drawn)


def frontier_block(record: Record) -> list[Block]:
    """Skill and capability over payload, for every arm; none where no arm has both."""
    drawn: list[tuple[str, Markup]] = []
    for metric in LEFT:
        placed = joint(record["measures"], "payload", metric)
        if len({(arm, x) for arm, x, _ in placed}) < FEWEST:
            continue
        arms = coloured(labelled(record["arms"]))
        found = [trail for arm, colour in arms if (trail := trail_of(arm, colour, placed, metric))]
        x, y = (axis([each[i] for each in placed.values()], METRICS[m].name) for i, m in enumerate(("payload", metric)))
        title = f"{METRICS[metric].name} over payload"
        drawn += [(title, each) for each in charts(found, x, y, title=title, name=f"f-{metric}", width=WIDE + 120)]
    lead = (
        "The best corner is the upper left: no payload, nothing else lost. Each arm from its first setting to its last."
    )
    return [Block("frontier", "Frontier", lead, drawn)] if drawn else []


def joint(measures: Sequence[Record], one: str, other: str) -> dict[tuple[str, float, str], tuple[float, float]]:
    """Values of two metrics by arm, setting and replicate, where both were measured."""
    found: dict[tuple[str, float, str], dict[str, float]] = {}
    for m in measures:
        found.setdefault((m["arm"], m["x"], m["replicate"]), {})[m["metric"]] = m["value"]
    return {key: (own[one], own[other]) for key, own in found.items() if one in own and other in own}


def trail_of(
    arm: Record, colour: str, placed: Mapping[tuple[str, float, str], tuple[float, float]], metric: str
) -> Curve | None:
    """An arm's two metrics, setting by setting."""
    shape, said = MARKS[arm["kind"]], METRICS[metric].name.lower()
    dots: dict[float, list[Dot]] = {}
    for (name, x, replicate), (payload, value) in placed.items():
        if name == arm["name"]:
            words = f"{name}, {replicate}, {x:g}: payload {payload:.2f}, {said} {value:.2f}"
            dots.setdefault(x, []).append(Dot(payload, value, words, shape))
    return through(arm, colour, dots)


def through(arm: Record, colour: str, dots: Mapping[float, Sequence[Dot]]) -> Curve | None:
    """A line through the means of an arm's replicates, setting by setting, with the replicates as dots."""
    if not dots:
        return None
    means = tuple(
        Dot(mean(d.x for d in own), mean(d.y for d in own), f"{arm['name']}, {at:g}: mean of {len(own)}", own[0].shape)
        for at, own in sorted(dots.items())
    )
    return Curve(text.clip(arm["label"], 34), colour, means, tuple(d for own in dots.values() for d in own))


def arms_block(record: Record) -> Block:
    """The arms."""
    arms = [[arm["name"], arm["kind"], arm["what"]] for arm in record["arms"]]
    lead = " ".join(record["notes"]) or "Controls and references stand beside the methods on the same prompts."
    return Block("arms", "Arms", lead, tables=[Table("Arms", ["Arm", "Kind", "Description"], 3, arms)])


def figures_block(record: Record, metrics: Sequence[str]) -> Block:
    """Means over the replicates of every metric, a row per arm and setting."""
    found: dict[tuple[str, float], dict[str, list[float]]] = {}
    for m in record["measures"]:
        found.setdefault((m["arm"], m["x"]), {}).setdefault(m["metric"], []).append(m["value"])
    order = [arm["name"] for arm in record["arms"]]
    rows = [
        [arm, f"{x:g}", *(mean_of(own.get(metric, []), shown_as(metric)) for metric in metrics)]
        for (arm, x), own in sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    ]
    head = ["Arm", "Setting", *(shown_as(metric).name for metric in metrics)]
    lead = "Means over the replicates; the record has every replicate with its intervals."
    return Block("figures", "Figures", lead, tables=[Table("Figures", head, 1, rows[:SHOWN])])


def mean_of(values: Sequence[float], shown: Shown) -> str:
    """The mean, or a dash for none."""
    if not values:
        return "–"
    return (text.percent if shown.is_share else text.decimals)(sum(values) / len(values))


def labelled(arms: Sequence[Record]) -> list[Record]:
    """Arms with their labels: names, without the group of Sites before a colon where there is only one."""
    groups = {group for arm in arms if (group := arm["name"].rpartition(": ")[0])}
    prefix = f"{groups.pop()}: " if len(groups) == 1 else ""
    return [{**arm, "label": arm["name"].removeprefix(prefix)} for arm in arms]


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
    """An arm's metric over the setting; the replicates with their intervals."""
    shape, dots = MARKS[arm["kind"]], dict[float, list[Dot]]()
    for m in measures:
        if m["arm"] == arm["name"]:
            words = f"{arm['name']}, {m['replicate']}, {m['x']:g}: {figure(m, shown)}"
            dots.setdefault(m["x"], []).append(Dot(m["x"], m["value"], words, shape, (m["low"], m["high"])))
    return through(arm, colour, dots)


def figure(measure: Record, shown: Shown) -> str:
    """A value with its interval."""
    write = text.percent if shown.is_share else text.decimals
    return f"{write(measure['value'])} [{write(measure['low'])}, {write(measure['high'])}]"


def draw(record: dict[str, Any]) -> str:
    """HTML page of an experiment."""
    return whole_page(view_of(record), "lanes.css")


PAGE = Page("experiment", "Experiment", ExperimentRecord, draw, paper=lambda record: paper_of(view_of(record)))
