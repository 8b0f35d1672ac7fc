"""Sparse codes: selection of the active features, and products that touch only their rows.

A code is flat: one entry per active feature of each token, tokens in order, with `offsets`
marking where each token begins. Every product of a code with a matrix is then an embedding bag.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

GROUP = 16
"""Features per group in `top_k`: the k largest entries lie in the k groups with the largest maxima."""

SAMPLED = 2**18
"""Approximate sample size for the initial threshold of `largest`."""


class Code(NamedTuple):
    """The active features of a batch of tokens."""

    values: Float[Tensor, " entry"]
    ids: Int[Tensor, " entry"]
    token: Int[Tensor, " entry"]
    offsets: Int[Tensor, " token"]
    """Index of the first entry of every token."""


def top_k(pre: Float[Tensor, "*token feature"], k: int) -> tuple[Float[Tensor, "*token k"], Int[Tensor, "*token k"]]:
    """The k largest entries of the last axis, in no particular order.

    Found in two rounds where that is faster: the largest groups by their maxima, then the largest
    entries in those. Exact up to the choice among equal entries.
    """
    features = pre.shape[-1]
    if features % GROUP or features < 4 * k * GROUP:
        return torch.topk(pre, k, dim=-1, sorted=False)
    groups = pre.unflatten(-1, (GROUP, -1))  # features j, j + G, … form a group, for contiguous maxima
    _, best = torch.topk(groups.amax(-2), k, dim=-1, sorted=False)
    step = features // GROUP
    members = (best[..., None, :] + step * torch.arange(GROUP, device=pre.device)[:, None]).flatten(-2)
    values, place = torch.topk(pre.gather(-1, members), k, dim=-1, sorted=False)
    return values, members.gather(-1, place)


def code_of_top_k(values: Float[Tensor, "token k"], ids: Int[Tensor, "token k"]) -> Code:
    """A code with k entries per token."""
    n, k = ids.shape
    entry = torch.arange(n * k, device=ids.device)
    return Code(values.flatten(), ids.flatten(), entry // k, entry[::k])


def count(active: Bool[Tensor, "*shape"]) -> int:
    """Number of True entries; numpy vectorises over bytes where torch widens them first."""
    return int(np.count_nonzero(active.numpy())) if active.device.type == "cpu" else int(active.count_nonzero())


def code_where(pre: Float[Tensor, "token feature"], active: Bool[Tensor, "token feature"]) -> Code:
    """A code with the entries where `active` is True."""
    if active.device.type == "cpu":
        place = torch.from_numpy(np.flatnonzero(active.numpy()))
    else:
        place = active.flatten().nonzero().squeeze(1)
    return _code_at(pre, place)


def _code_at(pre: Float[Tensor, "token feature"], place: Int[Tensor, " entry"]) -> Code:
    """A code with the entries at ascending indices of the flattened pre-activations."""
    tokens, features = pre.shape
    token = torch.div(place, features, rounding_mode="floor")
    starts = torch.searchsorted(place, torch.arange(tokens, device=pre.device) * features)
    return Code(pre.flatten()[place], place - token * features, token, starts)


def largest(pre: Float[Tensor, "token feature"], n: int) -> Code:
    """A code with the `n` largest positive entries of the batch, including ties with the last.

    A random sample gives a threshold that slightly more entries exceed; only those are compared.
    """
    flat = pre.flatten()
    stride = max(1, len(flat) // SAMPLED)
    while math.gcd(stride, pre.shape[1]) > 1:  # else the sample covers only a few features
        stride += 1
    sample = flat[::stride].float()
    expected = min(len(sample), math.ceil(1.2 * n * len(sample) / len(flat)) + 8)
    level = max(0.0, float(torch.topk(sample, expected, sorted=False).values.min()))
    code = code_where(pre, pre > level)
    if len(code.ids) < n and level > 0:  # an unlucky sample
        code = code_where(pre, pre > 0)
    if len(code.ids) <= n:
        return code
    values = code.values.float() if pre.dtype == torch.bfloat16 else code.values  # exact either way
    tokens = torch.arange(len(pre), device=pre.device)
    kept = values >= torch.kthvalue(values, len(values) - n + 1).values
    token = code.token[kept]
    return Code(code.values[kept], code.ids[kept], token, torch.searchsorted(token, tokens))


def split(code: Code, part: Int[Tensor, " entry"], parts: int, tokens: int) -> list[Code]:
    """Split a code by part of each entry."""
    every = torch.arange(tokens, device=code.ids.device)
    found: list[Code] = []
    for i in range(parts):
        kept = (part == i).nonzero().squeeze(1)
        token = code.token[kept]
        found.append(Code(code.values[kept], code.ids[kept], token, torch.searchsorted(token, every)))
    return found


def combine(code: Code, rows: Float[Tensor, "feature d"]) -> Float[Tensor, "token d"]:
    """Σ value · row over each token's active features."""
    return embedding_bag(code.ids, rows, code.offsets, per_sample_weights=code.values.to(rows.dtype), mode="sum")


def weighted_rows(
    rows: Float[Tensor, "feature d"], ids: Int[Tensor, "token k"], values: Float[Tensor, "token k"]
) -> Float[Tensor, "token d"]:
    """Σ value · row over k features of each token.

    An embedding bag, but for gradients in the values where it has none: those of half precision on a GPU.
    """
    if values.requires_grad and lacks_gradient(rows):
        return (values[:, None] @ rows[ids]).squeeze(1)
    return embedding_bag(ids, rows, per_sample_weights=values, mode="sum")


def lacks_gradient(rows: Tensor) -> bool:
    """True where an embedding bag of these rows has no gradient in its weights."""
    return rows.is_cuda and rows.dtype == torch.bfloat16


def row_dots(x: Float[Tensor, "token d"], rows: Float[Tensor, "feature d"], code: Code) -> Float[Tensor, " entry"]:
    """x of each entry's token · row of its feature.

    The gradient of an embedding bag in its weights: no row is gathered, where it has one.
    """
    if lacks_gradient(rows):
        return (x[code.token] * rows[code.ids]).sum(-1)
    with torch.enable_grad():
        weights = torch.zeros(code.ids.shape, dtype=rows.dtype, device=rows.device, requires_grad=True)
        bag = embedding_bag(code.ids, rows, code.offsets, per_sample_weights=weights, mode="sum")
        [dots] = torch.autograd.grad(bag, weights, x)
    return dots


class ByFeature(NamedTuple):
    """The entries of a code sorted by feature."""

    entry: Int[Tensor, " entry"]
    token: Int[Tensor, " entry"]
    offsets: Int[Tensor, " feature"]


def by_feature(code: Code, features: int) -> ByFeature:
    """Sort a code by feature, tokens in order within each."""
    if code.ids.device.type == "cpu" and features <= 2**16:  # numpy sorts 16-bit keys by radix
        order = torch.from_numpy(np.argsort(code.ids.numpy().astype(np.uint16), kind="stable"))
    else:
        order = code.ids.argsort(stable=True)
    counts = torch.bincount(code.ids, minlength=features)
    return ByFeature(order, code.token[order], counts.cumsum(0) - counts)


def scatter(
    order: ByFeature, weights: Float[Tensor, " entry"], x: Float[Tensor, "token d"]
) -> Float[Tensor, "feature d"]:
    """For every feature Σ weight · x over the tokens where it is active: the transpose of `combine`."""
    return embedding_bag(order.token, x, order.offsets, per_sample_weights=weights[order.entry], mode="sum")
