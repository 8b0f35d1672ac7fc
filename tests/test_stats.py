"""Intervals hold what they should, as often as they say."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import scipy.stats
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from unsleep.base.stats import Z, bootstrap, correlation, spearman, wilson
from unsleep.core import BadInput

COUNTS = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
VALUES = st.lists(st.floats(-100, 100), min_size=1, max_size=30)


def test_z_is_that_of_95_percent_on_two_sides():
    assert NormalDist().inv_cdf(0.975) == pytest.approx(Z, abs=1e-12)


@given(COUNTS)
def test_wilson_ends_are_the_rates_that_the_score_test_just_allows(counts: tuple[int, int]):
    """Wilson 1927: the interval is all p with |rate − p| ≤ z √(p(1−p)/n)."""
    successes, n = counts
    rate = successes / n
    for end in wilson(successes, n):
        if 0 < end < 1:
            assert abs(rate - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n), abs=1e-9)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 200, 0.0, 0.01885),
        (200, 200, 0.98115, 1.0),
        (0, 1, 0.0, 0.79345),
        (81, 263, 0.25529, 0.36621),  # Newcombe 1998, table I, method 3: 0.2553 to 0.3662
        (15, 148, 0.06239, 0.16049),  # the same: 0.0624 to 0.1605
    ],
)
def test_wilson_gives_known_intervals(successes: int, n: int, low: float, high: float):
    assert wilson(successes, n) == (pytest.approx(low, abs=6e-6), pytest.approx(high, abs=6e-6))


@given(COUNTS)
def test_wilson_holds_the_rate_and_is_symmetric(counts: tuple[int, int]):
    successes, n = counts
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    mirrored = wilson(n - successes, n)
    assert mirrored == (pytest.approx(1 - high, abs=1e-12), pytest.approx(1 - low, abs=1e-12))


@given(COUNTS)
def test_wilson_rises_with_successes_and_narrows_with_n(counts: tuple[int, int]):
    successes, n = counts
    low, high = wilson(successes, n)
    wider_low, wider_high = wilson(2 * successes, 2 * n)
    assert wider_high - wider_low < high - low
    assume(successes < n)
    more = wilson(successes + 1, n)
    assert more[0] > low
    assert more[1] > high


@pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 2), (0, 0), (1, -5)])
def test_counts_that_cannot_be_are_refused(successes: int, n: int):
    with pytest.raises(BadInput, match=f"{successes} successes of {n}"):
        wilson(successes, n)


@given(VALUES)
def test_the_bootstrap_interval_holds_the_mean_and_lies_among_the_values(values: list[float]):
    mean, low, high = bootstrap(values, resamples=200)
    assert mean == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
    assert low <= mean <= high
    assert min(values) - 1e-9 <= low
    assert high <= max(values) + 1e-9


@given(st.floats(-100, 100), st.integers(1, 30))
def test_the_bootstrap_of_a_constant_has_no_width(value: float, n: int):
    assert bootstrap([value] * n, resamples=50) == pytest.approx((value,) * 3, abs=1e-12)


@given(VALUES, st.floats(-5, 5), st.floats(-5, 5), st.integers(0, 99))
def test_the_bootstrap_moves_with_shift_and_scale(values: list[float], shift: float, scale: float, seed: int):
    mean, low, high = bootstrap(values, resamples=100, seed=seed)
    ends = sorted((scale * low + shift, scale * high + shift))
    changed = bootstrap([scale * v + shift for v in values], resamples=100, seed=seed)
    assert changed == pytest.approx((scale * mean + shift, *ends), abs=1e-6)


def test_the_bootstrap_is_the_same_for_a_seed_and_another_for_another():
    values = torch.randn(40, generator=torch.Generator().manual_seed(0))
    before = torch.random.get_rng_state()
    assert bootstrap(values, seed=1) == bootstrap(values.tolist(), seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_bootstrap_has_the_width_of_the_central_limit():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, low, high = bootstrap(values, resamples=4000)
    half = Z * float(values.std()) / math.sqrt(400)
    assert (low - mean, high - mean) == pytest.approx((-half, half), rel=0.06)


def test_the_bootstrap_holds_the_true_mean_about_95_times_in_100():
    make = torch.Generator().manual_seed(0)
    samples = torch.empty(400, 60, dtype=torch.float64).exponential_(generator=make)  # mean 1, skewed as KL is
    held = sum(low <= 1.0 <= high for _, low, high in (bootstrap(s, resamples=400) for s in samples))
    assert 0.91 <= held / 400 <= 0.97


def test_nothing_to_average_is_refused():
    with pytest.raises(BadInput, match="no values to average"):
        bootstrap([])


def test_correlation_is_scipys_and_its_interval_holds_it():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, generator=g)
    y = 0.5 * x + torch.randn(40, generator=g)
    value, low, high = correlation(x, y)
    assert value == pytest.approx(float(scipy.stats.pearsonr(x.numpy(), y.numpy()).statistic), abs=1e-6)
    assert low < value < high
    assert float(spearman(x[None], y)[0]) == pytest.approx(float(scipy.stats.spearmanr(x.numpy(), y.numpy()).statistic))
    with pytest.raises(BadInput, match="neither side constant"):
        correlation(x, torch.ones(40))
    alone = correlation(x, y, group=range(40))
    assert alone == pytest.approx((value, low, high))
    whole = correlation(x.repeat(9), y.repeat(9), group=[*range(40)] * 9)
    assert whole == pytest.approx((value, low, high)), "nine copies of a pair in one group tell no more than the pair"
    copied = correlation(x.repeat(9), y.repeat(9))
    assert copied[2] - copied[1] < 0.6 * (high - low)
