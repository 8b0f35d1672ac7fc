"""The Tanh architecture: its passes equal autograd, it learns, resumes, starts warm and comes back from files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.dictionaries import same
from support.losses import agree, autograd, gradients, mean_square, random_inputs, random_weights, sae_batch
from support.training import acts, config_of, in_pieces, planted
from unsleep.base.context import reporting
from unsleep.core import BadInput
from unsleep.dictionaries import losses, metrics
from unsleep.dictionaries.architectures import tanh
from unsleep.dictionaries.architectures.standard import Standard
from unsleep.dictionaries.architectures.tanh import Tanh
from unsleep.dictionaries.files import load_dictionary, save_dictionary
from unsleep.dictionaries.sweep import variants
from unsleep.dictionaries.train import TrainConfig, train
from unsleep.dictionaries.trainer import Trainer, config_for


def config(**changes: Any) -> TrainConfig:
    return replace(config_of("tanh", tokens=128 * 400), **{"sparsity": 1.0, **changes})


@given(st.integers(0, 300), st.booleans(), st.sampled_from([0.2, 1.0, 30.0]))
def test_the_gradients_by_either_path(seed: int, few: bool, saturation: float):
    w, x = random_weights(seed), random_inputs(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "SPARSE_BELOW", 2.0 if few else 0.0)
        patch.setattr(tanh, "SATURATION", saturation)
        done = gradients("tanh", w, sae_batch(w, x))

    def loss(p: dict[str, Tensor]) -> Tensor:
        code = ((x - p["b_dec"]) @ p["enc"].T + p["b_enc"]).relu()
        u = code * p["dec"].norm(dim=1)
        cost = 0.7 * saturation * (u / saturation).tanh().sum() / len(x)
        return mean_square(code @ p["dec"] + p["b_dec"], x) + cost

    agree(done, autograd(w, loss))


def test_a_cost_that_saturates_late_is_l1(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tanh, "SATURATION", 1e6)
    w, x = random_weights(3), random_inputs(3)
    agree(gradients("tanh", w, sae_batch(w, x)), gradients("standard", w, sae_batch(w, x)).grads)


def test_a_planted_dictionary_is_learned_with_less_shrinkage_than_by_l1():
    x = planted()
    found = {name: train(acts(x), replace(config(), architecture=name)) for name in ("tanh", "standard")}
    fit = {name: metrics.fit(d, x) for name, d in found.items()}
    assert fit["tanh"].fvu < 0.15
    assert fit["tanh"].l0 < 16
    spread = {name: float((d.rebuild(x) - d.rebuild(x).mean(0)).square().sum()) for name, d in found.items()}
    assert spread["standard"] < spread["tanh"] < 1.02 * float((x - x.mean(0)).square().sum())
    assert fit["tanh"].fvu < fit["standard"].fvu


class Killed(Exception):
    pass


def test_an_interrupted_training_ends_with_the_same_bits(tmp_path: Path):
    stream, settings = in_pieces(planted(600), (250, 50, 300)), config(tokens=12_800, checkpoint_every=20)

    def kill(stage: str, done: int, total: int) -> None:
        if done == 50:
            raise Killed

    with pytest.raises(Killed), reporting(kill):
        train(stream, settings, checkpoint=tmp_path / "c")
    assert train(stream, settings, checkpoint=tmp_path / "c").hash == train(stream, settings).hash


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning"])
@pytest.mark.parametrize("subtract", [False, True])
def test_it_comes_back_from_files_that_know_a_standard_dictionary_alone(tmp_path: Path, format: Any, subtract: bool):
    trained = replace(train(acts(planted(300)), config(tokens=1280)), subtract_bias=subtract)
    again = load_dictionary(save_dictionary(trained, tmp_path / "d", format=format))
    assert type(again) is Tanh
    assert again.hash == trained.hash
    metadata = {key: value for key, value in again.metadata.items() if not key.startswith("unsleep")}
    plain = Standard(again.site, again.model, *again.tensors().values(), metadata=metadata, subtract_bias=subtract)
    assert type(load_dictionary(save_dictionary(plain, tmp_path / "e", format=format))) is Standard


def test_sparsify_has_no_such_dictionary(tmp_path: Path):
    trained = train(acts(planted(300)), config(tokens=1280))
    with pytest.raises(BadInput, match="a Tanh dictionary cannot be written"):
        save_dictionary(trained, tmp_path / "d", format="sparsify")


def test_a_warm_start_gives_the_dictionary_back():
    x = planted(300)
    start = train(acts(x), config(tokens=12_800))
    assert config_for(start).architecture == "tanh"
    back = Trainer.from_dictionary(start, x, config_for(start)).dictionary(acts(x))
    same(start, replace(back, sink_norm=math.inf), x)


def test_it_is_a_choice_whose_variants_differ_by_their_cost():
    assert list(variants({"architecture": ("tanh", "topk"), "sparsity": (0.5, 2.0), "k": (8,)})) == [
        "tanh-c0.5",
        "tanh-c2",
        "topk",
    ]
