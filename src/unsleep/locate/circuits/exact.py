"""Exact effects of single nodes, and how well the estimators agree with them.

    exact(u) = m − m(u ← u_ref)

The node alone is patched with its reference at the tokens of its role; everything behind it responds freely, nothing
is frozen. One forward pass per node (the indirect effect of Marks et al. 2024, arXiv:2403.19647, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base.context import progress
from unsleep.base.records import Count
from unsleep.base.stats import correlation, spearman
from unsleep.locate.circuits.contrast import Contrast
from unsleep.locate.circuits.edges import Node
from unsleep.locate.circuits.effects import Estimator, node_change
from unsleep.locate.circuits.spaces import Space
from unsleep.models.streams import transformed


@dataclass(frozen=True)
class Agreement:
    """Correlation of an estimator's node effects with exact ones, over nodes."""

    estimator: Estimator
    nodes: Count
    pearson: float
    low: float
    """Its 95 % bootstrap interval, resampling nodes."""
    high: float
    spearman: float


@torch.no_grad()
def exact_effects(contrast: Contrast, spaces: Sequence[Space], nodes: Sequence[Node]) -> Float[Tensor, "prompt node"]:
    """The metric's drop when each node alone is patched with its reference.

    Args:
        spaces: those that the nodes are of; others may be among them.
    """
    used = {space.place: space for space in spaces if any(node.place == space.place for node in nodes)}
    found: list[Tensor] = []
    for start, part in contrast.parts():
        theirs, _ = contrast.run_reference(part, list(used))
        mine, value = contrast.run(part, list(used))
        drops: list[Tensor] = []
        for number, node in enumerate(nodes, 1):
            place = node.place
            change = node_change(used[place], part, mine[place], theirs[place], node.role, node.feature)
            with transformed(contrast.model.network, {place: lambda x, change=change: x - change}):
                drops.append(value - contrast.value(part))
            progress("exact effects", start * len(nodes) + number * len(part), len(contrast) * len(nodes))
        found.append(torch.stack(drops, 1).float().cpu() if drops else torch.zeros(len(part), 0))
    return torch.cat(found)


def agreement(
    estimator: Estimator, estimated: Float[Tensor, " node"], exact: Float[Tensor, " node"]
) -> Agreement | None:
    """Agreement of estimates with exact effects; none for fewer than three nodes, or where either is constant."""
    if len(exact) < 3 or float(estimated.std()) == 0 or float(exact.std()) == 0:
        return None
    pearson, low, high = correlation(estimated, exact)
    return Agreement(estimator, len(exact), pearson, low, high, float(spearman(estimated[None], exact)[0]))
