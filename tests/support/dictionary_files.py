"""Dictionaries in other libraries' files, as those write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from unsleep.core import Site
from unsleep.dictionaries.coders import Coder

D, F, K = 6, 20, 4
SITE = Site.parse("resid.3")
HOOK = "blocks.3.hook_resid_post"
X = torch.randn(9, D, generator=torch.Generator().manual_seed(0)) * 2


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def top(pre: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row where positive, one row at a time."""
    out = torch.zeros_like(pre)
    for row, values in enumerate(pre):
        for i in sorted(range(len(values)), key=lambda j: -float(values[j]))[:k]:
            out[row, i] = max(0.0, float(values[i]))
    return out


def assert_computes(found: Coder, code: torch.Tensor, rebuilt: torch.Tensor) -> None:
    assert int((code > 0).sum()) > 0
    torch.testing.assert_close(found.encode(X), code, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.rebuild(X), rebuilt, rtol=1e-5, atol=1e-5)


def saelens_config(architecture: str, **more: Any) -> dict[str, Any]:
    """As SAELens 6 writes it."""
    return {
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": HOOK, "prepend_bos": True},
        "architecture": architecture,
        **more,
    }


def saelens_weights(out: int = D, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    plain = {"W_enc": numbers(D, F), "b_enc": numbers(F, seed=1), "W_dec": numbers(F, out, seed=2)}
    return {**plain, "b_dec": numbers(out, seed=3), **more}


def saelens(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    write_json(folder / "cfg.json", config)
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def sparsify_weights(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    plain = {"encoder.weight": numbers(F, D), "encoder.bias": numbers(F, seed=1), "W_dec": numbers(F, D, seed=2)}
    return {**plain, "b_dec": numbers(D, seed=3), **more}


def sparsify(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    write_json(folder / "cfg.json", config)
    save_file(tensors, folder / "sae.safetensors")
    return folder


SPARSIFY = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": F,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D,
}


def write_state(path: Path, value: Any) -> None:
    """A file as their `torch.save` leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def linear(bias: str) -> dict[str, torch.Tensor]:
    return {
        "encoder.weight": numbers(F, D),
        "encoder.bias": numbers(F, seed=1),
        "decoder.weight": numbers(D, F, seed=2),
        bias: numbers(D, seed=3),
    }


BUFFERS = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.7)}


def learned(folder: Path, dict_class: str, state: Any, **more: Any) -> Path:
    trainer = {"trainer_class": "T", "dict_class": dict_class, "activation_dim": D, "dict_size": F, "layer": 3}
    trainer |= {"lm_name": "gpt2", "submodule_name": "resid_post_layer_3"} | more
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}})
    write_state(folder / "ae.pt", state)
    return folder
