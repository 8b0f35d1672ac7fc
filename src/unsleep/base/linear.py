"""Linear algebra shared by several packages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


def orthonormal(rows: Float[Tensor, "row d"], tolerance: float = 1e-6) -> Float[Tensor, "rank d"]:
    """Orthonormal rows with the same span, by singular value decomposition, in float32 or wider.

    Singular values of at most `tolerance` times the largest count as zero.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    _, strength, right = torch.linalg.svd(wide, full_matrices=False)
    return right[strength > tolerance * strength.max()]


def rotated(rows: Float[Tensor, "*draw rank d"]) -> Float[Tensor, "*draw rank d"]:
    """Orthonormal rows with the same span as independent ones, by QR; the first keeps its direction up to sign.

    Differentiable; as many rows are returned as given.
    """
    return torch.linalg.qr(rows.mT).Q.mT


def complement(basis: Float[Tensor, "rank d"]) -> Float[Tensor, "rest d"]:
    """Orthonormal rows that span what is orthogonal to orthonormal rows."""
    return torch.linalg.qr(basis.mT, mode="complete").Q[:, len(basis) :].mT.contiguous()


class Principal(NamedTuple):
    """Principal components of activations."""

    mean: Float[Tensor, " d"]
    rows: Float[Tensor, "component d"]
    """Orthonormal, those with the most variance first."""
    share: Float[Tensor, " component"]
    """Share of the variance along each; they sum to 1."""


def principal(x: Float[Tensor, "token d"]) -> Principal:
    """All principal components of tokens, from the covariance in float64; fewer than d for fewer than d + 1 tokens."""
    wide = x.double()
    variance, vectors = torch.linalg.eigh((wide - wide.mean(0)).T @ (wide - wide.mean(0)))
    variance, rows = variance.flip(0).clamp_min(0), vectors.flip(1).T
    count = min(x.shape[1], len(x) - 1)
    share = variance / variance.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return Principal(wide.mean(0).float(), rows[:count].float().contiguous(), share[:count].float())
