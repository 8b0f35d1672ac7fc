"""A dictionary's reconstruction in the place of what it reconstructs."""

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
    """Run a model on a dictionary's reconstruction at its Site, or a transcoder's at its target, or on 0 there.

    Attention sinks, on which no feature fires, stay as they are.
    """

    dictionary: Coder
    zero: bool = False
    """Put 0 there instead: the other end of the scale."""

    @property
    def widths(self) -> dict[Site, int]:
        """Where the dictionary reads and where it writes, each with its width."""
        d = self.dictionary
        return {d.site: d.d_model, **({} if d.target is None else {d.target: d.decoder.shape[1]})}

    def transforms(self, passes: Passes, dtype: torch.dtype, device: torch.device | str) -> dict[Site, Transform]:
        """At one Site, or at the two of a transcoder."""
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
                    "rebuilds it; expected a target behind the transcoder's own Site"
                )
            x = held.pop()
            return torch.where(dictionary.sinks(x), y, torch.zeros_like(y) if self.zero else dictionary.rebuild(x))

        if dictionary.target is None:
            return {dictionary.site: replace}
        return {dictionary.site: keep, dictionary.target: replace}
