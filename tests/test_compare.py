"""What fits and what matches: metrics equal a count one token at a time, features are matched, a warm start goes on."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.checks import as_in_use
from support.dictionaries import same
from support.training import ARCHITECTURES, acts, config_of, in_pieces, planted
from unsleep.core import ActivationStream, BadInput, Site
from unsleep.dictionaries.architectures.batchtopk import BatchTopK
from unsleep.dictionaries.architectures.gated import Gated
from unsleep.dictionaries.architectures.jumprelu import JumpReLU
from unsleep.dictionaries.architectures.matryoshka import Matryoshka
from unsleep.dictionaries.architectures.standard import Standard
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.compare import match, rotation
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.metrics import EDGES, fit
from unsleep.dictionaries.train import train
from unsleep.dictionaries.trainer import Trainer, config_for

D, F = 6, 20


def coder(architecture: str, seed: int = 0, *, transcoder: bool = False, unit: bool = True, **changes: Any) -> Coder:
    """Random weights of any architecture; about a fifth of its features fire on a token."""
    g = torch.Generator().manual_seed(seed)
    d_out = 4 if transcoder else D
    rows = torch.randn(F, d_out, generator=g)
    own: dict[str, Any] = {
        "site": Site(3),
        "model": "model",
        "W_enc": torch.randn(D, F, generator=g),
        "b_enc": torch.randn(F, generator=g) - 1,
        "W_dec": torch.nn.functional.normalize(rows, dim=1) if unit else rows,
        "b_dec": torch.randn(d_out, generator=g),
    }
    if transcoder:
        skip = None if architecture in ("gated", "matryoshka") else torch.randn(d_out, D, generator=g)
        own |= {"target": Site(4, "mlp"), "subtract_bias": False, "W_skip": skip}
    own |= changes
    match architecture:
        case "topk":
            return TopK(**own, k=4)
        case "batchtopk":
            return BatchTopK(**own, k=4, threshold=1.3)
        case "matryoshka":
            return Matryoshka(**own, k=4, threshold=1.3, groups=(3, 7, 10))
        case "standard":
            return Standard(**own)
        case "jumprelu":
            return JumpReLU(**own, threshold=torch.rand(F, generator=g) + 0.5)
        case _:
            return Gated(**own, b_mag=torch.rand(F, generator=g), r_mag=torch.randn(F, generator=g) / 5)


def tokens(n: int, d: int = D, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 2 + 1


# how well a dictionary fits


def naive(dictionary: Coder, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float, list[int]]:
    """FVU, L0 and how often each feature fires, one token at a time."""
    mean = [sum(float(v[i]) for v in y) / len(y) for i in range(y.shape[1])]
    error = variance = 0.0
    fired = [0] * dictionary.n_features
    for vector, aim in zip(x, y, strict=True):
        code = dictionary.encode(vector[None])
        rebuilt = dictionary.decode(code)[0]
        if dictionary.W_skip is not None:
            rebuilt = rebuilt + dictionary.W_skip @ vector
        error += sum(float(a - b) ** 2 for a, b in zip(aim, rebuilt, strict=True))
        variance += sum((float(a) - m) ** 2 for a, m in zip(aim, mean, strict=True))
        for j in (code[0] > 0).nonzero().flatten().tolist():
            fired[j] += 1
    return error / variance, sum(fired) / len(x), fired


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("transcoder", [False, True])
def test_the_fit_equals_one_token_at_a_time(architecture: str, transcoder: bool):
    dictionary = coder(architecture, transcoder=transcoder)
    x, y = tokens(60), tokens(60, 4, seed=1) if transcoder else None
    fvu, l0, fired = naive(dictionary, x, x if y is None else y)
    found = fit(dictionary, x, y, batch=7)
    assert found.fvu == pytest.approx(fvu, rel=1e-4)
    assert found.explained_variance == pytest.approx(1 - fvu, rel=1e-4)
    assert found.l0 == pytest.approx(l0)
    assert found.dead == pytest.approx(fired.count(0) / F)
    assert found.dense == pytest.approx(sum(n > 6 for n in fired) / F)
    assert found.tokens == 60
    bins = [sum(low < math.log10(n / 60) <= high for n in fired if n) for low, high in itertools.pairwise(EDGES)]
    assert list(found.density) == bins


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 40), st.booleans())
def test_pieces_and_batches_do_not_change_the_fit(sizes: list[int], batch: int, transcoder: bool):
    x, dictionary = tokens(sum(sizes) + 2), coder("topk", transcoder=transcoder)
    cut = (*sizes, 2)
    y = tokens(len(x), 4, seed=1) if transcoder else None
    stream = in_pieces(x, cut)
    aim = None if y is None else in_pieces(y, cut)
    whole, pieces = fit(dictionary, acts(x), y if y is None else acts(y)), fit(dictionary, stream, aim, batch=batch)
    assert pieces._replace(fvu=whole.fvu) == whole
    assert pieces.fvu == pytest.approx(whole.fvu, rel=1e-6)


def test_explained_variance_sees_a_bias_error_that_centring_would_hide():
    x = tokens(500)
    off = replace(coder("topk"), W_dec=torch.zeros(F, D), b_dec=x.mean(0) + 1)
    assert fit(off, x).fvu == pytest.approx(1 + D / float(x.var(0, unbiased=False).sum()), rel=1e-4)
    assert fit(replace(off, b_dec=x.mean(0)), x).explained_variance == pytest.approx(0, abs=1e-5)


def test_sums_are_exact_far_from_the_origin():
    x = (tokens(2_000) + 4_096).double()
    dictionary = replace(coder("topk"), W_dec=torch.zeros(F, D), b_dec=torch.full((D,), 4_097.0))
    expected = float((x - 4_097).square().sum() / (x - x.mean(0)).square().sum())
    assert fit(dictionary, x).fvu == pytest.approx(expected, rel=1e-9)


def test_features_are_counted_in_the_bin_of_their_rate():
    never, always = torch.full((F,), -1e6), torch.full((F,), 1e6)
    x = tokens(2_000)
    dictionary = coder("standard", b_enc=torch.where(torch.arange(F) < 5, always, never), subtract_bias=False)
    found = fit(dictionary, x)
    assert (found.dead, found.dense) == (0.75, 0.25)
    assert found.density == (0,) * 11 + (5,)
    once = replace(dictionary, W_enc=torch.eye(D, F), b_enc=torch.full((F,), -float(x[:, 0].max()) + 1e-3))
    found = fit(once, x[:, :].index_fill(1, torch.arange(1, D), -1.0))
    assert sum(found.density) == 1
    assert found.density[int((math.log10(1 / 2_000) + 6) * 2)] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": torch.zeros(0, D)}, "0 tokens of constant"),
        ({"source": torch.full((9, D), 3.3)}, "9 tokens of constant"),
        ({"source": tokens(9).index_fill(0, torch.tensor([2]), math.nan)}, "NaN"),
        ({"source": tokens(9, 5)}, "width 5; the dictionary expects 6"),
        ({"target": tokens(9)}, "rebuilds its own Site; expected no target"),
        ({"transcoder": True}, "rebuilds mlp.4; expected the activations there"),
        ({"transcoder": True, "target": tokens(8, 4)}, "9 tokens in 1 pieces with a target of 8 in 1"),
        ({"transcoder": True, "target": tokens(9, 5)}, "target have width 5; the dictionary expects 4"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(change: dict[str, Any], words: str):
    dictionary = coder("topk", transcoder=change.get("transcoder", False))
    with pytest.raises(BadInput, match=words):
        fit(dictionary, change.get("source", tokens(9)), change.get("target"))


# how alike two dictionaries are


@given(st.integers(0, 500), st.sampled_from(["one_to_one", "greedy"]), st.integers(1, 30))
def test_a_permuted_copy_matches_itself(seed: int, matching: Any, block: int):
    one = coder("topk", seed)
    order = torch.randperm(F, generator=torch.Generator().manual_seed(seed))
    other = replace(one, W_dec=one.W_dec[order] * 3)
    found = match(one, other, matching, block=block)
    assert found.mmcs == pytest.approx(1, abs=1e-5)
    assert torch.equal(order[found.second], found.first)
    assert torch.equal(found.first, torch.arange(F))


def test_matches_equal_those_found_by_trying_every_assignment():
    for seed in range(5):
        one, other = coder("standard", seed, unit=False), coder("standard", seed + 50, unit=False)
        few, many = (replace(one, **small(one, 4)), replace(other, **small(other, 6)))
        cosines = [[float(torch.cosine_similarity(a, b, dim=0)) for b in many.W_dec] for a in few.W_dec]
        best = max(itertools.permutations(range(6), 4), key=lambda p: sum(cosines[i][j] for i, j in enumerate(p)))
        for first, second in ((few, many), (many, few)):
            found = match(first, second)
            ours = found.second if first is few else found.first
            assert ours.tolist() == list(best)
            assert found.mmcs == pytest.approx(sum(cosines[i][j] for i, j in enumerate(best)) / 4, rel=1e-5)
            greedy = match(first, second, "greedy")
            assert greedy.mmcs == pytest.approx(sum(max(row) for row in cosines) / 4, rel=1e-5)
            assert greedy.mmcs >= found.mmcs - 1e-6


def small(dictionary: Coder, n: int) -> dict[str, torch.Tensor]:
    """Its first features."""
    return {"W_enc": dictionary.W_enc[:, :n], "b_enc": dictionary.b_enc[:n], "W_dec": dictionary.W_dec[:n]}


def test_a_row_of_zeros_matches_nothing():
    one = coder("standard")
    rows = one.W_dec.clone()
    rows[7] = 0
    found = match(replace(one, W_dec=rows), one)
    assert float(found.cosine[found.first == 7]) == 0
    assert found.mmcs == pytest.approx((F - 1) / F, abs=1e-5)


def test_dictionaries_of_different_widths_are_not_matched():
    with pytest.raises(BadInput, match="width 6 and 4"):
        match(coder("topk"), coder("topk", transcoder=True))
    with as_in_use(), pytest.raises(BadInput, match="matching is 'best'; expected one of one_to_one, greedy"):
        match(coder("topk"), coder("topk"), "best")  # type: ignore[arg-type]


# how far a fine-tune turned it


def test_rotation_tells_turned_features_from_those_that_only_grew():
    before = coder("standard", unit=False)
    w_dec, w_enc = before.W_dec.clone(), before.W_enc.clone()
    w_dec[3] *= 2
    w_dec[5] = torch.roll(w_dec[5], 1)
    w_dec[8] *= -1
    w_dec[9] = 0
    w_enc[:, 4] *= -0.5
    found = rotation(before, replace(before, W_dec=w_dec, W_enc=w_enc))
    turned = float(torch.cosine_similarity(before.W_dec[5], torch.roll(before.W_dec[5], 1), dim=0))
    expected = torch.ones(F).double()
    expected[5], expected[8], expected[9] = turned, -1, math.nan
    torch.testing.assert_close(found.decoder_cosine, expected, rtol=0, atol=1e-6, equal_nan=True)
    assert found.most(2).tolist() == [8, 5]
    assert found.most(F)[-1] == 9
    torch.testing.assert_close(found.decoder_change[3], before.W_dec[3].double().norm())
    torch.testing.assert_close(found.decoder_norm[:, 3], before.W_dec[3].double().norm() * torch.tensor([1, 2]))
    assert float(found.decoder_change[0]) == 0
    torch.testing.assert_close(found.encoder_cosine[4], torch.tensor(-1.0).double())
    torch.testing.assert_close(found.encoder_norm[1, 4], before.W_enc[:, 4].double().norm() / 2)
    torch.testing.assert_close(found.encoder_change[4], before.W_enc[:, 4].double().norm() * 1.5)
    with pytest.raises(BadInput, match=r"W_enc has shape \[6, 20\] before and \[6, 4\] after"):
        rotation(before, replace(before, **small(before, 4)))


# warm starts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("transcoder", [False, True])
@pytest.mark.parametrize("normalize", ["mean_norm", "rms", "none"])
def test_a_trainer_from_a_dictionary_gives_that_dictionary(architecture: str, transcoder: bool, normalize: str):
    start = coder(architecture, transcoder=transcoder)
    x, y = tokens(300) * 5, tokens(300, 4, seed=1) / 3 if transcoder else None
    config = config_for(start, TrainConfig(normalize=normalize))  # type: ignore[arg-type]
    assert (config.features, config.architecture, config.skip) == (F, architecture, start.W_skip is not None)
    trainer = Trainer.from_dictionary(start, x, config, y)
    back = trainer.dictionary(acts(x), target=start.target)
    assert type(back) is type(start)
    torch.testing.assert_close(back.W_dec, start.W_dec, rtol=1e-5, atol=1e-5)
    for name, weight in start.tensors().items():
        torch.testing.assert_close(back.tensors()[name], weight, rtol=1e-4, atol=1e-4)
    same(start, replace(back, sink_norm=math.inf), x)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
@pytest.mark.parametrize("subtract", [False, True])
def test_rows_of_any_norm_and_biases_that_are_not_subtracted_are_taken_over(architecture: str, subtract: bool):
    start = coder(architecture, unit=False, subtract_bias=subtract)
    x = tokens(300)
    back = Trainer.from_dictionary(start, x, config_for(start)).dictionary(acts(x))
    assert back.subtract_bias
    torch.testing.assert_close(back.W_dec.norm(dim=1), torch.ones(F))
    same(start, replace(back, sink_norm=math.inf), x)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_warm_start_loses_nothing_and_goes_on(architecture: str):
    x = planted()
    learned = train(acts(x), config_of(architecture, tokens=128 * 300))
    config = config_for(learned, config_of(architecture, learning_rate=1e-4, sparsity_warmup=0.0))
    trainer = Trainer.from_dictionary(learned, x, config)
    fresh = Trainer(x, config)
    warm, cold = (t.step(x[:512], 0) for t in (trainer, fresh))
    assert warm.fvu < 0.2 < cold.fvu
    for step in range(1, 20):
        trainer.step(x[:512], step)
    moved = rotation(learned, trainer.dictionary(acts(x)))
    assert 0 < float(moved.decoder_change.max()) < 0.2
    assert float(moved.decoder_cosine.min()) > 0.97


def test_the_features_that_turn_most_are_those_whose_directions_changed():
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(16, 16, generator=g), dim=1)
    other = rows.clone()
    other[[2, 11]] = torch.nn.functional.normalize(torch.randn(2, 16, generator=g), dim=1)
    f = torch.zeros(3_000, 16).scatter(1, torch.rand(3_000, 16, generator=g).topk(2, 1).indices, 1.0)
    f *= 1 + torch.rand(3_000, 16, generator=g)
    config = config_of("topk", features=16, k=2, tokens=128 * 600)
    before = train(acts(f @ rows), config)
    trainer = Trainer.from_dictionary(before, f @ other, config)
    for step in range(400):
        start = step * 128 % 2_900
        trainer.step(f[start : start + 128] @ other, step)
    after = trainer.dictionary(acts(f @ other))
    turned = set(rotation(before, after).most(2).tolist())
    nearest = match(replace(before, W_dec=rows), before)
    assert turned == set(nearest.second[[2, 11]].tolist())


def test_rows_of_zeros_start_anew():
    start = coder("standard")
    rows = start.W_dec.clone()
    rows[4] = 0
    trainer = Trainer.from_dictionary(replace(start, W_dec=rows), tokens(300), config_for(start))
    trainer.step(tokens(300), 0)
    torch.testing.assert_close(trainer.w.dec.norm(dim=1), torch.ones(F))
    assert float(trainer.w.enc[4].norm()) > 0.5


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("topk", {"architecture": "batchtopk"}, "architecture is 'batchtopk'; the dictionary to start from has 'topk'"),
        ("topk", {"k": 5}, "k is 5; the dictionary to start from has 4"),
        ("standard", {"features": 21}, "features is 21; the dictionary to start from has 20"),
        ("matryoshka", {"groups": (0.5, 0.5)}, r"groups \(10, 10\); the dictionary to start from has \(3, 7, 10\)"),
    ],
)
def test_a_config_that_does_not_fit_the_start_is_refused(architecture: str, changes: dict[str, Any], words: str):
    start = coder(architecture)
    with pytest.raises(BadInput, match=words):
        Trainer.from_dictionary(start, tokens(300), replace(config_for(start), **changes))


def test_activations_that_do_not_fit_the_start_are_refused():
    start = coder("topk")
    with pytest.raises(BadInput, match="reads width 6 and writes 6; the activations have 5"):
        Trainer.from_dictionary(start, tokens(300, 5), config_for(start))
    with pytest.raises(BadInput, match="rebuilds it; the training has a target"):
        Trainer.from_dictionary(start, tokens(300), config_for(start), tokens(300))
    with pytest.raises(BadInput, match="norms that are off 1 by up to"):
        Trainer.from_dictionary(replace(start, W_dec=start.W_dec * 1.5), tokens(300), config_for(start))
    stream = ActivationStream((300,), lambda _: tokens(300), Site(3), "model", "prompts")
    assert Trainer.from_dictionary(start, stream.sample(), config_for(start)).w.dec.shape == (F, D)
