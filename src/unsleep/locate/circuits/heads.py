"""Loadings of edges on attention heads: which head carries how much of an edge.

An edge into a place of layer L runs through the attention of L where it crosses tokens. The output of that attention is
the sum of its heads' outputs, so that the vector-Jacobian product of the target, restricted to one head's lane, is the
part of the edge that this head carries. The parts of all heads add up to what of the edge passes this attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base.context import progress
from unsleep.base.records import Count
from unsleep.core import BadInput
from unsleep.locate.circuits.contrast import Contrast
from unsleep.locate.circuits.edges import Cut, CutPart, Node
from unsleep.locate.circuits.spaces import Space
from unsleep.models.linearised import Linearisation
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Slot, lanes
from unsleep.models.streams import transformed

LEAST = 0.1
"""Share of an edge's |weight| from which a head is listed."""


@dataclass(frozen=True)
class HeadLoading:
    """The part of an edge that one attention head carries."""

    head: Count
    """In the layer of the edge's target."""
    weight: float
    """Mean over prompts, in units of the metric."""


def head_loadings(
    contrast: Contrast,
    spaces: Sequence[Space],
    nodes: Sequence[Node],
    pairs: Sequence[tuple[Node, Node | None]],
    *,
    relevance: bool = False,
) -> dict[int, Float[Tensor, "prompt head"]]:
    """Edge number → the parts that the heads of its target's layer carry; without edges that pass no attention.

    Args:
        nodes: all nodes of the circuit.
        pairs: source and target of each edge, as of `edges`.
        relevance: take gradients of the frozen model, where heads only move values and patterns are constant.
    """
    slots = _slots(contrast.model, pairs)
    frozen = Linearisation.of(contrast.model.network) if relevance else None
    by_place = {space.place: space for space in spaces}
    found: dict[int, list[Tensor]] = {}
    wanted: dict[Node, list[int]] = {}
    for i, (_, target) in enumerate(pairs):
        if target is not None and target.place.layer in slots:
            wanted.setdefault(target, []).append(i)
    for start, part in contrast.parts() if wanted else ():
        theirs, _ = contrast.run_reference(part, list(by_place))
        with frozen.recording() if frozen is not None else contextlib.nullcontext():
            cut = Cut.run(contrast, part, list(by_place), list(slots.values()))
        held = CutPart(part, by_place, nodes, cut, theirs)
        done = 0
        for place in dict.fromkeys(target.place for target in wanted):
            for target, vector in held.vectors(place):
                if target in wanted:
                    ids = wanted[target]
                    parts = _parts(contrast.model, held, slots[place.layer], target, vector, [pairs[i][0] for i in ids])
                    for i, weights in zip(ids, parts, strict=True):
                        found.setdefault(i, []).append(weights)
                    done += 1
                    total = len(wanted) * len(contrast)
                    progress("head loadings", start * len(wanted) + done * len(part), total)
    whole = {i: torch.cat(parts) for i, parts in found.items()}
    return {i: weights for i, weights in whole.items() if bool((weights != 0).any())}


def listed(weight: float, loadings: Float[Tensor, "prompt head"]) -> tuple[HeadLoading, ...]:
    """Heads that carry at least `LEAST` of an edge, largest first; `weight` is the edge's on the same prompts."""
    mean = loadings.mean(0)
    order = [h for h in mean.abs().argsort(descending=True).tolist() if abs(float(mean[h])) >= LEAST * abs(weight)]
    return tuple(HeadLoading(h, float(mean[h])) for h in order)


def _slots(model: LoadedModel, pairs: Sequence[tuple[Node, Node | None]]) -> dict[int, Slot]:
    """The heads of every layer that a target is in, where the layer has heads that one projection reads."""
    found: dict[int, Slot] = {}
    for layer in sorted({target.place.layer for _, target in pairs if target is not None}):
        slot = Slot(layer, "heads")
        with contextlib.suppress(BadInput):  # such as a layer of linear attention
            lanes(model.network, slot)
            with transformed(model.network, {slot: lambda x: x}):
                found[layer] = slot
    return found


def _parts(
    model: LoadedModel, held: CutPart, slot: Slot, target: Node, vector: Tensor, sources: Sequence[Node]
) -> list[Float[Tensor, "row head"]]:
    """Of each edge into one target, the part that each head carries."""
    cut, where = held.cut, lanes(model.network, slot)
    found = torch.zeros(len(sources), len(held.part), where.heads)
    whole = cut.straight(cut.raw[target.place], vector, [slot]).get(slot)
    if whole is None or not bool(whole.any()):
        return list(found)
    order = cut.order.index(target.place)
    before = [place for place in cut.order[:order] if any(source.place == place for source in sources)]
    for head in range(where.heads):
        part = torch.zeros_like(whole)
        lane = slice(head * where.size, (head + 1) * where.size)
        part[..., lane] = whole[..., lane]
        for place, g in cut.straight(cut.raw[slot], part, before).items():
            weights = held.weights(place, g)
            for i, source in enumerate(sources):
                if source.place == place:
                    found[i, :, head] = weights[source].cpu()
    return list(found)
