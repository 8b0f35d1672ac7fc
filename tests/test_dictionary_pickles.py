"""Dictionaries of dictionary_learning, and crosscoders: what they compute, and pickles that are refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support.dictionary_files import (
    BUFFERS,
    SITE,
    D,
    F,
    K,
    X,
    assert_computes,
    learned,
    linear,
    numbers,
    saelens_weights,
    top,
    write_state,
)
from unsleep.core import BadInput
from unsleep.dictionaries.architectures.batchtopk import BatchTopK
from unsleep.dictionaries.architectures.matryoshka import Matryoshka
from unsleep.dictionaries.architectures.standard import Standard
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.dictionaries.files import load_dictionary
from unsleep.dictionaries.files.crosscoders import load_foreign_crosscoder

# dictionary_learning


def bare(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    return saelens_weights(**more)


@pytest.mark.parametrize("dict_class", ["AutoEncoder", "AutoEncoderNew"])
def test_standard_dictionaries_of_dictionary_learning(tmp_path: Path, dict_class: str):
    new = dict_class == "AutoEncoderNew"
    bias = "decoder.bias" if new else "bias"
    w = linear(bias)
    found = load_dictionary(learned(tmp_path / "a", dict_class, w))
    code = ((X if new else X - w[bias]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    assert isinstance(found, Standard)
    assert (found.site, found.subtract_bias) == (SITE, not new)
    assert_computes(found, code, code @ w["decoder.weight"].T + w[bias])
    # their trainer of the April update names the class AutoEncoder, whichever it is
    assert load_dictionary(learned(tmp_path / "b", "AutoEncoder", w)).hash == found.hash


def test_topk_and_batchtopk_dictionaries_of_dictionary_learning(tmp_path: Path):
    w = linear("b_dec")
    pre = (X - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    topk = load_dictionary(learned(tmp_path / "a", "AutoEncoderTopK", {**w, **BUFFERS}, k=K))
    assert isinstance(topk, TopK)
    assert_computes(topk, top(pre, K), top(pre, K) @ w["decoder.weight"].T + w["b_dec"])
    over = pre.relu() * (pre.relu() > 0.7)
    batch = load_dictionary(learned(tmp_path / "b", "BatchTopKSAE", {**w, **BUFFERS}, k=K))
    assert type(batch) is BatchTopK
    assert batch.k == K
    assert_computes(batch, over, over @ w["decoder.weight"].T + w["b_dec"])
    early = learned(tmp_path / "c", "AutoEncoderTopK", w, k=K)  # k in the config alone
    assert load_dictionary(early).hash == topk.hash


def test_a_matryoshka_dictionary_of_dictionary_learning(tmp_path: Path):
    w = bare()
    state = {**w, **BUFFERS, "group_sizes": torch.tensor([5, 15])}
    found = load_dictionary(learned(tmp_path, "MatryoshkaBatchTopKSAE", state, k=K))
    pre = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    code = pre.relu() * (pre > 0.7)
    assert isinstance(found, Matryoshka)
    assert found.groups == (5, 15)
    assert_computes(found, code, code @ w["W_dec"] + w["b_dec"])


def test_a_jumprelu_dictionary_of_dictionary_learning(tmp_path: Path):
    w = bare(threshold=numbers(F, seed=4).exp())
    found = load_dictionary(learned(tmp_path, "JumpReluAutoEncoder", w))
    pre = X @ w["W_enc"] + w["b_enc"]
    code = pre.relu() * (pre > w["threshold"])
    assert_computes(found, code, code @ w["W_dec"] + w["b_dec"])


def test_a_gated_dictionary_of_dictionary_learning(tmp_path: Path):
    w = linear("decoder_bias")
    del w["encoder.bias"]
    w |= {name: numbers(F, seed=i) for i, name in enumerate(("r_mag", "gate_bias", "mag_bias"), 5)}
    found = load_dictionary(learned(tmp_path, "GatedAutoEncoder", w))
    pre = (X - w["decoder_bias"]) @ w["encoder.weight"].T
    code = (pre * w["r_mag"].exp() + w["mag_bias"]).relu() * (pre + w["gate_bias"] > 0)
    assert_computes(found, code, code @ w["decoder.weight"].T + w["decoder_bias"])


class Surprise:
    """Anything that is no tensor and no plain value."""


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"step": 7, "ae": {}, "optimizer": {}, "config": {}, "norm_factor": 2.0}, "backup of an interrupted run.*7"),
        ({"bias": Surprise()}, "could run code, and is not read"),
        ([torch.zeros(2)], "holds a list; expected a state dict"),
        ({"bias": 3}, "bias is a int; expected a tensor"),
        (linear("b_dec"), r"has no tensor 'bias'; it has .*dict_class is 'AutoEncoder'"),
        (linear("bias") | {"encoder.weight": torch.zeros(F, 7)}, r"shape \[20, 7\]; expected \[20, 6\]"),
        (linear("bias") | {"encoder.bias": torch.full((F,), math.nan)}, r"ae\.pt: encoder\.bias has 20 NaN"),
        (linear("bias") | {"encoder.bias": torch.ones(F, dtype=torch.long)}, r"encoder\.bias has dtype int64"),
        (linear("bias") | {"more": torch.ones(F)}, "has the tensor 'more'"),
    ],
)
def test_state_dicts_that_are_none_are_named(tmp_path: Path, state: Any, words: str):
    with pytest.raises(BadInput, match=rf"(?s)ae\.pt.*{words}|{words}"):
        load_dictionary(learned(tmp_path, "AutoEncoder", state))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.tensor([1, 2])}, r"k is int64 \[2\]; expected one number"),
        ({"k": torch.tensor(9)}, "k is 9; expected 4"),
        ({"threshold": torch.tensor(math.nan)}, "threshold is nan; expected a finite number"),
        ({"threshold": None}, "has no tensor 'threshold'"),
        ({"group_sizes": torch.tensor(20)}, r"group_sizes is int64 \[\]"),
        ({"group_sizes": torch.tensor([20, 20])}, r"groups \[20, 20\]; expected sizes over 0 that sum to 20"),
    ],
)
def test_buffers_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, torch.Tensor | None], words: str):
    state = bare() | BUFFERS | {"group_sizes": torch.tensor([5, 15])} | change
    learned(tmp_path, "MatryoshkaBatchTopKSAE", {n: t for n, t in state.items() if t is not None}, k=K)
    with pytest.raises(BadInput, match=words):
        load_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dict_class": "IdentityDict"}, "dict_class is 'IdentityDict'; expected one of .*AutoEncoder, "),
        ({"dict_size": 7}, r"shape \[20, 6\]; expected \[7, 6\]"),
        ({"activation_dim": "6"}, "activation_dim is '6'; expected int"),
        ({"submodule_name": None}, "give site"),
    ],
)
def test_configs_of_dictionary_learning_that_do_not_fit_say_why(tmp_path: Path, change: dict[str, Any], words: str):
    with pytest.raises(BadInput, match=words):
        load_dictionary(learned(tmp_path, **{"dict_class": "AutoEncoder", "state": linear("bias"), **change}))


# crosscoders


@pytest.mark.parametrize("compiled", ["", "_orig_mod."])
def test_a_crosscoder_of_crosscoder_learning(tmp_path: Path, compiled: str):
    w = {"encoder.weight": numbers(2, D, F), "encoder.bias": numbers(F, seed=1)}
    w |= {"decoder.weight": numbers(2, F, D, seed=2), "decoder.bias": numbers(2, D, seed=3)}
    write_state(tmp_path / "ae.pt", {compiled + name: tensor for name, tensor in w.items()})
    found = load_foreign_crosscoder(tmp_path, site=SITE, models=("a", "b"))
    x = numbers(2, 9, D, seed=9)
    code = (x[0] @ w["encoder.weight"][0] + x[1] @ w["encoder.weight"][1] + w["encoder.bias"]).relu()
    torch.testing.assert_close(found.encode(*x), code, rtol=1e-5, atol=1e-5)
    for m in (0, 1):
        rebuilt = code @ w["decoder.weight"][m] + w["decoder.bias"][m]
        torch.testing.assert_close(found.decode(code, m), rebuilt, rtol=1e-5, atol=1e-5)
    with pytest.raises(BadInput, match="2 models; expected 3"):
        load_foreign_crosscoder(tmp_path, site=SITE, models=("a", "b", "c"))


@pytest.mark.parametrize("norm", [1, 2, 4])
def test_a_batchtopk_crosscoder_compares_scaled_activations(tmp_path: Path, norm: int):
    w = {"encoder.weight": numbers(2, D, F), "encoder.bias": numbers(F, seed=1)}
    w |= {"decoder.weight": numbers(2, F, D, seed=2), "decoder.bias": numbers(2, D, seed=3)}
    extra = {**BUFFERS, "code_normalization_id": torch.tensor(norm), "activation_mean": torch.full((2, D), math.nan)}
    save_file({**w, **extra}, tmp_path / "model.safetensors")
    found = load_foreign_crosscoder(tmp_path, site=SITE, models=("a", "b"))
    x, rows = numbers(2, 9, D, seed=9), w["decoder.weight"]
    pre = (x[0] @ w["encoder.weight"][0] + x[1] @ w["encoder.weight"][1] + w["encoder.bias"]).relu()
    size = {1: rows[0].norm(dim=1) + rows[1].norm(dim=1), 2: torch.cat([*rows], 1).norm(dim=1), 4: torch.ones(F)}[norm]
    code = pre * (pre * size > 0.7)
    assert found.k == K
    for m in (0, 1):
        rebuilt = code @ rows[m] + w["decoder.bias"][m]
        torch.testing.assert_close(found.decode(found.encode(*x), m), rebuilt, rtol=1e-4, atol=1e-4)


def test_a_crosscoder_of_two_models_in_the_older_form(tmp_path: Path):
    w = {"W_enc": numbers(2, D, F), "b_enc": numbers(F, seed=1), "W_dec": numbers(F, 2, D), "b_dec": numbers(2, D)}
    write_state(tmp_path / "cc_weights.pt", w)
    found = load_foreign_crosscoder(tmp_path, site=SITE, models=("a", "b"))
    assert found.k == F
    torch.testing.assert_close(found.W_dec[1], w["W_dec"][:, 1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"W_enc": torch.ones(3, D, F)}, r"W_enc has shape \[3, 6, 20\]; expected \[2, 6, 20\]"),
        ({"W_enc": torch.ones(D, F)}, r"W_enc has shape \[6, 20\]; expected \[model, d_model, feature\]"),
        ({"W_dec": torch.ones(2, F, D)}, r"W_dec has shape \[2, 20, 6\]; expected \[20, 2, 6\]"),
        ({"b_dec": torch.full((2, D), math.inf)}, "b_dec has 12 NaN or infinite"),
        ({"W_enc": None}, "neither 'encoder.weight' nor 'W_enc'"),
    ],
)
def test_crosscoders_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, torch.Tensor | None], words: str):
    w = {"W_enc": numbers(2, D, F), "b_enc": numbers(F), "W_dec": numbers(F, 2, D), "b_dec": numbers(2, D)} | change
    write_state(tmp_path / "cc_weights.pt", {name: t for name, t in w.items() if t is not None})
    with pytest.raises(BadInput, match=rf"cc_weights\.pt.*{words}"):
        load_foreign_crosscoder(tmp_path, site=SITE, models=("a", "b"))


def test_a_crosscoder_that_its_weights_do_not_tell_is_refused(tmp_path: Path):
    w = {"encoder.weight": numbers(2, D, F), "encoder.bias": numbers(F, seed=1)}
    w |= {"decoder.weight": numbers(2, F, D, seed=2), "decoder.bias": numbers(2, D, seed=3)}
    for more, words in (
        ({"activation_mean": torch.ones(2, D)}, "activation_mean is set"),
        ({**BUFFERS, "threshold": torch.ones(2)}, r"threshold has shape \[2\]"),
        ({**BUFFERS, "code_normalization_id": torch.tensor(3)}, "code_normalization_id is 'mixed'"),
        ({"surprise": torch.ones(2)}, "has the tensor 'surprise'"),
    ):
        write_state(tmp_path / "ae.pt", {**w, **more})
        with pytest.raises(BadInput, match=words):
            load_foreign_crosscoder(tmp_path, site=SITE, models=("a", "b"))
    with pytest.raises(BadInput, match="has no crosscoder"):
        load_foreign_crosscoder(tmp_path / "none", site=SITE, models=("a", "b"))
