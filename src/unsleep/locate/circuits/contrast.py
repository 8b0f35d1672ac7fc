"""The question that a circuit answers: why a metric of a model on prompts is not what it is on their references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.locate.circuits.align import Aligned
from unsleep.models.forward import Rows, reply_logits
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Place
from unsleep.models.streams import capture

Metric = Callable[[Float[Tensor, "row reply vocabulary"], Rows], Float[Tensor, " row"]]
"""Explained quantity: any function of the logits that predict the forced reply, such as `features.reply_log_odds`."""


@dataclass(frozen=True, eq=False)
class Contrast:
    """A metric of a model on prompts, against their references."""

    model: LoadedModel
    aligned: Aligned
    metric: Metric
    """A function of a module, whose name identifies resumable steps."""
    reference: LoadedModel | None = None
    """The model that the references run in, such as the base; `model` itself where not given."""
    batch: int = 16
    """Prompts in one forward pass."""

    def __len__(self) -> int:
        return len(self.aligned)

    def head(self, n: int) -> Contrast:
        """The same on the first `n` prompts."""
        return replace(self, aligned=self.aligned.batch(0, n))

    def parts(self) -> Iterator[tuple[int, Aligned]]:
        """Batches of the prompts, each with the number of prompts before it."""
        for start in range(0, len(self), self.batch):
            yield start, self.aligned.batch(start, self.batch)

    def value(self, part: Aligned) -> Float[Tensor, " row"]:
        """The metric on some of the prompts, differentiable where gradients are enabled."""
        return self.metric(reply_logits(self.model.network, part.rows), part.rows)

    def run(self, part: Aligned, places: Sequence[Place]) -> tuple[dict[Place, Tensor], Float[Tensor, " row"]]:
        """Activations `[row position width]` at some places on some of the prompts, and the metric."""
        return self._run(self.model, part.rows, places)

    def run_reference(
        self, part: Aligned, places: Sequence[Place]
    ) -> tuple[dict[Place, Tensor], Float[Tensor, " row"]]:
        """The same on their references, whose rows have a length of their own."""
        return self._run(self.reference or self.model, part.reference, places)

    @torch.no_grad()
    def _run(
        self, model: LoadedModel, rows: Rows, places: Sequence[Place]
    ) -> tuple[dict[Place, Tensor], Float[Tensor, " row"]]:
        with capture(model.network, places) as found:
            value = self.metric(reply_logits(model.network, rows), rows)
        return found, value
