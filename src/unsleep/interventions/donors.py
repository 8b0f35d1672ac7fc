"""What flows through a place in one run, put into another: activation patching.

all of it:  x' = x_donor
lanes:      x' = x_donor in those heads or neurons, x in the others
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
"""Tokens of the recipient and the donor's → what becomes of them; equal tokens come back bit for bit."""


def whole(mine: Tokens, donor: Tokens) -> Tokens:
    """All of the donor."""
    return donor


def lanes_of(taken: Bool[Tensor, " width"]) -> Merge:
    """The donor in the lanes that are taken."""
    return lambda mine, donor: torch.where(taken, donor, mine)


def features_of(dictionary: Dictionary, kept: Float[Tensor, " feature"]) -> Merge:
    """The donor's activations of some features (1) in the place of the recipient's."""

    def written(x: Tokens) -> Tokens:
        code = dictionary.encode_sparse(x.float())
        return dictionary.combine(Encoded(code.values * kept[code.ids], code.ids))

    return lambda mine, donor: (mine.float() + (written(donor) - written(mine))).to(mine.dtype)


def subspace_of(rows: Float[Tensor, "rank d_model"]) -> Merge:
    """The donor's part in a subspace, given by orthonormal rows; differentiable in them."""
    return lambda mine, donor: (mine.float() + ((donor.float() - mine.float()) @ rows.T) @ rows).to(mine.dtype)


@dataclass(frozen=True, eq=False)
class Patch(Intervention):
    """Put a donor's tokens into the first forward pass; those after it are of a reply, and run as they are."""

    place: Any
    """A Site or a Slot."""
    donor: Tokens
    """The donor's tokens, in the order of `where`."""
    where: Bool[Tensor, "row position"]
    """Which tokens of the last positions of a pass they replace."""
    merge: Merge = whole

    @property
    def widths(self) -> dict[Any, int]:
        """Its place, and the width of the donor's tokens."""
        return {self.place: self.donor.shape[-1]}

    def transforms(self, passes: Passes, dtype: torch.dtype, device: torch.device | str) -> dict[Any, Transform]:
        """A transform that has still to see its first pass."""
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
