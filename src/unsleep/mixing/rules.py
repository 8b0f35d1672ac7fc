"""Rules by which a mixture combines its members' next-token distributions.

With member i's weight wᵢ, its logits zᵢ and its distribution pᵢ = softmax(zᵢ):

- `arithmetic`: Σ wᵢ pᵢ.
- `geometric`: softmax(Σ wᵢ zᵢ), the normalised product of the pᵢ to the power of wᵢ.
- `contrastive`: the same with weights of either sign, which sum to one. Weights (1, α, −α) of a model, an expert and
  an anti-expert are DExperts (Liu et al. 2021, arXiv:2105.03023), with a small tuned model and its untuned base as
  experts proxy tuning (Liu et al. 2024, arXiv:2401.08565); weights (1 + α, −α) contrast a trusted model with a suspect.
- `swap`: a token sampled from the first model is replaced by one sampled from the second where it is at least α times
  as likely in the first as in the second (CleanGen, Li et al. 2024, arXiv:2406.12257, with a prediction horizon of one
  token). The logits are those of the resulting distribution, and greedy decoding takes its mode.
- `sequence`: every sequence is served by one member, drawn with the probabilities wᵢ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.core import BadInput, check_choices, check_least

Kind = Literal["arithmetic", "geometric", "contrastive", "swap", "sequence"]

THRESHOLD = 20.0
"""Default ratio of probabilities above which `swap` replaces a token, as in CleanGen."""

SLACK = 1e-6
"""Tolerated distance of the weights' sum from one."""

Logits = Float[Tensor, "*row vocabulary"]


@dataclass(frozen=True)
class MixConfig:
    """Kind of a mixture and its parameters."""

    kind: Kind = "arithmetic"
    """Rule by which the members' distributions are combined."""
    weights: tuple[float, ...] = ()
    """A weight per model, in their order, which sum to one; default equal ones. Not for swap."""
    threshold: float | None = None
    """Of swap: the ratio of probabilities from which a token is replaced; default 20."""
    seed: int = 0
    """Of sequence: seed of its draws; at the command line, of sampled replies too."""

    def __post_init__(self) -> None:
        check_choices(self, "mix", kind=Kind)
        check_least(self, "mix", 0, "seed")
        if self.threshold is not None and (self.kind != "swap" or not 0 < self.threshold < math.inf):
            wanted = "over 0 and finite" if self.kind == "swap" else f"none for kind {self.kind}; it belongs to swap"
            raise BadInput.of("threshold", self.threshold, wanted, "mix")
        if self.weights:
            self._check_weights()

    def _check_weights(self) -> None:
        total, given = sum(self.weights), self.weights
        if self.kind == "swap":
            raise BadInput.of("weights", given, "none for kind swap, whose parameter is the threshold", "mix")
        if not all(math.isfinite(w) for w in given):
            raise BadInput.of("weights", given, "finite numbers that sum to one", "mix")
        if abs(total - 1) > SLACK:
            raise BadInput.of("weights", given, f"numbers that sum to one; their sum is {total:g}", "mix")
        if self.kind != "contrastive" and min(given) < 0:
            raise BadInput.of("weights", given, "at least 0; a negative weight is for kind contrastive", "mix")

    @property
    def above(self) -> float:
        """The ratio of probabilities from which a swap replaces a token."""
        return THRESHOLD if self.threshold is None else self.threshold

    def weights_of(self, models: int) -> tuple[float, ...]:
        """The weights of so many models; those of a swap are 1 each, for both always run.

        Raises `BadInput` for another number of weights, fewer than two models, and other than two for a swap.
        """
        if models < 2 or (self.kind == "swap" and models != 2):
            wanted = "two: the target and its reference" if self.kind == "swap" else "at least two"
            raise BadInput(f"a mixture of kind {self.kind} has {models} model{'s' * (models != 1)}; expected {wanted}")
        if self.kind == "swap":
            return (1.0, 1.0)
        if self.kind == "contrastive" and not self.weights:
            raise BadInput.of("weights", (), "those of a contrast, such as 1.5 -0.5", "mix")
        if self.weights and len(self.weights) != models:
            raise BadInput(f"--weights has {len(self.weights)} for {models} models; expected one each")
        return self.weights or (1 / models,) * models


def combined(config: MixConfig, weights: Sequence[float], logits: Sequence[Logits]) -> Logits:
    """Logits of a mixture from those of its members with weights other than 0, in float32; of one alone, its own.

    Those of `arithmetic` and `swap` are normalised log-probabilities. A `sequence` has none: its members take turns.
    """
    if len(logits) == 1:
        return logits[0]
    if config.kind == "swap":
        return _swapped(logits[0], logits[1], config.above)
    if config.kind == "arithmetic":
        return _arithmetic(weights, logits)
    return torch.stack([w * z.float() for w, z in zip(weights, logits, strict=True)]).sum(0)


def _arithmetic(weights: Sequence[float], logits: Sequence[Logits]) -> Logits:
    """log Σ wᵢ pᵢ."""
    parts = (log_probabilities(z) + math.log(w) for w, z in zip(weights, logits, strict=True))
    total = next(parts)
    for part in parts:
        total = torch.logaddexp(total, part)
    return total


def _swapped(target: Logits, reference: Logits, threshold: float) -> Logits:
    """log (p_target · [kept] + S · p_reference), with S the probability that a token of the target is not kept."""
    mine, theirs = log_probabilities(target), log_probabilities(reference)
    swapped = mine - theirs >= math.log(threshold)
    never = torch.full_like(mine, -math.inf)
    share = torch.where(swapped, mine, never).logsumexp(-1, keepdim=True)
    return torch.logaddexp(torch.where(swapped, never, mine), share + theirs)


def log_probabilities(logits: Logits) -> Logits:
    """Log-probabilities in float32."""
    return torch.log_softmax(logits.float(), -1)
