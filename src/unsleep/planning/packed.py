"""Quantised linear layers: bytes of their weights, and stand-ins on the meta device with their working memory.

A 4-bit weight is NF4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314): 0.5 byte, a byte per block of
64 for its largest magnitude, and a float32 per 256 of those, 0.516 byte in all. An 8-bit weight is a byte, with a
float32 per output (Dettmers et al. 2022, arXiv:2208.07339).
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Bits = Literal[4, 8]

BLOCK, BLOCKS = 64, 256
"""Weights per scale, and scales per scale of scales."""

TABLES = 4 * (16 + 256 + 1)
"""Bytes of a 4-bit layer's lookup tables and its offset."""


def packed_bytes(outputs: int, inputs: int, bits: Bits) -> int:
    """Bytes of a quantised weight.

    >>> packed_bytes(4096, 4096, 4) / 4096**2
    0.5159348249435425
    """
    if bits == 8:
        return outputs * inputs + 4 * outputs
    blocks = math.ceil(outputs * inputs / BLOCK)
    return math.ceil(outputs * inputs / 2) + blocks + 4 * math.ceil(blocks / BLOCKS) + TABLES


class Packed(nn.Linear):
    """Stands for a quantised linear layer: its weight has the shape of the original."""

    bits: Bits

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, bits: Bits) -> Packed:
        """A frozen layer with weight `[output, input]`."""
        with torch.device("meta"):
            layer = cls(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
        layer.bits = bits
        return layer.requires_grad_(False)

    @property
    def bytes(self) -> int:
        """Bytes of the quantised weight."""
        return packed_bytes(self.out_features, self.in_features, self.bits)

    def forward(self, input: Tensor) -> Tensor:
        """The product, with the memory that bitsandbytes takes for it."""
        return cast("Tensor", _Product.apply(input, self.weight, self.bias, self.bits))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, bits: Bits) -> Tensor:
        ctx.save_for_backward(*((weight, x) if bits == 8 else (weight,)))  # 8-bit layers keep their input
        if bits == 8:
            whole = x.new_empty(x.shape, dtype=torch.float16), x.new_empty(x.shape, dtype=torch.int8)
            out = nn.functional.linear(x, weight, bias)
            del whole
            return out
        out = nn.functional.linear(x, torch.empty_like(weight), bias)
        return out.clone()  # peft copies the output of a 4-bit layer

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight = torch.empty_like(ctx.saved_tensors[0])
        return grads[0] @ weight, None, None, None


def pack(network: PreTrainedModel, bits: Bits) -> None:
    """Replace the linear layers that bitsandbytes would quantise; embeddings and unembedding stay whole."""
    kept = {id(network.get_output_embeddings()), id(network.get_input_embeddings())}
    last = list(network.named_parameters())[-1][0].rpartition(".")[0]
    for name, module in list(network.named_modules()):
        if id(module) in kept or name == last or not isinstance(module, nn.Linear | Conv1D):
            continue
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        home, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(home), leaf, Packed.of(weight, module.bias, bits))
