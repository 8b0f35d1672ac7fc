"""Partial intervention: a share of another one's change, from none of it to more than all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unsleep.core import BadInput
from unsleep.interventions.intervention import Intervention
from unsleep.interventions.passes import Passes
from unsleep.models.hooks import Transform


@dataclass(frozen=True, eq=False)
class Partial(Intervention):
    """x + share · (T(x) − x), where T is the whole intervention; raises `BadInput` for a share that is not finite."""

    whole: Intervention
    share: float

    def __post_init__(self) -> None:
        if not -1e6 < self.share < 1e6:
            raise BadInput.of("share", self.share, "a finite number, such as 0.5", "partial intervention")

    @property
    def widths(self) -> Mapping[Any, int | None]:
        """Those of the whole."""
        return self.whole.widths

    @property
    def made_on(self) -> str:
        """Fingerprint of the model that the whole was fitted on."""
        return self.whole.made_on

    @property
    def acts(self) -> bool:
        """False for a share of 0 and for the identity."""
        return self.whole.acts and self.share != 0

    @property
    def follows_passes(self) -> bool:
        """As the whole does."""
        return self.whole.follows_passes

    def transforms(self, passes: Passes, dtype: torch.dtype, device: torch.device | str) -> dict[Any, Transform]:
        """The whole's transforms, each to a share."""
        made = self.whole.transforms(passes, dtype, device)
        return {place: self._of(transform) for place, transform in made.items()}

    def _of(self, transform: Transform) -> Transform:
        def partly(x: Tensor) -> Tensor:
            return torch.lerp(x, transform(x), self.share)

        return partly
