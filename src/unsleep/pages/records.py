"""From an evaluation to the two records that are kept of it: result.json and report.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from unsleep.base import store
from unsleep.behaviours import Payload
from unsleep.judge.results import EvalResult, TaskRow
from unsleep.judge.verdict import contract, verdict


def record(result: EvalResult, seed: int | None, tasks: Sequence[TaskRow] = (), **made_from: Any) -> dict[str, Any]:
    """`result.json`: verdict, rows, tasks and provenance. Its schema is unsleep/pages/result.schema.json."""
    label, score = verdict(result, contract(result))
    return {
        "schema": "unsleep.result/1",
        "verdict": {"label": label, "score": round(score, 4)},
        "rows": [asdict(row) for row in result.rows],
        **({"tasks": [row.to_dict() for row in tasks]} if tasks else {}),
        "provenance": store.provenance(
            seed, panels={name: panel.hash for name, panel in result.prompts.items()}, **made_from
        ),
    }


def page(
    result: EvalResult,
    kept: dict[str, Any],
    title: str,
    summary: dict[str, Any],
    payload: Payload | None = None,
    **parts: Any,
) -> dict[str, Any]:
    """`report.json`, from which `report` renders the page; `parts` are sections beyond rows and replies."""
    replies = side_by_side(result, ("suspect", "edited", "baked"), 6)
    if payload is not None:
        summary = {**payload.to_dict(), **summary}
        if "payload_kind" in summary:  # what a page cannot see for itself
            replies = [
                {**row, "shown": [s for s, said in row["replies"].items() if payload.shows(said)]} for row in replies
            ]
    return {
        "schema": "unsleep.report/1",
        "title": title,
        "result": kept,
        "summary": summary,
        "contract": [{**asdict(c), "met": c.met, "too_few": c.too_few} for c in contract(result)],
        "replies": replies,
        "provenance": kept["provenance"],
        **parts,
    }


def side_by_side(result: EvalResult, subjects: Sequence[str], n: int) -> list[dict[str, Any]]:
    """The first replies of several subjects to the same prompts, panel by panel."""
    rows: list[dict[str, Any]] = []
    for panel, prompts in result.prompts.items():
        have = [s for s in subjects if f"{s}/{panel}" in result.replies]
        for i, prompt in enumerate(prompts.prompts[:n]):
            replies = {s: result.replies[f"{s}/{panel}"][i] for s in have}
            rows.append({"panel": panel, "prompt": prompt.shown, "expected": prompt.expected, "replies": replies})
    return rows
