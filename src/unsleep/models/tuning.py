"""Training loop for weights: AdamW, gradient norm clipped to 1, learning rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base.context import progress

Schedule = Callable[[int, int], float]
"""(step, steps) → what the learning rate is multiplied by."""


def warm_up_and_down(step: int, steps: int) -> float:
    """Learning-rate factor: linear warm-up over a tenth of the steps, then linear decay to zero."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else max(0.0, (steps - step) / max(1, steps - warm))


def descend(
    weights: Sequence[Tensor],
    loss_of: Callable[[int], Float[Tensor, ""]],
    steps: int,
    learning_rate: float,
    stage: Callable[[float], str],
    schedule: Schedule = warm_up_and_down,
) -> list[float]:
    """Train weights by AdamW without weight decay; returns the loss of every step.

    Args:
        loss_of: the loss of a step, from which gradients flow to the weights.
        stage: the name under which progress is told, given the last loss.
    """
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    losses: list[float] = []
    for step in range(steps):
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress(stage(losses[-1]), step + 1, steps)
    return losses
