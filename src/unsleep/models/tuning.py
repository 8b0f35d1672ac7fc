"""Training loops: of weights by AdamW, gradient norm clipped to 1, learning rate schedule; of LoRA matrices, merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unsleep.base.context import kept, progress
from unsleep.core import BadInput
from unsleep.models.load import quiet_transformers

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

    Raises `BadInput` where the loss becomes NaN or infinite.
    """
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    losses: list[float] = []
    for step in range(steps):
        loss = loss_of(step)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise BadInput(
                f"{stage(losses[-1])}: the loss is {losses[-1]} at step {step + 1} of {steps}; train at a lower "
                f"learning rate than {learning_rate:g}, or in float32"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        progress(stage(losses[-1]), step + 1, steps)
    return losses


def fine_tuned(
    network: PreTrainedModel,
    loss_of: Callable[[PreTrainedModel, int], Float[Tensor, ""]],
    stage: str,
    *,
    rank: int,
    steps: int,
    learning_rate: float,
    seed: int,
    made_from: Any,
) -> PreTrainedModel:
    """Train LoRA matrices on every linear layer of a network's blocks and merge them; the network itself changes.

    Args:
        loss_of: the loss of a step, of the network with its matrices.
        stage: the name under which progress is told, with the last loss.
        made_from: what the result depends on, for a resumed run (`context.kept`).
    """
    from unsleep.models import adapters  # peft takes a second to import

    torch.manual_seed(seed)
    with quiet_transformers():
        adapted: Any = adapters.trainable(network, rank, "all-linear")

    def learned() -> dict[str, Tensor]:
        inner = adapted.get_base_model()
        trained = [w for w in inner.parameters() if w.requires_grad]
        descend(trained, lambda step: loss_of(inner, step), steps, learning_rate, lambda loss: f"{stage} {loss:.3f}")
        return adapters.trained_state(adapted)

    adapters.take_state(adapted, kept(learned, made_from=made_from))
    with quiet_transformers():
        return adapted.merge_and_unload().requires_grad_(False)
