"""Evaluations and repairs in the words of the page: what the static report says, as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unsleep.base import records
from unsleep.explorer.records import Demand, Run, Tile, Words
from unsleep.pages import page, text, verdict
from unsleep.pages.records import Report, Result

REPLIES = 40
"""Prompts whose recorded replies are shown, at most."""

WORDS = Words(page.SUBJECT_NAMES, page.PANEL_NAMES, page.METRIC_NAMES, page.BETTER)
"""Display names of the static report."""


def read_run(path: Path) -> Run:
    """The run of a report.json, or of a result.json; raises `BadInput` naming the file where it is neither."""
    if path.name == "result.json":
        return run_of(Report(path.resolve().parent.name, records.load(Result, path)))
    return run_of(records.load(Report, path))


def run_of(report: Report) -> Run:
    """A report in the words of the page."""
    record: Mapping[str, Any] = records.plain(report)
    result = record["result"]
    rows = {(r["subject"], r["panel"], r["metric"]): r for r in result["rows"]}
    summary: Mapping[str, Any] = record.get("summary") or {}
    contract: list[Mapping[str, Any]] = record.get("contract") or []
    names = page.subject_names(summary)
    label = result["verdict"]["label"]
    teacher = (record.get("repair") or {}).get("teacher")
    said = [verdict.headline(label, rows, summary), *verdict.details(rows, summary, contract, teacher)]
    return Run(
        title=report.title,
        verdict=label,
        tone=verdict.TONES[label],
        score=report.result.verdict.score,
        headline=" ".join(part.striptags() for part in said),
        rows=report.result.rows,
        payload=text.payload_words(summary) or "",
        trigger=summary.get("trigger") or "",
        tiles=tuple(Tile(t.label, t.before, t.after, t.note) for t in verdict.tiles(rows, summary, contract)),
        controls=(*verdict.control_notes(rows, names["control_random"]), *verdict.other_notes(rows, names)),
        next=tuple(summary.get("next") or ()),
        requirements=tuple(_demand(page.requirement(line, rows, names)) for line in contract),
        replies=(report.replies or ())[:REPLIES],
    )


def _demand(line: Mapping[str, Any]) -> Demand:
    tone, outcome = line["outcome"]
    return Demand(line["text"], line["bound"], " ".join(line["measured"]), tone, outcome)
