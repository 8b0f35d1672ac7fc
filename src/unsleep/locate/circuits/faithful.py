"""Faithfulness and completeness of a circuit, by patching all other nodes with their reference values.

    faithfulness(C) = (m(C) − m(∅)) / (m(all) − m(∅))        completeness(C) = faithfulness(all nodes but C)

In m(C) every node outside C has its reference's value at every token of its role, at every place, and those in C keep
what the run itself gives them (Marks et al. 2024, arXiv:2403.19647, section 3.2). A circuit that explains the behaviour
has a faithfulness near 1 and a completeness near 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unsleep.base.context import progress
from unsleep.base.stats import ratio
from unsleep.core import BadInput
from unsleep.locate.circuits.align import Aligned
from unsleep.locate.circuits.contrast import Contrast
from unsleep.locate.circuits.edges import Node
from unsleep.locate.circuits.effects import reference_nodes
from unsleep.locate.circuits.spaces import ERROR, Space
from unsleep.models.hooks import Transform
from unsleep.models.sites import Place
from unsleep.models.streams import transformed


@dataclass(frozen=True, eq=False)
class Listed:
    """The nodes of a circuit at one place."""

    ids: list[int]
    """Features that are nodes at some role."""
    features: Bool[Tensor, "role id"]
    """The roles at which each of them is one."""
    error: Bool[Tensor, " role"]
    """The roles at which the error is one."""

    @classmethod
    def of(cls, nodes: Sequence[Node], place: Place, roles: int) -> Listed:
        """Those of some nodes that are at a place."""
        own = [node for node in nodes if node.place == place]
        ids = sorted({node.feature for node in own} - {ERROR})
        features, error = torch.zeros(roles, len(ids), dtype=torch.bool), torch.zeros(roles, dtype=torch.bool)
        for node in own:
            if node.feature == ERROR:
                error[node.role] = True
            else:
                features[node.role, ids.index(node.feature)] = True
        return cls(ids, features, error)


@dataclass(frozen=True, eq=False)
class Patcher:
    """Prompts in which all nodes but a circuit's, or only these, are patched with their references."""

    contrast: Contrast
    spaces: Sequence[Space]
    streams: dict[int, dict[Place, Tensor]] = field(default_factory=dict[int, dict[Place, Tensor]])
    """Activations of the references by the first prompt of a batch, kept for further circuits."""

    @torch.no_grad()
    def run(
        self, nodes: Sequence[Node], *, complement: bool = False, with_errors: bool = False
    ) -> Float[Tensor, " prompt"]:
        """The metric where only some nodes keep their own values.

        Args:
            complement: keep all nodes but these instead.
            with_errors: keep every error, whichever nodes are given.
        """
        places = [space.place for space in self.spaces]
        for node in nodes:
            if node.place not in places:
                raise BadInput(f"node {node} is at {node.place}, for which no dictionary is given")
        listed = {place: Listed.of(nodes, place, len(self.contrast.aligned.roles)) for place in places}
        if with_errors:
            errors = torch.zeros if complement else torch.ones
            listed = {place: replace(n, error=errors(len(n.error), dtype=torch.bool)) for place, n in listed.items()}
        found: list[Tensor] = []
        for start, part in self.contrast.parts():
            if start not in self.streams:
                self.streams[start], _ = self.contrast.run_reference(part, places)
            changes = {
                space.place: patching(space, part, self.streams[start][space.place], own, complement=complement)
                for space, own in ((space, listed[space.place]) for space in self.spaces)
                if not complement or own.ids or bool(own.error.any())
            }
            with transformed(self.contrast.model.network, changes):
                found.append(self.contrast.value(part))
        return torch.cat(found)


def patching(space: Space, part: Aligned, theirs: Tensor, listed: Listed, *, complement: bool) -> Transform:
    """Give every node of a place but those listed, or only these, the reference's values.

    With u the nodes listed, x' = x_ref + Σ (u − u_ref), or x' = x − Σ (u − u_ref).
    """
    real = part.role >= 0
    role, ids, sign = part.role[real], listed.ids, -1 if complement else 1
    other = part.brought(theirs.float())[real]
    own, wide = (mask.to(role.device)[role] for mask in (listed.features, listed.error[:, None]))
    is_error = bool(listed.error.any()) and space.has_error
    features, rest = reference_nodes(space, part, theirs, ids) if ids or is_error else (theirs, theirs)
    features, rest = features[real] if ids else None, rest[real] if is_error else None

    def run(x: Tensor) -> Tensor:
        mine = x[real]
        new = mine.float() if complement else other
        if features is not None:
            new = new + sign * space.combine((space.encode(mine)[:, ids] - features) * own, ids)
        if rest is not None:
            new = new + sign * (space.rest(mine) - rest) * wide
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
    stage: str = "faithfulness",
) -> list[CurvePoint]:
    """Faithfulness and completeness of the first nodes of a ranking.

    Args:
        measure: the metric where some nodes, or all but them, keep their own values (`Patcher.run`).
        ends: the metric of the whole model and with no node kept.
        stage: name for the progress callback.

    Empty where the two ends are the same, so that there is nothing to explain.
    """
    if not differ(ends):
        return []
    found: list[CurvePoint] = []
    for done, size in enumerate(sizes, 1):
        both = (share(measure(ranked[:size], complement), ends) for complement in (False, True))
        found.append(CurvePoint(size, *both))
        progress(stage, done, len(sizes))
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
