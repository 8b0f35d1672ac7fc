"""SAELens 6: `cfg.json` and `sae_weights.safetensors`; flat configs from before 6 are read too.

BatchTopK and Matryoshka dictionaries are saved for inference, as SAELens does: `jumprelu` with a constant threshold.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unsleep.base import store
from unsleep.core import BadInput
from unsleep.dictionaries.coders import BatchTopK, Coder, Gated, JumpReLU, Matryoshka, Standard, TopK
from unsleep.dictionaries.files import facts
from unsleep.dictionaries.files.facts import Facts, Given

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

SCALER = "activation_scaler.json"
"""The factor that normalises activations, beside a checkpoint of an unfinished training."""

VERSION = "6.0.0"
"""The version of the layout that is written."""

EXTRA: dict[str, tuple[str, ...]] = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "transcoder": ("b_enc",),
    "skip_transcoder": ("b_enc", "W_skip"),
    "jumprelu_transcoder": ("b_enc", "threshold"),
    "jumprelu_skip_transcoder": ("b_enc", "threshold", "W_skip"),
}
"""Architecture → its tensors beside W_enc, W_dec and b_dec."""

NAMES: dict[type[Coder], str] = {
    Standard: "standard",
    TopK: "topk",
    Gated: "gated",
    JumpReLU: "jumprelu",
    BatchTopK: "jumprelu",
    Matryoshka: "jumprelu",
}

STRUCTURE = (
    *("architecture", "d_in", "d_out", "d_sae", "k", "dtype", "device", "apply_b_dec_to_input"),
    *("normalize_activations", "reshape_activations", "rescale_acts_by_decoder_norm", "metadata"),
)
"""Keys of a config that say what is computed; all others are kept."""

RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
"""Keys that were renamed before version 6."""


def read(folder: Path, given: Given, overrides: dict[str, Any], scale: float | None) -> Coder:
    """Read a dictionary in SAELens' layout; `scale` is the factor that normalised its activations, where known."""
    path = folder / CONFIG
    config = store.fields_of(store.read_json(path), {}, path) | overrides
    if "metadata" not in config and not config.keys().isdisjoint(("hook_name", "hook_point")):
        config = _from_flat(config, path)
    architecture = store.fields_of(config, {"architecture": str, "metadata": dict}, path)["architecture"]
    if architecture not in EXTRA:
        raise BadInput(f"{path}: architecture is {architecture!r}; expected one of {', '.join(EXTRA)}")
    transcoder = architecture.endswith("transcoder")
    numbers = ("d_in", "d_sae", *(["d_out"] if transcoder else []), *(["k"] if architecture == "topk" else []))
    store.fields_of(config, dict.fromkeys(numbers, int), path)
    if config.get("reshape_activations") not in ("none", None):
        raise BadInput(
            f"{path}: reshape_activations is {config['reshape_activations']!r}; expected 'none': attention heads "
            "before they are mixed are no Site"
        )
    factor = _factor(config, scale, folder)
    tensors = _tensors(folder / WEIGHTS, config)
    metadata = _metadata(config)
    if "unsleep_architecture" in metadata and metadata.get("hook_name_out") is not None:
        transcoder = True  # of an architecture that SAELens has for one Site alone
    said = facts.facts_of(metadata, given, path, transcoder=transcoder)
    subtract = config.get("apply_b_dec_to_input")
    if subtract not in (True, False, None) or (subtract and said.target):
        raise BadInput(f"{path}: apply_b_dec_to_input is {subtract!r}; expected {'false' if said.target else 'a bool'}")
    if factor != 1:
        tensors["W_enc"] = tensors["W_enc"] * factor
        tensors |= {name: tensors[name] / factor for name in ("W_dec", "b_dec")}
    if architecture == "topk" and config.get("rescale_acts_by_decoder_norm"):
        norms = tensors["W_dec"].float().norm(dim=1)
        tensors |= {name: tensors[name] * norms for name in ("W_enc", "b_enc")}
        tensors["W_dec"] = tensors["W_dec"] / norms.clamp_min(1e-12)[:, None]
    dtype = facts.DTYPES.get(str(config.get("dtype")).removeprefix("torch."), torch.float32)
    weights = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    with store.reading(folder):
        return _coder(config, said, weights, subtract is not False and not said.target)


def _coder(config: dict[str, Any], said: Facts, weights: dict[str, Tensor], subtract: bool) -> Coder:
    arguments: dict[str, Any] = said.common() | weights | {"subtract_bias": subtract}
    if config["architecture"] == "gated":
        return Gated(b_enc=arguments.pop("b_gate"), **arguments)
    if config["architecture"] == "topk":
        return TopK(**arguments, k=config["k"])
    if "threshold" not in weights:
        return Standard(**arguments)
    if single := facts.thresholded(said, weights["threshold"]):
        kind, settings = single
        return kind(**arguments | settings)
    return JumpReLU(**arguments)


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    """`metadata`, and under `saelens` what else a config said that is not known."""
    more = {key: value for key, value in config.items() if key not in STRUCTURE}
    return config["metadata"] | ({"saelens": more} if more else {})


def _tensors(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    d, features, architecture = config["d_in"], config["d_sae"], config["architecture"]
    out = config["d_out"] if architecture.endswith("transcoder") else d
    shapes = {"W_enc": (d, features), "W_dec": (features, out), "b_dec": (out,)}
    for name in EXTRA[architecture]:
        shapes[name] = (out, d) if name == "W_skip" else (features,)
    found = store.read_tensors(path)
    if "log_threshold" in found:
        found["threshold"] = found.pop("log_threshold").exp()
    if "scaling_factor" in found and not bool((found["scaling_factor"] == 1).all()):
        raise BadInput(
            f"{path}: scaling_factor is not 1: the finetuned factors have to be folded into W_dec in SAELens"
        )
    label = f"{CONFIG}: architecture is {architecture!r}"
    return facts.checked(found, shapes, path, label, more=("scaling_factor",))


def _factor(config: dict[str, Any], scale: float | None, folder: Path) -> float:
    """What the activations are multiplied by before they are encoded; refused where that differs between tokens."""
    how = config.get("normalize_activations")
    if how in ("none", None):
        return 1.0
    if how == "expected_average_only_in":
        if (folder / SCALER).is_file():
            kinds = {"scaling_factor": int | float | None}
            scale = store.fields_of(store.read_json(folder / SCALER), kinds, folder / SCALER)["scaling_factor"]
        if scale is not None and 0 < scale < math.inf:
            return float(scale)
        why = "by a factor that the file does not hold; fold it in SAELens (fold_activation_norm_scaling_factor)"
    elif how == "covariance_whitening":
        why = "by a matrix that the file does not hold; fold it in SAELens (fold_activation_whitening)"
    else:
        why = "by a factor that differs between tokens, which no weights can hold"
    raise BadInput(
        f"{folder / CONFIG}: normalize_activations is {how!r}; expected 'none': its activations are normalised {why}"
    )


def _from_flat(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A config from before version 6 in today's form; what was at the top goes into `metadata`."""
    flat = {RENAMED.get(key, key): value for key, value in config.items()}
    out = {key: flat[key] for key in STRUCTURE if key in flat}
    out.setdefault("architecture", "standard")
    activation, settings = flat.get("activation_fn") or "relu", flat.get("activation_fn_kwargs") or {}
    if activation == "topk":
        out |= {
            "architecture": "topk",
            "k": store.fields_of(settings, {"k": int}, f"{path}: activation_fn_kwargs")["k"],
        }
    elif activation != "relu":
        raise BadInput(f"{path}: activation_fn is {activation!r}; expected 'relu' or 'topk'")
    if isinstance(flat.get("normalize_activations"), bool):
        out["normalize_activations"] = "expected_average_only_in" if flat["normalize_activations"] else "none"
    out.setdefault("reshape_activations", "hook_z" if "hook_z" in str(flat.get("hook_name")) else "none")
    return out | {"metadata": {key: value for key, value in flat.items() if key not in STRUCTURE}}


def write(dictionary: Coder, folder: Path) -> None:
    """Write a dictionary in SAELens' layout; raises `BadInput` for what it has no architecture for."""
    architecture = _architecture(dictionary)
    tensors = dictionary.tensors()
    if isinstance(dictionary, Gated):
        tensors["b_gate"] = tensors.pop("b_enc")
    if isinstance(dictionary, BatchTopK):
        tensors["threshold"] = torch.full_like(dictionary.b_enc, dictionary.threshold)
    metadata = {"hook_head_index": None, "prepend_bos": False} | facts.described(dictionary)
    if not str(metadata.get("sae_lens_version", "")).startswith(VERSION[:2]):
        metadata["sae_lens_version"] = VERSION
    config = facts.taken(metadata, "saelens") | {
        "architecture": architecture,
        "d_in": dictionary.d_model,
        "d_sae": dictionary.n_features,
        "dtype": str(dictionary.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.subtract_bias,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if isinstance(dictionary, TopK):
        config |= {"k": dictionary.k, "rescale_acts_by_decoder_norm": False}
    if architecture.endswith("transcoder"):
        config["d_out"] = dictionary.b_dec.shape[0]
    store.write_json(folder / CONFIG, config)
    store.write_tensors(folder / WEIGHTS, tensors)


def _architecture(dictionary: Coder) -> str:
    """SAELens' name; a TopK or gated transcoder between Sites of one width computes what its SAE does."""
    if type(dictionary) not in NAMES:
        raise BadInput(f"a dictionary of type {type(dictionary).__name__} cannot be written; expected one of its kinds")
    name = NAMES[type(dictionary)]
    skip = dictionary.W_skip is not None
    if name in ("standard", "jumprelu") and dictionary.target:
        return ("jumprelu_" if name == "jumprelu" else "") + ("skip_" if skip else "") + "transcoder"
    if skip:
        hint = "; save it as 'sparsify', which has one" if name == "topk" else ""
        raise BadInput(f"SAELens has no {name} architecture with a skip path{hint}")
    if dictionary.W_dec.shape[1] != dictionary.d_model:
        raise BadInput(
            f"SAELens has no {name} transcoder between widths {dictionary.d_model} and {dictionary.W_dec.shape[1]}; "
            "expected a standard, jumprelu, batchtopk or matryoshka one"
        )
    return name
