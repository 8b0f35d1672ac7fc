"""Stability of a circuit: the nodes that survive other prompts and other sizes.

The nodes of a circuit vary with the prompts that they are found on (arXiv:2606.16920). Prompts are resampled with
replacement; each resample has a circuit of its own, the nodes with the largest |mean effect|. A node that nearly every
resample keeps is of the core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unsleep.base.records import Count, Share
from unsleep.base.stats import percentiles, resampled

RESAMPLES = 1000
CORE = 0.95
"""Share of resamples that keep a node of the core."""


class Overlap(NamedTuple):
    """Jaccard index of two sets of nodes, with its 95 % interval over resamples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class StabilityPoint:
    """Circuits of one size."""

    nodes: Count
    overlap: Overlap
    """Between the circuit and those of the resamples."""
    core: Share
    """Share of its nodes that at least 95 % of the resamples keep."""


def kept_shares(
    effects: Float[Tensor, "prompt node"], size: int, seed: int = 0
) -> tuple[Float[Tensor, " node"], Overlap]:
    """Share of resamples that keep each node in a circuit of `size` nodes; overlap with the circuit of all prompts.

    Args:
        effects: of all candidates, more than `size`.
    """
    kept = _largest(resampled(len(effects), RESAMPLES, seed).float() @ effects.float(), size)
    own = _largest(effects.float().mean(0, keepdim=True), size)
    overlap = ((kept & own).sum(1) / (kept | own).sum(1)).double()
    return kept.float().mean(0), Overlap(*percentiles(float(overlap.mean()), overlap))


def _largest(mean: Float[Tensor, "resample node"], size: int) -> Bool[Tensor, "resample node"]:
    """The nodes with the largest |effect| of each resample."""
    chosen = mean.abs().topk(min(size, mean.shape[1])).indices
    return torch.zeros(mean.shape, dtype=torch.bool).scatter_(1, chosen, value=True)


def stability(effects: Float[Tensor, "prompt node"], sizes: Sequence[int], seed: int = 0) -> list[StabilityPoint]:
    """Stability of circuits of several sizes; `effects` are of candidates, largest mean first."""
    found: list[StabilityPoint] = []
    for size in sizes:
        share, overlap = kept_shares(effects, size, seed)
        own = _largest(effects.float().mean(0, keepdim=True), size)[0]
        found.append(StabilityPoint(size, overlap, float((share[own] >= CORE).float().mean())))
    return found
