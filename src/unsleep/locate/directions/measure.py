"""Metrics of directions: held-out detection, random floors, cosine similarity and principal angles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unsleep.base.stats import percentiles, resampled, wilson
from unsleep.core import BadInput, check_classes
from unsleep.locate.directions.fit import Direction, Labelled


class HeldOut(NamedTuple):
    """Held-out detection metrics of a direction."""

    auroc: float
    """Probability that a positive token scores higher than a negative one; ties count half."""
    accuracy: float
    """Share of tokens classified correctly by the threshold."""
    margin: float
    """d′ (see `margins`), which ranks directions with perfect AUROC."""
    threshold: float
    """The most accurate threshold on the training tokens."""
    n: int
    """Number of held-out tokens."""


class Floor(NamedTuple):
    """Random directions on the same tokens, the baseline of every detector."""

    best: float
    """Highest held-out AUROC."""
    mean: float
    n: int
    """Number of directions."""


def scores(direction: Direction, x: Float[Tensor, "token d"]) -> Float[Tensor, " token"]:
    """(x − center) · v, with v the first row."""
    return (x.float() - direction.center) @ direction.vector[0]


def auroc(scores: Float[Tensor, " token"], labels: Bool[Tensor, " token"]) -> float:
    """Area under the ROC curve of one direction's scores (see `aurocs`)."""
    return float(aurocs(scores[None], labels)[0])


def aurocs(scores: Float[Tensor, "direction token"], labels: Bool[Tensor, " token"]) -> Float[Tensor, " direction"]:
    """Area under the ROC curve of each row of scores, ties counted half (Mann-Whitney U / n₊n₋), in float64.

    Raises `BadInput` for labels of a single class or of another length.
    """
    if scores.shape[1] != len(labels):
        raise BadInput(f"{scores.shape[1]} scores with {len(labels)} labels; expected one each")
    check_classes(labels)
    positive, negative = scores[:, labels].contiguous(), scores[:, ~labels].sort(dim=1).values
    below = torch.searchsorted(negative, positive)
    upto = torch.searchsorted(negative, positive, right=True)
    return (below + upto).double().sum(1) / (2 * positive.shape[1] * negative.shape[1])


def auroc_interval(
    triggered: Float[Tensor, " triggered"], clean: Float[Tensor, " clean"], resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """AUROC with its 95 % percentile bootstrap interval, resampling prompts within each class; ties count half.

    At 0 and 1, where a bootstrap has no width, the interval is Wilson's for the smaller class.
    """
    difference = triggered.double()[:, None] - clean.double()[None]
    wins = (difference > 0).double() + 0.5 * (difference == 0).double()
    weights = [resampled(n, resamples, seed + i) for i, n in enumerate(wins.shape)]
    means = ((weights[0] @ wins) * weights[1]).sum(1)
    value = float(wins.mean())
    if value in (0.0, 1.0):
        few = min(wins.shape)
        return value, *wilson(round(value * few), few)
    return percentiles(value, means)


def margins(scores: Float[Tensor, "direction token"], labels: Bool[Tensor, " token"]) -> Float[Tensor, " direction"]:
    """Mean difference of the classes in within-class standard deviations (d′, Green & Swets 1966), in float64.

    It distinguishes directions with perfect AUROC. Constant rows have 0. Raises `BadInput` as `aurocs` does.
    """
    if scores.shape[1] != len(labels):
        raise BadInput(f"{scores.shape[1]} scores with {len(labels)} labels; expected one each")
    check_classes(labels)
    high, low = scores[:, labels].double(), scores[:, ~labels].double()
    means = high.mean(1), low.mean(1)
    within = torch.cat([high - means[0][:, None], low - means[1][:, None]], dim=1).square().mean(1).sqrt()
    apart = means[0] - means[1]
    return torch.where(apart == 0, apart, apart / within.clamp_min(1e-12))


def best_threshold(scores: Float[Tensor, " token"], labels: Bool[Tensor, " token"]) -> float:
    """The most accurate threshold for the positive class, midway between two scores."""
    check_classes(labels)
    order = scores.argsort()
    ranked, truth = scores[order].double(), labels[order]
    # after i tokens: negatives below the cut and positives above it
    right = torch.cat([torch.zeros(1), (~truth).cumsum(0)]) + torch.cat(
        [truth.flip(0).cumsum(0).flip(0), torch.zeros(1)]
    )
    ends = torch.cat([ranked[:1] - 1, ranked, ranked[-1:] + 1])
    middles = (ends[1:] + ends[:-1]) / 2
    splits = torch.cat([torch.tensor([True]), ranked[1:] > ranked[:-1], torch.tensor([True])])
    return float(middles[torch.where(splits, right, -1.0).argmax()])


def held_out(direction: Direction, train: Labelled, test: Labelled) -> HeldOut:
    """AUROC, accuracy and margin on `test`, with the threshold from `train`."""
    _check_width(direction, test.x)
    threshold = best_threshold(scores(direction, train.x), train.y)
    found = scores(direction, test.x)
    right = (found > threshold) == test.y
    margin = float(margins(found[None], test.y)[0])
    return HeldOut(auroc(found, test.y), float(right.double().mean()), margin, threshold, len(test.y))


def random_floor(train: Labelled, test: Labelled, n: int = 1000, seed: int = 0) -> Floor:
    """Held-out AUROC of `n` random Gaussian directions, each signed by the training tokens, in one matmul.

    The best is chosen on the held-out tokens themselves, which makes it a conservative baseline.
    """
    if n < 1:
        raise BadInput(f"{n} random directions were asked for; expected at least 1")
    drawn = torch.randn(n, train.x.shape[1], generator=torch.Generator().manual_seed(seed))
    drawn = torch.nn.functional.normalize(drawn, dim=1)
    gap = train.x[train.y].mean(0) - train.x[~train.y].mean(0)
    signs = torch.where(drawn @ gap < 0, -1.0, 1.0)
    found = aurocs((drawn * signs[:, None]) @ (test.x - train.x.mean(0)).T, test.y)
    return Floor(float(found.max()), float(found.mean()), n)


def cosines(directions: Sequence[Direction]) -> Float[Tensor, "direction direction"]:
    """Cosine of every pair of directions; of two subspaces, the cosine of their smallest principal angle.

    Raises `BadInput` for different widths.
    """
    for d in directions[1:]:
        _check_width(directions[0], d.vector)
    out = torch.ones(len(directions), len(directions))
    for i, a in enumerate(directions):
        for j, b in enumerate(directions[:i]):
            both = a.vector @ b.vector.T
            value = both[0, 0] if both.numel() == 1 else torch.linalg.matrix_norm(both, 2)
            out[i, j] = out[j, i] = value
    return out.clamp(-1, 1)


def _check_width(direction: Direction, x: Tensor) -> None:
    if direction.vector.shape[1] != x.shape[1]:
        raise BadInput(
            f"a direction of width {direction.vector.shape[1]} at {direction.site} with activations of width "
            f"{x.shape[1]}; expected one width"
        )
