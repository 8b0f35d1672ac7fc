"""Linear algebra shared by several packages."""

from __future__ import annotations

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
