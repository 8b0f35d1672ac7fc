"""Faithfulness and completeness of a circuit, by patching all other nodes with their reference values.

    faithfulness(C) = (m(C) − m(∅)) / (m(all) − m(∅))        completeness(C) = faithfulness(all nodes but C)

In m(C) every node outside C has its reference's value at every token of its role, at every place, and those in C keep
what the run itself gives them (Marks et al. 2024, arXiv:2403.19647, section 4). A circuit that explains the behaviour
has a faithfulness near 1 and a completeness near 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unsleep.base.context import progress
from unsleep.base.stats import ratio
from unsleep.core import BadInput
from unsleep.locate.circuits.align import Aligned
from unsleep.locate.circuits.edges import Node
from unsleep.locate.circuits.effects import Metric, reference_nodes, run_streams
from unsleep.locate.circuits.spaces import ERROR, Space
from unsleep.models.forward import reply_logits
from unsleep.models.hooks import Transform
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Place
from unsleep.models.streams import transformed


@dataclass(frozen=True, eq=False)
class Kept:
    """Masks of the nodes of one place that are not patched."""

    features: Bool[Tensor, "role feature"]
    error: Bool[Tensor, " role"]


def kept_nodes(spaces: Sequence[Space], nodes: Sequence[Node], roles: int, *, complement: bool) -> dict[Place, Kept]:
    """The nodes of a circuit at each place, or all the others."""
    found = {
        space.place: Kept(torch.zeros(roles, space.size, dtype=torch.bool), torch.zeros(roles, dtype=torch.bool))
        for space in spaces
    }
    for node in nodes:
        if node.place not in found:
            raise BadInput(f"node {node} is at {node.place}, for which no dictionary is given")
        if node.feature == ERROR:
            found[node.place].error[node.role] = True
        else:
            found[node.place].features[node.role, node.feature] = True
    return {place: Kept(~k.features, ~k.error) for place, k in found.items()} if complement else found


@torch.no_grad()
def metric_of(
    model: LoadedModel,
    aligned: Aligned,
    spaces: Sequence[Space],
    nodes: Sequence[Node],
    metric: Metric,
    *,
    complement: bool = False,
    with_errors: bool = False,
    reference: LoadedModel | None = None,
    batch: int = 16,
) -> Float[Tensor, " prompt"]:
    """The metric where only some nodes keep their own values.

    Args:
        complement: keep all nodes but these instead.
        with_errors: keep every error, whichever nodes are given.
        reference: the model that the references run in; the model itself where not given.
    """
    keep = kept_nodes(spaces, nodes, len(aligned.roles), complement=complement)
    if with_errors:
        keep = {place: Kept(k.features, torch.ones_like(k.error)) for place, k in keep.items()}
    found: list[Tensor] = []
    for start in range(0, len(aligned), batch):
        part = aligned.batch(start, batch)
        theirs, _ = run_streams(reference or model, part.reference, spaces, metric)
        changes = {s.place: _put_back(s, part, theirs[s.place], keep[s.place]) for s in spaces}
        with transformed(model.network, changes):
            found.append(metric(reply_logits(model.network, part.rows), part.rows))
    return torch.cat(found)


def _put_back(space: Space, part: Aligned, theirs: Tensor, keep: Kept) -> Transform:
    """Give the nodes of a place that are not kept the reference's values."""
    real = part.role >= 0
    role = part.role[real]
    other = part.brought(theirs.float())[real]
    any_feature, any_error = bool(keep.features.any()), bool(keep.error.any()) and space.has_error
    if not any_feature and not any_error:
        return lambda x: x.masked_scatter(real[..., None], other.to(x.dtype))
    features, rest = (x[real] for x in reference_nodes(space, part, theirs))
    own, wide = keep.features.to(role.device)[role], keep.error.to(role.device)[role][:, None]

    def run(x: Tensor) -> Tensor:
        mine, new = x[real], other
        if any_feature:
            new = new + space.combine((space.encode(mine) - features) * own)
        if any_error:
            new = new + (space.rest(mine) - rest) * wide
        return x.masked_scatter(real[..., None], new.to(x.dtype))

    return run


class Faithfulness(NamedTuple):
    """A share of the metric's difference, with its interval over prompts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CurvePoint:
    """A circuit of so many nodes."""

    nodes: int
    faithfulness: Faithfulness
    completeness: Faithfulness
    """Of all the other nodes: near 0 where nothing else carries the behaviour."""


def curve(
    ranked: Sequence[Node],
    sizes: Sequence[int],
    measure: Callable[[Sequence[Node], bool], Float[Tensor, " prompt"]],
    ends: tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"]],
) -> list[CurvePoint]:
    """Faithfulness and completeness of the first nodes of a ranking.

    Args:
        measure: the metric where some nodes, or all but them, keep their own values (`metric_of`).
        ends: the metric of the whole model and with no node kept.

    Empty where the two ends are the same, so that there is nothing to explain.
    """
    if not differ(ends):
        return []
    found: list[CurvePoint] = []
    for done, size in enumerate(sizes, 1):
        both = (share(measure(ranked[:size], complement), ends) for complement in (False, True))
        found.append(CurvePoint(size, *both))
        progress("circuits of so many nodes", done, len(sizes))
    return found


SAME = 0.1
"""Difference of the metric, in its units, below which there is nothing to explain."""


def differ(ends: tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"]]) -> bool:
    """True if the metric differs between the full model and the fully patched one."""
    whole, none = ends
    return float((whole - none).mean().abs()) >= SAME


def share(
    value: Float[Tensor, " prompt"], ends: tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"]]
) -> Faithfulness:
    """(m − m(∅)) / (m(all) − m(∅)), of the means over prompts."""
    whole, none = ends
    return Faithfulness(*ratio(value - none, whole - none))
