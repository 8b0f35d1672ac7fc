"""Crosscoders of other libraries: crosscoder_learning, and an older two-model layout.

crosscoder_learning is a fork of dictionary_learning; its BatchTopK crosscoders compare a feature's activation times
the norms of its decoder rows with the threshold. The older layout has no library: `W_enc[2, d, F]`, `W_dec[F, 2, d]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base import store
from unsleep.core import BadInput, Site
from unsleep.dictionaries.crosscoders import Crosscoder
from unsleep.dictionaries.files import facts, names, pickled

FILES = ("model.safetensors", "crosscoder.safetensors", "cc_weights.pt", "ae.pt", "ae_final.pt", "model_final.pt")
"""Names of weight files, by library and version."""

NORMS = {1: "crosscoder", 2: "sae", 3: "mixed", 4: "none", 5: "decoupled"}
"""crosscoder_learning's `code_normalization_id`: the factor on activations before the threshold."""


class CrosscoderWeights(NamedTuple):
    """Weights of a crosscoder, f = relu(Σ_m x_m W_enc[m] + b_enc) above the threshold."""

    W_enc: Float[Tensor, "model d_model feature"]
    b_enc: Float[Tensor, " feature"]
    W_dec: Float[Tensor, "model feature d_model"]
    b_dec: Float[Tensor, "model d_model"]
    k: int | None = None
    """Mean number of active features per token; `None` for one trained with an L1 cost."""
    threshold: float = 0.0


def load_foreign_crosscoder(name: str | Path, *, site: Site, models: Sequence[str]) -> Crosscoder:
    """Load a crosscoder saved by another library.

    Args:
        name: a folder, or a hub id as in `load_dictionary`.
        site: Site of its activations, which the files do not contain.
        models: fingerprints of its models, in the file's order.

    One trained with an L1 cost has no k; its number of features is used. Raises `BadInput` as
    `read_crosscoder_weights` does, and for a wrong number of models.
    """
    found = read_crosscoder_weights(name)
    if len(models) != len(found.W_enc):
        raise BadInput(f"{name} is of {len(found.W_enc)} models; expected {len(models)}")
    k = found.k if found.k is not None else found.W_enc.shape[2]
    with store.reading(str(name)):
        return Crosscoder(
            site=site,
            models=tuple(models),
            W_enc=found.W_enc,
            b_enc=found.b_enc,
            W_dec=found.W_dec,
            b_dec=found.b_dec,
            k=k,
            threshold=found.threshold,
            scales=(1.0,) * len(models),
            sink_norms=(torch.inf,) * len(models),
        )


def read_crosscoder_weights(name: str | Path) -> CrosscoderWeights:
    """The weights of a crosscoder in a folder or on the hub.

    Raises `BadInput` naming the file, the key and the expected shape; and for a crosscoder that normalises its
    activations or has a threshold per model, which these weights cannot represent.
    """
    folder = names.find(name, FILES).folder
    there = [folder / file for file in FILES if (folder / file).is_file()]
    if not there:
        raise BadInput(f"{folder} holds no crosscoder; expected one of {', '.join(FILES)}")
    path = there[0]
    found = store.read_tensors(path) if path.suffix == ".safetensors" else pickled.read_state(path)
    if "encoder.weight" in found:
        return _of_crosscoder_learning(found, path)
    if "W_enc" not in found:
        raise BadInput(f"{path} has neither 'encoder.weight' nor 'W_enc'; it has {sorted(found)[:12]}")
    d, features = _sizes(found["W_enc"], path, "W_enc")[1:]
    shapes = {"W_enc": (2, d, features), "b_enc": (features,), "W_dec": (features, 2, d), "b_dec": (2, d)}
    tensors = facts.checked(found, shapes, path, "expected a crosscoder of two models")
    return CrosscoderWeights(
        tensors["W_enc"], tensors["b_enc"], tensors["W_dec"].transpose(0, 1).contiguous(), tensors["b_dec"]
    )


def _of_crosscoder_learning(found: dict[str, Tensor], path: Path) -> CrosscoderWeights:
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
    weights = CrosscoderWeights(w_enc, b_enc, w_dec, b_dec)
    if "threshold" not in found:
        return weights
    if found["threshold"].numel() != 1 or "k" not in found:
        raise BadInput(f"{path}: threshold has shape {list(found['threshold'].shape)}; expected [] and a k")
    norm = NORMS.get(int(found.get("code_normalization_id", torch.tensor(1))), "unknown")
    rows = weights.W_dec.double()
    by: dict[str, Tensor] = {
        "crosscoder": rows.norm(dim=2).sum(0),
        "sae": rows.norm(dim=(0, 2)),
        "none": torch.ones(features, dtype=torch.float64),
    }
    if norm not in by:
        raise BadInput(f"{path}: code_normalization_id is {norm!r}; expected one of {', '.join(by)}")
    size, dtype = by[norm].clamp_min(1e-12), weights.W_enc.dtype
    return weights._replace(
        W_enc=(weights.W_enc * size).to(dtype),
        b_enc=(weights.b_enc * size).to(dtype),
        W_dec=(rows / size[:, None]).to(dtype),
        k=int(found["k"]),
        threshold=float(found["threshold"]),
    )


def _sizes(tensor: Tensor, path: Path, name: str) -> tuple[int, int, int]:
    if tensor.ndim != 3:
        raise BadInput(f"{path}: {name} has shape {list(tensor.shape)}; expected [model, d_model, feature]")
    models, d, features = tensor.shape
    return models, d, features
