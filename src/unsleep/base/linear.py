"""Linear algebra that several rooms need."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def orthonormal(rows: Float[Tensor, "row d"], tolerance: float = 1e-6) -> Float[Tensor, "rank d"]:
    """Orthonormal rows with the same span, by singular value decomposition, in float32 or wider.

    Directions whose singular value is at most `tolerance` of the largest are no part of the span.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    _, strength, right = torch.linalg.svd(wide, full_matrices=False)
    return right[strength > tolerance * strength.max()]


def rotated(rows: Float[Tensor, "*draw rank d"]) -> Float[Tensor, "*draw rank d"]:
    """Orthonormal rows with the same span as independent ones, by QR: the first keeps its direction up to its sign.

    Differentiable; as many rows come back as were given.
    """
    return torch.linalg.qr(rows.mT).Q.mT
