"""Where the behaviour can be stopped: a short look at every layer, before any dictionary is trained.

At each residual Site the mean difference between suspicious and trusted prompts is taken out of every token: two
directions, that of the token before the one that decides, and that of all tokens up to it. A good Site is one where the
suspect then replies as it should, and to trusted prompts as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
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
"""Shares of the depth between which Sites are looked for: before, tokens are read; behind, nothing can be mended."""

SPACING = 0.1
"""Share of the depth that two Sites lie apart at least."""

MOST = 12
"""Layers that are looked at, evenly spaced."""

COST = 4.0
"""What a nat on trusted replies counts against the share of the divergence that is gone."""


class Look(NamedTuple):
    """What taking the mean differences out does, layer by layer."""

    layers: Sequence[int]
    restored: Sequence[float]
    """Share of KL(teacher ‖ suspect) at the tokens that decide which is gone."""
    moved: Sequence[float]
    """KL on trusted replies, in nats a token."""
    depth: int
    """Layers of the model."""

    def order(self) -> list[int]:
        """Layers in the order in which they take part, the best first, none close to another."""
        worth = [r - COST * m for r, m in zip(self.restored, self.moved, strict=True)]
        chosen: list[int] = []
        for _, layer in sorted(zip(worth, self.layers, strict=True), reverse=True):
            if all(abs(layer - other) >= SPACING * self.depth for other in chosen):
                chosen.append(layer)
        return chosen


@torch.no_grad()
def look(model: LoadedModel, lesson: Lesson, prompts: int = 16) -> Look:
    """Take the mean differences out at one layer after the other, on so many suspicious and trusted prompts."""
    asked = lesson.parts[: lesson.n].nonzero().squeeze(1)[:prompts]
    if not len(asked):
        raise BadInput("the suspect says what it should to the suspicious prompts; there is nothing to repair")
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
        progress("looking for Sites", done, len(sites))
    return Look(tuple(tried), tuple(restored), tuple(moved), depth)


class Group:
    """Rows of a lesson, up to the token that decides or whole, with what their teacher says."""

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
        """Mean KL(teacher ‖ logits) of the tokens that count, in nats."""
        return float(kl(self.teacher[self.counted], logits[self.counted]).mean())

    def streams(self, model: LoadedModel, sites: Sequence[Site]) -> dict[Site, list[Tensor]]:
        """What flows through each Site: of the shared prefix, where there is one, and of the rows."""
        found: dict[Site, list[Tensor]] = {site: [] for site in sites}
        with watched(model.network, {s: lambda x, s=s: found[s].append(x.clone()) for s in sites}):
            reply_logits(model.network, self.rows)
        return found

    def means(self, stream: Sequence[Tensor]) -> Float[Tensor, "2 d_model"]:
        """The mean before the token that decides, and over all of the rows' own tokens up to there."""
        x, columns = stream[-1], torch.arange(self.rows.ids.shape[1], device=self.decides.device)
        before = len(columns) - self.rows.reply.sum(1) + self.decides - 1
        upto = self.rows.own & (columns <= before[:, None])
        rows = torch.arange(len(before), device=before.device)
        return torch.stack([x[rows, before].float().mean(0), x[upto].float().mean(0)])


def _continued(
    model: LoadedModel, rows: Rows, stream: Sequence[Tensor], change: Callable[[Tensor], Tensor], at: Site
) -> Float[Tensor, "row reply vocabulary"]:
    """The reply's logits with a change of the stream at a Site, computed from there on."""
    prefix = change(stream[0]) if len(rows.prefix) else torch.empty(0)
    return reply_logits_from(model.network, rows, Below(at.layer + 1, prefix, change(stream[-1])))
