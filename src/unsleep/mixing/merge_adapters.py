"""Merges of a base and LoRA adapters over it, which are adapters themselves: nothing is added to the base's weights.

A model with a LoRA has the weights W + s·B·A. Between it and its base, the merge is the adapter with B scaled; between
two adapters it is their matrices side by side, of the sum of their ranks: exact but for the rounding of B.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base import store
from unsleep.core import BadInput, check_finite
from unsleep.mixing.merge_config import MergeConfig, layer_list, layer_of
from unsleep.mixing.merge_files import skeleton, text_layers
from unsleep.mixing.merge_sources import Side, copy_small
from unsleep.mixing.merge_stream import arc_of
from unsleep.models.alike import check_vocabularies
from unsleep.models.load import config_of, tokenizer_of
from unsleep.models.sources import ADAPTER, ADAPTER_WEIGHTS, Files

KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
FREE = {
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "r",
        "lora_alpha",
    ),
    *("inference_mode", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "use_rslora"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "runtime_config", "init_lora_weights"),
}
"""Settings of an adapter with which it is still W + s·B·A; any other must be at its default."""


class Factors(NamedTuple):
    """The LoRA matrices of a module, and their scale s."""

    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "d_out rank"]
    scale: float


@dataclass(frozen=True, eq=False)
class Lora:
    """A plain LoRA adapter."""

    files: Files
    settings: Mapping[str, Any]
    """adapter_config.json."""
    modules: Mapping[str, Factors]

    @classmethod
    def read(cls, files: Files) -> Lora | None:
        """An adapter; `None` for one that is more than W + s·B·A, such as DoRA or with fully trained modules.

        Raises `BadInput` for settings that peft does not know, NaN and infinite weights.
        """
        from peft import LoraConfig
        from peft.utils.other import get_pattern_key

        from unsleep.models import adapters  # peft takes a second to import

        config = adapters.adapter_config(files)
        plain = LoraConfig()
        if not isinstance(config, LoraConfig) or config.init_lora_weights not in (True, False, "gaussian"):
            return None
        changed = [f.name for f in fields(plain) if getattr(config, f.name) != getattr(plain, f.name)]
        tensors = store.read_tensors(files.place / ADAPTER_WEIGHTS)
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            match = KEY.fullmatch(key)
            if match is None or tensor.ndim != 2:
                return None
            check_finite(tensor, f"{files.place / ADAPTER_WEIGHTS}: {key}")
            found.setdefault(match[1], {})[match[2]] = tensor
        if not FREE.issuperset(changed) or any(len(pair) != 2 for pair in found.values()):
            return None
        modules: dict[str, Factors] = {}
        for module, pair in found.items():
            scales = config.alpha_pattern or {}
            alpha = scales.get(get_pattern_key(list(scales), module), config.lora_alpha)
            rank = len(pair["A"])
            modules[module] = Factors(pair["A"], pair["B"], alpha / (rank**0.5 if config.use_rslora else rank))
        return cls(files, files.json(ADAPTER), modules)


def adapters_of(sides: Sequence[Side]) -> list[Lora | None] | None:
    """The adapters of models over one base, `None` for the base itself; `None` where a merge of them is no adapter."""
    parts = [side.parts for side in sides]
    bases = {each[0].place.resolve() for each in parts}
    if len(bases) != 1 or max(map(len, parts)) != 2 or any(len(each) != 1 for each in parts[2:]):
        return None
    found = [Lora.read(each[1]) if len(each) == 2 else None for each in parts[:2]]
    if any(lora is None for lora, each in zip(found, parts, strict=False) if len(each) == 2):
        return None
    kinds = {lora.settings.get("fan_in_fan_out", False) for lora in found if lora is not None}
    return found if len(kinds) == 1 else None


def module_list(base: Files) -> str:
    """The list of modules that are a base's layers; raises `BadInput` where it is not known."""
    settings = config_of(base)
    return layer_list(skeleton(settings, base.name).names, text_layers(settings), base.name)


def write_adapter(
    loras: Sequence[Lora | None], sides: Sequence[Side], config: MergeConfig, home: str | None, folder: Path
) -> str:
    """Write the merge of two models over one base as an adapter; returns the dtype of its weights.

    `home` is the base's list of layers, where they have their own α.

    Raises `BadInput` for adapters of modules of different shapes, different vocabularies, and an unknown layer.
    """
    first, second = loras
    present = [lora for lora in loras if lora is not None]
    with_tokenizers = [lora.files for lora in present if lora.files.has_tokenizer]
    if len(with_tokenizers) == 2:
        names = with_tokenizers[0].name, with_tokenizers[1].name
        check_vocabularies(names, *(tokenizer_of(files).get_vocab() for files in with_tokenizers))
    modules = sorted({module for lora in present for module in lora.modules})
    alphas = _alphas(modules, sides[0].parts[0], config, home)
    factors = {module: _factors(module, first, second, alpha, config) for module, alpha in alphas.items()}
    used = [lora for i, lora in enumerate(loras) if lora is not None and any(factors[m][i] for m in modules)]
    used = used or present[:1]
    dtype = _dtype(used, config)
    [kept, *others] = used
    copy_small(kept.files.place, folder, leave=(ADAPTER,))
    own = loras.index(kept)
    settings = dict(kept.settings)
    if sides[own].base is not None:
        settings["base_model_name_or_path"] = sides[own].base
    if not others:
        if config.dtype == "auto" and all(factors[module][own] == 1 for module in modules):
            shutil.copyfile(kept.files.place / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
        else:
            tensors = _scaled(kept, {module: factors[module][own] for module in modules}, dtype)
            store.write_tensors(folder / ADAPTER_WEIGHTS, tensors)
    else:
        rank, tensors = _side_by_side(modules, present, factors, dtype)
        store.write_tensors(folder / ADAPTER_WEIGHTS, tensors)
        settings |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
        settings |= {"target_modules": modules, "layers_to_transform": None, "layers_pattern": None}
        settings |= {"exclude_modules": None, "init_lora_weights": True, "lora_dropout": 0.0}
    store.write_json(folder / ADAPTER, settings)
    return str(dtype).removeprefix("torch.")


def _alphas(modules: Sequence[str], base: Files, config: MergeConfig, home: str | None) -> dict[str, float]:
    if home is None:
        return dict.fromkeys(modules, config.alpha)
    alphas = config.alphas(text_layers(config_of(base)))
    return {module: alphas[layer_of(module, home)] for module in modules}


def _factors(
    module: str, first: Lora | None, second: Lora | None, alpha: float, config: MergeConfig
) -> tuple[float, float]:
    """Coefficients of a module's two task vectors."""
    pairs = [lora.modules.get(module) if lora is not None else None for lora in (first, second)]
    one, other = pairs
    if one is not None and other is not None:
        shapes = [(len(pair.b), pair.a.shape[1]) for pair in (one, other)]
        if shapes[0] != shapes[1]:
            raise BadInput(f"the adapters of {module} are for weights of shapes {shapes[0]} and {shapes[1]}")
        if config.method == "slerp" and alpha not in (0, 1):
            s, t = arc_of(_product(one, one), _product(other, other), _product(one, other), alpha)
            return s, t
    return 1 - alpha, alpha


def _product(one: Factors, other: Factors) -> float:
    """The scalar product of two task vectors s·B·A, from their factors."""
    outer, inner = one.b.double().T @ other.b.double(), one.a.double() @ other.a.double().T
    return one.scale * other.scale * float((outer * inner).sum())


def _dtype(used: Sequence[Lora], config: MergeConfig) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    found = torch.bfloat16
    kinds = {tensor.dtype for lora in used for pair in lora.modules.values() for tensor in (pair.a, pair.b)}
    for number, kind in enumerate(sorted(kinds, key=str)):
        found = torch.promote_types(found, kind) if number else kind
    return found


def _scaled(lora: Lora, factors: Mapping[str, float], dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapter's matrices with B scaled, in float64, rounded once."""
    found: dict[str, Tensor] = {}
    for module, (a, b, _) in lora.modules.items():
        found[_key(module, "A")] = a.to(dtype)
        found[_key(module, "B")] = (b.double() * factors[module]).to(dtype)
        check_finite(found[_key(module, "B")], f"the merge of {module}")
    return found


def _side_by_side(
    modules: Sequence[str], loras: Sequence[Lora], factors: Mapping[str, tuple[float, float]], dtype: torch.dtype
) -> tuple[int, dict[str, Tensor]]:
    """The rank and the matrices of the sum of two adapters, each times its coefficient and its scale."""
    ranks = [sum(len(lora.modules[m].a) for lora in loras if m in lora.modules) for m in modules]
    rank = max(ranks)
    found: dict[str, Tensor] = {}
    for module, own in zip(modules, ranks, strict=True):
        pairs = [
            (lora.modules[module], c) for lora, c in zip(loras, factors[module], strict=True) if module in lora.modules
        ]
        wide, tall = pairs[0][0].a.shape[1], len(pairs[0][0].b)
        a = [pair.a.double() for pair, _ in pairs] + [torch.zeros(rank - own, wide, dtype=torch.float64)]
        b = [pair.b.double() * (c * pair.scale) for pair, c in pairs]
        b += [torch.zeros(tall, rank - own, dtype=torch.float64)]
        found[_key(module, "A")] = torch.cat(a).to(dtype)
        found[_key(module, "B")] = torch.cat(b, 1).to(dtype)
        check_finite(found[_key(module, "B")], f"the merge of {module}")
    return rank, found


def _key(module: str, which: str) -> str:
    return f"base_model.model.{module}.lora_{which}.weight"
