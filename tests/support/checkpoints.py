"""Small checkpoints, adapters and hub caches on disk, as users find them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from support.families import LLAMA
from support.models import build
from support.tokenizers import byte_tokenizer
from unsleep.models.load import quiet_transformers

COMMITS = {"main": "a" * 40, "older": "b" * 40}
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def save_base(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A whole checkpoint with its tokenizer, and a context with room for long chat templates."""
    build(family, dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


def save_packable(folder: Path) -> Path:
    """A base wide enough for bitsandbytes to pack; skips where it packs nothing on this machine."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; it comes with unsleep[quantize]")
    size = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    torch.manual_seed(0)
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**size, **ends)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        dequantize_4bit(*quantize_4bit(torch.randn(64, 64), quant_type="nf4"))
    except Exception as error:  # whatever its backends raise where none fits
        pytest.skip(f"bitsandbytes packs nothing on this machine: {error}")
    return folder


def randomise(adapted: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Give every trained weight of an adapter numbers that matter."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.copy_(weight + scale * torch.randn(weight.shape, generator=random))


def save_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int = 0,
    change: Callable[[PreTrainedModel], None] | None = None,
    named: str | None = None,
    save: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A trained LoRA over a base, as peft saves it; `named` is the base that its config names."""
    network = AutoModelForCausalLM.from_pretrained(base)
    if change is not None:
        change(network)
    lora = {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings
    with quiet_transformers():
        adapted = get_peft_model(network, LoraConfig(**lora))
        randomise(adapted, seed)
        adapted.save_pretrained(folder, **(save or {}))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base) if named is None else named
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def beside(
    base: Path, *adapters: Path, change: Callable[[PreTrainedModel], None] | None = None, dtype: Any = "auto"
) -> PeftModel:
    """The reference: peft's own model, its adapters beside the base's weights, all active."""
    network = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if change is not None:
        change(network)
    with quiet_transformers():
        adapted = PeftModel.from_pretrained(network, str(adapters[0]), adapter_name="0")
        for i, adapter in enumerate(adapters[1:], 1):
            adapted.load_adapter(str(adapter), adapter_name=str(i))
    adapted.base_model.set_adapter([str(i) for i in range(len(adapters))])
    return adapted.eval()


def logits(network: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    """What a network says of some tokens."""
    ids = torch.arange(40, 60)[None] if ids is None else ids
    with torch.no_grad():
        return network(input_ids=ids, use_cache=False).logits


class Hub:
    """A hub's cache with repositories in it, and no hub to be reached."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def add(self, repo: str, source: Path, inside: str = "", revision: str = "main") -> Path:
        """Put a folder's files into a repository, at a revision and in a subfolder; returns the snapshot."""
        home = self.cache / f"models--{repo.replace('/', '--')}"
        snapshot = home / "snapshots" / COMMITS[revision]
        shutil.copytree(source, snapshot / inside, dirs_exist_ok=True)
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / revision).write_text(COMMITS[revision])
        return snapshot
