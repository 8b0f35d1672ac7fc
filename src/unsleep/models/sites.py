"""Where the Sites live in each model family.

A block's two halves each *add* something to the residual stream. For every family the table
names the submodule whose output is exactly that addition, so that for sequential and parallel
blocks alike

    resid_out = resid_in + attn + mlp

Families with a post-norm write through it, so the norm is the place; Bloom, MPT and OPT add the
residual inside or around their MLP, so its last linear layer is. `assert_identity` checks the
equation on the model itself, and a Site for which it does not hold is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from unsleep.core import BadInput, Refused, Site

Part = Literal["heads", "q", "k", "v"]
"""Inside attention: what the heads hand to the output projection, and the queries, keys and values."""


@dataclass(frozen=True, order=True)
class Slot:
    """A place inside a layer's attention, `Float[Tensor, "prompt position head_and_size"]`.

    `heads` is the input of the output projection; `q`, `k` and `v` are as their projections give them, before
    any norm, scale or rotation.
    """

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


@dataclass(frozen=True)
class Attention:
    """Paths of the projections of one family's attention, from the block."""

    out: str
    """The output projection."""
    qkv: tuple[str, ...]
    """The projections of queries, keys and values, or the one in which they are fused."""
    layout: Literal["apart", "blocks", "groups"] = "apart"
    """`blocks`: fused as all of q, all of k, all of v. `groups`: fused as each key's queries, its key, its value."""


@dataclass(frozen=True)
class Family:
    """Paths of the parts of one model family; dots descend into submodules."""

    layers: str
    """The module list of blocks."""
    attn: str
    """In a block: the module that outputs the attention's addition."""
    mlp: str
    """In a block: the module that outputs the MLP's addition."""
    final_norm: str
    """The norm between the last block and the unembedding."""
    writers: tuple[str, str] | None
    """In a block: the linear layers whose outputs are the two additions; `None` where a norm follows them."""
    attention: Attention | None = None
    """Where heads, queries, keys and values are; `None` where a family has not said so."""
    returns_tuple: bool = False
    """Whether a block returns `(hidden_states, attention_weights)` rather than the tensor alone."""


def _apart(folder: str, out: str) -> Attention:
    """Projections of their own in one module."""
    return Attention(f"{folder}.{out}", (f"{folder}.q_proj", f"{folder}.k_proj", f"{folder}.v_proj"))


_SELF_ATTN = _apart("self_attn", "o_proj")
_LLAMA = Family("model.layers", "self_attn", "mlp", "model.norm", ("self_attn.o_proj", "mlp.down_proj"), _SELF_ATTN)
_POST_NORM = Family(
    "model.layers", "post_attention_layernorm", "post_feedforward_layernorm", "model.norm", None, _SELF_ATTN
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "gpt2": Family(
        "transformer.h",
        "attn",
        "mlp",
        "transformer.ln_f",
        ("attn.c_proj", "mlp.c_proj"),
        Attention("attn.c_proj", ("attn.c_attn",), "blocks"),
    ),
    "gpt_neox": Family(
        "gpt_neox.layers",
        "attention",
        "mlp",
        "gpt_neox.final_layer_norm",
        ("attention.dense", "mlp.dense_4h_to_h"),
        Attention("attention.dense", ("attention.query_key_value",), "groups"),
    ),
    "gpt_neo": Family(
        "transformer.h",
        "attn",
        "mlp",
        "transformer.ln_f",
        ("attn.attention.out_proj", "mlp.c_proj"),
        _apart("attn.attention", "out_proj"),
        returns_tuple=True,
    ),
    "gptj": Family(
        "transformer.h",
        "attn",
        "mlp",
        "transformer.ln_f",
        ("attn.out_proj", "mlp.fc_out"),
        _apart("attn", "out_proj"),
        returns_tuple=True,
    ),
    "phi": Family(
        "model.layers",
        "self_attn",
        "mlp",
        "model.final_layernorm",
        ("self_attn.dense", "mlp.fc2"),
        _apart("self_attn", "dense"),
    ),
    "opt": Family(
        "model.decoder.layers",
        "self_attn",
        "fc2",
        "model.decoder.final_layer_norm",
        ("self_attn.out_proj", "fc2"),
        _apart("self_attn", "out_proj"),
    ),
    "falcon": Family(
        "transformer.h",
        "self_attention",
        "mlp.dense_4h_to_h",
        "transformer.ln_f",
        ("self_attention.dense", "mlp.dense_4h_to_h"),
        Attention("self_attention.dense", ("self_attention.query_key_value",), "groups"),
        returns_tuple=True,
    ),
    "bloom": Family(
        "transformer.h",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        "transformer.ln_f",
        ("self_attention.dense", "mlp.dense_4h_to_h"),
        Attention("self_attention.dense", ("self_attention.query_key_value",), "groups"),
        returns_tuple=True,
    ),
    "mpt": Family(
        "transformer.blocks",
        "attn",
        "ffn.down_proj",
        "transformer.norm_f",
        ("attn.out_proj", "ffn.down_proj"),
        Attention("attn.out_proj", ("attn.Wqkv",), "blocks"),
        returns_tuple=True,
    ),
}


def family(model: PreTrainedModel) -> Family:
    """The family of a model; raises `BadInput` naming the known ones for any other."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise BadInput(
            f"model type {kind!r} is not a family unsleep knows; it knows {', '.join(sorted(FAMILIES))}. "
            "A family is one line in unsleep/models/sites.py"
        )
    return FAMILIES[kind]


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks, in order."""
    return attrgetter(family(model).layers)(model)


def site_module(model: PreTrainedModel, site: Site) -> nn.Module:
    """The module whose output (for `embed`: whose input) is the Site.

    Raises `BadInput` for a layer that the model does not have.
    """
    blocks = layers(model)
    if site.layer >= len(blocks):
        raise BadInput(f"Site {site} is not in the model: it has layers 0 to {len(blocks) - 1}")
    block = blocks[site.layer]
    if site.point in ("resid", "embed"):
        return block
    names = family(model)
    return attrgetter(names.attn if site.point == "attn" else names.mlp)(block)


class Lanes(NamedTuple):
    """Where a Slot's heads stand in a module's input or output."""

    module: nn.Module
    """The output projection, whose input is meant, or a projection whose output is."""
    heads: int
    """How many; keys and values may have fewer than queries."""
    size: int
    """Width of a head."""
    at: Int[Tensor, " lane"] | None
    """Where in a fused output head by head; `None` where the whole is meant."""


def lanes(model: PreTrainedModel, slot: Slot) -> Lanes:
    """The heads of a Slot.

    Raises `BadInput` for a layer that the model does not have, and a family whose projections are not known.
    """
    block = site_module(model, Site(slot.layer))
    paths = family(model).attention
    if paths is None:
        raise BadInput(
            f"{model.config.model_type} has no heads, q, k and v that unsleep knows; take resid, attn or mlp, or name "
            "the projections in unsleep/models/sites.py"
        )
    heads = int(model.config.num_attention_heads)
    size = int(getattr(model.config, "head_dim", None) or width(model) // heads)
    if slot.part == "heads":
        return Lanes(attrgetter(paths.out)(block), heads, size, None)
    which = ("q", "k", "v").index(slot.part)
    module = attrgetter(paths.qkv[which if paths.layout == "apart" else 0])(block)
    outputs = int(getattr(module, "nf", None) or module.out_features)  # GPT-2's Conv1D has nf
    if paths.layout == "apart":
        return Lanes(module, outputs // size, size, None)
    keys = (outputs // size - heads) // 2
    queries = heads // keys  # of each key
    numbers = torch.arange(outputs)
    if paths.layout == "blocks":
        index = numbers.split([heads * size, keys * size, keys * size])[which]
    else:
        grouped = numbers.view(keys, queries + 2, size)
        index = (grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1])[which].flatten()
    return Lanes(module, heads if slot.part == "q" else keys, size, index)


def writers(model: PreTrainedModel, layer: int) -> list[nn.Module]:
    """The linear layers through which a block writes to the residual stream, attention's first.

    Raises `BadInput` for families that write through a norm, where no weight alone decides.
    """
    names = family(model).writers
    if names is None:
        raise BadInput(
            f"{model.config.model_type} writes to the residual stream through a norm, not through a linear layer"
        )
    block = site_module(model, Site(layer))
    return [attrgetter(name)(block) for name in names]


def embedding(model: PreTrainedModel) -> Tensor:
    """The token embedding, `Float[Tensor, "vocabulary d_model"]`."""
    return cast("Tensor", model.get_input_embeddings().weight)


def unembedding(model: PreTrainedModel) -> Tensor:
    """The matrix that turns the final residual into logits, `Float[Tensor, "vocabulary d_model"]`."""
    return cast("Tensor", cast("nn.Module", model.get_output_embeddings()).weight)


def width(model: PreTrainedModel) -> int:
    """d_model, the width of the residual stream."""
    return embedding(model).shape[1]


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm before the unembedding."""
    return attrgetter(family(model).final_norm)(model)


def all_sites(model: PreTrainedModel, points: tuple[str, ...] = ("attn", "mlp", "resid")) -> list[Site]:
    """Every Site of the model at the given points, by layer."""
    return [Site(layer, point) for layer in range(len(layers(model))) for point in points]  # type: ignore[arg-type]


@torch.no_grad()
def everywhere(model: PreTrainedModel) -> list[Site]:
    """The Sites at which a subspace has to be taken out to leave the whole stream: all that blocks ever read.

    The embedding, what attention adds (an MLP reads it before the block ends) and what blocks hand on.
    """
    return [Site(0, "embed"), *all_sites(model, ("attn", "resid"))]


def assert_identity(model: PreTrainedModel, tolerance: float = 0.02) -> None:
    """Check resid_out = resid_in + attn + mlp in every layer on a short random input.

    `tolerance` is the largest error allowed, relative to the largest entry of the layer's output:
    0.02 covers bf16 rounding, float32 models stay below 1e-5. Raises `Refused` naming the layer.
    """
    from unsleep.models.hooks import capture

    vocabulary = len(embedding(model))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(10, vocabulary - 1), vocabulary, (2, 6), generator=generator).to(model.device)
    count = len(layers(model))
    wanted = [Site(0, "embed"), *all_sites(model)]
    with capture(model, wanted) as found:
        model(input_ids=ids, use_cache=False)
    before = found[Site(0, "embed")].float()
    for layer in range(count):
        after = found[Site(layer)].float()
        sum_of_parts = before + found[Site(layer, "attn")].float() + found[Site(layer, "mlp")].float()
        error = float((after - sum_of_parts).abs().max() / after.abs().max().clamp_min(1e-9))
        if not error <= tolerance:
            raise Refused(
                f"{model.config.model_type} layer {layer}: attention and MLP outputs do not add up to the residual "
                f"(relative error {error:.3g}, allowed {tolerance}); this variant of the family is not supported"
            )
        before = after
