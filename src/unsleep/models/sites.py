"""Modules and weights behind Sites, attention heads, queries, keys, values and MLP neurons.

Blocks and their halves are found by probing (`anatomy`). Inside attention, projections are found by
name; for fused ones a table gives each family's layout, because no equation determines it.
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
"""Inside attention: per-head inputs of the output projection, and the queries, keys and values. Inside the MLP: neuron
activations, the inputs of its output projection.
"""


@dataclass(frozen=True, order=True)
class Slot:
    """A hook point inside a layer's attention or MLP, `Float[Tensor, "prompt position lane"]`.

    `heads` and `neurons` are the inputs of the two output projections; a lane is one neuron, or one coordinate of a
    head. `q`, `k` and `v` are the outputs of their projections, before any norm, scale or rotary embedding.
    """

    INPUTS: ClassVar = ("heads", "neurons")
    """Parts that are a module's input; the others are outputs."""

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
"""Any hook point."""


Layout = Literal["blocks", "groups"]
"""Layout of a fused QKV output: all of q, all of k, all of v; or, per key head, its queries, its key,
its value.
"""

FUSED: dict[str, tuple[str, Layout]] = {
    "bloom": ("query_key_value", "groups"),
    "falcon": ("query_key_value", "groups"),
    "gpt2": ("c_attn", "blocks"),
    "gpt_neox": ("query_key_value", "groups"),
    "mpt": ("Wqkv", "blocks"),
    "phi3": ("qkv_proj", "blocks"),
}
"""Model type → name and layout of its fused projection."""

APART = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
"""Names of separate projections."""

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
"""Names of output projections, for attention followed by a norm."""


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks, in order."""
    return cast("nn.ModuleList", model.get_submodule(anatomy.anatomy(model).layers))


class Tap(NamedTuple):
    """The module that a Site is read from."""

    module: nn.Module
    """Module whose output is the activation; for `embed`, its input."""
    scale: float = 1.0
    """Factor from the module's output to the activation."""


def tap(model: PreTrainedModel, site: Site) -> Tap:
    """The module of a Site.

    Raises `BadInput` for a layer that the model does not have, or a half that its block does not have.
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
    """The location of a Slot's heads in a module's input or output."""

    module: nn.Module
    """The output projection (its input is meant), or another projection (its output)."""
    heads: int
    """Number of heads, for k and v possibly fewer than for q; number of neurons for `neurons`."""
    size: int
    """Width of a head; 1 for a neuron."""
    at: Int[Tensor, " lane"] | None
    """Indices into a fused output, head by head; `None` for the whole."""


def lanes(model: PreTrainedModel, slot: Slot) -> Lanes:
    """The location of a Slot's heads.

    Raises `BadInput` for a layer that the model does not have, or one with unknown projections.
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
    if found is None or (slot.part == "q" and found.heads != heads):  # q_proj also holds a gate
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
    """The module that contains the projections of a layer's attention."""
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
    queries = heads // keys  # per key head
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
    """A linear layer that writes to the residual stream."""

    path: str
    """Dotted path relative to the block."""
    linear: nn.Module
    scale: float
    """Factor from the layer's output to what is added to the residual stream."""
    point: Point | None
    """The half that it belongs to; `None` for a third part."""


def writers(model: PreTrainedModel, layer: int) -> list[Writer]:
    """The linear layers that write a layer's update of the residual stream, attention first.

    A half that ends in a norm or a mixture of experts has none.
    """
    module, block = tap(model, Site(layer)).module, anatomy.anatomy(model).blocks[layer]
    found: list[Writer] = []
    for part in block.parts:
        if part.writer is not None:
            point: Point | None = "attn" if part is block.attn else "mlp" if part is block.mlp else None
            found.append(Writer(part.writer, module.get_submodule(part.writer), part.scale, point))
    return found


def writes_linearly(model: PreTrainedModel, layer: int) -> bool:
    """True if a layer's whole update of the residual stream comes from linear layers."""
    block = anatomy.anatomy(model).blocks[layer]
    return block.carry == 1.0 and all(p.writer is not None for p in block.parts)


def embedding(model: PreTrainedModel) -> Tensor:
    """The token embedding, `Float[Tensor, "vocabulary d_model"]`."""
    return weights.read(model.get_input_embeddings())


def unembedding(model: PreTrainedModel) -> Tensor:
    """The unembedding matrix, `Float[Tensor, "vocabulary d_model"]`."""
    return weights.read(cast("nn.Module", model.get_output_embeddings()))


def width(model: PreTrainedModel) -> int:
    """d_model, the width of the residual stream."""
    return anatomy.anatomy(model).width


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm before the unembedding; raises `BadInput` where the unembedding's input is no module's output."""
    place = anatomy.anatomy(model).final_norm
    if place is None:
        raise BadInput(f"{model.config.model_type} changes the stream between its last norm and its unembedding")
    return model.get_submodule(place)


def all_sites(model: PreTrainedModel, points: tuple[str, ...] = ("attn", "mlp", "resid")) -> list[Site]:
    """Every Site of the model at the given points, by layer, without halves that a block does not have."""
    sites = [Site(layer, cast("Point", point)) for layer in range(len(layers(model))) for point in points]
    return [s for s in sites if s.point not in ("attn", "mlp") or _half(model, s.layer, s.point) is not None]


def everywhere(model: PreTrainedModel) -> list[Site]:
    """The Sites at which a subspace must be ablated to remove it from the whole residual stream.

    The embedding, attention outputs (the MLP reads them before the block ends) and block outputs.
    """
    return [Site(0, "embed"), *all_sites(model, ("attn", "resid"))]
