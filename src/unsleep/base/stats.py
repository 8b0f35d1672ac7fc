"""Confidence intervals: every reported rate or mean has one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from unsleep.core import BadInput

Z = 1.959963984540054
"""The 97.5 % point of the standard normal: two-sided 95 % intervals throughout."""


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate (Wilson 1927, J. Am. Stat. Assoc. 22).

    >>> [round(x, 3) for x in wilson(0, 200)]
    [0.0, 0.019]
    """
    if not 0 <= successes <= n or n < 1:
        raise BadInput(f"{successes} successes of {n}; expected 0 to n, and n at least 1")
    rate, square = successes / n, Z * Z / n
    centre = (rate + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(rate * (1 - rate) / n + square / (4 * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == n else min(1.0, centre + half)


def bootstrap(values: Sequence[float] | Tensor, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `values` with its 95 % percentile bootstrap interval (Efron 1979, Ann. Stat. 7), resampling prompts.

    For a paired comparison pass the differences.
    """
    x = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(x) == 0:
        raise BadInput("no values to average; expected at least 1")
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(x), (resamples, len(x)), generator=generator)
    return percentiles(float(x.mean()), x[index].mean(1))


def ratio(
    top: Sequence[float] | Tensor, bottom: Sequence[float] | Tensor, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `top` over mean of `bottom`, with its 95 % percentile bootstrap interval, resampling prompts in pairs.

    Resamples whose bottom mean is 0 are left out. Raises `BadInput` where the lengths differ or are 0, or the mean of
    `bottom` is 0.
    """
    x, y = (torch.as_tensor(values, dtype=torch.float64).flatten() for values in (top, bottom))
    if len(x) != len(y) or not len(x) or float(y.mean()) == 0:
        raise BadInput(f"{len(x)} values over {len(y)}; expected equal numbers, at least 1, and a non-zero denominator")
    index = torch.randint(len(x), (resamples, len(x)), generator=torch.Generator().manual_seed(seed))
    below = y[index].mean(1)
    return percentiles(float(x.mean() / y.mean()), (x[index].mean(1) / below)[below != 0])


def correlation(
    x: Sequence[float] | Tensor, y: Sequence[float] | Tensor, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Pearson correlation with its 95 % percentile bootstrap interval, resampling pairs.

    Resamples in which one of the two is constant are left out. Raises `BadInput` where the lengths differ, there are
    fewer than 3 pairs, or one is constant.
    """
    both = torch.stack([torch.as_tensor(values, dtype=torch.float64).flatten() for values in (x, y)])
    if both.shape[1] < 3 or bool((both.std(1) == 0).any()):
        raise BadInput(f"{both.shape[1]} pairs cannot be correlated; expected at least 3, and neither side constant")
    index = torch.randint(both.shape[1], (resamples, both.shape[1]), generator=torch.Generator().manual_seed(seed))
    value = float(_pearson(both[:, None])[0])
    drawn = _pearson(both[:, index])
    usable = drawn[drawn.isfinite()]
    return percentiles(value, usable if len(usable) else torch.tensor([value], dtype=torch.float64))


def rank_correlation(x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; raises `BadInput` as `correlation` does."""
    both = (torch.as_tensor(values, dtype=torch.float64).flatten().numpy() for values in (x, y))
    return correlation(*(torch.from_numpy(rankdata(side)) for side in both), resamples=1)[0]


def _pearson(both: Float[Tensor, "2 resample pair"]) -> Float[Tensor, " resample"]:
    """Correlation of the two sides in each resample; not finite where one is constant."""
    centred = both - both.mean(-1, keepdim=True)
    squares = (centred * centred).sum(-1)
    return (centred[0] * centred[1]).sum(-1) / (squares[0] * squares[1]).sqrt()


def percentiles(value: float, drawn: Float[Tensor, " resample"]) -> tuple[float, float, float]:
    """A value with the 95 % percentile interval of its resamples, in float64, which holds the value itself."""
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return value, min(low, value), max(high, value)
