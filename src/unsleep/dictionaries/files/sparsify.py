"""sparsify: `<hookpoint>/cfg.json` and `<hookpoint>/sae.safetensors`, with or without a skip connection.

A hookpoint is a module. An autoencoder reconstructs the module's output; a transcoder (`transcode`) maps its
input, which is no Site, to its output. An autoencoder subtracts the decoder bias from its input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unsleep.base import store
from unsleep.core import BadInput
from unsleep.dictionaries.architectures import KINDS
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import facts
from unsleep.dictionaries.files.facts import Given

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"

ACTIVATIONS = {kind.in_sparsify: kind for kind in KINDS.values() if kind.in_sparsify}
"""Its activation names → our classes."""

DEFAULTS: dict[str, Any] = {
    "activation": next(iter(ACTIVATIONS)),
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": 32,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
}
"""sparsify's defaults for missing config keys."""

TYPES = {"activation": str, "expansion_factor": int, "num_latents": int, "k": int, "d_in": int}


def read(folder: Path, given: Given) -> Coder:
    """Load one hookpoint's folder, which is named after the hookpoint."""
    path = folder / CONFIG
    config = store.fields_of({**DEFAULTS, **store.fields_of(store.read_json(path), {}, path)}, TYPES, path)
    kind = ACTIVATIONS.get(config["activation"])
    if kind is None or config.get("signed"):
        what = "signed" if config.get("signed") else f"activation {config['activation']!r}"
        expected = " or ".join(map(repr, ACTIVATIONS))
        raise BadInput(f"{path}: the code is {what}; expected activation {expected}, with no feature below 0")
    for key in ("skip_connection", "transcode"):
        if config[key] not in (True, False):
            raise BadInput(f"{path}: {key} is {config[key]!r}; expected true or false")
    d, features = config["d_in"], config["num_latents"] or config["d_in"] * config["expansion_factor"]
    shapes = {"encoder.weight": (features, d), "encoder.bias": (features,), "W_dec": (features, d), "b_dec": (d,)}
    if config["skip_connection"]:
        shapes["W_skip"] = (d, d)
    label = f"{CONFIG}: num_latents is {features}, skip_connection is {config['skip_connection']}"
    tensors = facts.checked(store.read_tensors(folder / WEIGHTS), shapes, folder / WEIGHTS, label)
    named = folder.resolve()
    hookpoint = named.parent.name if named.name.startswith("seed") else named.name
    module = facts.site_of_module(hookpoint)
    metadata = store.fields_of(config.get("metadata") or {}, {}, f"{path}: metadata")
    kept = {key: value for key, value in config.items() if key not in ("metadata", "d_in", "num_latents", "k")}
    transcode = config["transcode"]
    found = None if transcode else module
    said = facts.facts_of(metadata | {"sparsify": kept}, given, path, found=found, transcoder=transcode, to=module)
    fields = said.common() | {"k": config["k"]}
    with store.reading(folder):
        return kind(
            **fields,
            W_enc=tensors["encoder.weight"].T.contiguous(),
            b_enc=tensors["encoder.bias"],
            W_dec=tensors["W_dec"],
            b_dec=tensors["b_dec"],
            W_skip=tensors.get("W_skip"),
        )


def write(dictionary: Coder, folder: Path) -> None:
    """Write a dictionary into a subfolder named after the module of its Site, or of a transcoder's target."""
    if dictionary.in_sparsify is None:
        names = " and ".join(kind.__name__ for kind in ACTIVATIONS.values())
        raise BadInput(
            f"sparsify has the {names} architecture alone; a {type(dictionary).__name__} dictionary cannot be written. "
            "Use 'saelens'"
        )
    if dictionary.W_dec.shape[1] != dictionary.d_model:
        raise BadInput(
            f"sparsify has no transcoder between widths {dictionary.d_model} and {dictionary.W_dec.shape[1]}; "
            "expected the same"
        )
    coder = dictionary.with_bias(subtracted=dictionary.target is None)
    place = folder / facts.module_of_site(coder.target or coder.site)
    place.mkdir()
    metadata = facts.described(coder)
    unit = bool(((coder.W_dec.float().norm(dim=1) - 1).abs() < 1e-2).all())
    config = {
        **DEFAULTS,
        "expansion_factor": max(1, coder.n_features // coder.d_model),
        "normalize_decoder": unit,
        **facts.taken(metadata, "sparsify"),
        "activation": dictionary.in_sparsify,
        "num_latents": coder.n_features,
        "k": dictionary.settings()["k"],
        "skip_connection": coder.W_skip is not None,
        "transcode": coder.target is not None,
        "d_in": coder.d_model,
        "metadata": metadata,
    }
    tensors = coder.tensors()
    tensors["encoder.weight"] = tensors.pop("W_enc").T
    tensors["encoder.bias"] = tensors.pop("b_enc")
    store.write_json(place / CONFIG, config)
    store.write_tensors(place / WEIGHTS, tensors)
