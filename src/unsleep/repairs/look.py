"""Site selection: a quick ablation at every layer, before any dictionary is trained.

At each residual Site the difference of means between suspicious and trusted prompts is ablated at every token: two
directions, one from the token before the deciding one, one averaged over all tokens up to it. At a good Site the
suspect then replies as it should, with unchanged replies to trusted prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unsleep.base.context import progress
from unsleep.base.linear import rotated
from unsleep.core import BadInput, Site
from unsleep.interventions.intervention import operation
from unsleep.interventions.subspaces import Projection
from unsleep.models.forward import Below, Rows, kl, reply_logits, reply_logits_from
from unsleep.models.model import LoadedModel
from unsleep.models.sites import layers
from unsleep.models.streams import watched
from unsleep.repairs.masks import Lesson

DEPTHS = (0.2, 0.9)
"""Range of relative depth for Sites: earlier layers still read the tokens, later ones come too late."""

SPACING = 0.1
"""Minimum distance of two Sites, in relative depth."""

MOST = 12
"""Maximum number of layers tried, evenly spaced."""

COST = 4.0
"""Penalty per nat of KL on trusted replies, against the share of the divergence that is removed."""


class Look(NamedTuple):
    """Effect of ablating the mean differences, layer by layer."""

    layers: Sequence[int]
    restored: Sequence[float]
    """Share of KL(teacher ‖ suspect) at the deciding tokens that is removed."""
    moved: Sequence[float]
    """KL on trusted replies, in nats per token."""
    depth: int
    """Number of layers of the model."""

    def order(self) -> list[int]:
        """Layers from best to worst, none closer than `SPACING` to a better one."""
        worth = [r - COST * m for r, m in zip(self.restored, self.moved, strict=True)]
        chosen: list[int] = []
        for _, layer in sorted(zip(worth, self.layers, strict=True), reverse=True):
            if all(abs(layer - other) >= SPACING * self.depth for other in chosen):
                chosen.append(layer)
        return chosen


@torch.no_grad()
def look(model: LoadedModel, lesson: Lesson, prompts: int = 16) -> Look:
    """Ablate the mean differences at one layer at a time, on at most `prompts` suspicious and trusted prompts."""
    asked = lesson.parts[: lesson.n].nonzero().squeeze(1)[:prompts]
    if not len(asked):
        raise BadInput(
            "the suspect already gives the reference replies to the suspicious prompts; there is nothing to repair"
        )
    kept = lesson.n + torch.arange(min(prompts, len(lesson.rows.ids) - lesson.n))
    groups = [Group(lesson, asked, decisive=True), Group(lesson, kept, decisive=False)]
    depth, dtype = len(layers(model.network)), model.network.dtype
    if depth < 2:
        return Look((0,), (0.0,), (0.0,), depth)
    between = [i for i in range(depth - 1) if DEPTHS[0] * depth <= i < DEPTHS[1] * depth] or [0]
    tried = between[:: -(-len(between) // MOST)]
    sites = [Site(layer) for layer in tried]
    suspicious, trusted = (group.streams(model, sites) for group in groups)
    whole = groups[0].divergence(reply_logits(model.network, groups[0].rows))
    restored: list[float] = []
    moved: list[float] = []
    for done, site in enumerate(sites, 1):
        means = groups[0].means(suspicious[site]), groups[1].means(trusted[site])
        basis = rotated(means[0] - means[1])
        take_out = operation(Projection(site, basis, means[1].mean(0), model.fingerprint), dtype, model.device)
        left, beside = (
            group.divergence(_continued(model, group.rows, held[site], take_out, site))
            for group, held in zip(groups, (suspicious, trusted), strict=True)
        )
        restored.append(round(1 - left / max(whole, 1e-6), 4))
        moved.append(round(beside, 4))
        progress("Site selection", done, len(sites))
    return Look(tuple(tried), tuple(restored), tuple(moved), depth)


class Group:
    """Rows of a lesson, cut at the deciding token or whole, with the teacher's logits."""

    def __init__(self, lesson: Lesson, index: Tensor, *, decisive: bool) -> None:
        index = index.to(lesson.decides.device)
        self.rows = lesson.rows.select(index)
        width = self.rows.reply.shape[1]
        self.teacher = lesson.teacher[lesson.taught[index]][:, -width:]
        place = self.rows.reply.long().cumsum(1) - 1
        at = place == lesson.decides[index][:, None] if decisive else place >= 0
        self.counted = at & self.rows.reply
        self.decides = lesson.decides[index]

    def divergence(self, logits: Float[Tensor, "row reply vocabulary"]) -> float:
        """Mean KL(teacher ‖ logits) over the counted tokens, in nats."""
        return float(kl(self.teacher[self.counted], logits[self.counted]).mean())

    def streams(self, model: LoadedModel, sites: Sequence[Site]) -> dict[Site, list[Tensor]]:
        """Activations at each Site: of the shared prefix, where there is one, and of the rows."""
        found: dict[Site, list[Tensor]] = {site: [] for site in sites}
        with watched(model.network, {s: lambda x, s=s: found[s].append(x.clone()) for s in sites}):
            reply_logits(model.network, self.rows)
        return found

    def means(self, stream: Sequence[Tensor]) -> Float[Tensor, "2 d_model"]:
        """Means at the token before the deciding one, and over the rows' own tokens up to it."""
        x, columns = stream[-1], torch.arange(self.rows.ids.shape[1], device=self.decides.device)
        upto = self.rows.own & (columns <= self._before[:, None])
        return torch.stack([self.deciding(stream).mean(0), x[upto].float().mean(0)])

    def deciding(self, stream: Sequence[Tensor]) -> Float[Tensor, "row d_model"]:
        """Activations at the token before the deciding one."""
        rows = torch.arange(len(self._before), device=self._before.device)
        return stream[-1][rows, self._before].float()

    @property
    def _before(self) -> Int[Tensor, " row"]:
        """Column of the token before the deciding one."""
        return self.rows.ids.shape[1] - self.rows.reply.sum(1) + self.decides - 1


def _continued(
    model: LoadedModel, rows: Rows, stream: Sequence[Tensor], change: Callable[[Tensor], Tensor], at: Site
) -> Float[Tensor, "row reply vocabulary"]:
    """Logits of the reply with a transform of the residual stream at a Site, computed from that layer on."""
    prefix = change(stream[0]) if len(rows.prefix) else torch.empty(0)
    return reply_logits_from(model.network, rows, Below(at.layer + 1, prefix, change(stream[-1])))
