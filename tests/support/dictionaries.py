"""Dictionaries of random weights."""

from __future__ import annotations

import torch

from unsleep.core import Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.dictionaries.coders import Coder
from unsleep.models.model import LoadedModel


def small_dictionary(features: int = 6, d_model: int = 4, k: int = 2) -> TopK:
    """Random weights at resid.1."""
    make = torch.Generator().manual_seed(0)
    shapes = ((d_model, features), (features,), (features, d_model), (d_model,))
    weights = [torch.randn(*shape, generator=make) for shape in shapes]
    return TopK(Site(1), "0" * 16, *weights, k=k)


D, F = 32, 64


def dictionary(model: LoadedModel, layer: int = 1, k: int = 8, seed: int = 0) -> TopK:
    g = torch.Generator().manual_seed(seed + layer)
    rows = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    return TopK(Site(layer), model.fingerprint, rows.T.contiguous(), torch.zeros(F), rows, torch.zeros(D), k=k)


def same(one: Coder, other: Coder, x: torch.Tensor) -> None:
    torch.testing.assert_close(other.encode(x) > 0, one.encode(x) > 0)
    torch.testing.assert_close(other.rebuild(x), one.rebuild(x), rtol=1e-3, atol=1e-3)
