"""Crosscoders of other libraries: crosscoder_learning, and an older two-model layout.

crosscoder_learning is a fork of dictionary_learning; its BatchTopK crosscoders compare a feature's activation times
the norms of its decoder rows with the threshold. The older layout has no library: `W_enc[2, d, F]`, `W_dec[F, 2, d]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unsleep.base import store
from unsleep.core import BadInput, Site
from unsleep.dictionaries.crosscoders import Crosscoder
from unsleep.dictionaries.files import facts, names, pickled

FILES = ("model.safetensors", "crosscoder.safetensors", "cc_weights.pt", "ae.pt", "ae_final.pt", "model_final.pt")
"""Names of weight files, by library and version."""

NORMS = {1: "crosscoder", 2: "sae", 3: "mixed", 4: "none", 5: "decoupled"}
"""crosscoder_learning's `code_normalization_id`: the factor on activations before the threshold."""


def load_foreign_crosscoder(name: str | Path, *, site: Site, models: Sequence[str]) -> Crosscoder:
    """Read a crosscoder that another library saved.

    Args:
        name: a folder, or a hub id as in `load_dictionary`.
        site: where its activations are taken; the files do not say it.
        models: fingerprints of its models, in the file's order.

    One that was trained with an L1 cost has no k; its number of features stands for it. Raises `BadInput` naming the
    file, the key and the shape that was expected; where it is of another number of models; and where a crosscoder
    normalises its activations or takes a threshold for each model, which ours cannot say.
    """
    folder = names.find(name, FILES).folder
    there = [folder / file for file in FILES if (folder / file).is_file()]
    if not there:
        raise BadInput(f"{folder} has no crosscoder; expected one of {', '.join(FILES)}")
    path = there[0]
    found = store.read_tensors(path) if path.suffix == ".safetensors" else pickled.read_state(path)
    if "encoder.weight" in found:
        weights = _of_crosscoder_learning(found, path)
    elif "W_enc" in found:
        weights = _of_two_models(found, path)
    else:
        raise BadInput(f"{path} has neither 'encoder.weight' nor 'W_enc'; it has {sorted(found)[:12]}")
    count, _, features = weights["W_enc"].shape
    if len(models) != count:
        raise BadInput(f"{name} is of {count} models; expected {len(models)}")
    fields: dict[str, Any] = {"k": features, "threshold": 0.0, **weights}
    fields |= {"scales": (1.0,) * count, "sink_norms": (torch.inf,) * count}
    with store.reading(str(name)):
        return Crosscoder(site=site, models=tuple(models), **fields)


def _of_two_models(found: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The fields that the older form says."""
    _, d, features = _sizes(found["W_enc"], path, "W_enc")
    shapes = {"W_enc": (2, d, features), "b_enc": (features,), "W_dec": (features, 2, d), "b_dec": (2, d)}
    tensors = facts.checked(found, shapes, path, "expected a crosscoder of two models")
    return {**tensors, "W_dec": tensors["W_dec"].transpose(0, 1).contiguous()}


def _of_crosscoder_learning(found: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The fields that crosscoder_learning says."""
    models, d, features = _sizes(found["encoder.weight"], path, "encoder.weight")
    shapes = {
        "encoder.weight": (models, d, features),
        "encoder.bias": (features,),
        "decoder.weight": (models, features, d),
        "decoder.bias": (models, d),
    }
    for name in ("activation_mean", "activation_std"):
        if name in found and not bool(found[name].isnan().all()):
            raise BadInput(f"{path}: {name} is set: its activations are normalised, and the weights are not folded")
    more = ("k", "threshold", "code_normalization_id", "target_rms", "activation_global_scale")
    more += ("activation_mean", "activation_std")
    tensors = facts.checked(found, shapes, path, "expected a crosscoder of crosscoder_learning", more=more)
    w_enc, b_enc, w_dec, b_dec = (tensors[name] for name in shapes)
    weights: dict[str, Any] = {"W_enc": w_enc, "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec}
    if "threshold" not in found:
        return weights
    if found["threshold"].numel() != 1 or "k" not in found:
        raise BadInput(f"{path}: threshold has shape {list(found['threshold'].shape)}; expected [] and a k")
    norm = NORMS.get(int(found.get("code_normalization_id", torch.tensor(1))), "unknown")
    rows = w_dec.double()
    by: dict[str, Tensor] = {
        "crosscoder": rows.norm(dim=2).sum(0),
        "sae": rows.norm(dim=(0, 2)),
        "none": torch.ones(features, dtype=torch.float64),
    }
    if norm not in by:
        raise BadInput(f"{path}: code_normalization_id is {norm!r}; expected one of {', '.join(by)}")
    size, dtype = by[norm].clamp_min(1e-12), w_enc.dtype
    return {
        "W_enc": (w_enc * size).to(dtype),
        "b_enc": (b_enc * size).to(dtype),
        "W_dec": (rows / size[:, None]).to(dtype),
        "b_dec": b_dec,
        "k": int(found["k"]),
        "threshold": float(found["threshold"]),
    }


def _sizes(tensor: Tensor, path: Path, name: str) -> tuple[int, int, int]:
    if tensor.ndim != 3:
        raise BadInput(f"{path}: {name} has shape {list(tensor.shape)}; expected [model, d_model, feature]")
    models, d, features = tensor.shape
    return models, d, features
