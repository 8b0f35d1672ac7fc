"""Correlation with reward: permutation tests are exact, false features stay below q, planted ones are found."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from unsleep.base.stats import benjamini_hochberg, clustered, correlations, ranks, spearman
from unsleep.core import BadInput, Site
from unsleep.rewards.correlated import Correlated, CorrelationConfig, correlated
from unsleep.rewards.permutation import Design, one_sided, permutation_test, residual, shuffles, stages
from unsleep.rewards.pooling import Tokens
from unsleep.rewards.probes import bag_of_words, fit_probe, linear_reward, scored
from unsleep.rewards.samples import Samples

SITES = (Site(1), Site(1, "mlp"))
QUICK = CorrelationConfig(resamples=200)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sparse(samples: int, features: int, seed: int = 0) -> Tensor:
    """Pooled features that fire on about half of the samples, in three poolings that agree in part."""
    g = generator(seed)
    peak = torch.randn(samples, features, generator=g).relu()
    mean = peak * torch.rand(samples, features, generator=g)
    last = peak * (torch.rand(samples, features, generator=g) < 0.5)
    return torch.stack([peak, mean, last])


def world(rewards: Tensor, each: int = 1, topics: int = 4) -> tuple[Samples, Tokens]:
    """Samples with these rewards, `each` for a prompt, of random lengths."""
    n = len(rewards)
    prompts = [f"question {i // each}" for i in range(n)]
    lengths = torch.randint(3, 20, (n,), generator=generator(5))
    rows = [[0] * (4 + i % 3 + int(length)) for i, length in enumerate(lengths)]
    named = [f"topic {i // each % topics}" for i in range(n)]
    samples = Samples.of(prompts, [f"word {i}" for i in range(n)], rewards.tolist(), named)
    return samples, Tokens(rows, torch.tensor([4 + i % 3 for i in range(n)]))


# Permutations


def test_p_values_are_those_of_all_permutations_with_ties_counted() -> None:
    x = torch.tensor([[0.0, 0, 0, 1, 1, 2, 5], [0, 0, 0, 0, 0, 0, 3], [1, 1, 1, 1, 1, 1, 1]])
    y = torch.tensor([0.0, 0, 1, 1, 2, 2, 2])
    design = Design.of(y, torch.arange(7), torch.zeros(0, 7))
    columns = design.columns(x[None])
    found = permutation_test(lambda ids: columns[:, ids], 3, design, 30_000)
    torch.testing.assert_close(found.r[0], spearman(x, y))
    for i in (0, 1):
        every = torch.tensor(list(itertools.permutations(range(7))))
        r = spearman(ranks(y[every]), x[i]).abs()
        exact = float((r >= float(found.r[0, i].abs()) - 1e-9).double().mean())
        assert float(found.p[i]) == pytest.approx(exact, abs=0.02)
    assert (float(found.p[2]), int(found.draws[2])) == (1, 0), "a constant feature is not tested"


def test_only_small_p_values_see_many_permutations() -> None:
    y = torch.randn(40, generator=generator())
    x = torch.cat([y[None], torch.randn(20, 40, generator=generator(1))])
    design = Design.of(y, torch.arange(40), torch.zeros(0, 40))
    columns = design.columns(x[None])
    found = permutation_test(lambda ids: columns[:, ids], 21, design, 5000)
    assert float(found.p[0]) == pytest.approx(1 / 5001)
    assert int((found.draws == 1000).sum()) > 15
    assert stages(1000) == [1000]
    assert stages(500) == [500]


def test_many_rewarded_features_end_the_draws() -> None:
    y = torch.randn(60, generator=generator())
    x = torch.cat(
        [y + 0.1 * torch.randn(200, 60, generator=generator(1)), torch.randn(200, 60, generator=generator(2))]
    )
    design = Design.of(y, torch.arange(60), torch.zeros(0, 60))
    columns = design.columns(x[None])
    found = permutation_test(lambda ids: columns[:, ids], 400, design, 100_000, level=0.05)
    assert int(found.draws.max()) == 1000
    assert bool((benjamini_hochberg(found.p)[:200] <= 0.05).all())


def test_the_strongest_pooling_is_paid_for() -> None:
    n, features = 60, 400
    y = torch.randn(n, generator=generator())
    x = torch.randn(3, features, n, generator=generator(1))
    design = Design.of(y, torch.arange(n), torch.zeros(0, n))
    columns = design.columns(x)
    p = permutation_test(lambda ids: columns[:, ids], features, design, 1000).p
    assert abs(float((p <= 0.1).double().mean()) - 0.1) < 0.05
    assert abs(float(p.mean()) - 0.5) < 0.05


def test_samples_of_one_prompt_count_as_dependent() -> None:
    prompts, each, features = 24, 8, 300
    owner = torch.arange(prompts).repeat_interleave(each)
    y = torch.randn(prompts, generator=generator())[owner] + 0.01 * torch.randn(prompts * each, generator=generator(1))
    x = torch.randn(features, prompts, generator=generator(2))[:, owner]
    shares: list[float] = []
    for told in (owner, torch.arange(len(owner))):
        design = Design.of(y, told, torch.zeros(0, len(y)))
        columns = design.columns(x[None])
        p = permutation_test(lambda ids, c=columns: c[:, ids], features, design, 1000).p
        shares.append(float((p <= 0.05).double().mean()))
    assert shares[0] < 0.12
    assert shares[1] > 0.3, "samples that trade places alone look independent"


def test_shuffles_move_whole_prompts_of_equal_size() -> None:
    owner = torch.tensor([3, 3, 7, 7, 9, 1, 1, 1])
    drawn = shuffles(owner, 500, generator())
    assert bool((drawn.sort(1).values == torch.arange(8)).all())
    assert bool((drawn[:, 4] == 4).all()), "the only prompt with one sample"
    assert {tuple(sorted(row)) for row in drawn[:, 5:].tolist()} == {(5, 6, 7)}
    assert {tuple(row) for row in drawn[:, :2].tolist()} == {(0, 1), (1, 0), (2, 3), (3, 2)}


def test_covariates_are_partialled_out_and_a_function_of_them_is_not_tested() -> None:
    z = torch.randn(2, 50, generator=generator())
    y = z[0] * 3 + torch.randn(50, generator=generator(1))
    design = Design.of(y, torch.arange(50), ranks(z))
    x = torch.stack([z[0], z[0] + 0.5 * torch.randn(50, generator=generator(2))])
    found = design.columns(x[None])[0]
    assert float(found[0].abs().max()) == 0
    basis = torch.cat([torch.ones(1, 50, dtype=torch.float64), ranks(z)])
    left = [
        v - basis.T @ torch.linalg.lstsq(basis.T, v[:, None]).solution[:, 0] for v in (ranks(x)[1], ranks(y[None])[0])
    ]
    expected = torch.nn.functional.cosine_similarity(left[0], left[1], dim=0)
    torch.testing.assert_close(found[1] @ design.y, expected)
    assert float(residual(torch.ones(1, 50, dtype=torch.float64), design.nuisance).abs().max()) == 0


def test_rewards_and_samples_that_cannot_be_tested_are_refused() -> None:
    with pytest.raises(BadInput, match="all 20 rewards are 1"):
        Design.of(torch.ones(20), torch.arange(20), torch.zeros(0, 20))
    with pytest.raises(BadInput, match="constant given the covariates"):
        Design.of(torch.arange(20.0), torch.arange(20), torch.arange(20.0)[None])
    with pytest.raises(BadInput, match="degrees of freedom"):
        Design.of(torch.arange(20.0), torch.arange(20), torch.eye(20))


def test_one_sided_p_values_ask_for_the_sign() -> None:
    y = torch.randn(30, generator=generator())
    design = Design.of(y, torch.arange(30), torch.zeros(0, 30))
    r, p = one_sided(design.columns(y.expand(2, 30)), torch.tensor([1.0, -1.0]), design)
    assert r.tolist() == pytest.approx([1, 1])
    assert p.tolist() == pytest.approx([1 / 1001, 1], abs=1e-3)


# Shared statistics


def test_adjusted_p_values_reject_as_the_procedure_does() -> None:
    p = torch.rand(50, generator=generator()) ** 3
    adjusted = benjamini_hochberg(p)
    ordered = sorted(p.tolist())
    for q in (0.01, 0.05, 0.2):
        bars = [value for i, value in enumerate(ordered, 1) if value <= q * i / 50]
        assert set((adjusted <= q).nonzero()[:, 0].tolist()) == set(
            (p <= max(bars, default=-1)).nonzero()[:, 0].tolist()
        )


def test_correlations_of_clusters_have_wider_intervals() -> None:
    owner = torch.arange(20).repeat_interleave(5)
    y = torch.randn(20, generator=generator())[owner]
    x = (y + torch.randn(20, generator=generator(1))[owner])[None]
    alone, whole = (correlations(x, y, clustered(o, 500)) for o in (torch.arange(100), owner))
    assert float(alone[0, 0]) == pytest.approx(float(torch.corrcoef(torch.stack([x[0], y]))[0, 1]), abs=1e-5)
    assert float(whole[0, 2] - whole[0, 1]) > 1.5 * float(alone[0, 2] - alone[0, 1])
    assert correlations(torch.zeros(1, 100), y, clustered(owner, 50)).tolist() == [[0, 0, 0]]


# Selection


def found_in(rewards: Tensor, pooled: Tensor, each: int = 1, config: CorrelationConfig = QUICK) -> list[Correlated]:
    samples, tokens = world(rewards, each)
    half = pooled.shape[2] // 2
    parts = dict(zip(SITES, (pooled[..., :half], pooled[..., half:]), strict=True))
    return list(correlated(parts, samples, tokens, config).sites.values())


@pytest.mark.parametrize("each", [1, 2])
def test_random_rewards_yield_at_most_q_false_features(each: int) -> None:
    n, draws = 120, 20
    pooled = sparse(n, 200)
    samples, tokens = world(torch.zeros(n) + torch.arange(n), each)
    base = tokens.length.double() / 5 + torch.tensor([float(t[-1]) for t in samples.topics or ()])
    false, any_selected = 0, 0
    for seed in range(draws):
        prompt = torch.randn(n, generator=generator(100 + seed))[samples.owner]
        rewards = base + prompt + torch.randn(n, generator=generator(200 + seed))
        found = found_in(rewards, pooled, each)
        false += sum(int(x.replicated.sum()) for x in found)
        any_selected += any(bool(x.selected.any()) for x in found)
    assert false / draws <= QUICK.q
    assert any_selected <= 4


def test_a_planted_feature_is_found_with_its_sign_and_pooling() -> None:
    n, pooled = 160, sparse(160, 200)
    pooled[:, :, 150] = 0
    rewards = 4 * pooled[2, :, 7] - 2 * pooled[0, :, 130] + 0.5 * torch.randn(n, generator=generator(3))
    first, second = found_in(rewards, pooled)
    assert first.kept() == (7,)
    assert second.kept() == (30,)
    assert (first.kept(sign=1), first.kept(sign=-1), second.kept(sign=-1)) == ((7,), (), (30,))
    assert first.kept(least=0.99) == ()
    assert int(first.pooling[7]) == 2
    value, low, high = first.scored[7].tolist()
    assert 0 < low <= value <= high
    assert value == pytest.approx(float(first.r[2, 2, 7]), abs=1e-5)
    assert bool(second.scored[0].isnan().all())
    assert not bool(second.tested[50]), "a dead feature"
    assert (float(second.p[50]), float(second.r[:, :, 50].abs().max())) == (1, 0)
    assert second.lowest(1) == (30,)
    assert 30 not in second.lowest(3, second.kept())
    assert len(second.lowest(3, second.kept())) == 3


def test_a_feature_of_the_topic_is_not_found_where_topics_are_given() -> None:
    n, pooled = 120, sparse(120, 40)
    samples, tokens = world(torch.arange(120.0))
    topic = torch.tensor([float(t[-1]) for t in samples.topics or ()])
    pooled[:, :, 3] = topic + 0.3 * torch.rand(n, generator=generator(1))
    rewards = (topic + 0.3 * torch.randn(n, generator=generator(2))).tolist()
    told = Samples.of(samples.prompts, samples.outputs, rewards, samples.topics)
    for partial, kept in ((("topic",), ()), ((), (3,))):
        config = CorrelationConfig(partial=partial, resamples=100)
        found = correlated({SITES[0]: pooled}, told, tokens, config)
        assert found.sites[SITES[0]].kept() == kept
        assert found.partialled == partial


def test_parts_hold_whole_prompts_and_too_few_are_refused() -> None:
    samples, _ = world(torch.arange(96.0), each=3)
    parts = samples.parts((0.5, 0.25, 0.25))
    owners = [set(samples.owner[places].tolist()) for places in parts]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 32
    assert sorted(torch.cat(list(parts)).tolist()) == list(range(96))
    with pytest.raises(BadInput, match="part C has 3 of 32"):
        samples.parts((0.5, 0.4, 0.1))
    for wrong, told in (({"q": 0.0}, "q is 0"), ({"shares": (1.0, 0.0, 0.0)}, "shares")):
        with pytest.raises(BadInput, match=told):
            CorrelationConfig(**wrong)


# Linear rewards


def test_a_probe_is_ridge_regression_and_a_linear_function_of_pooled_features() -> None:
    n, pooled = 60, sparse(60, 30)
    rewards = 2 * pooled[0, :, 4] - pooled[1, :, 9] + 0.1 * torch.randn(n, generator=generator(3))
    fit = torch.arange(n) < 45
    probe = fit_probe(list(pooled), rewards, fit, torch.arange(n))
    x = pooled.permute(1, 0, 2).flatten(1).double()
    mean, deviation = x[fit].mean(0), x[fit].std(0, correction=0)
    z = (x - mean) / deviation
    penalty = probe.penalty * float(z[fit].square().sum(1).mean())
    y = rewards.double()
    w = torch.linalg.solve(z[fit].T @ z[fit] + penalty * torch.eye(z.shape[1]), z[fit].T @ (y[fit] - y[fit].mean()))
    torch.testing.assert_close(probe.predicted, z @ w + y[fit].mean(), rtol=1e-6, atol=1e-6)
    function = linear_reward(probe, {Site(1): pooled}, fit)
    torch.testing.assert_close(function({Site(1): pooled}), probe.predicted, rtol=1e-6, atol=1e-6)
    assert probe.columns == 90


def test_probes_are_scored_on_samples_that_they_have_not_seen() -> None:
    n = 120
    words = ["good" if i % 3 == 0 else "bad" if i % 3 == 1 else "plain" for i in range(n)]
    rewards = torch.tensor([{"good": 1.0, "bad": -1.0, "plain": 0.0}[w] for w in words])
    rewards = rewards + 0.2 * torch.randn(n, generator=generator())
    samples = Samples.of([f"q{i}" for i in range(n)], [f"it is {w}" for w in words], rewards.tolist())
    fit = torch.arange(n) < 90
    bag = bag_of_words(samples.outputs, fit)
    assert bag.shape == (n, 5)
    probes = {
        "words": fit_probe([bag], rewards, fit, samples.owner),
        "noise": fit_probe([torch.randn(n, 40, generator=generator(1))], rewards, fit, samples.owner),
        "nothing": fit_probe([torch.zeros(n, 3)], rewards, fit, samples.owner),
    }
    found = scored(probes, samples, torch.arange(90, n), resamples=200)
    assert found["words"].r2.low > 0.7
    assert found["words"].spearman.low > 0.7
    assert found["words"].gain is None
    assert abs(found["noise"].r2.value) < 0.2
    assert found["nothing"].r2.value == pytest.approx(0, abs=1e-9)
    gain = found["noise"].gain
    assert gain is not None
    assert gain.low > 0.4
    assert bag_of_words(["a", "b"], torch.tensor([True, True])).shape == (2, 0)
