"""Splicing: a dictionary's reconstruction replaces the activation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.interventions.intervention import Intervention, Stream
from unsleep.interventions.passes import Passes
from unsleep.models.hooks import Transform


@dataclass(frozen=True, eq=False)
class Splice(Intervention):
    """Replace the activation by a dictionary's reconstruction at its Site, a transcoder's at its target, or by 0.

    Attention sinks, on which no feature is active, are unchanged.
    """

    dictionary: Coder
    zero: bool = False
    """Zero ablation instead, the lower end of the splice score."""

    @property
    def widths(self) -> dict[Site, int]:
        """Widths where the dictionary reads and where it writes."""
        d = self.dictionary
        return {d.site: d.d_model, **({} if d.target is None else {d.target: d.decoder.shape[1]})}

    def transforms(self, passes: Passes, dtype: torch.dtype, device: torch.device | str) -> dict[Site, Transform]:
        """Transforms at one Site, or at a transcoder's two."""
        dictionary = self.dictionary.to(dtype, device)
        held: list[Tensor] = []

        def keep(x: Stream) -> Stream:
            held.append(x)
            return x

        def replace(y: Stream) -> Stream:
            if dictionary.target is None:
                held.append(y)
            if not held:
                raise BadInput(
                    f"the model computes {dictionary.target} before {dictionary.site}, from which the transcoder "
                    "reconstructs it; expected a target after the transcoder's own Site"
                )
            x = held.pop()
            return torch.where(dictionary.sinks(x), y, torch.zeros_like(y) if self.zero else dictionary.rebuild(x))

        if dictionary.target is None:
            return {dictionary.site: replace}
        return {dictionary.site: keep, dictionary.target: replace}
