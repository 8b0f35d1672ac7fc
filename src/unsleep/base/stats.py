"""Confidence intervals: every reported rate or mean has one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unsleep.core import BadInput


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


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


def flat(values: Sequence[float] | Tensor) -> Float[Tensor, " value"]:
    """Values in float64 on the CPU, where their resamples are drawn."""
    return torch.as_tensor(values, dtype=torch.float64, device="cpu").flatten()


def paired_rates(before: Sequence[float] | Tensor, after: Sequence[float] | Tensor) -> tuple[float, float, float]:
    """Difference after − before of two rates on the same prompts with its 95 % interval (Newcombe 1998, Stat. Med. 17).

    Method 10 there: Wilson limits of both rates and the correlation of the outcomes, so that the interval has a width
    also where every prompt changes alike. Outcomes are 0 and 1. Raises `BadInput` for unequal numbers, or none.
    """
    x, y = (flat(each) for each in (before, after))
    n = len(x)
    if len(y) != n or not n:
        raise BadInput(f"{n} outcomes before and {len(y)} after; expected equal numbers, at least 1")
    both, first, second = (float(each.sum()) for each in (x * y, x, y))
    margins = first * (n - first) * second * (n - second)
    cross = both * (n - first - second + both) - (first - both) * (second - both)
    phi = (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(margins) if margins else 0.0
    (low1, high1), (low2, high2) = wilson(round(first), n), wilson(round(second), n)
    p1, p2 = first / n, second / n

    def half(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    difference = (second - first) / n
    low, high = difference - half(p2 - low2, high1 - p1), difference + half(high2 - p2, p1 - low1)
    return difference, max(-1.0, low), min(1.0, high)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """One-sided exact p-value that outcomes are no more frequent after than before, on the same prompts.

    A sign test of the prompts whose outcome changed (McNemar 1947, Psychometrika 12): 1 where none did. Raises
    `BadInput` for unequal numbers.

    >>> mcnemar([False] * 10, [True] * 10) == 0.5**10
    True
    """
    if len(before) != len(after):
        raise BadInput(f"{len(before)} outcomes before and {len(after)} after; expected equal numbers")
    gained, lost = (sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((after, before), (before, after)))
    n = gained + lost
    return sum(math.comb(n, k) for k in range(gained, n + 1)) / 2**n


def bootstrap(values: Sequence[float] | Tensor, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `values` with its 95 % percentile bootstrap interval (Efron 1979, Ann. Stat. 7), resampling prompts.

    For a paired comparison pass the differences.
    """
    x = flat(values)
    if len(x) == 0:
        raise BadInput("no values to average; expected at least 1")
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(x), (resamples, len(x)), generator=generator)
    return percentiles(float(x.mean()), x[index].mean(1))


def bootstrap_each(
    values: Float[Tensor, "prompt column"], resamples: int = 1000, seed: int = 0
) -> Float[Tensor, "column 3"]:
    """`bootstrap` of every column, all of them on the same resampled prompts: value, low and high.

    Raises `BadInput` for no prompts.
    """
    n = len(values)
    if not n:
        raise BadInput("no values to average; expected at least 1")
    x = values.double().cpu()
    means = resampled(n, resamples, seed) @ x
    ends = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    mean = x.mean(0)
    return torch.stack([mean, torch.minimum(ends[0], mean), torch.maximum(ends[1], mean)], 1)


def bootstrap_both(
    values: Float[Tensor, "draw prompt"], resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean with its 95 % percentile bootstrap interval, resampling random draws and prompts (Owen 2007, AoAS 1).

    Raises `BadInput` for no values.
    """
    if not values.numel():
        raise BadInput("no values to average; expected at least 1")
    x = values.double().cpu()
    draws, prompts = (resampled(n, resamples, seed + i) for i, n in enumerate(x.shape))
    return percentiles(float(x.mean()), ((draws @ x) * prompts).sum(1))


def resampled(n: int, resamples: int, seed: int) -> Float[Tensor, "resample n"]:
    """Weights of `n` items in each bootstrap resample; rows sum to 1."""
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(resamples, n, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / n, dtype=torch.float64))


def clustered(owner: Int[Tensor, " item"], resamples: int, seed: int = 0) -> Float[Tensor, "resample item"]:
    """Weights of items in each bootstrap resample of their clusters, such as the samples of a prompt; rows sum to 1.

    `owner` is the number of each item's cluster, from 0.
    """
    weights = resampled(int(owner.max()) + 1, resamples, seed)[:, owner.cpu()]
    return weights / weights.sum(1, keepdim=True)


def correlations(
    x: Float[Tensor, "column item"], y: Float[Tensor, " item"], weights: Float[Tensor, "resample item"]
) -> Float[Tensor, "column 3"]:
    """Pearson correlation of every row of `x` with `y`, and its 95 % percentile bootstrap interval.

    `weights` are those of `clustered` or `resampled`. A constant row has correlation 0, also within a resample.
    """
    x, y = (each - each.mean(-1, keepdim=True) for each in (x.double().cpu(), y.double().cpu()))
    drawn = _weighted_correlation(x, y, weights)
    whole = _weighted_correlation(x, y, torch.full_like(weights[:1], 1 / len(y)))[:, 0]
    ends = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=1)
    return torch.stack([whole, torch.minimum(ends[0], whole), torch.maximum(ends[1], whole)], 1)


def _weighted_correlation(
    x: Float[Tensor, "column item"], y: Float[Tensor, " item"], weights: Float[Tensor, "resample item"]
) -> Float[Tensor, "column resample"]:
    to, mean = weights.T, x @ weights.T
    others = y @ to
    covariance = (x * y) @ to - mean * others
    spread = (x.square() @ to - mean.square()).clamp_min(0) * (y.square() @ to - others.square()).clamp_min(0)
    floor = 1e-24 * x.square().mean(1, keepdim=True).clamp_min(1e-300) * y.square().mean().clamp_min(1e-300)
    return torch.where(spread > floor, covariance / spread.clamp_min(1e-300).sqrt(), 0.0).clamp(-1, 1)


def benjamini_hochberg(p: Float[Tensor, " test"]) -> Float[Tensor, " test"]:
    """Adjusted p-values: rejecting the tests with at most q keeps the false discovery rate at q.

    Benjamini & Hochberg 1995, J. R. Stat. Soc. B 57, for independent or positively dependent tests.

    >>> benjamini_hochberg(torch.tensor([0.01, 0.5, 0.02])).tolist()
    [0.03, 0.5, 0.03]
    """
    order = p.double().argsort(descending=True)
    rank = torch.arange(len(p), 0, -1, dtype=torch.float64, device=p.device)
    adjusted = torch.empty(len(p), dtype=torch.float64, device=p.device)
    adjusted[order] = (p.double()[order] * len(p) / rank).cummin(0).values.clamp_max(1)
    return adjusted


def spearman(x: Float[Tensor, "column item"], y: Float[Tensor, " item"]) -> Float[Tensor, " column"]:
    """Spearman's rank correlation of every row of `x` with `y`, ties at their mean rank; 0 for a constant row."""
    one, other = (each - each.mean(-1, keepdim=True) for each in (ranks(x), ranks(y[None])))
    size = (one.square().sum(1) * other.square().sum(1)).sqrt()
    return torch.where(size > 0, (one * other).sum(1) / size.clamp_min(1e-12), torch.zeros_like(size))


def ranks(x: Float[Tensor, "column item"]) -> Float[Tensor, "column item"]:
    """Rank of each value in its row, from 0, ties at their mean, in float64."""
    x = x.contiguous()
    ordered = x.sort(dim=1).values
    return (torch.searchsorted(ordered, x) + torch.searchsorted(ordered, x, right=True)).double() / 2


def ratio(
    top: Sequence[float] | Tensor, bottom: Sequence[float] | Tensor, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `top` over mean of `bottom`, with its 95 % percentile bootstrap interval, resampling prompts in pairs.

    Resamples whose bottom mean is 0 are left out. Raises `BadInput` where the lengths differ or are 0, or the mean of
    `bottom` is 0.
    """
    x, y = (flat(values) for values in (top, bottom))
    if len(x) != len(y) or not len(x) or float(y.mean()) == 0:
        raise BadInput(f"{len(x)} values over {len(y)}; expected equal numbers, at least 1, and a non-zero denominator")
    index = torch.randint(len(x), (resamples, len(x)), generator=torch.Generator().manual_seed(seed))
    below = y[index].mean(1)
    return percentiles(float(x.mean() / y.mean()), (x[index].mean(1) / below)[below != 0])


def correlation(
    x: Sequence[float] | Tensor,
    y: Sequence[float] | Tensor,
    resamples: int = 2000,
    seed: int = 0,
    *,
    group: Sequence[int] | Tensor | None = None,
) -> tuple[float, float, float]:
    """Pearson correlation with its 95 % percentile bootstrap interval, resampling pairs, or whole groups of pairs.

    Args:
        group: number of the group that each pair is in, such as the text that a token is of.

    Resamples in which one of the two is constant are left out. Raises `BadInput` where the lengths differ, there are
    fewer than 3 pairs, or one is constant.
    """
    one, other = (flat(values) for values in (x, y))
    n = len(one)
    if len(other) != n or n < 3 or any(bool((side == side[0]).all()) for side in (one, other)):
        raise BadInput(
            f"{n} and {len(other)} values cannot be correlated; expected at least 3 pairs, and neither side constant"
        )
    one, other = one - one.mean(), other - other.mean()
    each = torch.stack([torch.ones_like(one), one, other, one * one, other * other, one * other], 1)
    if group is not None:
        places = torch.as_tensor(group, device="cpu").flatten().unique(return_inverse=True)[1]
        each = each.new_zeros(int(places.max()) + 1, each.shape[1]).index_add(0, places, each)
    value = float(_pearson(each.sum(0, keepdim=True))[0])
    drawn = _pearson(resampled(len(each), resamples, seed) @ each)
    usable = drawn[drawn.isfinite()]
    return percentiles(value, usable if len(usable) else torch.tensor([value], dtype=torch.float64))


def _pearson(sums: Float[Tensor, "resample 6"]) -> Float[Tensor, " resample"]:
    """Correlation by the sums of 1, x, y, x², y² and xy; not a number where x or y is constant."""
    n, x, y, xx, yy, xy = sums.T
    spreads = [torch.where(n * aa - a * a > 1e-12 * n * aa, n * aa - a * a, torch.nan) for a, aa in ((x, xx), (y, yy))]
    return (n * xy - x * y) / (spreads[0] * spreads[1]).sqrt()


def percentiles(value: float, drawn: Float[Tensor, " resample"]) -> tuple[float, float, float]:
    """A value with the 95 % percentile interval of its resamples, in float64, which holds the value itself."""
    low, high = torch.quantile(drawn, drawn.new_tensor([0.025, 0.975])).tolist()
    return value, min(low, value), max(high, value)


def balanced_accuracy(right: tuple[int, int], n: tuple[int, int]) -> tuple[float, float, float]:
    """Mean of two classes' accuracies with its 95 % interval.

    The interval combines the Wilson intervals of both rates (Zou & Donner 2008, Stat. Med. 27): unlike a bootstrap's it
    has a width where every answer is right.

    >>> [round(x, 2) for x in balanced_accuracy((10, 10), (10, 10))]
    [1.0, 0.8, 1.0]
    """
    rates = [hits / of for hits, of in zip(right, n, strict=True)]
    ends = [wilson(hits, of) for hits, of in zip(right, n, strict=True)]
    value = sum(rates) / 2
    below = math.hypot(*(rate - low for rate, (low, _) in zip(rates, ends, strict=True))) / 2
    above = math.hypot(*(high - rate for rate, (_, high) in zip(rates, ends, strict=True))) / 2
    return value, max(0.0, value - below), min(1.0, value + above)
