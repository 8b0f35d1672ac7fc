"""dictionary_learning: `config.json` and `ae.pt`, a state dict in the file of `torch.save`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from unsleep.base import store
from unsleep.core import BadInput, Point, Site
from unsleep.dictionaries.coders import BatchTopK, Coder, Gated, JumpReLU, Matryoshka, Standard, TopK
from unsleep.dictionaries.files import facts, pickled
from unsleep.dictionaries.files.facts import Given

CONFIG, WEIGHTS = "config.json", "ae.pt"

LINEAR = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
"""Weights of linear layers, which are ours transposed."""

BARE = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


class Layout(NamedTuple):
    """What a class of dictionary_learning is here."""

    kind: type[Coder]
    names: dict[str, str]
    """Its name of a tensor → ours."""
    subtracts: bool
    """Whether it takes b_dec off the input."""
    trainer: str
    """The trainer that makes it."""
    settings: tuple[str, ...] = ()
    """Buffers beside the weights."""


LAYOUTS = {
    "AutoEncoder": Layout(
        Standard, {**LINEAR, "encoder.bias": "b_enc", "bias": "b_dec"}, subtracts=True, trainer="StandardTrainer"
    ),
    "AutoEncoderNew": Layout(
        Standard,
        {**LINEAR, "encoder.bias": "b_enc", "decoder.bias": "b_dec"},
        subtracts=False,
        trainer="StandardTrainerAprilUpdate",
    ),
    "GatedAutoEncoder": Layout(
        Gated,
        {**LINEAR, "gate_bias": "b_enc", "decoder_bias": "b_dec", "mag_bias": "b_mag", "r_mag": "r_mag"},
        subtracts=True,
        trainer="GatedSAETrainer",
    ),
    "JumpReluAutoEncoder": Layout(
        JumpReLU, {**BARE, "threshold": "threshold"}, subtracts=False, trainer="JumpReluTrainer"
    ),
    "AutoEncoderTopK": Layout(
        TopK, {**LINEAR, "encoder.bias": "b_enc", "b_dec": "b_dec"}, True, "TopKTrainer", ("k", "threshold")
    ),
    "BatchTopKSAE": Layout(
        BatchTopK, {**LINEAR, "encoder.bias": "b_enc", "b_dec": "b_dec"}, True, "BatchTopKTrainer", ("k", "threshold")
    ),
    "MatryoshkaBatchTopKSAE": Layout(
        Matryoshka, BARE, True, "MatryoshkaBatchTopKTrainer", ("k", "threshold", "group_sizes")
    ),
}

POINTS: dict[str, Point] = {"resid_post": "resid", "mlp_out": "mlp", "attn_out": "attn"}
"""How its scripts name a submodule: `resid_post_layer_12`."""


def read(folder: Path, given: Given) -> Coder:
    """Read a finished dictionary."""
    path = folder / CONFIG
    config = store.fields_of(store.read_json(path), {"trainer": dict}, path)
    kinds = {"dict_class": str, "activation_dim": int, "dict_size": int}
    trainer = store.fields_of(config["trainer"], kinds, f"{path}: trainer")
    name = trainer["dict_class"]
    if name not in LAYOUTS:
        raise BadInput(f"{path}: trainer: dict_class is {name!r}; expected one of {', '.join(LAYOUTS)}")
    state = pickled.read_state(folder / WEIGHTS)
    if name == "AutoEncoder" and "decoder.bias" in state and "bias" not in state:
        name = "AutoEncoderNew"  # their trainer of the April update writes "AutoEncoder" for either
    layout = LAYOUTS[name]
    settings = {key: state.pop(key) for key in layout.settings if key in state}
    tensors = facts.checked(
        state,
        _shapes(layout, trainer["activation_dim"], trainer["dict_size"]),
        folder / WEIGHTS,
        f"{CONFIG}: dict_class is {trainer['dict_class']!r}",
    )
    metadata = store.fields_of(config.get("metadata") or {}, {}, f"{path}: metadata")
    kept = {key: value for key, value in config.items() if key != "metadata"}
    said = facts.facts_of(metadata | {"dictionary_learning": kept}, given, path, found=_site(trainer))
    weights: dict[str, Any] = {ours: _turned(theirs, tensors[theirs]) for theirs, ours in layout.names.items()}
    numbers = _settings(layout, settings, trainer, folder)
    if said.threshold is not None and numbers.get("threshold") == float(torch.tensor(said.threshold)):
        numbers["threshold"] = float(said.threshold)  # before it was rounded to float32
    with store.reading(folder):
        arguments: dict[str, Any] = weights | said.common() | numbers | {"subtract_bias": layout.subtracts}
        return layout.kind(**arguments)


def _settings(layout: Layout, found: dict[str, Tensor], trainer: dict[str, Any], folder: Path) -> dict[str, Any]:
    """k, threshold and groups, as the class needs them; old files of top-k have k in the config alone."""
    path = folder / WEIGHTS
    out: dict[str, Any] = {}
    for name in layout.settings:
        if name not in found:
            if name == "k":
                out["k"] = store.fields_of(trainer, {"k": int}, f"{folder / CONFIG}: trainer")["k"]
                continue
            if layout.kind is TopK:
                continue
            raise BadInput(f"{path} has no tensor {name!r}; {CONFIG}: dict_class is {trainer['dict_class']!r}")
        tensor = found[name]
        wanted = "[]" if name != "group_sizes" else "[group]"
        if tensor.ndim != wanted.count("g") or tensor.is_floating_point() != (name == "threshold"):
            kind = f"{str(tensor.dtype)[6:]} {list(tensor.shape)}"
            raise BadInput(f"{path}: {name} is {kind}; expected {'numbers' if wanted != '[]' else 'one number'}")
        out[name] = tensor.tolist()
    if trainer.get("k", out.get("k")) != out.get("k"):
        raise BadInput(f"{path}: k is {out['k']}; expected {trainer['k']}, as {CONFIG} says")
    threshold = out.pop("threshold", 0.0) if layout.kind is TopK else out.get("threshold", 0.0)
    if not math.isfinite(threshold):
        raise BadInput(f"{path}: threshold is {threshold}; expected a finite number")
    return out | ({"groups": tuple(out.pop("group_sizes"))} if "group_sizes" in out else {})


def _shapes(layout: Layout, d: int, features: int) -> dict[str, tuple[int, ...]]:
    ours = {"W_enc": (d, features), "W_dec": (features, d), "b_dec": (d,)}
    out: dict[str, tuple[int, ...]] = {}
    for theirs, name in layout.names.items():
        shape = ours.get(name, (features,))
        out[theirs] = shape[::-1] if theirs in LINEAR else shape
    return out


def _turned(theirs: str, tensor: Tensor) -> Tensor:
    return tensor.T.contiguous() if theirs in LINEAR else tensor


def _site(trainer: dict[str, Any]) -> Site | None:
    """What `submodule_name` says; `layer` alone leaves the point open."""
    name = trainer.get("submodule_name")
    if not isinstance(name, str):
        return None
    if found := re.fullmatch(r"(resid_post|mlp_out|attn_out)_layer_(\d{1,6})", name):
        return Site(int(found[2]), POINTS[found[1]])
    return facts.site_of_module(name)


def write(dictionary: Coder, folder: Path) -> None:
    """Write a finished dictionary; raises `BadInput` for transcoders, which the library's files have not."""
    if dictionary.target is not None or dictionary.W_skip is not None:
        raise BadInput("dictionary_learning has no transcoders and no skip paths; use 'saelens' or 'sparsify'")
    name = _class(dictionary)
    layout = LAYOUTS[name]
    coder = facts.with_bias(dictionary, subtracted=layout.subtracts)
    weights = coder.tensors()
    state = {theirs: _turned(theirs, weights[ours]) for theirs, ours in layout.names.items()}
    settings = coder.settings()
    if layout.settings:
        state["k"] = torch.tensor(settings["k"], dtype=torch.int32)
        state["threshold"] = torch.tensor(settings.get("threshold", -1.0))
    if isinstance(coder, Matryoshka):
        state["group_sizes"] = torch.tensor(coder.groups)
    metadata = facts.described(coder)
    kept = facts.taken(metadata, "dictionary_learning")
    before = kept.get("trainer")
    trainer = (cast("dict[str, Any]", before) if isinstance(before, dict) else {}) | {
        "trainer_class": layout.trainer,
        "dict_class": name,
        "activation_dim": coder.d_model,
        "dict_size": coder.n_features,
        "layer": coder.site.layer,
        "submodule_name": _submodule(coder.site),
    }
    trainer.setdefault("lm_name", str(metadata.get("model_name", "unknown")))
    trainer |= {"k": settings["k"]} if layout.settings else {}
    trainer |= {"group_sizes": settings["groups"]} if "groups" in settings else {}
    store.write_json(folder / CONFIG, kept | {"trainer": trainer, "metadata": metadata})
    pickled.write_state(folder / WEIGHTS, state)


def _class(dictionary: Coder) -> str:
    if isinstance(dictionary, Standard) and not dictionary.subtract_bias:
        return "AutoEncoderNew"
    for name, layout in LAYOUTS.items():
        if type(dictionary) is layout.kind:
            return name
    raise BadInput(f"dictionary_learning has no class for a {type(dictionary).__name__} dictionary; use 'saelens'")


def _submodule(site: Site) -> str:
    names = {point: name for name, point in POINTS.items()}
    return f"{names[site.point]}_layer_{site.layer}" if site.point in names else facts.module_of_site(site)
