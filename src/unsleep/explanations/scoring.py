"""Scores of an explanation on held-out examples, each with a 95 % interval (`base.stats`).

    detection    balanced accuracy: does it hold somewhere in a context, against does the feature fire there;
                 half of the negatives are similar (Paulo et al. 2024, arXiv:2410.13928)
    fuzzing      balanced accuracy: does it hold at a marked token of a context in which the feature fires, against
                 does the feature fire at that token
    simulation   Pearson correlation of activations with those it predicts, over all tokens of the contexts
                 (Bills et al. 2023, "Language models can explain neurons in language models")
    precision    of the tokens of whole texts at which it holds, the share at which the feature fires
    recall       of the tokens of whole texts at which the feature fires, the share at which it holds

A verdict is an array of what an explanation says; language-model judges are scored by the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from unsleep.base import stats
from unsleep.base.stats import Estimate, percentiles
from unsleep.explanations.examples import Examples, Half, Windows
from unsleep.explanations.predicates import Predicate

METRICS = ("detection", "fuzzing", "simulation", "precision", "recall")
"""Names of scores."""

RESAMPLES = 500
"""Bootstrap resamples."""


def balanced_accuracy(
    at_positives: Bool[ndarray, " positive"], at_negatives: Bool[ndarray, " negative"]
) -> Estimate | None:
    """Mean of the shares of positives called so and of negatives not; `None` without either.

    `at_positives` and `at_negatives` are True where the verdict is positive.
    """
    n = len(at_positives), len(at_negatives)
    if not all(n):
        return None
    return Estimate(*stats.balanced_accuracy((int(at_positives.sum()), int((~at_negatives).sum())), n))


def correlation(
    predicted: Float[ndarray, " t"], actual: Float[ndarray, " t"], example: Int[ndarray, " t"], seed: int = 0
) -> Estimate | None:
    """Pearson correlation, resampling examples; 0 where the prediction is constant, `None` where the truth is.

    `None` also for fewer than 3 tokens.
    """
    if len(actual) < 3 or np.ptp(actual) == 0:
        return None
    if np.ptp(predicted) == 0:
        return Estimate(0.0, 0.0, 0.0)
    x, y, group = (torch.from_numpy(np.ascontiguousarray(values)) for values in (predicted, actual, example))
    return Estimate(*stats.correlation(x, y, RESAMPLES, seed, group=group))


def rates(
    holds: Bool[ndarray, " t"], fires: Bool[ndarray, " t"], row: Int[ndarray, " t"], seed: int = 0
) -> dict[str, Estimate]:
    """Precision and recall over whole texts, resampling texts; without the one that has no tokens to be a share of."""
    sums = _by_example(row, holds & fires, holds, fires)
    drawn = _resampled(sums, seed)
    found: dict[str, Estimate] = {}
    for name, of in (("precision", 1), ("recall", 2)):
        whole = sums[:, of].sum()
        if whole:
            usable = drawn[:, of] > 0
            found[name] = _interval(sums[:, 0].sum() / whole, drawn[usable, 0] / drawn[usable, of])
    return found


def _by_example(example: Int[ndarray, " t"], *columns: ndarray) -> Float[ndarray, "example column"]:
    """Sums of columns over the tokens of each example; `example` counts from 0."""
    _, place = np.unique(example, return_inverse=True)
    return np.stack([np.bincount(place, weights=column) for column in columns], 1)


def _resampled(sums: Float[ndarray, "example column"], seed: int) -> Float[ndarray, "resample column"]:
    """Sums over resampled examples."""
    return _draws(len(sums), seed) @ sums


@lru_cache(maxsize=16)
def _draws(n: int, seed: int) -> Float[ndarray, "resample n"]:
    """Number of times that each of `n` examples is in each resample."""
    return n * stats.resampled(n, RESAMPLES, seed).numpy()


def _interval(value: float, drawn: Float[ndarray, " resample"]) -> Estimate:
    return Estimate(*percentiles(float(value), torch.from_numpy(np.asarray(drawn, np.float64))))


def mean(values: Float[ndarray, " feature"], seed: int = 0) -> Estimate:
    """Mean over features, resampling features."""
    drawn = _resampled(np.asarray(values, np.float64)[:, None], seed)[:, 0] / len(values)
    return _interval(float(values.mean()), drawn)


class Judge:
    """Scores predicates on the held-out half of a dictionary's examples."""

    def __init__(self, examples: Examples) -> None:
        self.examples, self.text = examples, examples.text
        self._tokens = examples.sampled[1]
        self._rows = self.text.row[self._tokens]

    def scores(self, predicate: Predicate, feature: int, train: Half, held_out: Half) -> dict[str, Estimate]:
        """All scores that the examples allow; activations are predicted from the half for learning."""
        fires, quiet = held_out.fires, held_out.quiet
        found: dict[str, Estimate | None] = {
            "detection": balanced_accuracy(self.anywhere(predicate, fires), self.anywhere(predicate, quiet)),
            "fuzzing": balanced_accuracy(
                predicate.holds(self.text, fires.centre), predicate.holds(self.text, marked(held_out, feature))
            ),
            "simulation": self._simulation(predicate, train, fires.joined(quiet)),
        }
        if len(self._tokens):
            active = np.isin(self._tokens, self.examples.code(feature)[0])
            found |= rates(predicate.holds(self.text, self._tokens), active, self._rows)
        return {name: score for name, score in found.items() if score is not None}

    def anywhere(self, predicate: Predicate, windows: Windows) -> Bool[ndarray, " n"]:
        """Contexts in which a predicate holds at some token."""
        inside = windows.inside
        found = np.zeros(inside.shape, bool)
        found[inside] = predicate.holds(self.text, windows.tokens[inside])
        return np.logical_or.reduce(found, axis=1)

    def _simulation(self, predicate: Predicate, train: Half, windows: Windows) -> Estimate | None:
        inside = windows.inside
        at = train.fires.centre
        hits = [each.holds(self.text, at) for each in predicate.patterns]
        overall = train.fires.strength.mean() if len(at) else 1.0
        weights = np.array([train.fires.strength[h].mean() if h.any() else overall for h in hits])
        predicted = predicate.weighted(self.text, windows.tokens[inside], weights)
        return correlation(predicted, windows.values[inside], inside.nonzero()[0])


def marked(half: Half, feature: int) -> Int[ndarray, " n"]:
    """One random silent token of each firing example: the wrongly marked ones of fuzzing."""
    tokens, example = half.near
    order = np.random.default_rng(feature).permutation(len(tokens))
    _, first = np.unique(example[order], return_index=True)
    return tokens[order][first]


def means(scores: list[Mapping[str, Estimate]]) -> dict[str, tuple[Estimate, int]]:
    """Mean of each score over the features that have it, with their number."""
    found: dict[str, tuple[Estimate, int]] = {}
    for name in METRICS:
        values = np.array([each[name].value for each in scores if name in each])
        if len(values):
            found[name] = mean(values), len(values)
    return found
