"""SAELens 6: `cfg.json` and `sae_weights.safetensors`; flat configs from before 6 are read too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unsleep.base import store
from unsleep.core import BadInput
from unsleep.dictionaries.architectures import KINDS
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import facts
from unsleep.dictionaries.files.facts import Facts, Given

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

SCALER = "activation_scaler.json"
"""File of the normalisation factor, beside a checkpoint of an unfinished training."""

VERSION = "6.0.0"
"""Version of the written layout."""

OWNERS = {name: kind for kind in KINDS.values() if not kind.in_saelens.borrowed for name in kind.in_saelens.every_name}
"""Its architecture names → our classes, unless unsleep's own keys override them."""

NUMBERS = tuple(number for kind in OWNERS.values() for number in kind.in_saelens.numbers)

STRUCTURE = (
    *("architecture", "d_in", "d_out", "d_sae", *NUMBERS, "dtype", "device", "apply_b_dec_to_input"),
    *("normalize_activations", "reshape_activations", "rescale_acts_by_decoder_norm", "metadata"),
)
"""Config keys that affect the computation; all others are kept."""

RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
"""Keys renamed in version 6."""


def read(folder: Path, given: Given, overrides: dict[str, Any], scale: float | None) -> Coder:
    """Load a dictionary in SAELens' layout; `scale` is the normalisation factor of its activations, where known."""
    path = folder / CONFIG
    config = store.fields_of(store.read_json(path), {}, path) | overrides
    if "metadata" not in config and not config.keys().isdisjoint(("hook_name", "hook_point")):
        config = _from_flat(config, path)
    architecture = store.fields_of(config, {"architecture": str, "metadata": dict}, path)["architecture"]
    if architecture not in OWNERS:
        raise BadInput(f"{path}: architecture is {architecture!r}; expected one of {', '.join(OWNERS)}")
    kind = OWNERS[architecture]
    transcoder = architecture.endswith("transcoder")
    numbers = ("d_in", "d_sae", *(["d_out"] if transcoder else []), *kind.in_saelens.numbers)
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
        transcoder = True  # SAELens has no transcoder of this architecture
    said = facts.facts_of(metadata, given, path, transcoder=transcoder)
    subtract = config.get("apply_b_dec_to_input")
    if subtract not in (True, False, None) or (subtract and said.target):
        raise BadInput(f"{path}: apply_b_dec_to_input is {subtract!r}; expected {'false' if said.target else 'a bool'}")
    if factor != 1:
        tensors["W_enc"] = tensors["W_enc"] * factor
        tensors |= {name: tensors[name] / factor for name in ("W_dec", "b_dec")}
    tensors = kind.of_saelens(config, tensors)
    dtype = facts.DTYPES.get(str(config.get("dtype")).removeprefix("torch."), torch.float32)
    weights = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    with store.reading(folder):
        return _coder(config, said, weights, subtract is not False and not said.target)


def _coder(config: dict[str, Any], said: Facts, tensors: dict[str, Tensor], subtract: bool) -> Coder:
    owner = OWNERS[config["architecture"]]
    layout = owner.in_saelens
    weights = {layout.names.get(name, name): tensor for name, tensor in tensors.items()}
    sharing = [k for k in KINDS.values() if k.in_saelens.borrowed and k.in_saelens.name == layout.name]
    fields = weights | {number: config[number] for number in layout.numbers}
    kind, own = facts.restored(said, sharing, weights) or (owner, fields)
    arguments: dict[str, Any] = said.common() | own | {"subtract_bias": subtract}
    return kind(**arguments)


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    """`metadata`, with unknown config keys under `saelens`."""
    more = {key: value for key, value in config.items() if key not in STRUCTURE}
    return config["metadata"] | ({"saelens": more} if more else {})


def _tensors(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    d, features, architecture = config["d_in"], config["d_sae"], config["architecture"]
    out = config["d_out"] if architecture.endswith("transcoder") else d
    names = OWNERS[architecture].in_saelens.names
    shapes = {"W_enc": (d, features), "W_dec": (features, out), "b_dec": (out,)}
    shapes |= dict.fromkeys(names, (features,)) | ({"W_skip": (out, d)} if "skip_" in architecture else {})
    found = store.read_tensors(path)
    for name in names:
        if f"log_{name}" in found:
            found[name] = found.pop(f"log_{name}").exp()
    if "scaling_factor" in found and not bool((found["scaling_factor"] == 1).all()):
        raise BadInput(
            f"{path}: scaling_factor is not 1: the finetuned factors have to be folded into W_dec in SAELens"
        )
    label = f"{CONFIG}: architecture is {architecture!r}"
    return facts.checked(found, shapes, path, label, more=("scaling_factor",))


def _factor(config: dict[str, Any], scale: float | None, folder: Path) -> float:
    """Factor on the activations before encoding; refused where it differs between tokens."""
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
    """A config from before version 6 in the current form; its top-level keys go into `metadata`."""
    flat = {RENAMED.get(key, key): value for key, value in config.items()}
    out = {key: flat[key] for key in STRUCTURE if key in flat}
    activation, settings = flat.get("activation_fn") or "relu", flat.get("activation_fn_kwargs") or {}
    kinds = {k.in_saelens.activation: k.in_saelens for k in OWNERS.values() if k.in_saelens.activation}
    if activation not in kinds:
        raise BadInput(f"{path}: activation_fn is {activation!r}; expected {' or '.join(map(repr, kinds))}")
    name, numbers = kinds[activation].name, kinds[activation].numbers
    if numbers:
        found = store.fields_of(settings, dict.fromkeys(numbers, int), f"{path}: activation_fn_kwargs")
        out |= {"architecture": name, **{number: found[number] for number in numbers}}
    out.setdefault("architecture", name)
    if isinstance(flat.get("normalize_activations"), bool):
        out["normalize_activations"] = "expected_average_only_in" if flat["normalize_activations"] else "none"
    out.setdefault("reshape_activations", "hook_z" if "hook_z" in str(flat.get("hook_name")) else "none")
    return out | {"metadata": {key: value for key, value in flat.items() if key not in STRUCTURE}}


def write(dictionary: Coder, folder: Path) -> None:
    """Write a dictionary in SAELens' layout; raises `BadInput` for architectures that it lacks."""
    architecture = _architecture(dictionary)
    theirs = {ours: name for name, ours in dictionary.in_saelens.names.items()}
    tensors = {theirs.get(name, name): tensor for name, tensor in dictionary.saved().items()}
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
        **dictionary.to_saelens(),
    }
    if architecture.endswith("transcoder"):
        config["d_out"] = dictionary.b_dec.shape[0]
    store.write_json(folder / CONFIG, config)
    store.write_tensors(folder / WEIGHTS, tensors)


def _architecture(dictionary: Coder) -> str:
    """SAELens' name; where it has no transcoder, the autoencoder's may stand for one between Sites of equal width."""
    if type(dictionary) not in KINDS.values():
        raise BadInput(f"a dictionary of type {type(dictionary).__name__} cannot be written; expected one of its kinds")
    layout = dictionary.in_saelens
    skip = dictionary.W_skip is not None
    if layout.transcoder is not None and dictionary.target:
        return layout.every_name[2 if skip else 1]
    if skip:
        hint = "; save it as 'sparsify', which has one" if dictionary.in_sparsify else ""
        raise BadInput(f"SAELens has no {layout.name} architecture with a skip path{hint}")
    if dictionary.W_dec.shape[1] != dictionary.d_model:
        having = [name for name, kind in KINDS.items() if kind.in_saelens.transcoder is not None]
        raise BadInput(
            f"SAELens has no {layout.name} transcoder between widths {dictionary.d_model} and "
            f"{dictionary.W_dec.shape[1]}; expected one of {', '.join(having)}"
        )
    return layout.name
