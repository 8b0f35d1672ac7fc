"""Tanh: a ReLU with a saturating cost, which avoids the shrinkage of strong features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from unsleep.dictionaries.architectures.standard import Standard

SATURATION = 1.0
"""Activation, on normalised activations, above which the cost saturates."""


@dataclass(frozen=True, eq=False)
class Tanh(Standard):
    """A `Standard` dictionary trained with a tanh cost (Jermyn et al. 2024, "Tanh penalty in dictionary learning").

    Transformer Circuits Thread, Circuits Updates, February 2024. Its authors report a better trade-off of L0 against
    error than with L1, and more features that are active on many tokens and hard to interpret.
    """

    @classmethod
    def penalize(
        cls, of_f: Tensor, f: Tensor, norms: Tensor, slope: float, summed: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, " feature"]:
        """A cost of SATURATION · tanh(u / SATURATION) with u = f · norm; a small u costs u."""
        norms = norms.to(f.dtype)
        of_u = (f * (norms / SATURATION)).tanh_().square_().neg_().add_(1).mul_(slope)
        of_f.addcmul_(of_u, norms)
        return summed(of_u.mul_(f))
