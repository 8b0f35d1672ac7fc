"""JumpReLU: a feature is active above its own threshold; trained with an L0 cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.core import BadInput
from unsleep.dictionaries import losses, sparse
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.layouts import BARE, Learned, SAELens
from unsleep.dictionaries.losses import Batch, Dense, Pass, Weights
from unsleep.dictionaries.settings import Settings


@dataclass(frozen=True)
class Thresholds(Settings):
    """Initialisation and training of JumpReLU thresholds."""

    threshold: float = 0.01
    """JumpReLU: initial threshold of every feature, on normalised activations."""
    bandwidth: float = 0.05
    """JumpReLU: bandwidth of the rectangular kernel in the threshold's pseudo-derivative."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("threshold", "bandwidth"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise BadInput.of(name, value, "over 0 and finite", "training")


@dataclass(frozen=True, eq=False)
class JumpReLU(Coder):
    """Active with its pre-activation above its own threshold (Rajamanoharan et al. 2024, arXiv:2407.14435)."""

    threshold: Float[Tensor, " feature"] = field(kw_only=True)

    training = Thresholds
    _weights = (*Coder._weights, "threshold")

    def activate(self, pre: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        """relu(pre) where pre is above the threshold, else 0."""
        return torch.where(pre > self.threshold, pre.relu(), 0)

    @classmethod
    def initial(cls, config: Thresholds, zeros: Float[Tensor, " feature"]) -> dict[str, Tensor]:
        """Logarithms of the thresholds."""
        return {"log_threshold": torch.full_like(zeros, math.log(config.threshold))}

    @classmethod
    def gradients(cls, w: Weights, batch: Batch, config: Thresholds, step: int) -> Pass:
        """L0 cost; its gradient and the thresholds' are estimated with a rectangular kernel.

        Rajamanoharan et al. 2024, "Jumping ahead", arXiv:2407.14435, section 3.
        """
        pre = losses.encode(w, batch)
        threshold = w.own["log_threshold"].exp()
        over = pre - threshold.to(pre.dtype)
        active, near = over > 0, over.abs() < config.bandwidth / 2
        n = sparse.count(active)
        if losses.is_sparse(max(n, sparse.count(near)), active):
            code = sparse.code_where(pre, active)
            done = losses.sparse_pass(w, batch, pre, code._replace(values=code.values.to(w.dec.dtype)))
            edge = sparse.code_where(pre, near)
            at_edge = sparse.row_dots(batch.slope(done.error), w.dec, edge)
            grad = torch.zeros_like(threshold).index_add_(0, edge.ids, at_edge)
            crowd = torch.bincount(edge.ids, minlength=len(threshold)).to(w.dec.dtype)
        else:
            rebuilt = Dense(w, batch, pre.masked_fill(~active, 0))
            done = rebuilt.backward(pre, losses.threshold_backward(rebuilt.slopes, over, 0), n)
            grad = losses.column_sums(rebuilt.slopes.masked_fill(~near, 0)).to(w.dec.dtype)
            crowd = losses.column_sums(near.to(pre.dtype)).to(w.dec.dtype)
        cost = config.cost(step) / len(pre)
        done.grads["log_threshold"] = -(grad * threshold + cost * crowd) / config.bandwidth * threshold
        return done

    @classmethod
    def trained(
        cls, w: Weights, config: Thresholds, stretch: Float[Tensor, " feature"], level: float
    ) -> dict[str, Any]:
        """The thresholds."""
        return {"threshold": (w.own["log_threshold"].exp() * stretch).cpu()}

    def own_weights(
        self, like: Tensor, stretch: Float[Tensor, " feature"], shift: Float[Tensor, " feature"]
    ) -> dict[str, Tensor]:
        """Logarithms of the thresholds."""
        return {"log_threshold": (self.threshold.to(like) * stretch).clamp_min(1e-8).log()}

    in_saelens = SAELens("jumprelu", {"b_enc": "b_enc", "threshold": "threshold"}, transcoder="jumprelu_")
    in_dictionary_learning = (
        Learned("JumpReluAutoEncoder", "JumpReluTrainer", {**BARE, "threshold": "threshold"}, subtracts=False),
    )
