"""Crosscoders tell what two models share from what one has alone, and their scales change nothing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.checks import as_in_use
from unsleep.base import store
from unsleep.base.context import reporting
from unsleep.core import Activations, ActivationStream, BadInput, Site
from unsleep.dictionaries import metrics
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.crosscoders import (
    Crosscoder,
    decoder_norm_ratio,
    joined,
    latent_scaling,
    load_crosscoder,
    save_crosscoder,
    train_crosscoder,
)

D, SHARED, ONLY = 24, 20, 4
FIRST, SECOND = slice(SHARED, SHARED + ONLY), slice(SHARED + ONLY, SHARED + 2 * ONLY)
CONFIG = TrainConfig(
    architecture="batchtopk",
    features=40,
    k=3,
    tokens=128 * 800,
    batch=128,
    learning_rate=3e-3,
    dead_after=2_000,
    aux_k=8,
)


def acts(x: torch.Tensor, model: str, site: Site | None = None) -> Activations:
    return Activations(x, torch.zeros(len(x), dtype=torch.long), site or Site(3), model, "prompts")


def planted(scales: tuple[float, float] = (7.0, 21.0)) -> tuple[Activations, Activations, torch.Tensor]:
    """20 features that both models have, turned a little, and 4 that each has alone; and how strongly each fires."""
    g = torch.Generator().manual_seed(0)
    total = SHARED + 2 * ONLY
    rows = torch.nn.functional.normalize(torch.randn(2, total, D, generator=g), dim=-1)
    rows[1, :SHARED] = torch.nn.functional.normalize(rows[0, :SHARED] + 0.3 * rows[1, :SHARED], dim=-1)
    rows[1, FIRST] = 0
    rows[0, SECOND] = 0
    f = torch.zeros(4_000, total).scatter(1, torch.rand(4_000, total, generator=g).topk(3, 1).indices, 1.0)
    f *= 1 + torch.rand(4_000, total, generator=g)
    one, two = (scale * (f @ rows[m] + 0.2) for m, scale in enumerate(scales))
    return acts(one, "first"), acts(two, "second"), f


@cache
def trained() -> Crosscoder:
    return train_crosscoder(*planted()[:2], CONFIG)


def learned(crosscoder: Crosscoder, f: torch.Tensor, *x: Activations) -> torch.Tensor:
    """For each planted feature the learned one that fires most as it does; −1 where none does."""
    code = crosscoder.encode(*(a.tensor for a in x))
    both = torch.corrcoef(torch.cat([f.T, code.T])).nan_to_num()[: f.shape[1], f.shape[1] :].max(1)
    return torch.where(both.values > 0.95, both.indices, -1)


def random_crosscoder(seed: int = 0, models: int = 2, d: int = 5, features: int = 12, **changes: Any) -> Crosscoder:
    g = torch.Generator().manual_seed(seed)
    own: dict[str, Any] = {
        "site": Site(2, "mlp"),
        "models": tuple("abc"[:models]),
        "W_enc": torch.randn(models, d, features, generator=g),
        "b_enc": torch.randn(features, generator=g),
        "W_dec": torch.randn(models, features, d, generator=g),
        "b_dec": torch.randn(models, d, generator=g),
        "k": 4,
        "threshold": 0.7,
        "scales": (1.0, 0.5, 2.0)[:models],
        "sink_norms": (math.inf,) * models,
    }
    return Crosscoder(**{**own, **changes})


# what it computes


@given(st.integers(0, 1000), st.integers(1, 3))
def test_a_code_is_what_its_formula_says_one_token_and_feature_at_a_time(seed: int, models: int):
    crosscoder = random_crosscoder(seed, models)
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn(6, 5, generator=g) for _ in range(models)]
    code = torch.zeros(6, 12)
    for t in range(6):
        for j in range(12):
            pre = float(crosscoder.b_enc[j])
            pre += sum(float(x[m][t] @ crosscoder.W_enc[m, :, j]) for m in range(models))
            code[t, j] = pre if pre > 0.7 else 0.0
    torch.testing.assert_close(crosscoder.encode(*x), code, rtol=1e-4, atol=1e-4)
    pre = sum(crosscoder.contribution(x[m], m) for m in range(models)) + crosscoder.b_enc
    torch.testing.assert_close(torch.where(pre > 0.7, pre, 0), code, rtol=1e-4, atol=1e-4)
    sparse = crosscoder.encode_sparse(*x)
    for m in range(models):
        rebuilt = code @ crosscoder.W_dec[m] + crosscoder.b_dec[m]
        torch.testing.assert_close(crosscoder.decode(code, m), rebuilt, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(crosscoder.decode_sparse(sparse, m), rebuilt, rtol=1e-4, atol=1e-4)


def test_its_views_are_dictionaries_of_the_models_side_by_side():
    crosscoder = random_crosscoder()
    x = torch.randn(9, 10)
    parts = x.split(5, dim=1)
    both = crosscoder.joint.rebuild(x)
    for m in (0, 1):
        own = crosscoder.decode(crosscoder.encode(*parts), m)
        torch.testing.assert_close(both[:, 5 * m : 5 * m + 5], own, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(crosscoder.of(m).rebuild(x), own, rtol=1e-4, atol=1e-4)


def test_no_feature_fires_on_a_sink_of_either_model():
    crosscoder = random_crosscoder(sink_norms=(50.0, 5.0), threshold=0.0, b_enc=torch.ones(12) * 1e4)
    one, two = torch.ones(4, 5), torch.ones(4, 5)
    one[1] *= 40
    two[2] *= 40
    fires = (crosscoder.encode(one, two) > 0).any(1)
    assert fires.tolist() == [True, False, False, True]
    assert (crosscoder.encode_sparse(one, two).values > 0).any(1).tolist() == fires.tolist()


# training


def test_planted_features_of_one_model_and_of_both_are_told_apart():
    one, two, f = planted()
    crosscoder = trained()
    found = learned(crosscoder, f, one, two)
    ratio = decoder_norm_ratio(crosscoder)
    assert int((found >= 0).sum()) >= 24
    for j, i in enumerate(found.tolist()):
        if i >= 0:
            low, high = (0.4, 0.6) if j < SHARED else (0.0, 0.2) if j < SHARED + ONLY else (0.8, 1.0)
            assert low <= float(ratio[i]) <= high, j


def test_both_models_are_rebuilt_in_their_own_scales():
    one, two, _ = planted()
    crosscoder = trained()
    beside = joined(one, two)
    assert metrics.fit(crosscoder.joint, beside).fvu < 0.05
    for m, x in enumerate((one, two)):
        assert metrics.fit(crosscoder.of(m), beside, x).fvu < 0.05
    assert crosscoder.scales[0] == pytest.approx(math.sqrt(D) / float(one.tensor.norm(dim=1).mean()), rel=1e-5)
    assert crosscoder.sink_norms[1] == pytest.approx(10 * float(two.tensor.norm(dim=1).median()), rel=1e-5)


def test_the_scale_of_a_models_activations_changes_nothing_but_its_own_weights():
    quick = replace(CONFIG, tokens=128 * 60)
    small, large = (train_crosscoder(*planted(scales)[:2], quick) for scales in ((7.0, 7.0), (7.0, 28.0)))
    torch.testing.assert_close(large.W_dec[0], small.W_dec[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(large.W_dec[1], 4 * small.W_dec[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(decoder_norm_ratio(large), decoder_norm_ratio(small), rtol=1e-3, atol=1e-3)


def test_identical_models_share_every_feature():
    one, _, _ = planted()
    crosscoder = train_crosscoder(one, replace(one, model="copy"), CONFIG)
    fired = (crosscoder.encode(one.tensor, one.tensor) > 0).float().mean(0) > 0.01
    assert int(fired.sum()) > 20
    torch.testing.assert_close(
        decoder_norm_ratio(crosscoder)[fired], torch.full((int(fired.sum()),), 0.5).double(), rtol=0.0, atol=0.02
    )
    rows = torch.nn.functional.normalize(crosscoder.W_dec[:, fired], dim=-1)
    assert float((rows[0] * rows[1]).sum(-1).min()) > 0.95
    assert float((rows[0] * rows[1]).sum(-1).median()) > 0.999
    scaling = latent_scaling(crosscoder, one, replace(one, model="copy"))
    torch.testing.assert_close(scaling.error_ratio[fired], torch.ones(int(fired.sum())).double(), rtol=0.0, atol=0.05)


def test_training_goes_on_from_a_checkpoint_and_tells_of_itself(tmp_path: Path):
    quick = replace(CONFIG, tokens=128 * 40, checkpoint_every=10)
    one, two, _ = planted()

    class Killed(Exception):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        assert total == 40
        if done == 20:
            raise Killed

    with pytest.raises(Killed), reporting(kill):
        train_crosscoder(one, two, quick, checkpoint=tmp_path)
    assert train_crosscoder(one, two, quick, checkpoint=tmp_path).hash == train_crosscoder(one, two, quick).hash


# latent scaling


def naive_scaling(crosscoder: Crosscoder, x: tuple[torch.Tensor, torch.Tensor], of: int) -> dict[str, torch.Tensor]:
    """Least squares by a solver, one feature at a time."""
    scaled = [crosscoder.scales[m] * x[m].double() for m in (0, 1)]
    rows = [crosscoder.scales[m] * crosscoder.W_dec[m].double() for m in (0, 1)]
    bias = [crosscoder.scales[m] * crosscoder.b_dec[m].double() for m in (0, 1)]
    f = crosscoder.encode(*x).double()
    found = {name: torch.full((2, crosscoder.n_features), math.nan).double() for name in ("error", "reconstruction")}
    for j in range(crosscoder.n_features):
        if not bool((f[:, j] > 0).any()):
            continue
        others = f.clone()
        others[:, j] = 0
        column = (f[:, j, None] * rows[of][j]).flatten()[:, None]
        for m in (0, 1):
            targets = {"error": scaled[m] - others @ rows[m] - bias[m], "reconstruction": f @ rows[m]}
            for name, y in targets.items():
                found[name][m, j] = torch.linalg.lstsq(column, y.flatten()[:, None]).solution[0, 0]
    return found


@given(st.integers(0, 1000), st.sampled_from([0, 1]), st.integers(1, 50))
def test_latent_scaling_is_least_squares(seed: int, of: int, batch: int):
    crosscoder = random_crosscoder(seed, threshold=1.5)
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(40, 5, generator=g), torch.randn(40, 5, generator=g))
    found = latent_scaling(crosscoder, acts(x[0], "a"), acts(x[1], "b"), of=of, batch=batch)
    expected = naive_scaling(crosscoder, x, of)
    for name in ("error", "reconstruction"):
        torch.testing.assert_close(getattr(found, name), expected[name], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert found.fired.tolist() == (crosscoder.encode(*x) > 0).sum(0).tolist()
    torch.testing.assert_close(
        found.error_ratio, expected["error"][1 - of] / expected["error"][of], rtol=1e-3, atol=1e-4, equal_nan=True
    )


def test_latent_scaling_sees_planted_exclusive_features_and_a_shared_one_that_was_shrunk_away():
    one, two, f = planted()
    crosscoder = trained()
    found = learned(crosscoder, f, one, two)
    for of, exclusive in ((0, FIRST), (1, SECOND)):
        scaling = latent_scaling(crosscoder, one, two, of=of)
        own, shared = (ids[ids >= 0] for ids in (found[exclusive], found[:SHARED]))
        assert len(own) >= 2
        assert float(scaling.error_ratio[own].abs().max()) < 0.15
        assert float(scaling.reconstruction_ratio[own].abs().max()) < 0.3
        assert float(scaling.error_ratio[shared].min()) > 0.7
    victim = int(found[:SHARED].max())
    w_dec = crosscoder.W_dec.clone()
    w_dec[0, victim] = 0
    shrunk = replace(crosscoder, W_dec=w_dec)
    assert float(decoder_norm_ratio(shrunk)[victim]) == 1.0
    assert float(latent_scaling(shrunk, one, two).error_ratio[victim]) > 0.7


def test_pieces_do_not_change_latent_scaling():
    one, two, _ = planted()
    sizes = (1_500, 1, 2_499)

    def cut(a: Activations) -> ActivationStream:
        parts = a.tensor.split(sizes)
        return ActivationStream(sizes, lambda i: parts[i], a.site, a.model, a.prompts)

    whole, pieces = latent_scaling(trained(), one, two), latent_scaling(trained(), cut(one), cut(two))
    torch.testing.assert_close(whole.error, pieces.error, equal_nan=True)
    with pytest.raises(BadInput, match="in the same pieces"):
        latent_scaling(trained(), one, cut(two))


# on disk


def test_a_saved_crosscoder_reads_back_the_same(tmp_path: Path):
    for i, crosscoder in enumerate((random_crosscoder(metadata={"note": "ü"}), random_crosscoder(models=3), trained())):
        back = load_crosscoder(save_crosscoder(crosscoder, tmp_path / str(i)))
        assert back.hash == crosscoder.hash
        assert (back.site, back.models, back.sink_norms) == (crosscoder.site, crosscoder.models, crosscoder.sink_norms)
        assert json.dumps(back.metadata) == json.dumps(crosscoder.metadata)
        assert all(torch.equal(t, back.tensors()[name]) for name, t in crosscoder.tensors().items())
    with pytest.raises(BadInput, match="exists already"):
        save_crosscoder(random_crosscoder(), tmp_path / "0")


def test_what_shapes_a_code_is_in_its_hash():
    one = random_crosscoder()
    others = [
        replace(one, threshold=0.8),
        replace(one, scales=(1.0, 0.6)),
        replace(one, sink_norms=(3.0, math.inf)),
        replace(one, models=("a", "c")),
        replace(one, b_dec=one.b_dec + 1),
    ]
    assert len({one.hash, *(o.hash for o in others)}) == 6


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"schema": "unsleep.crosscoder/9"},
            "crosscoder.schema is 'unsleep.crosscoder/9'; expected unsleep.crosscoder/1",
        ),
        ({"models": "ab"}, "models is 'ab'; expected a list"),
        ({"models": ["a"]}, "W_enc has shape [2, 5, 12] for 1 models"),
        ({"k": "4"}, "k is '4'; expected a whole number"),
        ({"threshold": None}, "threshold is None"),
        ({"scales": [1.0]}, "scales is (1.0,); expected 2 numbers over 0"),
        ({"scales": [1.0, -2]}, "scales is (1.0, -2.0); expected 2 numbers over 0"),
        ({"sink_norms": [0, None]}, "sink_norms is (0.0, inf); expected 2 numbers over 0"),
        ({"site": "nowhere"}, "Site 'nowhere' is unknown"),
    ],
    ids=str,
)
def test_a_damaged_record_is_named(tmp_path: Path, change: dict[str, Any], told: str):
    path = save_crosscoder(random_crosscoder(), tmp_path / "c") / "crosscoder.json"
    store.write_json(path, {**store.read_json(path), **change})
    with pytest.raises(BadInput, match=re.escape(told)) as error:
        load_crosscoder(tmp_path / "c")
    assert str(path) in str(error.value)


def test_damaged_weights_are_named(tmp_path: Path):
    folder = save_crosscoder(random_crosscoder(), tmp_path / "c")
    whole = random_crosscoder().tensors()
    for tensors, told in (
        ({**whole, "b_enc": whole["b_enc"][:5]}, r"b_enc has shape \[5\]; expected \[12\]"),
        ({**whole, "W_dec": whole["W_dec"][0]}, r"W_dec has shape \[12, 5\]; expected \[\*, \*, \*\]"),
        ({**whole, "W_enc": whole["W_enc"] * math.nan}, "W_enc has 120 NaN"),
        ({"W_enc": whole["W_enc"]}, "no tensor 'b_enc'"),
    ):
        store.write_tensors(folder / "crosscoder.safetensors", tensors)
        with as_in_use(), pytest.raises(BadInput, match=told):
            load_crosscoder(folder)


# refused


def test_what_cannot_be_trained_on_is_refused():
    one, two, _ = planted()
    x = two.tensor
    for other, words in (
        (acts(x[:100], "b"), "expected the same tokens at the same Site"),
        (acts(x, "b", Site(4)), "expected the same tokens at the same Site"),
        (Activations(x, two.prompt_index, Site(3), "b", "others"), "of prompts prompts, the second 4000"),
        (acts(x[:, :20], "b"), "widths 24 and 20"),
        (acts(torch.ones_like(x), "b"), "the second model's activations are constant"),
        (acts(x * math.nan, "b"), "NaN"),
    ):
        with pytest.raises(BadInput, match=words):
            train_crosscoder(one, other, CONFIG)
    with pytest.raises(BadInput, match="architecture is 'topk'; expected 'batchtopk'"):
        train_crosscoder(one, two, replace(CONFIG, architecture="topk"))


def test_what_cannot_be_encoded_or_compared_is_refused():
    crosscoder = random_crosscoder()
    x = torch.randn(3, 5)
    for wrong in ((x,), (x, x[:2]), (x, x, x)):
        with as_in_use(), pytest.raises(BadInput, match="expected the same tokens of each model"):
            crosscoder.encode(*wrong)
    for compare in (decoder_norm_ratio, lambda c: latent_scaling(c, acts(x, "a"), acts(x, "b"))):
        with pytest.raises(BadInput, match="is of 3 models; expected 2"):
            compare(random_crosscoder(models=3))
    with pytest.raises(BadInput, match="of is 2"):
        latent_scaling(crosscoder, acts(x, "a"), acts(x, "b"), of=2)
