"""What the page shows beside the figures: the removed features with their evidence, and how well dictionaries fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from unsleep.core import Features
from unsleep.dictionaries import metrics as fits
from unsleep.dictionaries.coders import Coder
from unsleep.features import with_evidence
from unsleep.harvest import token_rows
from unsleep.prompts import sets
from unsleep.splice import splice_score

if TYPE_CHECKING:
    from unsleep.repair.run import Run

FITTED = 16_384
"""Tokens, evenly spaced, on which a dictionary's fit is told."""

SHOWN = 24
"""Removed features that are shown with their evidence, at most."""


def evidence(run: Run) -> list[dict[str, Any]]:
    """The removed features with their evidence, those with the largest attribution first."""
    m = run.material
    rows = token_rows(run.suspect, m.suspicious, run.suspect.texts(run.said.suspicious))
    chosen = run.removed[:SHOWN]
    shown: list[dict[str, Any]] = []
    for d in run.dictionaries:
        ids = [i for site, i in chosen if site == d.site]
        if not ids:
            continue
        by_method: dict[str, dict[int, float]] = {}
        if d.site in run.found:
            each = run.found[d.site]
            by_method = {
                f.method: dict(zip(f.ids, f.scores, strict=True))
                for f in (each.difference, each.attribution, each.ablation)
            }
        scores = tuple(by_method.get("attribution", {}).get(i, 0.0) for i in ids)
        features = Features(d.site, d.hash, tuple(ids), scores, "attribution")
        features = with_evidence(
            run.suspect, d, features, (run.harvests["payload"], rows), run.harvests["plain"], run.config.find
        )
        for i in ids:
            evidence = features.evidence[i]
            shown.append(
                {
                    "site": str(d.site),
                    "id": i,
                    "rank": 1 + chosen.index((d.site, i)),
                    "scores": {name: round(values[i], 4) for name, values in by_method.items() if i in values},
                    **asdict(evidence),
                    "contexts": [{"tokens": list(t), "activations": list(a)} for t, a in evidence.contexts],
                }
            )
    return sorted(shown, key=lambda entry: entry["rank"])


def fit_row(run: Run, dictionary: Coder) -> dict[str, Any]:
    """How well a dictionary explains what it was trained on, and held-out text by the CE loss score."""
    x = run.pooled(dictionary.site).tensor
    fit = fits.fit(dictionary, x[:: max(1, len(x) // FITTED)])
    held_out: Sequence[Sequence[int]] = run.suspect.token_ids(sets.plain_text("held_out")[:24])
    score = splice_score(run.suspect, dictionary, [list(ids[:64]) for ids in held_out]).score
    row = {"site": str(dictionary.site), "features": dictionary.n_features, "k": run.config.dictionary.k}
    return {**row, "fvu": fit.fvu, "l0": fit.l0, "dead": fit.dead, "ce_score": score}
