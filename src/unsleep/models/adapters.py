"""PEFT adapters: attached to their base, checked key by key, merged into its weights.

1. The vocabulary is resized for rows that the adapter brings.
2. PEFT attaches the adapter. A weight that the adapter's file lacks, or that the model has no place for, is
   refused: otherwise the bare base would pass for the adapted model.
3. Reference logits are computed with the adapter unmerged.
4. A tied unembedding is untied where the adapter changes it or the embedding.
5. The adapter is merged layer by layer, in float32, and rounded once to the base's dtype.
6. The merged model's logits must match the reference.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType, load_peft_weights, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from unsleep.core import BadInput, Refused, check_finite
from unsleep.models.anatomy import first_look, probe
from unsleep.models.ignored import IgnoredKeys
from unsleep.models.sources import ADAPTER, ADAPTER_WEIGHTS, TEMPLATE, Files

ROUNDING = 24.0
"""Tolerated difference of merged and unmerged logits, relative to their spread, in units of the dtype's resolution."""

SUMS = 1e-3
"""Additional tolerance relative to the spread, for another order of summation."""


def trainable(network: PreTrainedModel, rank: int, modules: Sequence[str] | str, head: str | None = None) -> PeftModel:
    """A network with trainable LoRA matrices (Hu et al. 2021, arXiv:2106.09685), α twice their rank.

    `modules` are names of linear layers, or `all-linear` for all but the unembedding; empty for peft's default of the
    family. `head` names the head of a sequence-classification model, which is trained and saved as a whole.
    `unload` detaches the matrices. Raises `ValueError` as peft does.
    """
    wanted = modules if isinstance(modules, str) else list(modules) or None
    task = {"task_type": "SEQ_CLS", "modules_to_save": [head]} if head else {"task_type": "CAUSAL_LM"}
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=wanted, **cast("Any", task))
    return cast("PeftModel", get_peft_model(network, config))


def trained_state(adapted: PeftModel) -> dict[str, Tensor]:
    """The trained matrices by name."""
    return get_peft_model_state_dict(adapted)


def take_state(adapted: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Load trained matrices from `trained_state`."""
    set_peft_model_state_dict(adapted, dict(state))


def save_trained(adapted: PeftModel, folder: Path, base: str, template: str | None, dtype: torch.dtype | None) -> None:
    """Save trained matrices, and a head, as a PEFT adapter over a base, with the chat template used in training.

    `dtype` is that of the saved matrices, without a head; `None` keeps their own.
    """
    adapted.peft_config["default"].base_model_name_or_path = base
    state = {k: v.to(dtype) for k, v in get_peft_model_state_dict(adapted).items()} if dtype else None
    adapted.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    if template:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")


def with_adapters(
    network: PreTrainedModel,
    adapters: Sequence[Files],
    tokens: int,
    *,
    merge: bool,
    ignored: IgnoredKeys | None = None,
) -> PreTrainedModel:
    """A base with adapters attached in order; modifies the given network.

    Args:
        tokens: size of the tokenizer's vocabulary.
        merge: merge into plain weights; otherwise adapters stay beside packed weights, all active at once.
        ignored: keys in the adapters' files that may be skipped.

    Raises:
        BadInput: an adapter of a kind that cannot be merged, with settings unknown to PEFT, or whose keys
            or shapes do not fit the base.
        Refused: the merged model's logits differ from the unmerged adapter's.
    """
    ignored = ignored or IgnoredKeys()
    if merge:
        for files in adapters:
            network = _merged(_attached(network, files, "own", tokens, ignored), files)
        return network
    adapted: PeftModel | None = None
    names = [f"own{i}" for i in range(len(adapters))]
    for files, name in zip(adapters, names, strict=True):
        adapted = _attached(adapted or network, files, name, tokens, ignored)
    if adapted is None:
        return network
    cast("Any", adapted.base_model).set_adapter(names)
    return cast("Any", adapted.base_model).model


def _attached(
    network: PreTrainedModel | PeftModel, files: Files, name: str, tokens: int, ignored: IgnoredKeys
) -> PeftModel:
    """The network with an unmerged adapter."""
    config = adapter_config(files)
    base: PreTrainedModel = network.get_base_model() if isinstance(network, PeftModel) else network  # type: ignore[assignment]
    shapes = _shapes(files)
    _make_room(base, config, shapes, tokens, files)
    config.inference_mode = True
    if isinstance(network, PeftModel):
        network.add_adapter(name, config)
        adapted = network
    else:
        adapted = PeftModel(network, config, adapter_name=name)
    found = _without_copies(load_peft_weights(str(files.place), device="cpu"))
    kept = ignored.left(found, files.name)
    found = {key: found[key] for key in kept}
    for key, tensor in found.items():
        check_finite(tensor, f"{files.place / ADAPTER_WEIGHTS}: {key}")
    path = files.place / ADAPTER_WEIGHTS
    for key, held in get_peft_model_state_dict(adapted, adapter_name=name).items():
        if key in found and found[key].shape != held.shape:
            raise BadInput(
                f"{path}: {key} has shape {list(found[key].shape)}; on this base it would be {list(held.shape)}. Give "
                "the base that it was trained on with --base MODEL"
            )
    result = set_peft_model_state_dict(adapted, found, adapter_name=name)
    if missing := _without_value(adapted, result.missing_keys, name):
        raise BadInput(
            f"{path} lacks {len(missing)} of the adapter's weights ({missing[0].replace(f'.{name}', '')} …); the model "
            "would equal the base there. Give the whole file, or another base with --base MODEL"
        )
    if unexpected := list(result.unexpected_keys):
        keys = sorted(key.replace(f".{name}", "") for key in unexpected)
        if config.task_type == "SEQ_CLS":
            raise BadInput(
                f"{files.name} is a reward model or another sequence classifier, and a causal language model is "
                f"expected; give it as --reward {files.name}, or pass {ignored.flag(keys, set(found) - set(keys))} for "
                "its backbone without the head"
            )
        raise BadInput(
            f"{path} holds {len(keys)} weights that the base does not have ({keys[0]} …); give the base that it "
            f"was trained on with --base MODEL, or pass {ignored.flag(keys, set(found) - set(keys))} if they do "
            "not matter"
        )
    return adapted.eval().requires_grad_(False)


def _without_copies(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without peft's duplicates and originals of fully trained modules."""
    left = dict(found)
    for key, tensor in found.items():
        for inner in (".modules_to_save", ".original_module"):
            plain = found.get(key.replace(inner, "", 1)) if inner in key else None
            if plain is not None and (inner == ".original_module" or torch.equal(plain, tensor)):
                left.pop(key)
    return left


def _without_value(adapted: PeftModel, missing: Sequence[str], name: str) -> list[str]:
    """The missing keys whose tensors do not share memory with one that was read under another key."""
    own = {k: t.data_ptr() for k, t in adapted.state_dict().items() if name in k.split(".")}
    read = {place for key, place in own.items() if key not in missing}
    return [key for key in missing if name in key.split(".") and own.get(key) not in read]


def adapter_config(files: Files) -> PeftConfig:
    """An adapter's config; raises `BadInput` for unknown settings."""
    path, given = files.place / ADAPTER, files.json(ADAPTER)
    kind = given.get("peft_type")
    if kind not in set(PEFT_TYPE_TO_CONFIG_MAPPING):
        raise BadInput(f"{path}: peft_type is {kind!r}; expected one of {', '.join(t.value for t in PeftType)}")
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    unknown = [k for k, v in given.items() if v and k not in {f.name for f in fields(cls)}]
    if unknown:
        raise BadInput(
            f"{path}: {unknown[0]} is a setting that the installed peft does not know; upgrade peft, or remove the "
            "setting if it does not matter"
        )
    config = cls.from_pretrained(str(files.place))
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(kind))
    if config.is_prompt_learning or tuner is None or not hasattr(tuner, "merge_and_unload"):
        raise BadInput(f"{path}: {kind} adds tokens instead of changing weights; expected an adapter such as LoRA")
    return config


def _shapes(files: Files) -> dict[str, tuple[int, ...]]:
    with safe_open(files.place / ADAPTER_WEIGHTS, framework="pt") as held:
        return {key: tuple(held.get_slice(key).get_shape()) for key in held.keys()}  # noqa: SIM118 - no mapping


def _make_room(
    base: PreTrainedModel, config: PeftConfig, shapes: Mapping[str, tuple[int, ...]], tokens: int, files: Files
) -> None:
    """Resize the vocabulary where the adapter was trained with more or fewer rows."""
    limit = max((max(shape) for shape in shapes.values() if shape), default=0)
    ranks = [getattr(config, "r", 0), *(getattr(config, "rank_pattern", None) or {}).values()]
    if any(isinstance(r, int) and r > limit for r in ranks):
        raise BadInput(f"{files.place / ADAPTER}: rank {max(ranks)} exceeds both dimensions of its weights")
    ends = [e for e in (base.get_input_embeddings(), base.get_output_embeddings()) if e is not None]
    names = [name for name, module in base.named_modules() if module in ends]
    rows = int(cast("Any", ends[0]).weight.shape[0])
    wanted = {
        shape[0]
        for key, shape in shapes.items()
        for n in names
        if re.search(rf"(^|\.){re.escape(n)}\.(base_layer\.|modules_to_save\.)?weight$", key)
    }
    trained = _trained_tokens(config)
    if not wanted and trained and max(trained) >= rows:
        wanted = {max(tokens, max(trained) + 1)}
        if unset := sorted(set(range(rows, *wanted)) - set(trained)):
            raise BadInput(f"{files.name} was trained with added tokens without embedding rows, such as {unset[0]}")
    if len(wanted) > 1:
        raise BadInput(
            f"{files.name} has embeddings of {' and '.join(map(str, sorted(wanted)))} rows; expected one size"
        )
    if wanted and wanted != {rows}:
        base.resize_token_embeddings(*wanted, mean_resizing=False)


def _trained_tokens(config: PeftConfig) -> list[int]:
    """Tokens whose embedding rows alone were trained."""
    held = getattr(config, "trainable_token_indices", None) or []
    return sorted({i for part in (held.values() if isinstance(held, dict) else [held]) for i in part})


@torch.no_grad()
def _merged(adapted: PeftModel, files: Files) -> PreTrainedModel:
    """The network with the adapter merged, after comparing logits with the unmerged adapter."""
    ids = probe(cast("PreTrainedModel", adapted.get_base_model()))
    wanted: Tensor = cast("Any", adapted)(input_ids=ids, use_cache=False).logits.float()
    _untie(adapted)
    for layer in [m for m in adapted.modules() if isinstance(m, BaseTunerLayer)]:
        with _in_float32(layer):
            cast("Any", layer).merge()
    merged = cast("PreTrainedModel", cast("Any", adapted).merge_and_unload()).requires_grad_(False)
    _tie_again(merged)
    error = _typical(first_look(merged).float() - wanted)
    spread = _typical(wanted - wanted.mean(-1, keepdim=True))
    allowed = (ROUNDING * torch.finfo(merged.dtype).eps + SUMS) * spread
    if not error <= allowed:
        raise Refused(
            f"{files.name} cannot be merged faithfully: its logits differ by {error:.3g} from those with the "
            f"unmerged adapter (allowed {allowed:.3g}); this kind of adapter is not supported"
        )
    return merged


def _typical(logits: Tensor) -> float:
    """Root mean square over the vocabulary, at the median position: rounding moves an attention sink far."""
    return float(logits.square().mean(-1).sqrt().median())


@contextlib.contextmanager
def _in_float32(layer: nn.Module) -> Generator[None]:
    """Hold a layer's weights and its adapter's in float32 during the block."""
    held = {p: p.dtype for p in layer.parameters() if p.is_floating_point()}
    for parameter in held:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter in layer.parameters():
            if parameter in held:
                parameter.data = parameter.data.to(held[parameter])


def _untie(adapted: PeftModel) -> None:
    """Give modules with a tied weight that the adapter changes weights of their own."""
    plain = [m for m in adapted.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    by_weight: dict[int, list[nn.Module]] = {}
    for module in plain:
        by_weight.setdefault(id(module.weight), []).append(module)
    adapting = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    changed = {id(m) for outer in adapted.modules() if isinstance(outer, adapting) for m in outer.modules()}
    for sharing in by_weight.values():
        if len(sharing) > 1 and any(id(module) in changed for module in sharing):
            for module in sharing[1:]:
                own = cast("Any", module).weight.detach().clone()
                cast("Any", module).weight = nn.Parameter(own, requires_grad=False)


def _tie_again(network: PreTrainedModel) -> None:
    """Tie the unembedding to the embedding again where they are equal; record in the config whether they are tied."""
    first, last = cast("Any", network.get_input_embeddings()), cast("Any", network.get_output_embeddings())
    if last is None or last.weight is first.weight:
        return
    config = network.config.get_text_config()
    if (
        config.tie_word_embeddings
        and first.weight.shape == last.weight.shape
        and torch.equal(first.weight, last.weight)
    ):
        last.weight = first.weight
        return
    for each in (network.config, config):
        each.tie_word_embeddings = False
