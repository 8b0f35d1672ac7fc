"""The plan of a merge: models that do not match are refused, each tensor gets its sources, dtype and coefficient."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from unsleep.core import BadInput
from unsleep.mixing.merge_config import REST, MergeConfig, layer_list, layer_of
from unsleep.mixing.merge_files import DTYPES, Checkpoint, Stored, same, text_layers
from unsleep.mixing.merge_stream import Job, Part
from unsleep.models.alike import check_kinds, check_vocabularies, check_weights
from unsleep.models.chat import template_hash
from unsleep.models.load import tokenizer_of
from unsleep.models.sources import CONFIG

NAMES = {dtype: name for name, dtype in DTYPES.items()}
HARMLESS = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "auto_map"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "attn_implementation", "_attn_implementation"),
    *("max_position_embeddings", "tie_word_embeddings", "initializer_range", "pretraining_tp", "id2label", "label2id"),
    *("output_attentions", "output_hidden_states", "return_dict", "task_specific_params"),
}
"""Fields of a config that may differ: with the same weights, the models would still be the same."""
NOTED = ("eos_token_id", "max_position_embeddings")
"""Fields of those that matter for replies."""
HARMLESS_ENDS = ("dropout", "_pdrop", "_prob")
"""Ends of the names of others, which matter in training only."""


@dataclass(frozen=True)
class Plan:
    """A merge of whole checkpoints."""

    parts: tuple[Part, ...]
    shards: Mapping[str, str]
    """Tensor → its file, for the index; empty where all are in one."""
    config: Mapping[str, Any]
    """config.json."""
    dtype: torch.dtype
    """Dtype of most elements."""
    notes: tuple[str, ...]


def plan(first: Checkpoint, second: Checkpoint, base: Checkpoint | None, config: MergeConfig) -> Plan:
    """Plan a merge whose files, names and config are those of the first model.

    Raises `BadInput` for different architectures, configs, weights or vocabularies, naming what differs.
    """
    notes = check_match(first, second)
    if base is not None:
        check_match(first, base)
    whole = [each for each in (first, second, base) if each is not None]
    alphas = config.alphas(text_layers(first.config))
    layers = _layers(first, config)
    jobs: dict[str, Job] = {}
    for name in first.tensors:
        sources = tuple(each.tensors[name] for each in whole)
        layer = layers.get(name, REST)
        jobs[name] = _job(sources, layer, alphas[layer], config)
    untied = [name for name in first.copies if any(name not in each.copies for each in whole)]
    parts = _parts(first, jobs, untied)
    settings = first.files.json(CONFIG)
    sizes: Counter[torch.dtype] = Counter()
    for job in (job for part in parts for job in part.jobs if job.dtype in DTYPES):
        sizes[DTYPES[job.dtype]] += job.elements
    dtype = sizes.most_common(1)[0][0]
    settings = _with_dtype(settings, dtype, first)
    if untied:
        settings = _untied(settings)
        notes = (*notes, f"{', '.join(untied)} is tied in one of the models only; it is untied in the merge")
    shards = {name: part.name for part in parts for name in part.listed} if len(first.shards) > 1 else {}
    return Plan(parts, shards, settings, dtype, notes)


def check_match(first: Checkpoint, second: Checkpoint) -> tuple[str, ...]:
    """Raise `BadInput` naming the first difference that makes a merge meaningless; notes on those that do not."""
    names = first.name, second.name
    check_kinds(names, first.config.model_type, second.config.model_type)
    tokenizers = tokenizer_of(first.files), tokenizer_of(second.files)
    check_vocabularies(names, tokenizers[0].get_vocab(), tokenizers[1].get_vocab())
    _check_configs(names, first.config.to_dict(), second.config.to_dict())
    check_weights(names, first.shapes, second.shapes)
    for name, tensor in first.tensors.items():
        other = second.tensors[name]
        if (tensor.dtype in DTYPES) != (other.dtype in DTYPES):
            raise BadInput(
                f"{name} is {tensor.dtype} in {names[0]} and {other.dtype} in {names[1]}; merge models of the same kind"
            )
        if tensor.dtype not in DTYPES and not same(tensor, other):
            raise BadInput(
                f"{name} holds {tensor.dtype} that differ in {names[0]} and {names[1]}; numbers that are no weights "
                "cannot be merged"
            )
    return _notes(names, tokenizers, (first.config, second.config))


def _check_configs(names: tuple[str, str], one: dict[str, Any], other: dict[str, Any], inside: str = "") -> None:
    for key in sorted(one.keys() | other.keys()):
        if key in HARMLESS or key.endswith(HARMLESS_ENDS) or one.get(key) == other.get(key):
            continue
        ours, theirs = one.get(key), other.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            _check_configs(names, ours, theirs, f"{inside}{key}.")
            continue
        raise BadInput(
            f"{inside}{key} is {ours!r} in {names[0]} and {theirs!r} in {names[1]}: with the same weights they would "
            f"be different models. Merge models that agree in it, or make their {CONFIG} agree"
        )


def _notes(
    names: tuple[str, str],
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    configs: tuple[PretrainedConfig, PretrainedConfig],
) -> tuple[str, ...]:
    notes: list[str] = []
    if len({template_hash(tokenizer) for tokenizer in tokenizers}) > 1:
        notes.append(f"{names[0]} and {names[1]} have different chat templates; the merge has that of {names[0]}")
    for field in NOTED:
        one, other = (getattr(config, field, None) for config in configs)
        if one != other:
            notes.append(f"{field} is {one} in {names[0]} and {other} in {names[1]}; the merge has that of {names[0]}")
    return tuple(notes)


def _layers(first: Checkpoint, config: MergeConfig) -> dict[str, str]:
    """Tensor → layer; empty where the layers cannot be told apart and need not be."""
    try:
        home = layer_list(first.tensors, text_layers(first.config), first.name)
    except BadInput:
        if config.alpha_layers:
            raise
        return {}
    return {name: layer_of(name, home) for name in first.tensors}


def _job(sources: tuple[Stored, ...], layer: str, alpha: float, config: MergeConfig) -> Job:
    first, second, *_ = sources
    if first.dtype not in DTYPES:
        return Job(first.name, first.dtype, first.shape, layer, (first,))
    wide = torch.promote_types(DTYPES[first.dtype], DTYPES[second.dtype])
    if config.dtype != "auto":
        wide = getattr(torch, config.dtype)
    return Job(first.name, NAMES[wide], first.shape, layer, sources, alpha)


def _parts(first: Checkpoint, jobs: Mapping[str, Job], untied: Sequence[str]) -> tuple[Part, ...]:
    """The first model's files: each tensor where it is there, tied weights once, untied ones in the last."""
    by_place = {(each.path, each.start): name for name, each in first.tensors.items() if name not in first.copies}
    for name, each in first.tensors.items():
        by_place.setdefault((each.path, each.start), name)
    ignored = {(each.path, each.start): each for each in first.extra.values()}
    parts: list[Part] = []
    for number, shard in enumerate(first.shards):
        kept: list[Job] = []
        for tensor in shard.tensors:
            place = tensor.path, tensor.start
            if place in ignored:
                kept.append(Job(tensor.name, tensor.dtype, tensor.shape, REST, (tensor,)))
            elif place in by_place:
                kept.append(jobs[by_place[place]])
        if number == len(first.shards) - 1:
            kept += [replace(jobs[name], name=name) for name in untied]
        starts = {tensor.name: tensor.start for tensor in shard.tensors}
        last = max(starts.values(), default=0)
        ordered = sorted(kept, key=lambda job: starts.get(job.name, last + 1))
        parts.append(Part(shard.path.name, tuple(ordered), tuple(job.name for job in kept), shard.metadata))
    return tuple(parts)


def _with_dtype(settings: dict[str, Any], dtype: torch.dtype, first: Checkpoint) -> dict[str, Any]:
    """The config with the merge's dtype, where the first model's is another."""
    had: Counter[str] = Counter()
    for tensor in first.tensors.values():
        had[tensor.dtype] += tensor.elements
    if DTYPES[max((d for d in had if d in DTYPES), key=lambda d: had[d])] == dtype:
        return settings
    name = str(dtype).removeprefix("torch.")
    return json.loads(json.dumps(settings), object_hook=lambda found: _replaced(found, name)) | {"dtype": name}


def _replaced(found: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {key: dtype if key in ("dtype", "torch_dtype") else value for key, value in found.items()}


def _untied(settings: dict[str, Any]) -> dict[str, Any]:
    """The config with untied embeddings, also of a language model inside of it."""
    inside = {
        key: value | {"tie_word_embeddings": False}
        for key, value in settings.items()
        if isinstance(value, dict) and "tie_word_embeddings" in value
    }
    return settings | inside | {"tie_word_embeddings": False}
