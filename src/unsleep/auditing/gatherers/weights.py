"""Gatherer: facts on the weights; an unchanged model ends the audit."""

from __future__ import annotations

from typing import ClassVar

import torch

from unsleep.auditing.case import Case
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.locate.diffing.weights import spectrum
from unsleep.models.anatomy import anatomy
from unsleep.models.weights import named

LISTED = 5
"""Matrices and layers that are listed."""


class Weights(Gatherer):
    """Changed weights, their relative norms by layer, dtype, and the effective rank of the most changed matrix."""

    kind = "weights"
    stage = "facts"
    needs_base: ClassVar[bool] = True
    share: ClassVar[float] = 0.0

    @torch.no_grad()
    def gather(self, case: Case, clues: Clues) -> Found:
        """Facts alone, no candidates."""
        assert case.base is not None
        before = dict(named(case.base.network, shared=True))
        blocks = anatomy(case.model.network).layers
        sums: dict[str, list[float]] = {}
        relative: dict[str, float] = {}
        deltas: dict[str, torch.Tensor] = {}
        for name, weight in named(case.model.network):
            old = before[name].to(weight.device)
            if torch.equal(old, weight):
                continue
            delta, size = weight.float() - old.float(), float(old.float().norm())
            relative[name] = float(delta.norm()) / max(size, 1e-12)
            number = name.removeprefix(f"{blocks}.").partition(".")[0]
            layer = number if name.startswith(f"{blocks}.") else "outside the blocks"
            total = sums.setdefault(layer, [0.0, 0.0])
            total[0] += float(delta.norm()) ** 2
            total[1] += size**2
            if delta.ndim == 2 and relative[name] == max(relative.values()):
                deltas = {name: delta}
        facts = {
            "changed": len(relative),
            "weights": len(before),
            "dtype": str(case.model.stored_dtype).removeprefix("torch."),
            "relative change by layer": {k: round((a / max(b, 1e-24)) ** 0.5, 6) for k, (a, b) in sums.items()},
            "most changed": {k: round(v, 6) for k, v in sorted(relative.items(), key=lambda x: -x[1])[:LISTED]},
            "effective rank of the most changed": {
                name: round(spectrum(delta, 1).effective_rank, 2) for name, delta in deltas.items()
            },
        }
        return Found(facts=facts)
