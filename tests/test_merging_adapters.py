"""Merges of a base and LoRAs over it are adapters; others are merged into their base first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import unsleep
from support.checkpoints import logits, save_adapter, save_base
from unsleep import MergeConfig
from unsleep.base import store
from unsleep.core import BadInput
from unsleep.models.load import load_model

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def deltas(adapter: Path, base: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to the weights, by peft."""
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    merged = PeftModel.from_pretrained(network, str(adapter)).merge_and_unload().state_dict()
    return {name: weight - before[name] for name, weight in merged.items()}


def test_between_a_base_and_its_lora_the_lora_is_scaled(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, lora_alpha=6)
    own = deltas(adapter, base)
    for first, second, alpha, share in (
        (base, adapter, 0.3, 0.3),
        (adapter, base, 0.3, 0.7),
        (base, adapter, -2.0, -2.0),
    ):
        made = unsleep.merge(first, second, tmp_path / "merged", MergeConfig(alpha=alpha))
        assert (made.form, made.layers) == ("adapter", ())
        for name, delta in deltas(tmp_path / "merged", base).items():
            assert torch.allclose(delta, share * own[name], atol=1e-6), name
        assert load_file(tmp_path / "merged" / ADAPTER).keys() == load_file(adapter / ADAPTER).keys()
    assert load_model(tmp_path / "merged").made_of[0]["name"] == str(base)
    assert "+" in made.mergekit


def test_at_one_the_adapter_has_its_own_bytes(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base)
    other = save_adapter(tmp_path / "other", base, seed=1, r=2)
    for first, second, alpha in ((base, adapter, 1.0), (other, adapter, 1.0), (adapter, other, 0.0)):
        unsleep.merge(first, second, tmp_path / "merged", MergeConfig(alpha=alpha))
        assert store.hash_file(tmp_path / "merged" / ADAPTER) == store.hash_file(adapter / ADAPTER)
    unsleep.merge(base, adapter, tmp_path / "merged", MergeConfig(alpha=0.0))
    assert torch.equal(logits(load_model(tmp_path / "merged").network), logits(load_model(base).network))


@pytest.mark.parametrize("rslora", [False, True])
def test_two_loras_are_put_side_by_side(base: Path, tmp_path: Path, rslora: bool) -> None:
    first = save_adapter(tmp_path / "first", base, lora_alpha=3)
    second = save_adapter(
        tmp_path / "second",
        base,
        seed=1,
        r=2,
        target_modules=["q_proj", "o_proj"],
        use_rslora=rslora,
        rank_pattern={"o_proj": 3},
        alpha_pattern={"o_proj": 5},
    )
    one, other = deltas(first, base), deltas(second, base)
    unsleep.merge(first, second, tmp_path / "merged", MergeConfig(alpha=0.3, alpha_layers="1=2"))
    for name, delta in deltas(tmp_path / "merged", base).items():
        alpha = 2 if "layers.1." in name else 0.3
        assert torch.allclose(delta, (1 - alpha) * one[name] + alpha * other[name], atol=1e-5), name
    assert json.loads((tmp_path / "merged/adapter_config.json").read_text())["r"] == 6
    load_model(tmp_path / "merged")


def test_a_spherical_merge_of_loras_is_that_of_whole_models(base: Path, tmp_path: Path) -> None:
    first, second = save_adapter(tmp_path / "first", base), save_adapter(tmp_path / "second", base, seed=1)
    config = MergeConfig(alpha=0.4, method="slerp", base=str(base))
    assert unsleep.merge(first, second, tmp_path / "merged", config).form == "adapter"
    copy, away = tmp_path / "copy", tmp_path / "away"
    shutil.copytree(base, copy)
    shutil.copytree(second, away)
    (away / CONFIG).write_text((second / CONFIG).read_text().replace(str(base), str(copy)))
    assert unsleep.merge(first, away, tmp_path / "whole", config).form == "weights"
    one, other = (dict(load_model(tmp_path / name).network.named_parameters()) for name in ("merged", "whole"))
    for name, weight in one.items():
        assert torch.allclose(weight, other[name], atol=1e-5), (name, (weight - other[name]).abs().max())


def test_adapters_that_are_no_plain_loras_are_merged_into_their_base(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, use_dora=True)
    made = unsleep.merge(base, adapter, tmp_path / "merged", MergeConfig(alpha=1.0))
    assert made.form == "weights"
    assert set(made.models[1].sha256) == {"0/model.safetensors", f"1/{ADAPTER}"}
    assert load_model(tmp_path / "merged").fingerprint == load_model(adapter).fingerprint


def test_an_adapter_whose_base_is_gone_takes_the_given_one(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, named=str(tmp_path / "gone"))
    with pytest.raises(BadInput, match=r"names the base .*gone"):
        unsleep.merge(base, adapter, tmp_path / "merged", MergeConfig(alpha=0.5))
    made = unsleep.merge(base, adapter, tmp_path / "merged", MergeConfig(alpha=0.5, base=str(base)))
    assert made.form == "adapter"
    assert made.notes == (f"{adapter}: the base is {base}, as given",)
    load_model(tmp_path / "merged")
