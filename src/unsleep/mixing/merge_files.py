"""Tensors of a checkpoint where they lie on disk: dtype, shape and byte range of each, without loading it.

Names are those of the model's class: a file saved without its prefix has it added (`h.0.attn…` is
`transformer.h.0.attn…`). A tied weight is one tensor under two names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from unsleep.core import BadInput
from unsleep.models.load import config_of, loading, quiet_transformers
from unsleep.models.quantized import method_of
from unsleep.models.sources import INDEX, WEIGHTS, Files, shards

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of weights that can be merged, by their names in safetensors files."""
WHOLE = {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
"""Dtypes of tensors that are no weights, such as masks: both models must have the same."""
PIECE = 1 << 24
"""Bytes per read when two tensors are compared."""


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    name: str
    """Its name there."""
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Position of its first byte in the file."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


class Shard(NamedTuple):
    """A safetensors file."""

    path: Path
    metadata: dict[str, str] | None
    tensors: tuple[Stored, ...]
    """In the header's order."""


def shard(path: Path) -> Shard:
    """The header of a safetensors file; raises `BadInput` where it is damaged."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(size))
            metadata = header.pop("__metadata__", None)
            found = [
                Stored(name, path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
                for name, entry in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{path} has no readable header ({error}); download it again") from None
    return Shard(path, metadata, tuple(found))


class Skeleton(NamedTuple):
    """Facts of a model's class, from the model without weights."""

    names: frozenset[str]
    """Names of its weights."""
    prefix: str
    """First component of most of them, such as `model`."""
    tied: Mapping[str, str]
    """Name of a tied weight → name of the one it is tied to."""
    ignored: tuple[str, ...]
    """Regular expressions for names in files that are no weights of the model."""

    def name_of(self, stored: str) -> str:
        """The model's name of a tensor in a file."""
        full = f"{self.prefix}.{stored}"
        return full if stored not in self.names and full in self.names else stored

    def ignores(self, name: str) -> bool:
        """True for a tensor that is no weight of the model, and is known not to be."""
        return name not in self.names and any(re.search(pattern, name) for pattern in self.ignored)


def skeleton(config: PretrainedConfig, name: str) -> Skeleton:
    """Build a model on the meta device, which takes no memory; raises `BadInput` where it is no causal LM."""
    with quiet_transformers(), loading(name), torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(config)
    ignored = network._keys_to_ignore_on_load_unexpected or ()
    names = frozenset(network.state_dict())
    return Skeleton(names, str(network.base_model_prefix), dict(network.all_tied_weights_keys), tuple(sorted(ignored)))


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A whole checkpoint on disk."""

    files: Files
    config: PretrainedConfig
    shards: tuple[Shard, ...]
    tensors: Mapping[str, Stored]
    """The model's name of every weight → where it is stored; one that is tied and not stored has its source's place."""
    copies: frozenset[str]
    """Names of tied weights: they are at their source's place, whether or not the file has a copy."""
    extra: Mapping[str, Stored]
    """Tensors that the model's class ignores, such as the causal masks of old files."""

    @classmethod
    def open(cls, files: Files) -> Checkpoint:
        """Read configs and headers.

        Raises `BadInput` for a GGUF file, quantised weights, an 8-bit dtype, and a name that two shards have.
        """
        if files.is_gguf:
            raise BadInput(
                f"{files.name} is a GGUF file, whose weights are quantised; merge the original checkpoint, or load it "
                "and save it as safetensors first"
            )
        config = config_of(files)
        method = method_of(config) or method_of(config.get_text_config())
        if method is not None:
            raise BadInput(
                f"{files.name} has weights quantised with {method}, which cannot be merged; merge the original "
                "checkpoint, or load it and save it dequantised first"
            )
        bones = skeleton(config, files.name)
        names = [WEIGHTS] if files.has(WEIGHTS) else shards(files.place)
        found = tuple(shard(files.place / name) for name in names)
        tensors: dict[str, Stored] = {}
        extra: dict[str, Stored] = {}
        for tensor in (tensor for each in found for tensor in each.tensors):
            named = bones.name_of(tensor.name)
            place = extra if bones.ignores(named) else tensors
            if named in tensors or named in extra:
                raise BadInput(f"{files.name} has {tensor.name} in two of its shards; download it again")
            place[named] = _supported(tensor, files.name)
        return cls(files, config, found, *_tied(tensors, bones), extra)

    @property
    def name(self) -> str:
        """The requested name."""
        return self.files.name

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def weight_files(files: Files) -> list[Path]:
    """The weight files of a whole checkpoint."""
    return [files.place / name for name in (shards(files.place) if files.has(INDEX) else [WEIGHTS])]


def _supported(tensor: Stored, name: str) -> Stored:
    if tensor.dtype not in DTYPES and tensor.dtype not in WHOLE:
        raise BadInput(
            f"{name}: {tensor.name} has dtype {tensor.dtype}, which cannot be merged; expected "
            f"{', '.join(DTYPES)}. Merge the original checkpoint"
        )
    return tensor


def _tied(tensors: dict[str, Stored], bones: Skeleton) -> tuple[dict[str, Stored], frozenset[str]]:
    """Tensors with every tied weight at its source's place, and the names of those; copies that differ are untied."""
    copies: set[str] = set()
    for name, source in bones.tied.items():
        if source not in tensors and name in tensors:
            tensors[source] = tensors[name]
            copies.add(name)
        elif source in tensors and (name not in tensors or same(tensors[name], tensors[source])):
            tensors[name] = tensors[source]
            copies.add(name)
    return tensors, frozenset(copies)


def same(one: Stored, other: Stored) -> bool:
    """True for tensors of the same dtype, shape and bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if (one.path, one.start) == (other.path, other.start):
        return True
    return all(a == b for a, b in zip(_pieces(one), _pieces(other), strict=True))


def size_of(tensor: Stored) -> int:
    """Bytes of a tensor."""
    return tensor.elements * ITEMS[tensor.dtype]


ITEMS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2} | {
    name: 1 if name == "BOOL" else int(name[1:]) // 8 for name in WHOLE
}
"""Bytes per element by dtype."""


def _pieces(tensor: Stored) -> Iterator[bytes]:
    left = size_of(tensor)
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        while left:
            piece = file.read(min(PIECE, left))
            if not piece:
                raise BadInput(f"{tensor.path} ends inside {tensor.name}; download it again")
            left -= len(piece)
            yield piece


def text_layers(config: PretrainedConfig) -> int:
    """Number of layers of the language model."""
    return int(cast("Any", config.get_text_config()).num_hidden_layers)
