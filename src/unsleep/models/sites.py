"""Where Sites, heads, queries, keys and values live in a model, and which weights write there.

Blocks and their halves are found on the model itself (`anatomy`). Inside attention, projections are told by their
names; of those that are fused, a table says how a family lays them out, because no equation does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from unsleep.core import BadInput, Point, Site
from unsleep.models import anatomy, weights

Part = Literal["heads", "q", "k", "v", "neurons"]
"""Inside attention: what heads hand to the output projection, and the queries, keys and values. Inside the MLP: what
neurons hand to its output projection."""


@dataclass(frozen=True, order=True)
class Slot:
    """A place inside a layer's attention or MLP, `Float[Tensor, "prompt position lane"]`.

    `heads` and `neurons` are the inputs of the two output projections, a lane a neuron, several side by side a head;
    `q`, `k` and `v` are as their projections give them, before any norm, scale or rotation.
    """

    INPUTS: ClassVar = ("heads", "neurons")
    """Parts that are a module's input; the others are its output."""

    layer: int
    part: Part

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise BadInput(f"Slot layer is {self.layer}; layers count from 0")
        if self.part not in get_args(Part):
            raise BadInput(f"Slot part is {self.part!r}; expected one of {get_args(Part)}")

    def __str__(self) -> str:
        return f"{self.part}.{self.layer}"


Place = Site | Slot
"""Where hooks can reach."""


Layout = Literal["blocks", "groups"]
"""How queries, keys and values are fused in one output: all of q, all of k, all of v; or each key's queries, its key,
its value."""

FUSED: dict[str, tuple[str, Layout]] = {
    "bloom": ("query_key_value", "groups"),
    "falcon": ("query_key_value", "groups"),
    "gpt2": ("c_attn", "blocks"),
    "gpt_neox": ("query_key_value", "groups"),
    "mpt": ("Wqkv", "blocks"),
    "phi3": ("qkv_proj", "blocks"),
}
"""Model type → the name of its fused projection, and its layout."""

APART = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
"""Names of projections of their own."""

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
"""Names of output projections, for attention with a norm behind it."""


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks, in order."""
    return cast("nn.ModuleList", model.get_submodule(anatomy.anatomy(model).layers))


class Tap(NamedTuple):
    """A module through which a Site's activation flows."""

    module: nn.Module
    """Its output is the activation; for `embed` its input."""
    scale: float = 1.0
    """The activation is this multiple of it."""


def tap(model: PreTrainedModel, site: Site) -> Tap:
    """Where the Site is.

    Raises `BadInput` for a layer that the model does not have, and a half that its block does not have.
    """
    blocks = layers(model)
    if site.layer >= len(blocks):
        raise BadInput(f"Site {site} is not in the model: it has layers 0 to {len(blocks) - 1}")
    block = blocks[site.layer]
    if site.point in ("resid", "embed"):
        return Tap(block)
    half = _half(model, site.layer, site.point)
    if half is None:
        raise BadInput(
            f"Site {site} is not in the model: no single module of that block is its {site.point}; take resid"
        )
    return Tap(block.get_submodule(half.path), half.scale)


def _half(model: PreTrainedModel, layer: int, point: Point) -> anatomy.Part | None:
    block = anatomy.anatomy(model).blocks[layer]
    return block.attn if point == "attn" else block.mlp


class Lanes(NamedTuple):
    """Where a Slot's heads stand in a module's input or output."""

    module: nn.Module
    """The output projection, whose input is meant, or a projection whose output is."""
    heads: int
    """How many; keys and values may have fewer than queries. Neurons, where a Slot is of those."""
    size: int
    """Width of a head; 1 for a neuron."""
    at: Int[Tensor, " lane"] | None
    """Where in a fused output head by head; `None` where the whole is meant."""


def lanes(model: PreTrainedModel, slot: Slot) -> Lanes:
    """The heads of a Slot.

    Raises `BadInput` for a layer that the model does not have, and one whose projections are not known.
    """
    tap(model, Site(slot.layer))
    if slot.part == "neurons":
        return _neurons(model, slot.layer)
    heads = int(getattr(model.config.get_text_config(), "num_attention_heads", 0))
    attention = _attention(model, slot.layer)
    fused, layout = FUSED.get(model.config.model_type, (None, None))
    found: Lanes | None = None
    if attention is not None and heads:
        size = int(getattr(attention, "head_dim", 0) or width(model) // heads)
        if slot.part == "heads":
            module = _output(model, slot.layer, attention)
            found = Lanes(module, heads, _inputs_of(module) // heads, None) if module is not None else None
        elif layout is None:
            module = getattr(attention, APART[slot.part])
            found = Lanes(module, _outputs_of(module) // size, size, None)
        else:
            found = _fused(getattr(attention, str(fused)), layout, slot.part, heads, size)
    if found is None or (slot.part == "q" and found.heads != heads):  # a gate beside the queries
        raise BadInput(
            f"{model.config.model_type} has no {slot.part} that unsleep knows in layer {slot.layer}; take resid, attn "
            "or mlp, or name the projections in unsleep/models/sites.py"
        )
    return found


def _neurons(model: PreTrainedModel, layer: int) -> Lanes:
    half = _half(model, layer, "mlp")
    if half is None or half.writer is None:
        raise BadInput(
            f"layer {layer} of {model.config.model_type} has no neurons that one linear layer reads; take resid or mlp"
        )
    module = layers(model)[layer].get_submodule(half.writer)
    return Lanes(module, _inputs_of(module), 1, None)


def _attention(model: PreTrainedModel, layer: int) -> nn.Module | None:
    """The module that holds the projections of a layer's attention."""
    fused, _ = FUSED.get(model.config.model_type, (None, None))
    wanted = {fused} if fused else set(APART.values())
    holders = (m for m in layers(model)[layer].modules() if wanted <= {name for name, _ in m.named_children()})
    return next(holders, None)


def _output(model: PreTrainedModel, layer: int, attention: nn.Module) -> nn.Module | None:
    """The output projection of a layer's attention."""
    half = _half(model, layer, "attn")
    if half is not None and half.writer is not None:
        return layers(model)[layer].get_submodule(half.writer)
    return next((m for name, m in attention.named_children() if name in OUTPUTS), None)


def _fused(module: nn.Module, layout: Layout, part: Part, heads: int, size: int) -> Lanes:
    outputs = _outputs_of(module)
    keys = (outputs // size - heads) // 2
    queries = heads // keys  # of each key
    numbers, which = torch.arange(outputs), ("q", "k", "v").index(part)
    if layout == "blocks":
        index = numbers.split([heads * size, keys * size, keys * size])[which]
    else:
        grouped = numbers.view(keys, queries + 2, size)
        index = (grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1])[which].flatten()
    return Lanes(module, heads if part == "q" else keys, size, index)


def _outputs_of(linear: Any) -> int:
    return int(linear.nf if hasattr(linear, "nf") else linear.out_features)  # GPT-2's Conv1D has nf


def _inputs_of(linear: Any) -> int:
    return int(linear.nx if hasattr(linear, "nx") else linear.in_features)


class Writer(NamedTuple):
    """A linear layer through which a block writes to the residual stream."""

    path: str
    """From the block."""
    linear: nn.Module
    scale: float
    """What is written is this multiple of the layer's output."""
    point: Point | None
    """The half that it gives; `None` for a third part."""


def writers(model: PreTrainedModel, layer: int) -> list[Writer]:
    """The linear layers through which a layer writes to the residual stream, attention's first.

    A half that a norm or a mixture of experts gives has none.
    """
    module, block = tap(model, Site(layer)).module, anatomy.anatomy(model).blocks[layer]
    found: list[Writer] = []
    for part in block.parts:
        if part.writer is not None:
            point: Point | None = "attn" if part is block.attn else "mlp" if part is block.mlp else None
            found.append(Writer(part.writer, module.get_submodule(part.writer), part.scale, point))
    return found


def writes_linearly(model: PreTrainedModel, layer: int) -> bool:
    """Whether all that a layer adds to the residual stream are outputs of linear layers."""
    block = anatomy.anatomy(model).blocks[layer]
    return block.carry == 1.0 and all(p.writer is not None for p in block.parts)


def embedding(model: PreTrainedModel) -> Tensor:
    """The token embedding, `Float[Tensor, "vocabulary d_model"]`."""
    return weights.values(model.get_input_embeddings())


def unembedding(model: PreTrainedModel) -> Tensor:
    """The matrix that turns the final residual into logits, `Float[Tensor, "vocabulary d_model"]`."""
    return weights.values(cast("nn.Module", model.get_output_embeddings()))


def width(model: PreTrainedModel) -> int:
    """d_model, the width of the residual stream."""
    return anatomy.anatomy(model).width


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm before the unembedding; raises `BadInput` where what the unembedding reads is no module's output."""
    place = anatomy.anatomy(model).final_norm
    if place is None:
        raise BadInput(f"{model.config.model_type} changes the stream between its last norm and its unembedding")
    return model.get_submodule(place)


def all_sites(model: PreTrainedModel, points: tuple[str, ...] = ("attn", "mlp", "resid")) -> list[Site]:
    """Every Site of the model at the given points, by layer; halves that a block does not have are left out."""
    sites = [Site(layer, cast("Point", point)) for layer in range(len(layers(model))) for point in points]
    return [s for s in sites if s.point not in ("attn", "mlp") or _half(model, s.layer, s.point) is not None]


def everywhere(model: PreTrainedModel) -> list[Site]:
    """The Sites at which a subspace has to be taken out to leave the whole stream: all that blocks ever read.

    The embedding, what attention adds (an MLP reads it before the block ends) and what blocks hand on.
    """
    return [Site(0, "embed"), *all_sites(model, ("attn", "resid"))]
