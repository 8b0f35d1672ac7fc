"""dictionary_learning: `config.json` and `ae.pt`, a state dict saved by `torch.save`."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from unsleep.base import store
from unsleep.core import BadInput, Point, Site
from unsleep.dictionaries.architectures import KINDS
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import facts, pickled
from unsleep.dictionaries.files.facts import Facts, Given
from unsleep.dictionaries.layouts import LINEAR, Buffer, Learned

CONFIG, WEIGHTS = "config.json", "ae.pt"

NAMES = {
    layout.name: (kind, layout)
    for kind in KINDS.values()
    for layout in kind.in_dictionary_learning
    if not layout.borrowed
}
"""Its class names → our architectures, unless unsleep's own keys override them."""

POINTS: dict[str, Point] = {"resid_post": "resid", "mlp_out": "mlp", "attn_out": "attn"}
"""Submodule names of its scripts: `resid_post_layer_12`."""


def read(folder: Path, given: Given) -> Coder:
    """Load a finished dictionary."""
    path = folder / CONFIG
    config = store.fields_of(store.read_json(path), {"trainer": dict}, path)
    kinds = {"dict_class": str, "activation_dim": int, "dict_size": int}
    trainer = store.fields_of(config["trainer"], kinds, f"{path}: trainer")
    name = trainer["dict_class"]
    if name not in NAMES:
        raise BadInput(f"{path}: trainer: dict_class is {name!r}; expected one of {', '.join(NAMES)}")
    state = pickled.read_state(folder / WEIGHTS)
    kind, layout = NAMES[name]
    layout = _fitting(kind, layout, state)
    buffers = {key: state.pop(key) for key in layout.buffers if key in state}
    label = f"{CONFIG}: dict_class is {name!r}"
    shapes = _shapes(layout, trainer["activation_dim"], trainer["dict_size"])
    tensors = facts.checked(state, shapes, folder / WEIGHTS, label)
    metadata = store.fields_of(config.get("metadata") or {}, {}, f"{path}: metadata")
    kept = {key: value for key, value in config.items() if key != "metadata"}
    said = facts.facts_of(metadata | {"dictionary_learning": kept}, given, path, found=_site(trainer))
    weights: dict[str, Any] = {ours: _turned(theirs, tensors[theirs]) for theirs, ours in layout.names.items()}
    fields = weights | _settings(layout, buffers, trainer, folder, said)
    sharing = [
        k for k in KINDS.values() for its in k.in_dictionary_learning if its.borrowed and its.name == layout.name
    ]
    with store.reading(folder):
        kind, own = facts.restored(said, sharing, weights) or (kind, fields)
        arguments: dict[str, Any] = said.common() | own | {"subtract_bias": layout.subtracts}
        return kind(**arguments)


def _fitting(kind: type[Coder], named: Learned, state: Collection[str]) -> Learned:
    """The class that fits the tensors: some trainers write one class name for any class of their architecture."""
    later = kind.in_dictionary_learning[kind.in_dictionary_learning.index(named) :]
    return next((layout for layout in later if layout.names.keys() <= set(state)), named)


def _settings(
    layout: Learned, found: dict[str, Tensor], trainer: dict[str, Any], folder: Path, said: Facts
) -> dict[str, Any]:
    """Our settings from its buffers."""
    out: dict[str, Any] = {}
    for name, buffer in layout.buffers.items():
        if name not in found and buffer.setting is None:
            continue
        value = _value(name, buffer, found.get(name), trainer, folder)
        if buffer.setting is not None:
            exact = said.settings[buffer.setting]
            rounded = isinstance(exact, float) and value == float(torch.tensor(exact))
            out[buffer.setting] = exact if rounded else value  # the value before rounding to float32
    return out


def _value(name: str, buffer: Buffer, tensor: Tensor | None, trainer: dict[str, Any], folder: Path) -> Any:
    """Value of a buffer; integers may be in the config instead, in old files only there."""
    path, whole = folder / WEIGHTS, not buffer.dtype.is_floating_point
    in_config = whole and not buffer.ndim
    if tensor is None and in_config:
        return store.fields_of(trainer, {name: int}, f"{folder / CONFIG}: trainer")[name]
    if tensor is None:
        raise BadInput(f"{path} has no tensor {name!r}; {CONFIG}: dict_class is {trainer['dict_class']!r}")
    if tensor.ndim != buffer.ndim or tensor.is_floating_point() == whole:
        kind = f"{str(tensor.dtype)[6:]} {list(tensor.shape)}"
        raise BadInput(f"{path}: {name} is {kind}; expected {'numbers' if buffer.ndim else 'one number'}")
    value: Any = tuple(tensor.tolist()) if buffer.ndim else tensor.item()
    if in_config and trainer.get(name, value) != value:
        raise BadInput(f"{path}: {name} is {value}; expected {trainer[name]}, as {CONFIG} says")
    if not whole and not math.isfinite(value):
        raise BadInput(f"{path}: {name} is {value}; expected a finite number")
    return value


def _shapes(layout: Learned, d: int, features: int) -> dict[str, tuple[int, ...]]:
    ours = {"W_enc": (d, features), "W_dec": (features, d), "b_dec": (d,)}
    out: dict[str, tuple[int, ...]] = {}
    for theirs, name in layout.names.items():
        shape = ours.get(name, (features,))
        out[theirs] = shape[::-1] if theirs in LINEAR else shape
    return out


def _turned(theirs: str, tensor: Tensor) -> Tensor:
    return tensor.T.contiguous() if theirs in LINEAR else tensor


def _site(trainer: dict[str, Any]) -> Site | None:
    """Site of `submodule_name`; `None` where only `layer` is given."""
    name = trainer.get("submodule_name")
    if not isinstance(name, str):
        return None
    if found := re.fullmatch(r"(resid_post|mlp_out|attn_out)_layer_(\d{1,6})", name):
        return Site(int(found[2]), POINTS[found[1]])
    return facts.site_of_module(name)


def write(dictionary: Coder, folder: Path) -> None:
    """Write a finished dictionary; raises `BadInput` for transcoders, which the format lacks."""
    if dictionary.target is not None or dictionary.W_skip is not None:
        raise BadInput("dictionary_learning has no transcoders and no skip paths; use 'saelens' or 'sparsify'")
    layout = _class(dictionary)
    coder = dictionary.with_bias(subtracted=layout.subtracts)
    weights = coder.tensors()
    state = {theirs: _turned(theirs, weights[ours]) for theirs, ours in layout.names.items()}
    settings = coder.settings()
    for name, buffer in layout.buffers.items():
        state[name] = torch.tensor(-1 if buffer.setting is None else settings[buffer.setting], dtype=buffer.dtype)
    whole = {name: buffer.setting for name, buffer in layout.buffers.items() if not buffer.dtype.is_floating_point}
    metadata = facts.described(coder)
    kept = facts.taken(metadata, "dictionary_learning")
    before = kept.get("trainer")
    trainer = (cast("dict[str, Any]", before) if isinstance(before, dict) else {}) | {
        "trainer_class": layout.trainer,
        "dict_class": layout.name,
        "activation_dim": coder.d_model,
        "dict_size": coder.n_features,
        "layer": coder.site.layer,
        "submodule_name": _submodule(coder.site),
    }
    trainer.setdefault("lm_name", str(metadata.get("model_name", "unknown")))
    trainer |= {name: settings[setting] for name, setting in whole.items() if setting is not None}
    store.write_json(folder / CONFIG, kept | {"trainer": trainer, "metadata": metadata})
    pickled.write_state(folder / WEIGHTS, state)


def _class(dictionary: Coder) -> Learned:
    """The class with the dictionary's handling of b_dec, or else the first of its architecture."""
    every = dictionary.in_dictionary_learning
    if not every or type(dictionary) not in KINDS.values():
        raise BadInput(f"dictionary_learning has no class for a {type(dictionary).__name__} dictionary; use 'saelens'")
    return next((layout for layout in every if layout.subtracts == dictionary.subtract_bias), every[0])


def _submodule(site: Site) -> str:
    names = {point: name for name, point in POINTS.items()}
    return f"{names[site.point]}_layer_{site.layer}" if site.point in names else facts.module_of_site(site)
