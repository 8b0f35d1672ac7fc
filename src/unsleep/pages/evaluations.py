"""Sections of an evaluation for LaTeX, from the view of its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from unsleep.judge.results import PANELS, SUBJECTS
from unsleep.pages import charts, text
from unsleep.pages.blocks import Block, Paper, Table
from unsleep.pages.names import METRIC_NAMES, PANEL_NAMES
from unsleep.pages.svg import el

View = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]


def paper_of(view: View, rows: Rows, names: Mapping[str, str]) -> Paper:
    """The LaTeX of a report: its view, the rows behind it, and the names of subjects."""
    numbers = {f"{r['metric']}/{r['subject']}/{r['panel']}": charts.words(r).full for r in rows}
    numbers |= {"verdict": view["label"], **({"repair score": view["score"]} if view["score"] else {})}
    blocks = [
        outcome(view, rows, names),
        Block(
            "effects",
            "Side effects",
            "Empty or degenerate replies, and the divergence from the suspect without the trigger.",
            [facet(f) for f in view["effects"]],
        ),
        requirements(view["contract"]),
        *history(view["repair"]),
        *frontier(view["frontier"]),
        features(view["features"]),
        *quality(view),
        figures(view["rows"]),
    ]
    return Paper(view["title"], str(view["headline"].striptags()), numbers, blocks)


def facet(drawn: charts.Facet) -> tuple[str, Markup]:
    """An interval chart with its caption."""
    return f"{drawn.panel}: {drawn.metric} ({drawn.better})", charts.standalone(drawn)


def outcome(view: View, rows: Rows, names: Mapping[str, str]) -> Block:
    """Payload and skill of every subject on every panel."""
    lead = "Percentages of held-out prompts with 95 % intervals."
    tables = [table for metric in ("asr", "skill") if (table := by_panel(rows, metric, names)).rows]
    return Block("outcome", "Before and after", lead, [facet(f) for pair in view["outcome"] for f in pair], (), tables)


def by_panel(rows: Rows, metric: str, names: Mapping[str, str]) -> Table:
    """One metric, a share, in percent: a row per subject, a column per panel."""
    at = {(r["subject"], r["panel"]): r for r in rows if r["metric"] == metric}
    panels = [p for p in PANELS if any(panel == p for _, panel in at)]
    lines = [
        [names[s], *(percents(at[s, p]) if (s, p) in at else "–" for p in panels)]
        for s in SUBJECTS
        if any(subject == s for subject, _ in at)
    ]
    title = METRIC_NAMES[metric][0].upper() + METRIC_NAMES[metric][1:]
    return Table(f"{title}, percent", ["Model", *(PANEL_NAMES[p] for p in panels)], 1, lines)


def percents(row: Mapping[str, Any]) -> str:
    """A share in percent with its interval, rounded outward."""
    low, high = text.outward(max(row["low"], 0.0), up=False), text.outward(min(row["high"], 1.0), up=True)
    return f"{100 * row['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def requirements(contract: Sequence[View]) -> Block:
    """The contract and what was measured."""
    rows = [
        [
            f"{c['outcome'][1]} {c['beyond']}".strip(),
            c["text"],
            f"{c['subject']}, {c['panel']}: {c['bound']}",
            " ".join(c["measured"]),
        ]
        for c in contract
    ]
    head = ["Outcome", "Requirement", "Bound", "Measured"]
    lead = "The contract of the repair, fixed before the evaluation."
    return Block("contract", "Requirements", lead, tables=[Table("Requirements", head, 3, rows)])


def history(repair: View | None) -> list[Block]:
    """Site scan, attempts and baselines of a repair."""
    if repair is None:
        return []
    keys = ("what", "removed", "shown", "followed", "degenerate", "kl", "time")
    rows = [[f"{a['number']}{' (kept)' * a['kept']}", *(a[key] for key in keys)] for a in repair["attempts"]]
    head = ["Attempt", "Change", "Features", "Payload", "Like the reference", "Degenerate", "KL", "Time"]
    tables = [Table("Attempts", head, 2, rows)]
    if repair["baselines"]:
        tables.append(Table("Baseline repairs", ["Baseline", "Setting"], 2, repair["baselines"]))
    drawn = [(f"{title} ({better})", drawing) for title, better, drawing in repair["look"] or []]
    lead = (
        f"Reference replies to suspicious prompts: {repair['teacher']}. The edit is at {repair['used'] or 'no Site'}."
    )
    return [Block("repair", "History of the edit", lead, drawn, (), tables)]


def frontier(found: View | None) -> list[Block]:
    """Effect and cost by number of removed features."""
    if found is None:
        return []
    legend = el("p", *(el("span", key, f" {name}") for name, key in found["legend"]), class_="legend-line")
    drawn = [(f"{title} ({better})", el("div", legend, drawing)) for title, better, drawing in found["charts"]]
    rows = [[name, count, *cells] for name, count, cells in found["table"]]
    head = ["Series", "Features", "Payload shown", "Skill shown", "Cross-entropy change"]
    lead = "Effect and cost by number of removed features, on the selection prompts."
    return [Block("frontier", "Frontier", lead, drawn, (), [Table("Frontier", head, 1, rows)])]


def features(found: Sequence[View]) -> Block:
    """The removed features."""
    rows = [
        [
            f["site"],
            str(f["id"]),
            " ".join(f["promotes"][:5]) or "–",
            "; ".join(f"{v} {what}" for v, what in f["rates"]),
        ]
        for f in found
    ]
    head = ["Site", "Feature", "Promotes", "Active in"]
    return Block("features", "Features", "Removed features, best first.", tables=[Table("Features", head, 4, rows)])


def quality(view: View) -> list[Block]:
    """Dictionaries, tasks of lm-evaluation-harness, and the time of each stage."""
    head = ["Site", "Features", "k", "L0", "FVU", "CE score", "Dead"]
    blocks = [Block("dictionaries", "Dictionaries", "", tables=[Table("Dictionaries", head, 1, view["dictionaries"])])]
    if tasks := view["tasks"]:
        lines = [[line["task"], line["metric"], line["n"], *line["cells"]] for line in tasks["lines"]]
        table = Table("Tasks", ["Task", "Metric", "Items", *tasks["heads"]], 2, lines)
        blocks.append(Block("tasks", "Tasks", "Of lm-evaluation-harness, with its standard errors.", tables=[table]))
    times = [[stage.name, stage.time, stage.part] for stage in view["stages"]]
    lead = f"{view['total']} in total."
    return [
        *blocks,
        Block("stages", "Time", lead, tables=[Table("Time by stage", ["Stage", "Time", "Share"], 1, times)]),
    ]


def figures(rows: Sequence[View]) -> Block:
    """Every row of the result."""
    keys = ("metric", "panel", "subject", "figure", "interval", "n")
    head = ["Figure", "On", "Model", "Measured", "95 % interval", "n"]
    table = Table("All figures", head, 3, [[str(r[key]) for key in keys] for r in rows])
    return Block("rows", "All figures", "Every figure behind the verdict.", tables=[table])
