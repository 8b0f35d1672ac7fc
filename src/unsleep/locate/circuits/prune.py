"""Pruning: a gate per node is learned, so that few open gates carry the metric.

    u' = u_ref + z (u − u_ref),   z = σ(a)        minimise   max(0, target − faithfulness) · weight + log Σ z

Effects of single nodes rank nodes one by one; a circuit loses at every place the share that its nodes do not carry, and
over many places nothing is left. Gates are learned together, through all places at once (differentiable masking: De Cao
et al. 2022, arXiv:2112.06837; Edge Pruning: Bhaskar et al. 2024, arXiv:2406.16778). What they were learned on must not
be what the circuit is measured on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base.context import progress
from unsleep.core import BadInput, check_least
from unsleep.locate.circuits.align import Aligned
from unsleep.locate.circuits.effects import Effects, Metric, reference_nodes, run_streams
from unsleep.locate.circuits.spaces import Space
from unsleep.models.forward import reply_logits
from unsleep.models.hooks import Transform
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Place
from unsleep.models.streams import transformed


@dataclass(frozen=True)
class PruneConfig:
    """Settings of pruning."""

    steps: int = 150
    target: float = 0.95
    """Faithfulness that the gated model keeps."""
    weight: float = 20.0
    """Of the faithfulness that is missing, against the price of all gates."""
    learning_rate: float = 0.3
    batch: int = 8
    """Prompts per step."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "pruning", 1, "steps", "batch")
        if not 0 < self.target <= 1:
            raise BadInput.of("target", self.target, "above 0 and at most 1", "pruning")


def prune(
    model: LoadedModel,
    aligned: Aligned,
    spaces: Sequence[Space],
    metric: Metric,
    found: Effects,
    config: PruneConfig = PruneConfig(),
    *,
    reference: LoadedModel | None = None,
) -> Effects:
    """Learn a gate per node; the effects' means with every node's gate in place of its effect.

    Args:
        found: effects of all nodes; nodes without any are closed.
        reference: the model that the references run in; the model itself where not given.
    """
    gates = _Gates(model, aligned, spaces, metric, found, reference or model)
    optimiser = torch.optim.Adam(list(gates.logits.values()), lr=config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(config.steps):
        rows = torch.randperm(len(aligned), generator=generator)[: config.batch].sort().values
        share = gates.faithfulness(rows)
        opened = sum((gates.open(place).sum() for place in gates.logits), torch.zeros(()))
        missing = (config.target - share).clamp_min(0)
        optimiser.zero_grad()
        (config.weight * missing + opened.log()).backward()
        optimiser.step()
        words = f"pruning, {opened.item():,.0f} open, faithfulness {share.item():.2f}"
        progress(words, step + 1, config.steps)
    mean = {place: gates.open(place).detach() for place in gates.logits}
    return Effects(found.roles, mean, found.metric, found.reference)


class _Gates:
    """Gates of all nodes, and the gated model."""

    def __init__(
        self,
        model: LoadedModel,
        aligned: Aligned,
        spaces: Sequence[Space],
        metric: Metric,
        found: Effects,
        reference: LoadedModel,
    ) -> None:
        self.model, self.aligned, self.spaces, self.metric, self.reference = model, aligned, spaces, metric, reference
        self.candidates = {space.place: found.mean[space.place] != 0 for space in spaces}
        self.logits = {
            place: torch.full(mask.shape, 2.0, device=mask.device, requires_grad=True)
            for place, mask in self.candidates.items()
        }

    def open(self, place: Place) -> Float[Tensor, "role node"]:
        """The gates of a place, closed where a node has no effect."""
        return torch.sigmoid(self.logits[place]) * self.candidates[place]

    def faithfulness(self, rows: Tensor) -> Float[Tensor, ""]:
        """Of the gated model, on some prompts."""
        part = self.aligned.at(rows)
        with torch.no_grad():
            theirs, _ = run_streams(self.reference, part.reference, self.spaces, self.metric)
            whole = self.metric(reply_logits(self.model.network, part.rows), part.rows)
            none = {s.place: self._gated(s, part, theirs[s.place], closed=True) for s in self.spaces}
            with transformed(self.model.network, none):
                bare = self.metric(reply_logits(self.model.network, part.rows), part.rows)
        gated = {space.place: self._gated(space, part, theirs[space.place]) for space in self.spaces}
        with torch.enable_grad(), transformed(self.model.network, gated):
            value = self.metric(reply_logits(self.model.network, part.rows), part.rows)
        return (value - bare).mean() / (whole - bare).mean()

    def _gated(self, space: Space, part: Aligned, theirs: Tensor, *, closed: bool = False) -> Transform:
        real = part.role >= 0
        other = part.brought(theirs.float())[real]
        if closed:
            return lambda x: x.masked_scatter(real[..., None], other.to(x.dtype))
        ids = self.candidates[space.place].any(0).nonzero().flatten()
        own = [i for i in ids.tolist() if i < space.size]
        features, rest = (x[real] for x in reference_nodes(space, part, theirs, own))
        role = part.role[real]
        gates = self.open(space.place)[role]

        def run(x: Tensor) -> Tensor:
            mine = x[real]
            new = other
            if own:
                new = new + space.combine((space.encode(mine)[:, own] - features) * gates[:, own], own)
            if space.has_error:
                new = new + (space.rest(mine) - rest) * gates[:, space.size :]
            return x.masked_scatter(real[..., None], new.to(x.dtype))

        return run
