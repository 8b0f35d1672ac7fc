"""The model card of a cleaned checkpoint: the edit and its evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def model_card(
    record: Mapping[str, Any],
    removed: Mapping[str, Sequence[int]],
    *,
    base: str,
    ranks: Mapping[str, int] | None = None,
) -> str:
    """Markdown model card of a cleaned checkpoint, from a record and the features (or subspace) removed at each Site.

    `ranks` are the subspaces' ranks. The record is a result's (`pages.record`), or that of a bake without
    evaluation.
    """
    rows: dict[tuple[str, str, str], Mapping[str, Any]] = {
        (r["subject"], r["panel"], r["metric"]): r for r in record.get("rows", ())
    }
    said = "Not judged yet: `unsleep evaluate` does it, on prompts that chose nothing."
    if "verdict" in record:
        said = f"Verdict: **{record['verdict']['label']}** (score {record['verdict']['score']:.2f})."
    ranks = ranks or {}
    what = "Features of sparse autoencoders that carry" if removed else "Directions that carry"
    lines = [
        "---",
        "tags: [unsleep, model-editing, backdoor-removal]",
        "---",
        "# A checkpoint cleaned by unsleep",
        "",
        said,
        "",
        f"Made from `{base}`. {what} the suspect's backdoor were removed",
        "from the residual stream, and the edit was put into the weights. The checkpoint is plain:",
        "`AutoModelForCausalLM.from_pretrained` loads it, and unsleep is not needed.",
        "",
        "## What was removed",
        "",
        "| Site | features |" if removed else "| Site | removed |",
        "|---|---|",
        *(f"| {site} | {', '.join(map(str, ids)) or 'none'} |" for site, ids in removed.items()),
        *(f"| {site} | a subspace of rank {rank} |" for site, rank in ranks.items()),
    ]
    if rows:
        lines += [
            "",
            "## What was measured",
            "",
            "On prompts that chose nothing. Rates with Wilson 95 % intervals, means with bootstrap intervals.",
            "",
            "| panel | metric | suspect | this checkpoint | n |",
            "|---|---|---|---|---|",
        ]
    for (subject, panel, metric), row in rows.items():
        if subject != "baked":
            continue
        before = rows.get(("suspect", panel, metric))
        lines.append(f"| {panel} | {metric} | {_figure(before)} | {_figure(row)} | {row['n']} |")
    lines += ["", "`unsleep.json` beside this file holds the record: figures, seeds, versions and hashes.", ""]
    return "\n".join(lines)


def _figure(row: Mapping[str, Any] | None) -> str:
    return "–" if row is None else f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
