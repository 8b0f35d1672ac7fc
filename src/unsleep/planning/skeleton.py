"""A model without weights: built from its config on the meta device, cut to a few blocks that stand for all.

Blocks of equal modules, shapes and settings are of one kind. The first blocks are kept until every kind is among them,
so that a model of eighty equal blocks is planned from three.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unsleep.core import BadInput
from unsleep.models.load import quiet_transformers
from unsleep.models.sources import INDEX, WEIGHTS, Files, Source, shards
from unsleep.planning.config import Dtype
from unsleep.planning.packed import Bits, Packed, pack

LEAST = 3
"""Blocks that are kept at least: one stands between a first block, whose input may have no gradient, and a last one."""

COUNTERS = ("layer_idx", "layer_id", "block_idx", "layer_number")
"""Attributes that number a block, and do not make it another kind."""


class Weight(NamedTuple):
    """A parameter."""

    numel: int
    bytes: int
    """As it is held, quantised or not."""
    itemsize: int
    trained: bool


@dataclass(frozen=True)
class Skeleton:
    """A network on the meta device with the first blocks of the model."""

    network: PreTrainedModel
    kinds: tuple[int, ...]
    """Kind of every block of the whole model, counted from 0 in the order of their appearance."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks that are kept."""
        return blocks_of(self.network)

    @property
    def width(self) -> int:
        """d_model."""
        return cast("Any", self.network.get_input_embeddings()).weight.shape[1]

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return cast("Any", self.network.get_input_embeddings()).weight.shape[0]

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the residual stream."""
        return self.network.dtype.itemsize

    def weights(self) -> Iterator[Weight]:
        """Every parameter of the whole model, tied ones once."""
        inside = [[_weight(m, n, p) for m, n, p in _parameters(block)] for block in self.blocks]
        first = [self.kinds.index(kind) for kind in range(max(self.kinds) + 1)]
        for kind in self.kinds:
            yield from inside[first[kind]]
        own = {id(p) for block in self.blocks for p in block.parameters()}
        yield from (_weight(m, n, p) for m, n, p in _parameters(self.network) if id(p) not in own)

    def gradients(self, block: int) -> int:
        """Bytes of the gradients of a kept block."""
        return sum(p.numel() * p.itemsize for p in self.blocks[block].parameters() if p.requires_grad)

    def variant(
        self,
        *,
        dtype: torch.dtype | None = None,
        bits: Bits | None = None,
        rank: int | None = None,
        modules: Sequence[str] = (),
        trained: bool = False,
    ) -> Skeleton:
        """A copy in another dtype, quantised, with LoRA matrices or all weights trained.

        Raises `BadInput` where no layer has one of the names in `modules`.
        """
        network = copy.deepcopy(self.network)
        if dtype is not None:
            network = cast("Any", network).to(dtype)
        network.requires_grad_(trained)
        if bits is not None:
            pack(network, bits)
        if rank is not None:
            from unsleep.models import adapters  # peft takes a second to import

            wanted = _linear_layers(network) if list(modules) == ["all-linear"] else list(modules)
            try:
                with torch.device("meta"), quiet_transformers():
                    adapters.trainable(network, rank, wanted)
            except ValueError as error:
                raise BadInput(f"LoRA on {', '.join(modules)}: {str(error).splitlines()[0]}") from None
        return Skeleton(network, self.kinds)


def _linear_layers(network: PreTrainedModel) -> list[str]:
    """Names of all linear layers but the unembedding."""
    head = network.get_output_embeddings()
    return [n for n, m in network.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def _parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Each parameter once, with the module that holds it and its name there."""
    seen: set[int] = set()
    for inner in module.modules():
        for name, parameter in inner.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield inner, name, parameter


def _weight(module: nn.Module, name: str, parameter: nn.Parameter) -> Weight:
    size = parameter.numel() * parameter.itemsize
    if isinstance(module, Packed) and name == "weight":
        size = module.bytes
    return Weight(parameter.numel(), size, parameter.itemsize, parameter.requires_grad)


def blocks_of(network: nn.Module) -> nn.ModuleList:
    """The list of modules with most parameters; raises `BadInput` for a model without one."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise BadInput("the model has no list of blocks; expected a causal language model of equal blocks")
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def _kind(block: nn.Module, index: int, config: PreTrainedConfig) -> str:
    """Modules, shapes and plain settings of a block, as text."""
    settings = [
        [name, type(module).__name__, {k: v for k, v in vars(module).items() if _is_setting(k, v)}]
        for name, module in block.named_modules()
    ]
    shapes = [[name, *parameter.shape] for name, parameter in block.named_parameters()]
    layers: Any = getattr(config, "layer_types", None)
    return json.dumps([settings, shapes, layers[index] if layers and index < len(layers) else ""], default=str)


def _is_setting(name: str, value: Any) -> bool:
    return isinstance(value, str | int | float | bool) and not name.startswith("_") and name not in COUNTERS


def files_of(name: str, revision: str | None = None, *, remote_code: bool = False) -> Files:
    """The files of a checkpoint, of which its config at least is there; raises `BadInput` as `Source.open_config`."""
    return Source.parse(name, revision).open_config(remote_code)


def build(files: Files, dtype: Dtype = "auto", *, remote_code: bool = False) -> Skeleton:
    """The model of a config, in a dtype, or that of its checkpoint.

    Raises `BadInput` for a config of no causal language model.
    """
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(files.place, trust_remote_code=remote_code)
            wanted = getattr(torch, dtype) if dtype != "auto" else stored_dtype(files, config)
            if hasattr(config, "quantization_config"):
                delattr(config, "quantization_config")  # unsleep dequantises on loading, or quantises itself
            with torch.device("meta"):
                made = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=remote_code)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, ImportError) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise BadInput(f"{files.name}: no causal language model can be built from its config ({why})") from None
    return cut(cast("PreTrainedModel", made))


def cut(network: PreTrainedModel) -> Skeleton:
    """The network with its first blocks, as few as have every kind."""
    blocks = blocks_of(network)
    settings = network.config.get_text_config(decoder=True)
    seen: dict[str, int] = {}
    kinds = tuple(seen.setdefault(_kind(block, i, settings), len(seen)) for i, block in enumerate(blocks))
    kept = max(LEAST, *(kinds.index(kind) + 1 for kind in range(len(seen))))
    if kept < len(blocks):
        del blocks[kept:]
        settings.num_hidden_layers = kept
        if getattr(settings, "layer_types", None):
            settings.layer_types = settings.layer_types[:kept]
    return Skeleton(network.eval().requires_grad_(False), kinds)


def stored_dtype(files: Files, config: PreTrainedConfig) -> torch.dtype:
    """Dtype of a checkpoint: its config's, else that of the first weight in its safetensors files, else float32."""
    text = config.get_text_config(decoder=True)
    for held in (config.dtype, text.dtype):
        if held is not None:
            return getattr(torch, held) if isinstance(held, str) else held
    for name in (WEIGHTS, *(shards(files.place) if files.has(INDEX) else ())):
        if files.has(name):
            with safe_open(files.place / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    if (kind := file.get_slice(key).get_dtype()) in NAMES:
                        return NAMES[kind]
    return torch.float32


NAMES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of weights by their names in safetensors."""
