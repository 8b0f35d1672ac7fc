"""Linear reward: ridge regression of the reward on pooled features, beside probes on what need not mean anything.

    features                    the model's features: maximum, mean and last activation
    base                        the same of the base model
    untrained                   of the same dictionaries' directions in a model of random weights, densities matched
    bag of words                counts of the words of the output
    length, position and topic  what is partialled out of correlations

All are fitted on A and B, the penalty by cross-validation over prompts, and scored on C. A linear reward says something
about features only where it is better than the last four.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unsleep.base.stats import Estimate, clustered, correlations, percentiles, ranks
from unsleep.core import Site
from unsleep.judge.metrics import words
from unsleep.rewards.samples import Samples

PENALTIES = tuple(10.0**power for power in range(-4, 5))
"""Ridge penalties tried, in multiples of the mean squared norm of a sample."""

FOLDS = 5

WORDS = 20_000
"""Most frequent words of the bag."""


class Probe(NamedTuple):
    """A ridge regression: predictions of all samples, and its weights over standardised columns."""

    predicted: Float[Tensor, " sample"]
    dual: Float[Tensor, " fitted"]
    """Weight of each sample of the fit."""
    mean: float
    """Mean reward of the fit: the prediction without any column."""
    penalty: float
    """In multiples of the mean squared norm of a sample."""
    columns: int
    """Columns that vary over the fit."""


class LinearReward(NamedTuple):
    """A probe as a linear function of pooled features."""

    weights: dict[Site, Float[Tensor, "pooling feature"]]
    bias: float

    def __call__(self, pooled: Mapping[Site, Float[Tensor, "pooling sample feature"]]) -> Float[Tensor, " sample"]:
        """Rewards of samples from their pooled features."""
        parts = [torch.einsum("psf,pf->s", pooled[site].double(), w.double()) for site, w in self.weights.items()]
        return torch.stack(parts).sum(0) + self.bias


class Scale(NamedTuple):
    """Mean and deviation of columns over the samples of a fit."""

    mean: Float[Tensor, " column"]
    deviation: Float[Tensor, " column"]
    varies: Bool[Tensor, " column"]
    """False for columns that are constant over the fit, which take no part."""

    @classmethod
    def of(cls, x: Float[Tensor, "sample column"], fit: Bool[Tensor, " sample"]) -> Scale:
        """Those of the samples of a fit."""
        own = x[fit].double()
        deviation = own.std(0, correction=0)
        return cls(own.mean(0), deviation, deviation > 1e-9 * own.abs().amax(0).clamp_min(1e-300))

    def __call__(self, x: Float[Tensor, "sample column"]) -> Float[Tensor, "sample varying"]:
        """The varying columns with mean 0 and deviation 1 over the fit."""
        return (x[:, self.varies].double() - self.mean[self.varies]) / self.deviation[self.varies]


def fit_probe(
    inputs: Iterable[Float[Tensor, "sample _"]],
    rewards: Float[Tensor, " sample"],
    fit: Bool[Tensor, " sample"],
    owner: Int[Tensor, " sample"],
    seed: int = 0,
) -> Probe:
    """Ridge regression on the samples of `fit`, in its dual form, with a cross-validated penalty.

    `owner` is the number of each sample's prompt: a fold holds whole prompts.
    """
    n, columns = len(rewards), 0
    gram = torch.zeros(n, n, dtype=torch.float64)
    for block in inputs:
        for part in block.split(4096, dim=1):
            ready = Scale.of(part, fit)(part)
            gram += ready @ ready.T
            columns += ready.shape[1]
    y = rewards.double()
    scale = float(gram.diagonal()[fit].mean()) if columns else 1.0
    gram = gram / (scale or 1.0)
    own, target = gram[fit][:, fit], y[fit]
    order = torch.randperm(int(owner.max()) + 1, generator=torch.Generator().manual_seed(seed))
    folds = order[owner[fit]] % FOLDS
    losses = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for fold in range(FOLDS):
        inside = folds != fold
        if bool(inside.all()) or not bool(inside.any()):
            continue
        mean = target[inside].mean()
        values, vectors = torch.linalg.eigh(own[inside][:, inside])
        turned, to = vectors.T @ (target[inside] - mean), own[~inside][:, inside] @ vectors
        for i, penalty in enumerate(PENALTIES):
            guess = mean + to @ (turned / (values.clamp_min(0) + penalty))
            losses[i] += (guess - target[~inside]).square().sum()
    penalty = PENALTIES[int(losses.argmin())]
    mean = float(target.mean())
    dual = torch.linalg.solve(own + penalty * torch.eye(len(own), dtype=torch.float64), target - mean)
    return Probe(mean + gram[:, fit] @ dual, dual / (scale or 1.0), mean, penalty, columns)


def linear_reward(
    probe: Probe, pooled: Mapping[Site, Float[Tensor, "pooling sample feature"]], fit: Bool[Tensor, " sample"]
) -> LinearReward:
    """A probe on pooled features as a linear function of them."""
    weights: dict[Site, Tensor] = {}
    bias = probe.mean
    for site, x in pooled.items():
        each = torch.zeros(len(x), x.shape[2], dtype=torch.float64)
        for row, values in enumerate(x):
            scale = Scale.of(values, fit)
            each[row, scale.varies] = (probe.dual @ scale(values[fit])) / scale.deviation[scale.varies]
            bias -= float(each[row] @ scale.mean)
        weights[site] = each
    return LinearReward(weights, bias)


def bag_of_words(texts: Sequence[str], fit: Bool[Tensor, " sample"]) -> Float[Tensor, "sample word"]:
    """Counts of words, damped as log(1 + count), of those that occur in two texts of the fit."""
    counts = [Counter(words(text)) for text in texts]
    seen = Counter(word for found, own in zip(counts, fit.tolist(), strict=True) if own for word in found)
    place = {word: i for i, (word, n) in enumerate(seen.most_common(WORDS)) if n > 1}
    bag = torch.zeros(len(texts), len(place), dtype=torch.float64)
    for row, found in enumerate(counts):
        for word, n in found.items():
            if word in place:
                bag[row, place[word]] = n
    return bag.log1p()


class Scored(NamedTuple):
    """A probe's scores on samples that it was not fitted on, with 95 % bootstrap intervals over prompts."""

    r2: Estimate
    """1 − squared error over that of the fit's mean."""
    spearman: Estimate
    gain: Estimate | None
    """R² of the first probe minus this one's, paired; `None` for the first."""


def scored(
    probes: Mapping[str, Probe], samples: Samples, judged: Int[Tensor, " chosen"], resamples: int = 2000, seed: int = 0
) -> dict[str, Scored]:
    """Scores of probes on some samples; the first is compared with the others."""
    y = torch.tensor(samples.rewards, dtype=torch.float64)[judged]
    owner = samples.owner[judged].unique(return_inverse=True)[1]
    weights = clustered(owner, resamples, seed)
    found: dict[str, Scored] = {}
    first: tuple[float, Tensor] | None = None
    for name, probe in probes.items():
        guess = probe.predicted[judged]
        error, total = (guess - y).square(), (y - probe.mean).square()
        value = 1 - float(error.sum() / total.sum()) if float(total.sum()) else 0.0
        drawn = 1 - (weights @ error) / (weights @ total).clamp_min(1e-300)
        order = ranks(torch.stack([guess, y]))
        rank = correlations(order[:1], order[1], weights)[0].tolist()
        gain = None if first is None else Estimate(*percentiles(first[0] - value, first[1] - drawn))
        first = first or (value, drawn)
        found[name] = Scored(Estimate(*percentiles(value, drawn)), Estimate(*rank), gain)
    return found
