"""Activations that a small dictionary can explain, and quick trainings on them."""

from __future__ import annotations

from dataclasses import replace

import torch

from unsleep.core import Activations, ActivationStream, Site
from unsleep.dictionaries.config import TrainConfig


def sparse_data(n: int = 4096, d: int = 16, true: int = 32, seed: int = 0) -> torch.Tensor:
    """Tokens that are sums of three of 32 directions, with an offset."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(true, d, generator=g), dim=1)
    which = torch.rand(n, true, generator=g).topk(3, dim=1).indices
    strength = torch.rand(n, 3, generator=g) + 0.5
    return torch.einsum("nk,nkd->nd", strength, directions[which]) * 7 + 3


def activations(x: torch.Tensor) -> Activations:
    return Activations(x, torch.zeros(len(x), dtype=torch.long), Site(1), "model", "prompts")


QUICK = TrainConfig(features=64, k=3, tokens=120_000, batch=512, learning_rate=3e-3, dead_after=20_000)
ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "standard", "jumprelu", "gated")
SPARSITY = {"standard": 0.7, "gated": 1.5, "jumprelu": 1.0}
SMALL = TrainConfig(features=64, k=4, tokens=12_800, batch=128, learning_rate=3e-3, dead_after=2_000, aux_k=8)


def config_of(architecture: str, **changes: object) -> TrainConfig:
    own = {"sparsity": SPARSITY.get(architecture, 1.0), "bandwidth": 0.3, "threshold": 0.05}
    return replace(SMALL, architecture=architecture, **own, **changes)  # type: ignore[arg-type]


def planted(n: int = 2_000, d: int = 16, true: int = 24, k: int = 3, seed: int = 0, scale: float = 7.0) -> torch.Tensor:
    """Sums of k of `true` unit directions, on an offset."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(true, d, generator=g), dim=1)
    strength = torch.zeros(n, true).scatter(1, torch.rand(n, true, generator=g).topk(k, 1).indices, 1.0)
    strength *= 1 + torch.rand(n, true, generator=g)
    return scale * (strength @ rows + 0.2)


def acts(x: torch.Tensor, site: Site | None = None) -> Activations:
    return Activations(x, torch.zeros(len(x), dtype=torch.long), site or Site(3), "model", "prompts")


def in_pieces(x: torch.Tensor, sizes: tuple[int, ...]) -> ActivationStream:
    parts = x.split(sizes)
    return ActivationStream(sizes, lambda i: parts[i], Site(3), "model", "prompts")
