"""LEACE: least-squares concept erasure in closed form (Belrose et al. 2023, arXiv:2306.03819).

Of all affine maps after which x and the label z are uncorrelated, so that no linear probe predicts z, LEACE changes
x least. With W = Σ_xx^(−1/2) (theorem 4.3):

    r(x) = x − W⁻¹ P W (x − μ),     P = the orthogonal projector onto the span of W Σ_xz

For two classes the span is one-dimensional, and the map factors into a read and a write direction:

    r(x) = x − s uᵀ(x − μ),     s = Σ_xz / ‖Σ_xz‖,   u = Σ_xx⁻¹ s / (sᵀ Σ_xx⁻¹ s)

s is parallel to the mean difference, u to Fisher's discriminant; r is an oblique
projection. Σ_xx is shrunk towards a multiple of the identity (Ledoit & Wolf 2004, J. Multivariate Anal. 88), because
there are often fewer tokens than dimensions; the erasure is exact for any shrinkage.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unsleep.core import BadInput


class Eraser(NamedTuple):
    """The LEACE map r, in float32."""

    writes: Float[Tensor, " d"]
    """s, the unit write direction."""
    reads: Float[Tensor, " d"]
    """u, the read direction; u · s = 1."""
    mean: Float[Tensor, " d"]
    """μ."""

    def __call__(self, x: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"]:
        """r(x), in the dtype of x."""
        wide = x.float()
        return (wide - ((wide - self.mean) @ self.reads)[..., None] * self.writes).to(x.dtype)


def fit_eraser(x: Float[Tensor, "token d"], y: Bool[Tensor, " token"], *, shrinkage: float | None = None) -> Eraser:
    """Fit LEACE for one binary label (Belrose et al. 2023, arXiv:2306.03819).

    Args:
        shrinkage: weight of the identity in Σ_xx, 0 to 1; `None` for Ledoit and Wolf's. At 0, Σ_xx⁻¹ is the
            pseudo-inverse.

    Raises `BadInput` for a single class, classes with equal means, or a shrinkage out of range.
    """
    if not 0 < int(y.sum()) < len(y):
        raise BadInput(f"{int(y.sum())} of {len(y)} labels are positive; expected tokens of both classes")
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise BadInput(f"shrinkage is {shrinkage}; expected 0 to 1")
    mean = x.double().mean(0)
    centred = x.double() - mean
    z = y.double() - y.double().mean()
    writes = centred.T @ z
    size = writes.norm()
    if not float(size) > 1e-12 * float(centred.abs().max()):
        raise BadInput("the two classes have the same mean; there is nothing to erase")
    writes = writes / size
    reads = _solve(centred, writes, _ledoit_wolf(centred) if shrinkage is None else shrinkage)
    return Eraser(writes.float(), (reads / (reads @ writes)).float(), mean.float())


def _solve(centred: Float[Tensor, "token d"], b: Float[Tensor, " d"], shrinkage: float) -> Float[Tensor, " d"]:
    """Σ⁻¹ b for Σ = (1 − α) XᵀX/n + α m I with m the mean variance, from the smaller Gram matrix.

    b must lie in the span of the tokens.
    """
    n, d = centred.shape
    identity = shrinkage * centred.square().sum() / (n * d)
    strength, right = torch.linalg.eigh(centred @ centred.T if n <= d else centred.T @ centred)
    kept = strength > 1e-10 * strength[-1]
    strength, right = strength[kept], right[:, kept]
    rows = (right.T @ centred) / strength.sqrt()[:, None] if n <= d else right.T
    return rows.T @ ((rows @ b) / ((1 - shrinkage) * strength / n + identity))


def _ledoit_wolf(centred: Float[Tensor, "token d"]) -> float:
    """Shrinkage with the least mean squared error (Ledoit & Wolf 2004, lemma 3.3), without a d × d matrix."""
    n, d = centred.shape
    gram = centred @ centred.T if n <= d else centred.T @ centred
    squares = centred.square().sum(1)
    m = float(squares.sum()) / (n * d)
    size = float(gram.square().sum()) / n**2  # ‖Σ‖²
    apart = size - d * m**2
    noise = (float(squares.square().sum()) / n - size) / n
    return min(max(noise / apart, 0.0), 1.0) if apart > 0 else 1.0
