"""Random weights and inputs of small dictionaries, and the gradients that autograd finds for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unsleep.dictionaries.architectures import KINDS
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.losses import Batch, Pass, Weights

D, F, N = 6, 24, 7
GROUPS = (4, 8, 12)
CONFIG = TrainConfig(
    features=F, k=3, sparsity=0.7, sparsity_warmup=0.0, bandwidth=0.9, groups=tuple(size / F for size in GROUPS)
)


def gradients(architecture: str, w: Weights, batch: Batch, **changes: Any) -> Pass:
    """One pass of an architecture, at the full cost."""
    return KINDS[architecture].gradients(w, batch, replace(CONFIG, architecture=architecture, **changes), 0)


def random_weights(seed: int, d_in: int = D, extras: tuple[str, ...] = ()) -> Weights:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    w = Weights(normal(F, d_in), normal(F, D), normal(F) * 0.3, normal(D) * 0.3)
    for name in extras:
        if name == "skip":
            w.skip = normal(D, d_in)
        else:
            w.own[name] = normal(F) * 0.3
    return w


def random_inputs(seed: int, n: int = N, d: int = D) -> Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    x[0] = 0
    return x


def autograd(w: Weights, loss: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_(True) for name, tensor in w.named().items()}
    loss(leaves).backward()
    return {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}


def sae_batch(w: Weights, x: Tensor) -> Batch:
    shifted = x - w.b_dec
    return Batch(shifted, shifted, True, torch.float64)


def agree(done: Pass, expected: dict[str, Tensor]) -> None:
    assert done.grads.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(done.grads[name], grad, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def mean_square(rebuilt: Tensor, x: Tensor) -> Tensor:
    return (rebuilt - x).square().sum() / len(x)


def kept(pre: Tensor, count: int, per_token: bool) -> Tensor:
    """Which pre-activations are among the largest, chosen outside the graph."""
    if per_token:
        return torch.zeros_like(pre).scatter(1, pre.detach().topk(count, 1).indices, 1.0)
    level = pre.detach().flatten().sort(descending=True).values[: count * len(pre)][-1].clamp_min(0)
    return (pre.detach() >= level).double()
