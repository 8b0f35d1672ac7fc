"""Activation patching: a donor run's activations at a place replace the recipient's (Vig et al. 2020, arXiv:2004.12265;
Meng et al. 2022, arXiv:2202.05262).

all:        x' = x_donor
lanes:      x' = x_donor in the chosen heads or neurons, x in the others
features:   x' = x + Σ_{j∈S} (f_j(x_donor) − f_j(x)) W_dec_j
subspace:   x' = x + (x_donor − x) Bᵀ B
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unsleep.core import Dictionary, Encoded
from unsleep.interventions.intervention import Intervention
from unsleep.interventions.passes import Passes
from unsleep.models.hooks import Transform

Tokens = Float[Tensor, "token width"]

Merge = Callable[[Tokens, Tokens], Tokens]
"""(recipient's tokens, donor's tokens) → patched tokens; equal inputs are returned bit-identical."""


def whole(mine: Tokens, donor: Tokens) -> Tokens:
    """Replace the whole activation."""
    return donor


def lanes_of(taken: Bool[Tensor, " width"]) -> Merge:
    """Replace the chosen lanes."""
    return lambda mine, donor: torch.where(taken, donor, mine)


def features_of(dictionary: Dictionary, kept: Float[Tensor, " feature"]) -> Merge:
    """Replace the activations of the features with `kept` 1."""

    def written(x: Tokens) -> Tokens:
        code = dictionary.encode_sparse(x.float())
        return dictionary.combine(Encoded(code.values * kept[code.ids], code.ids))

    return lambda mine, donor: (mine.float() + (written(donor) - written(mine))).to(mine.dtype)


def subspace_of(rows: Float[Tensor, "rank d_model"]) -> Merge:
    """Replace the component in a subspace, given by orthonormal rows; differentiable in them."""
    return lambda mine, donor: (mine.float() + ((donor.float() - mine.float()) @ rows.T) @ rows).to(mine.dtype)


@dataclass(frozen=True, eq=False)
class Patch(Intervention):
    """Patch a donor's tokens into the first forward pass; later passes, which generate a reply, are unpatched."""

    place: Any
    """A Site or a Slot."""
    donor: Tokens
    """The donor's tokens, in the order of `where`."""
    where: Bool[Tensor, "row position"]
    """Mask over the last positions of a pass: the replaced tokens."""
    merge: Merge = whole

    @property
    def widths(self) -> dict[Any, int]:
        """Width of the donor's tokens at its place."""
        return {self.place: self.donor.shape[-1]}

    def transforms(self, passes: Passes, dtype: torch.dtype, device: torch.device | str) -> dict[Any, Transform]:
        """A transform for the first pass after this call."""
        donor = self.donor.to(device, dtype)
        first = iter([True])

        def run(x: Tensor) -> Tensor:
            if not next(first, False):
                return x
            columns = self.where.shape[1]
            before, end = x[:, : x.shape[1] - columns], x[:, x.shape[1] - columns :]
            new = end.index_put(tuple(self.where.nonzero(as_tuple=True)), self.merge(end[self.where], donor))
            return torch.cat([before, new], 1) if before.shape[1] else new

        return {self.place: run}
