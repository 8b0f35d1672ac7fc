"""The effect of every node: what the metric would lose if the node were as it is in the reference.

    effect(u) = g · (u − u_ref)     summed over the tokens of a role, in units of the metric

`u` is a feature f_j, for which g is ∂m/∂x · d_j, or the rest of an activation, for which g is ∂m/∂x. Summed over all
nodes of a place that is m to first order. Estimators (Marks et al. 2024, "Sparse feature circuits", arXiv:2403.19647):

- `attribution`: the gradient at the prompt itself. One forward and one backward pass, for all places at once.
- `relevance`: the same in the frozen model (`models.linearised`).
- `integrated`: the mean gradient on the line from the prompt to its reference, a place at a time.
- `inputs`: the mean gradient on the line between their embeddings, for all places at once (Hanna et al. 2024, "Have
  faith in faithfulness", arXiv:2403.17806). It sees where a trigger's switch flips, which gradients at either end miss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base.context import progress
from unsleep.core import Site
from unsleep.locate.circuits.align import Aligned
from unsleep.locate.circuits.contrast import Contrast
from unsleep.locate.circuits.spaces import ERROR, Space
from unsleep.models.hooks import Transform
from unsleep.models.linearised import Linearisation
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Place
from unsleep.models.streams import transformed

Estimator = Literal["attribution", "relevance", "integrated", "inputs"]

STEPS = 10
"""Points on the line of integrated gradients."""

Streams = Mapping[Place, Float[Tensor, "row position width"]]


class Spot(NamedTuple):
    """One node of `Effects`."""

    place: Place
    role: int
    column: int
    """In `Effects.mean`."""


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects of all nodes of the places that were asked for."""

    roles: tuple[str, ...]
    mean: dict[Place, Float[Tensor, "role node"]]
    """Mean over prompts; the last node of a space with an error is that error."""
    metric: Float[Tensor, " prompt"]
    """At the prompts."""
    reference: Float[Tensor, " prompt"]
    """At their references."""
    each: Float[Tensor, "prompt spot"]
    """On every prompt, of as many of the `best` nodes as were asked for."""

    def best(self, n: int) -> list[Spot]:
        """The `n` nodes with the largest |mean effect|, largest first; fewer where fewer have any."""
        return _best(self.mean, n)


def _best(mean: Mapping[Place, Float[Tensor, "role node"]], n: int) -> list[Spot]:
    flat = torch.cat([each.flatten() for each in mean.values()])
    bounds = torch.tensor([0, *(each.numel() for each in mean.values())]).cumsum(0)
    places = list(mean)
    found: list[Spot] = []
    for i in flat.abs().topk(min(n, len(flat))).indices.tolist():
        which = int(torch.searchsorted(bounds, i, right=True)) - 1
        place = places[which]
        role, column = divmod(i - int(bounds[which]), mean[place].shape[1])
        if float(mean[place][role, column]) != 0:
            found.append(Spot(place, role, column))
    return found


def effects(
    contrast: Contrast,
    spaces: Sequence[Space],
    estimator: Estimator = "attribution",
    *,
    keep: int = 0,
    stage: str = "node effects",
) -> Effects:
    """Estimate the effect of every node.

    Args:
        keep: of so many nodes, those with the largest |mean effect|, the effect on every prompt is returned too.
        stage: name for the progress callback.

    Raises `BadInput` as `Linearisation.of` does for `relevance`.
    """
    mean: dict[Place, Tensor] = {}
    metrics: list[Tensor] = []
    others: list[Tensor] = []
    by_place: dict[Place, _Sparse] = {space.place: _Sparse() for space in spaces}
    for found in _batches(contrast, spaces, estimator, stage):
        for space in spaces:
            each = found.effects(space)
            share = each.sum(0) / len(contrast)
            mean[space.place] = mean[space.place] + share if space.place in mean else share
            if keep:
                by_place[space.place].add(each)
        metrics.append(found.metric)
        others.append(found.reference)
    each = _on_prompts(by_place, mean, _best(mean, keep), len(contrast))
    return Effects(contrast.aligned.roles, mean, torch.cat(metrics), torch.cat(others), each)


class _Sparse:
    """Effects of one place's nodes on every prompt, without those that are 0.

    The largest nodes are known only after the last prompt, so that every node's effects are held until then. A
    sparse dictionary's are nearly all 0. Each other takes 8 bytes: at most 0.4 GB for 100 prompts of 40 tokens, at 90
    Sites with 64 features each on either side, where all effects at 40 roles would take 6.6 GB.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, each: Float[Tensor, "row role node"]) -> None:
        """Hold the effects of some prompts."""
        flat = each.flatten(1).float().cpu()
        real = flat != 0
        self.parts.append((real.sum(1), real.nonzero()[:, 1].int(), flat[real]))

    def of(self, nodes: Sequence[int], total: int) -> Float[Tensor, "prompt node"]:
        """Effects of some nodes, by their number among a place's `total`, roles apart."""
        column = torch.full((total,), -1)
        column[list(nodes)] = torch.arange(len(nodes))
        rows: list[Tensor] = []
        for counts, index, values in self.parts:
            at = column[index.long()]
            row = torch.arange(len(counts)).repeat_interleave(counts)
            part = torch.zeros(len(counts), len(nodes))
            part[row[at >= 0], at[at >= 0]] = values[at >= 0]
            rows.append(part)
        return torch.cat(rows)


def _on_prompts(
    by_place: Mapping[Place, _Sparse], mean: Mapping[Place, Tensor], spots: Sequence[Spot], prompts: int
) -> Float[Tensor, "prompt spot"]:
    """Effects of some nodes on every prompt."""
    found = torch.zeros(prompts, len(spots))
    for place, sparse in by_place.items():
        own = [i for i, spot in enumerate(spots) if spot.place == place]
        if own:
            width = mean[place].shape[1]
            found[:, own] = sparse.of([spots[i].role * width + spots[i].column for i in own], mean[place].numel())
    return found


@dataclass(frozen=True, eq=False)
class _Batch:
    """Some prompts, run with gradients."""

    part: Aligned
    mine: Streams
    theirs: Mapping[Place, Tensor]
    """Of the reference, whose rows have another length."""
    slopes: Streams
    metric: Float[Tensor, " row"]
    reference: Float[Tensor, " row"]

    def effects(self, space: Space) -> Float[Tensor, "row role node"]:
        """Effects of one space's nodes."""
        place = space.place
        return node_effects(space, self.part, self.mine[place], self.theirs[place], self.slopes[place])


def _batches(contrast: Contrast, spaces: Sequence[Space], estimator: Estimator, stage: str) -> Iterator[_Batch]:
    frozen = Linearisation.of(contrast.model.network) if estimator == "relevance" else None
    places = [space.place for space in spaces]
    for start, part in contrast.parts():
        theirs, other = contrast.run_reference(part, places)
        mine, slopes, value = _gradients(contrast, part, theirs, frozen, estimator)
        yield _Batch(part, mine, theirs, slopes, value, other)
        progress(stage, start + len(part), len(contrast))


@contextlib.contextmanager
def shifted(
    model: LoadedModel, places: Sequence[Place], start: Callable[[Place, Tensor], Tensor] = lambda _, x: x
) -> Generator[tuple[dict[Place, Tensor], dict[Place, Tensor]]]:
    """Run with a zero added at every place, whose gradient is the activation's; yields activations and zeros.

    `start` may put something else in the place of an activation.
    """
    held: dict[Place, Tensor] = {}
    zeros: dict[Place, Tensor] = {}

    def at(place: Place) -> Transform:
        def run(x: Tensor) -> Tensor:
            x = start(place, x)
            held[place], zeros[place] = x, torch.zeros_like(x, requires_grad=True)
            return x + zeros[place]

        return run

    with torch.enable_grad(), transformed(model.network, {place: at(place) for place in places}):
        yield held, zeros


def _gradients(
    contrast: Contrast,
    part: Aligned,
    theirs: Mapping[Place, Tensor],
    frozen: Linearisation | None,
    estimator: Estimator,
) -> tuple[dict[Place, Tensor], dict[Place, Tensor], Float[Tensor, " row"]]:
    """Activations and the metric's gradients at each place of the reference, and the metric."""
    places, recording = list(theirs), frozen.recording() if frozen is not None else contextlib.nullcontext()
    with recording, shifted(contrast.model, places) as (x, zeros):
        value = contrast.value(part)
        found = torch.autograd.grad(value.sum(), [zeros[place] for place in places])
    mine = {place: x[place].detach() for place in places}
    slopes = dict(zip(places, found, strict=True))
    if estimator == "integrated":
        for done, place in enumerate(places, 1):
            slopes[place] = _mean_slope(contrast, part, place, mine[place], part.brought(theirs[place]))
            progress("integrated gradients", done, len(places))
    if estimator == "inputs":
        slopes = _input_slopes(contrast, part, places)
    return mine, slopes, value.detach()


def _input_slopes(contrast: Contrast, part: Aligned, places: Sequence[Place]) -> dict[Place, Tensor]:
    """The mean gradient at each place on the line from the prompt's embeddings to its reference's."""
    embed = Site(0, "embed")
    found, _ = contrast.run_reference(part, [embed])
    theirs, real = part.brought(found[embed]), (part.role >= 0)[..., None]
    total: dict[Place, Tensor] = {}
    for k in range(STEPS):
        share = (k + 0.5) / STEPS

        def at(place: Place, x: Tensor, share: float = share) -> Tensor:
            return torch.where(real, torch.lerp(x, theirs.to(x), share), x) if place == embed else x

        with shifted(contrast.model, list(dict.fromkeys([embed, *places])), at) as (_, zeros):
            slopes = torch.autograd.grad(contrast.value(part).sum(), [zeros[place] for place in places])
        for place, slope in zip(places, slopes, strict=True):
            total[place] = total[place] + slope.float() / STEPS if place in total else slope.float() / STEPS
        progress("gradients between the inputs", k + 1, STEPS)
    return total


def _mean_slope(contrast: Contrast, part: Aligned, place: Place, mine: Tensor, theirs: Tensor) -> Tensor:
    """The mean gradient on the line from the prompt to its reference."""
    total = torch.zeros_like(mine)
    theirs = torch.where((part.role >= 0)[..., None], theirs, mine)
    for k in range(STEPS):
        point = torch.lerp(mine, theirs, (k + 0.5) / STEPS)
        with shifted(contrast.model, [place], lambda _, x, point=point: point) as (_, zeros):
            (slope,) = torch.autograd.grad(contrast.value(part).sum(), zeros[place])
        total += slope
    return total / STEPS


@torch.no_grad()
def node_effects(
    space: Space,
    part: Aligned,
    mine: Float[Tensor, "row position width"],
    theirs: Float[Tensor, "row other width"],
    slope: Float[Tensor, "row position width"],
) -> Float[Tensor, "row role node"]:
    """The effects of one space's nodes on every prompt, summed over the tokens of each role."""
    real = part.role >= 0
    change = differences(space, part, mine, theirs)
    each = space.read(slope[real]) * change.features
    if space.has_error:
        each = torch.cat([each, (slope[real].float() * change.rest).sum(-1, keepdim=True)], 1)
    return by_role(part, each)


@dataclass(frozen=True, eq=False)
class Differences:
    """Nodes at a prompt less those of its reference, for every token with a role."""

    features: Float[Tensor, "token feature"]
    rest: Float[Tensor, "token width"]


@torch.no_grad()
def differences(space: Space, part: Aligned, mine: Tensor, theirs: Tensor) -> Differences:
    """u − u_ref of every node, in float32."""
    real = part.role >= 0
    features, rest = reference_nodes(space, part, theirs)
    x = mine[real]
    return Differences(space.encode(x) - features[real], space.rest(x) - rest[real])


@torch.no_grad()
def reference_nodes(
    space: Space, part: Aligned, theirs: Tensor, ids: Sequence[int] | None = None
) -> tuple[Float[Tensor, "row position feature"], Float[Tensor, "row position width"]]:
    """Features, or some of them, and rests of the reference, brought to the tokens that they are compared with."""
    flat = theirs.flatten(0, 1)
    features = space.encode(flat).unflatten(0, theirs.shape[:2])
    features = features if ids is None else features[..., list(ids)]
    rest = space.rest(flat).unflatten(0, theirs.shape[:2])
    return part.brought(features), part.brought(rest)


@torch.no_grad()
def node_change(
    space: Space, part: Aligned, x: Float[Tensor, "row position width"], theirs: Tensor, role: int, feature: int
) -> Float[Tensor, "row position width"]:
    """u − u_ref of one node at the tokens of its role, as a change of the activation."""
    ids = [] if feature == ERROR else [feature]
    features, rest = reference_nodes(space, part, theirs, ids)
    flat = x.flatten(0, 1)
    if feature == ERROR:
        change = space.rest(flat).view_as(x) - rest
    else:
        change = space.combine(space.encode(flat)[:, ids] - features.flatten(0, 1), ids).view_as(x)
    return (change * (part.role == role)[..., None]).to(x.dtype)


def by_role(part: Aligned, each: Float[Tensor, "token node"]) -> Float[Tensor, "row role node"]:
    """Values of tokens with a role, summed over the tokens of each role in each row."""
    real = part.role >= 0
    row = torch.arange(len(part), device=each.device)[:, None].expand_as(part.role)[real]
    index = row * len(part.roles) + part.role[real]
    found = each.new_zeros(len(part) * len(part.roles), each.shape[1])
    return found.index_add(0, index, each).unflatten(0, (len(part), len(part.roles)))
