"""Edges: the part of a node's effect that comes directly from another node, through no third node.

    w(u → d) = ∂m/∂d · ∂d/∂u · (u − u_ref)     summed over the tokens of both roles, in units of the metric

Every place is cut: its output is a leaf of the autograd graph. A vector-Jacobian product of a node then
reaches the places that feed it without another in between, and no further: the stop-gradients of Marks et al. 2024
(arXiv:2403.19647, appendix A), whatever places there are. With dictionaries at attention, MLP and residual of every
layer an edge stays within a block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base.context import progress
from unsleep.locate.circuits.align import Aligned
from unsleep.locate.circuits.contrast import Contrast
from unsleep.locate.circuits.effects import Differences, by_role, differences
from unsleep.locate.circuits.spaces import ERROR, FeatureSpace, Space
from unsleep.models.hooks import Transform
from unsleep.models.linearised import Linearisation
from unsleep.models.sites import Place
from unsleep.models.streams import transformed


@dataclass(frozen=True, order=True)
class Node:
    """A feature, or the error, of a place at the tokens of a role."""

    place: Place
    role: int
    """Position in `Aligned.roles`."""
    feature: int
    """-1 is the reconstruction error."""

    def __str__(self) -> str:
        return f"{self.place}/{self.role}/{'error' if self.feature == ERROR else self.feature}"


OUTPUT = None
"""The metric, as the target of an edge."""


@dataclass(frozen=True, eq=False)
class Edges:
    """Weights of edges on every prompt."""

    pairs: list[tuple[Node, Node | None]]
    """Source and target; the target `OUTPUT` is the metric itself."""
    weights: Float[Tensor, "prompt edge"]
    effects: Float[Tensor, "prompt node"]
    """The nodes' effects on every prompt, in the order in which they were given."""


@dataclass(eq=False)
class Cut:
    """A forward pass whose every place is a leaf."""

    order: list[Place]
    """Places in the order in which they ran."""
    raw: dict[Place, Tensor]
    """Activation at each place before the cut."""
    leaf: dict[Place, Tensor]
    """A zero, added to what flows on."""
    value: Float[Tensor, " row"]
    """The metric."""

    @classmethod
    def run(cls, contrast: Contrast, part: Aligned, places: Sequence[Place], taps: Sequence[Place] = ()) -> Cut:
        """Run some of the prompts, cut at some places; at `taps` activations have a leaf, but the graph goes on."""
        raw: dict[Place, Tensor] = {}
        leaf: dict[Place, Tensor] = {}

        def at(place: Place) -> Transform:
            def cut(x: Tensor) -> Tensor:
                raw[place], leaf[place] = x, torch.zeros_like(x, requires_grad=True)
                return (x if place in taps else x.detach()) + leaf[place]

            return cut

        changes = {place: at(place) for place in (*places, *taps)}
        with torch.enable_grad(), transformed(contrast.model.network, changes):
            value = contrast.value(part)
        return cls([place for place in raw if place not in taps], raw, leaf, value)

    def straight(self, output: Tensor, vector: Tensor | None, before: Sequence[Place]) -> dict[Place, Tensor]:
        """The vector-Jacobian product of an output with respect to the places that feed it straight."""
        if not before or not output.requires_grad:
            return {}
        leaves = [self.leaf[place] for place in before]
        grads = torch.autograd.grad(output, leaves, vector, retain_graph=True, allow_unused=True)
        found = cast("Sequence[Tensor | None]", grads)
        return {place: g for place, g in zip(before, found, strict=True) if g is not None}

    def gradients(self) -> tuple[dict[Place, Tensor], dict[Place, Tensor]]:
        """The metric's gradient at each place, and that part of it which passes through no later place."""
        straight = self.straight(self.value.sum(), None, self.order)
        total = {place: straight.get(place, torch.zeros_like(self.leaf[place])) for place in self.order}
        for i in range(len(self.order) - 1, 0, -1):
            place = self.order[i]
            for earlier, g in self.straight(self.raw[place], total[place], self.order[:i]).items():
                total[earlier] = total[earlier] + g
        return total, straight


def edges(contrast: Contrast, spaces: Sequence[Space], nodes: Sequence[Node], *, relevance: bool = False) -> Edges:
    """Estimate the edges between nodes, and from them to the metric.

    Args:
        relevance: take gradients of the frozen model (`models.linearised`).
    """
    frozen = Linearisation.of(contrast.model.network) if relevance else None
    by_place = {space.place: space for space in spaces}
    found: list[dict[tuple[Node, Node | None], Tensor]] = []
    own: list[Tensor] = []
    for start, part in contrast.parts():
        theirs, _ = contrast.run_reference(part, list(by_place))
        with frozen.recording() if frozen is not None else contextlib.nullcontext():
            cut = Cut.run(contrast, part, list(by_place))
        done = CutPart(part, by_place, nodes, cut, theirs)
        found.append(done.edges())
        own.append(done.effects())
        progress("edges", start + len(part), len(contrast))
    pairs = sorted({pair for each in found for pair in each}, key=lambda pair: (str(pair[0]), str(pair[1])))
    sizes = [len(effects) for effects in own]
    columns = [
        torch.cat([each.get(pair, torch.zeros(n)) for each, n in zip(found, sizes, strict=True)]) for pair in pairs
    ]
    weights = torch.stack(columns, 1) if columns else torch.zeros(len(contrast), 0)
    return Edges(pairs, weights, torch.cat(own))


class CutPart:
    """Some prompts, run with cuts: effects of nodes, and edges between them."""

    def __init__(
        self, part: Aligned, spaces: dict[Place, Space], nodes: Sequence[Node], cut: Cut, theirs: dict[Place, Tensor]
    ) -> None:
        self.part, self.spaces, self.nodes, self.cut = part, spaces, nodes, cut
        self.real = part.role >= 0
        self.total, self.to_metric = cut.gradients()
        self.at: dict[Place, list[Node]] = {}
        for node in nodes:
            self.at.setdefault(node.place, []).append(node)
        self.changes: dict[Place, Differences] = {}
        for place, own in self.at.items():
            change = differences(spaces[place], part, cut.raw[place].detach(), theirs[place])
            ids = [node.feature for node in own if node.feature != ERROR]
            self.changes[place] = Differences(change.features[:, ids], change.rest)

    def effects(self) -> Float[Tensor, "row node"]:
        """Effects of all nodes."""
        by_place = {place: self.weights(place, self.total[place]) for place in self.at}
        return torch.stack([by_place[node.place][node] for node in self.nodes], 1).cpu()

    def edges(self) -> dict[tuple[Node, Node | None], Float[Tensor, " row"]]:
        """Weights of all edges."""
        found: dict[tuple[Node, Node | None], Tensor] = {}
        for place, g in self.to_metric.items():
            if place in self.at:
                found |= {(node, OUTPUT): w.cpu() for node, w in self.weights(place, g).items()}
        for i, place in enumerate(self.cut.order):
            before = [earlier for earlier in self.cut.order[:i] if earlier in self.at]
            if place not in self.at or not before:
                continue
            for target, vector in self.vectors(place):
                for earlier, g in self.cut.straight(self.cut.raw[place], vector, before).items():
                    found |= {(node, target): w.cpu() for node, w in self.weights(earlier, g).items()}
        return found

    @torch.no_grad()
    def weights(self, place: Place, g: Float[Tensor, "row position width"]) -> dict[Node, Float[Tensor, " row"]]:
        """g · (u − u_ref) of every node of a place, summed over the tokens of its role."""
        space, change, own = self.spaces[place], self.changes[place], self.at[place]
        ids = [node.feature for node in own if node.feature != ERROR]
        each = space.read(g[self.real])[:, ids] * change.features
        sums = by_role(self.part, torch.cat([each, (g[self.real].float() * change.rest).sum(-1, keepdim=True)], 1))
        column = {feature: i for i, feature in enumerate(ids)}
        return {node: sums[:, node.role, column.get(node.feature, len(ids))] for node in own}

    @torch.no_grad()
    def vectors(self, place: Place) -> list[tuple[Node, Tensor]]:
        """Of every node of a place, the part of the metric's gradient with respect to the activation that passes it."""
        x, g = self.cut.raw[place].detach()[self.real], self.total[place][self.real]
        vector, roles = _pulling(self.spaces[place], x, g), self.part.role[self.real]
        found: list[tuple[Node, Tensor]] = []
        for node in self.at[place]:
            here = (roles == node.role)[:, None]
            whole = torch.zeros_like(self.total[place])
            whole[self.real] = (vector(node.feature) * here).to(whole.dtype)
            found.append((node, whole))
        return found


def _pulling(
    space: Space, x: Float[Tensor, "token width"], g: Float[Tensor, "token width"]
) -> Callable[[int], Float[Tensor, "token width"]]:
    """Feature, or `ERROR` → the gradient of m with respect to x by this node alone, g being m's with respect to x.

    A feature answers along its encoder direction; the error is what an activation has beside its features, so that
    it answers to all of x but for what the features take.
    """
    if not isinstance(space, FeatureSpace):
        return lambda _: g.float()
    taken = space.read(g) * space.slopes(x)

    def vector(feature: int) -> Tensor:
        if feature == ERROR:
            return g.float() - space.back(taken)
        return taken[:, feature, None] * space.reads(feature)

    return vector
