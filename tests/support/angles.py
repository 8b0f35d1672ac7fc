"""Principal angles by scipy, to hold ours against."""

from __future__ import annotations

import torch
from scipy.linalg import subspace_angles
from torch import Tensor


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles between the spans of two sets of rows, in radians, smallest first (Knyazev & Argentati 2002)."""
    return torch.tensor(subspace_angles(a.double().T.numpy(), b.double().T.numpy())[::-1].copy())
