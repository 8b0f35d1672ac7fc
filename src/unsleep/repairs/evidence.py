"""Evidence for the report: contexts of the removed features, and the dictionaries' quality of fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from unsleep.activations.harvest import Harvest
from unsleep.core import Features, Site
from unsleep.dictionaries import metrics as fits
from unsleep.dictionaries.coders import Coder
from unsleep.judge.splice import splice_score
from unsleep.locate.features import FindConfig, Found, with_evidence
from unsleep.models.model import LoadedModel
from unsleep.pages.records import Context, Fitted, Shown
from unsleep.prompts import sets

FITTED = 16_384
"""Evenly spaced tokens on which a dictionary's fit is measured."""

SHOWN = 24
"""Maximum number of removed features shown with evidence."""


def evidence(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    removed: Sequence[tuple[Site, int]],
    found: Mapping[Site, Found],
    payload: tuple[Harvest, Sequence[Sequence[int]]],
    plain: Harvest,
    config: FindConfig,
) -> list[Shown]:
    """The removed features with their evidence, in the order given.

    Args:
        found: Site → the results that ranked its features, where available.
        payload: the harvest of the suspicious prompts with their replies, and its token ids.
        plain: the harvest of plain text.
    """
    chosen = removed[:SHOWN]
    shown: list[Shown] = []
    for d in dictionaries:
        ids = [i for site, i in chosen if site == d.site]
        if not ids:
            continue
        by_method: dict[str, dict[int, float]] = {}
        if d.site in found:
            each = found[d.site]
            by_method = {
                f.method: dict(zip(f.ids, f.scores, strict=True))
                for f in (each.difference, each.attribution, each.ablation)
            }
        scores = tuple(by_method.get("attribution", {}).get(i, 0.0) for i in ids)
        features = Features(d.site, d.hash, tuple(ids), scores, "attribution")
        features = with_evidence(model, d, features, payload, plain, config)
        for i in ids:
            found_at = features.evidence[i]
            given = {name: round(values[i], 4) for name, values in by_method.items() if i in values}
            contexts = tuple(Context(*context) for context in found_at.contexts)
            shown.append(
                Shown(
                    str(d.site),
                    i,
                    1 + chosen.index((d.site, i)),
                    given,
                    contexts,
                    found_at.promotes,
                    found_at.suppresses,
                    found_at.suspicious_rate,
                    found_at.trusted_rate,
                )
            )
    return sorted(shown, key=lambda entry: entry.rank)


def fit_row(model: LoadedModel, dictionary: Coder, x: Float[Tensor, "token d_model"], k: int) -> Fitted:
    """Quality of fit of a dictionary on `x`, its training data, and its CE loss score on held-out text."""
    fit = fits.fit(dictionary, x[:: max(1, len(x) // FITTED)])
    held_out: Sequence[Sequence[int]] = model.token_ids(sets.plain_text("held_out")[:24])
    score = splice_score(model, dictionary, [list(ids[:64]) for ids in held_out]).score
    return Fitted(str(dictionary.site), dictionary.n_features, k, fit.fvu, fit.l0, fit.dead, score)
