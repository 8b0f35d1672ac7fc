"""Edges measured: a node is put back to its reference, its neighbours answer, and everything else stays.

Every place is held at what it is in the run, but for the source's, so that only straight paths are left. With patterns,
norms and gates held too, the measured weight is the one predicted in the frozen model; with nothing held beside the
places it shows what the linearisation leaves out. In either case the set of features that fire at the target, and the
metric's gradient there, are those of the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base.context import progress
from unsleep.locate.circuits.align import Aligned
from unsleep.locate.circuits.contrast import Contrast
from unsleep.locate.circuits.edges import Cut, Node
from unsleep.locate.circuits.effects import by_role, node_change
from unsleep.locate.circuits.spaces import ERROR, FeatureSpace, Space
from unsleep.models.hooks import Transform
from unsleep.models.linearised import Linearisation
from unsleep.models.sites import Place
from unsleep.models.streams import transformed

Pair = tuple[Node, Node | None]


class Measured(NamedTuple):
    """Weights of edges, in units of the metric; NaN where the model cannot be frozen."""

    frozen: Float[Tensor, "prompt edge"]
    free: Float[Tensor, "prompt edge"]


def measured(contrast: Contrast, spaces: Sequence[Space], pairs: Sequence[Pair], *, relevance: bool) -> Measured:
    """Measure edges, one forward pass a source, frozen and free.

    Args:
        pairs: source and target of each edge.
        relevance: whether the model can be frozen, and the metric's gradient is taken in the frozen model.
    """
    sources = list(dict.fromkeys(source for source, _ in pairs))
    by_place = {space.place: space for space in spaces}
    base = Linearisation.of(contrast.model.network) if relevance else None
    found: list[Tensor] = []
    for start, part in contrast.parts():
        theirs, _ = contrast.run_reference(part, list(by_place))
        with base.recording() if base is not None else contextlib.nullcontext():
            cut = Cut.run(contrast, part, list(by_place))
        done = _Bench(contrast, part, by_place, cut, theirs)
        weights = torch.full((2, len(part), len(pairs)), torch.nan)
        for number, source in enumerate(sources, 1):
            own = [(i, target) for i, (s, target) in enumerate(pairs) if s == source]
            change = done.change(source)
            for which, freeze in enumerate((base, None)):
                if which == 0 and base is None:
                    continue
                answers = done.answers(source.place, change, [target for _, target in own], freeze)
                weights[which][:, [i for i, _ in own]] = answers.cpu()
            progress("measuring edges", start * len(sources) + number * len(part), len(contrast) * len(sources))
        found.append(weights)
    return Measured(*torch.cat(found, 1)) if found else Measured(torch.zeros(0, 0), torch.zeros(0, 0))


class _Bench:
    """Prompts on which edges are measured."""

    def __init__(
        self,
        contrast: Contrast,
        part: Aligned,
        spaces: Mapping[Place, Space],
        cut: Cut,
        theirs: Mapping[Place, Tensor],
    ) -> None:
        self.contrast, self.part, self.spaces, self.theirs = contrast, part, spaces, theirs
        self.total, _ = cut.gradients()
        self.base = {place: x.detach() for place, x in cut.raw.items()}
        self.value = cut.value.detach()
        self.slopes: dict[Node, Tensor] = {}
        """Of each target, whatever its role: slope times gradient at each token; of an error, all features' slopes."""

    @torch.no_grad()
    def answers(
        self, at_place: Place, change: Tensor, targets: Sequence[Node | None], freeze: Linearisation | None
    ) -> Float[Tensor, "row target"]:
        """Drop of each target's contribution when the source is patched with its reference."""
        raw: dict[Place, Tensor] = {}

        def at(place: Place) -> Transform:
            def held(x: Tensor) -> Tensor:
                raw[place] = x
                return self.base[place] - change if place == at_place else self.base[place]

            return held

        frozen = freeze.held() if freeze is not None else contextlib.nullcontext()
        with frozen, transformed(self.contrast.model.network, {place: at(place) for place in self.base}):
            value = self.contrast.value(self.part)
        lost = [self.value - value if target is None else self._lost(target, raw[target.place]) for target in targets]
        return torch.stack(lost, 1)

    def change(self, source: Node) -> Float[Tensor, "row position width"]:
        """u − u_ref at the source's tokens, as a change of the activation."""
        x, theirs = self.base[source.place], self.theirs[source.place]
        return node_change(self.spaces[source.place], self.part, x, theirs, source.role, source.feature)

    def _lost(self, target: Node, now: Float[Tensor, "row position width"]) -> Float[Tensor, " row"]:
        """∂m/∂d · (d − d now), summed over the target's tokens; the set of features that fire is held."""
        real = self.part.role >= 0
        space, g = self.spaces[target.place], self.total[target.place][real]
        before, lost = self.base[target.place][real], (self.base[target.place] - now)[real].float()
        if not isinstance(space, FeatureSpace):
            each = (g.float() * lost).sum(-1)
        elif target.feature == ERROR:
            taken = space.pre(lost) * self._slopes(space, target, before, g)
            each = (g.float() * (lost - space.combine(taken))).sum(-1)
        else:
            each = (lost @ space.reads(target.feature)) * self._slopes(space, target, before, g)
        return by_role(self.part, each[:, None])[:, target.role, 0]

    def _slopes(self, space: FeatureSpace, target: Node, before: Tensor, g: Tensor) -> Tensor:
        key = replace(target, role=0)
        if key not in self.slopes:
            slopes = space.slopes(before)
            own = slopes if target.feature == ERROR else (slopes * space.read(g))[:, target.feature]
            self.slopes[key] = own.clone()
        return self.slopes[key]
