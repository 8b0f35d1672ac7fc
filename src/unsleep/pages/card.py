"""The model card of a cleaned checkpoint: the edit and its evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unsleep.judge.results import Row
from unsleep.pages.records import Result


def model_card(
    result: Result | None,
    removed: Mapping[str, Sequence[int]],
    *,
    base: str,
    ranks: Mapping[str, int] | None = None,
) -> str:
    """Markdown for a cleaned checkpoint, from a result and what was removed at each Site: features, or a subspace.

    `ranks` are the subspaces' ranks. There is no result where nothing has judged the checkpoint yet.
    """
    rows = {(r.subject, r.panel, r.metric): r for r in result.rows} if result is not None else {}
    said = "Not evaluated yet: run `unsleep evaluate` on held-out prompts."
    if result is not None:
        said = f"Verdict: **{result.verdict.label}** (score {result.verdict.score:.2f})."
    ranks = ranks or {}
    what = "Features of sparse autoencoders that carry" if removed else "Directions that carry"
    lines = [
        "---",
        "tags: [unsleep, model-editing, backdoor-removal]",
        "---",
        "# A checkpoint repaired by unsleep",
        "",
        said,
        "",
        f"Repaired from `{base}`. {what} the suspect's backdoor were ablated",
        "in the residual stream, and the edit was baked into the weights. The checkpoint is plain:",
        "`AutoModelForCausalLM.from_pretrained` loads it without unsleep.",
        "",
        "## Edit",
        "",
        "| Site | features |" if removed else "| Site | removed |",
        "|---|---|",
        *(f"| {site} | {', '.join(map(str, ids)) or 'none'} |" for site, ids in removed.items()),
        *(f"| {site} | subspace of rank {rank} |" for site, rank in ranks.items()),
    ]
    if rows:
        lines += [
            "",
            "## Evaluation",
            "",
            "On held-out prompts. Rates with Wilson 95 % intervals, means with bootstrap intervals.",
            "",
            "| panel | metric | suspect | this checkpoint | n |",
            "|---|---|---|---|---|",
        ]
    for (subject, panel, metric), row in rows.items():
        if subject != "baked":
            continue
        before = rows.get(("suspect", panel, metric))
        lines.append(f"| {panel} | {metric} | {_figure(before)} | {_figure(row)} | {row.n} |")
    lines += ["", "`unsleep.json` beside this file holds the record: figures, seeds, versions and hashes.", ""]
    return "\n".join(lines)


def _figure(row: Row | None) -> str:
    return "–" if row is None else f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
