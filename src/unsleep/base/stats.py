"""Confidence intervals: every reported rate or mean has one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
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


def percentiles(value: float, drawn: Float[Tensor, " resample"]) -> tuple[float, float, float]:
    """A value with the 95 % percentile interval of its resamples, in float64, which holds the value itself."""
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
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
