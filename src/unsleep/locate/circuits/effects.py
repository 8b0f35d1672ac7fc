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
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base.context import progress
from unsleep.core import Site
from unsleep.locate.circuits.align import Aligned
from unsleep.locate.circuits.spaces import ERROR, Space
from unsleep.models.forward import Rows, reply_logits, run
from unsleep.models.hooks import Transform
from unsleep.models.linearised import Linearisation
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Place
from unsleep.models.streams import capture, transformed

Estimator = Literal["attribution", "relevance", "integrated", "inputs"]

Metric = Callable[[Float[Tensor, "row reply vocabulary"], Rows], Float[Tensor, " row"]]
"""Explained quantity: any function of the logits that predict the forced reply, such as `features.reply_log_odds`."""

STEPS = 10
"""Points on the line of integrated gradients."""

Streams = Mapping[Place, Float[Tensor, "row position width"]]


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

    def best(self, n: int) -> list[tuple[Place, int, int]]:
        """The `n` nodes with the largest |mean effect|: place, role, and column in `mean`."""
        flat = torch.cat([mean.flatten() for mean in self.mean.values()])
        order = flat.abs().topk(min(n, len(flat))).indices.tolist()
        found: list[tuple[Place, int, int]] = []
        starts = list(self.mean.items())
        bounds = torch.tensor([0, *(mean.numel() for _, mean in starts)]).cumsum(0)
        for i in order:
            which = int(torch.searchsorted(bounds, i, right=True)) - 1
            place, mean = starts[which]
            role, column = divmod(i - int(bounds[which]), mean.shape[1])
            if float(mean[role, column]) != 0:
                found.append((place, role, column))
        return found


def effects(
    model: LoadedModel,
    aligned: Aligned,
    spaces: Sequence[Space],
    metric: Metric,
    estimator: Estimator = "attribution",
    *,
    reference: LoadedModel | None = None,
    batch: int = 16,
) -> Effects:
    """Estimate the effect of every node.

    Args:
        reference: the model that the references run in, such as the base; the model itself where not given.
        batch: prompts in one forward pass.

    Raises `BadInput` as `Linearisation.of` does for `relevance`.
    """
    mean: dict[Place, Tensor] = {}
    metrics: list[Tensor] = []
    others: list[Tensor] = []
    for found in _batches(model, aligned, spaces, metric, estimator, reference or model, batch):
        for space in spaces:
            share = found.effects(space).sum(0) / len(aligned)
            mean[space.place] = mean[space.place] + share if space.place in mean else share
        metrics.append(found.metric)
        others.append(found.reference)
    return Effects(aligned.roles, mean, torch.cat(metrics), torch.cat(others))


def effects_on_prompts(
    model: LoadedModel,
    aligned: Aligned,
    spaces: Sequence[Space],
    columns: Sequence[tuple[Place, int, int]],
    metric: Metric,
    estimator: Estimator = "attribution",
    *,
    reference: LoadedModel | None = None,
    batch: int = 16,
) -> Float[Tensor, "prompt node"]:
    """Effects of some nodes on every prompt; `columns` as `Effects.best` gives them."""
    own: dict[Place, list[int]] = {}
    for i, (place, _, _) in enumerate(columns):
        own.setdefault(place, []).append(i)
    used = [space for space in spaces if space.place in own]
    rows: list[Tensor] = []
    for found in _batches(model, aligned, used, metric, estimator, reference or model, batch):
        each = torch.zeros(len(found.metric), len(columns))
        for space in used:
            ids = own[space.place]
            roles, nodes = zip(*(columns[i][1:] for i in ids), strict=True)
            each[:, ids] = found.effects(space)[:, list(roles), list(nodes)].cpu()
        rows.append(each)
    return torch.cat(rows)


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


def _batches(
    model: LoadedModel,
    aligned: Aligned,
    spaces: Sequence[Space],
    metric: Metric,
    estimator: Estimator,
    reference: LoadedModel,
    batch: int,
) -> Iterator[_Batch]:
    frozen = Linearisation.of(model.network) if estimator == "relevance" else None
    for start in range(0, len(aligned), batch):
        part = aligned.batch(start, batch)
        theirs, other = run_streams(reference, part.reference, spaces, metric)
        mine, slopes, value = _gradients(model, part, spaces, metric, theirs, frozen, estimator, reference)
        yield _Batch(part, mine, theirs, slopes, value, other)
        progress("node effects", min(start + batch, len(aligned)), len(aligned))


@torch.no_grad()
def run_streams(
    model: LoadedModel, rows: Rows, spaces: Sequence[Space], metric: Metric
) -> tuple[dict[Place, Tensor], Float[Tensor, " row"]]:
    """Activations at each place, and the metric."""
    with capture(model.network, [space.place for space in spaces]) as found:
        value = metric(reply_logits(model.network, rows), rows)
    return found, value


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
    model: LoadedModel,
    part: Aligned,
    spaces: Sequence[Space],
    metric: Metric,
    theirs: Streams,
    frozen: Linearisation | None,
    estimator: Estimator,
    reference: LoadedModel,
) -> tuple[dict[Place, Tensor], dict[Place, Tensor], Float[Tensor, " row"]]:
    """Activations and the metric's gradients at each place, and the metric."""
    places = [space.place for space in spaces]
    with frozen.recording() if frozen is not None else contextlib.nullcontext(), shifted(model, places) as (x, zeros):
        value = metric(reply_logits(model.network, part.rows), part.rows)
        found = torch.autograd.grad(value.sum(), [zeros[place] for place in places])
    mine = {place: x[place].detach() for place in places}
    slopes = dict(zip(places, found, strict=True))
    if estimator == "integrated":
        for done, place in enumerate(places, 1):
            slopes[place] = _mean_slope(model, part, place, mine[place], part.brought(theirs[place]), metric)
            progress("integrated gradients", done, len(places))
    if estimator == "inputs":
        slopes = _input_slopes(model, part, places, reference, metric)
    return mine, slopes, value.detach()


def _input_slopes(
    model: LoadedModel, part: Aligned, places: Sequence[Place], reference: LoadedModel, metric: Metric
) -> dict[Place, Tensor]:
    """The mean gradient at each place on the line from the prompt's embeddings to its reference's."""
    embed = Site(0, "embed")
    with torch.no_grad(), capture(reference.network, [embed]) as found:
        run(reference.network, part.reference, 1)
    theirs, real = part.brought(found[embed]), (part.role >= 0)[..., None]
    total: dict[Place, Tensor] = {}
    for k in range(STEPS):
        share = (k + 0.5) / STEPS

        def at(place: Place, x: Tensor, share: float = share) -> Tensor:
            return torch.where(real, torch.lerp(x, theirs.to(x), share), x) if place == embed else x

        with shifted(model, list(dict.fromkeys([embed, *places])), at) as (_, zeros):
            value = metric(reply_logits(model.network, part.rows), part.rows)
            slopes = torch.autograd.grad(value.sum(), [zeros[place] for place in places])
        for place, slope in zip(places, slopes, strict=True):
            total[place] = total[place] + slope.float() / STEPS if place in total else slope.float() / STEPS
        progress("gradients between the inputs", k + 1, STEPS)
    return total


def _mean_slope(
    model: LoadedModel, part: Aligned, place: Place, mine: Tensor, theirs: Tensor, metric: Metric
) -> Tensor:
    """The mean gradient on the line from the prompt to its reference."""
    total = torch.zeros_like(mine)
    theirs = torch.where((part.role >= 0)[..., None], theirs, mine)
    for k in range(STEPS):
        point = torch.lerp(mine, theirs, (k + 0.5) / STEPS)
        with shifted(model, [place], lambda _, x, point=point: point) as (_, zeros):
            value = metric(reply_logits(model.network, part.rows), part.rows)
            (slope,) = torch.autograd.grad(value.sum(), zeros[place])
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
