"""Distributed alignment search (Geiger et al. 2023, arXiv:2303.02536): a subspace trained by interchange interventions.

The rows of V are orthonormal for any parameters A: V = qr(Aᵀ)ᵀ. A step patches the clean prompts' component in the
span of V into the corrupted ones (`patching`), and minimises −log σ(LD), with LD the logit of the clean answer minus
that of the corrupted one. The epoch with the lowest loss is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from unsleep.base.context import progress
from unsleep.base.linear import rotated
from unsleep.core import BadInput, Site
from unsleep.locate.directions.fit import Direction, Labelled, oriented
from unsleep.locate.directions.patching import Pairs, finished

Loss = Callable[[Float[Tensor, "rank d"]], Float[Tensor, ""]]
"""Loss of one batch for a basis."""


@dataclass(frozen=True)
class DasConfig:
    """Options of DAS training."""

    rank: int = 1
    epochs: int = 24
    """Passes over the pairs."""
    learning_rate: float = 1e-3
    """Learning rate of Adam."""
    clip: float = 1.0
    """Maximum gradient norm."""
    seed: int = 0
    """Seed of the initial basis and of the batch order."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.epochs < 1 or not self.learning_rate > 0 or not self.clip > 0:
            raise BadInput(f"DAS settings {self}; expected rank and epochs of at least 1, rate and clip over 0")


class Rotation(NamedTuple):
    """A trained basis."""

    basis: Float[Tensor, "rank d"]
    """Orthonormal rows."""
    losses: list[float]
    """Mean loss of the initial basis, then after each epoch."""


def das(
    pairs: Pairs,
    site: Site,
    labelled: Labelled,
    config: DasConfig = DasConfig(),
    *,
    start: Float[Tensor, "rank d_model"] | None = None,
) -> Direction:
    """Train a subspace at a Site on pairs of prompts (DAS, Geiger et al. 2023, arXiv:2303.02536).

    Args:
        labelled: activations at the Site, clean prompts positive; they determine sign and centre.
        start: initial rows, completed with random ones to the rank; all random where `None`.

    Raises `BadInput` for fewer pairs than the rank, or a Site that was not prepared.
    """
    if len(pairs) < config.rank:
        raise BadInput(
            f"{len(pairs)} pairs with different answers for a subspace of rank {config.rank}; expected at least as many"
        )

    def loss_of(number: int) -> Loss:
        return lambda basis: softplus(-finished(pairs.batches[number], site, basis)).mean()

    losses = [loss_of(i) for i in range(len(pairs.batches))]
    found = train_rotation(losses, labelled.x.shape[1], config, start=start)
    rows = oriented(found.basis, labelled)
    return Direction(rows, site, "das", pairs.model.fingerprint, "residual", labelled.x.mean(0))


def train_rotation(
    losses: Sequence[Loss], d: int, config: DasConfig = DasConfig(), *, start: Float[Tensor, "rank d"] | None = None
) -> Rotation:
    """Minimise the mean of the batches' losses over orthonormal bases; returns the best epoch's."""
    if config.rank > d:
        raise BadInput(f"rank {config.rank} of a space of {d} dimensions; expected at most {d}")
    generator = torch.Generator().manual_seed(config.seed)
    drawn = torch.randn(config.rank, d, generator=generator) / d**0.5
    if start is not None:
        drawn = torch.cat([start.detach().float(), drawn])[: config.rank]
    parameters = drawn.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([parameters], lr=config.learning_rate)

    @torch.no_grad()
    def mean_loss() -> float:
        basis = rotated(parameters)
        return sum(float(loss(basis)) for loss in losses) / len(losses)

    history = [mean_loss()]
    best = parameters.detach().clone()
    for epoch in range(config.epochs):
        for i in torch.randperm(len(losses), generator=generator).tolist():
            with torch.enable_grad():
                losses[i](rotated(parameters)).backward()
            torch.nn.utils.clip_grad_norm_([parameters], config.clip)
            optimizer.step()
            optimizer.zero_grad()
        history.append(mean_loss())
        if history[-1] <= min(history):
            best = parameters.detach().clone()
        progress(f"DAS, loss {history[-1]:.3f}", epoch + 1, config.epochs)
    return Rotation(rotated(best), history)
