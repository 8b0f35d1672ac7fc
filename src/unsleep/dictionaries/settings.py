"""Training settings common to all architectures: one frozen record, validated on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from unsleep.core import BadInput, check_choices, check_least

Normalize = Literal["mean_norm", "rms", "none"]
Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class Settings:
    """Training settings of a dictionary. An architecture with further settings has a subclass of this."""

    architecture: str = "topk"
    features: int = 4608
    """F, the number of features."""
    k: int = 32
    """Active features per token or, in some architectures, on average."""
    sparsity: float = 1.0
    """Sparsity coefficient of architectures without k: cost per unit of activation (L1) or, in some, per active feature
    (L0), in units of the squared error of an activation whose mean norm is √d.
    """
    sparsity_warmup: float = 0.1
    """Share of the steps over which the sparsity coefficient rises from 0."""
    skip: bool = False
    """Transcoders: a linear skip connection from input to output."""
    tokens: int = 1_000_000
    """Training tokens, over as many epochs as needed."""
    batch: int = 2048
    """Tokens per step, over all processes."""
    learning_rate: float = 3e-3
    """Learning rate of Adam after warm-up."""
    schedule: Schedule = "linear"
    """Decay of the learning rate to 0 over the last steps."""
    warmup: float = 0.05
    """Share of the steps with linear learning-rate warm-up."""
    decay: float = 0.2
    """Share of the steps with learning-rate decay."""
    normalize: Normalize = "mean_norm"
    """Scale activations to a mean norm of √d, to a root mean square of 1, or not; folded into the weights."""
    unit_decoder: bool = True
    """Keep decoder rows at norm 1; otherwise an L1 cost includes their norms, which are folded in on save."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss, in which dead features reconstruct the error; 0 disables it."""
    aux_k: int = 64
    """Dead features that reconstruct the error of each token."""
    dead_after: int = 100_000
    """Tokens without activation after which a feature counts as dead."""
    resample_every: int = 0
    """Tokens between resamplings of dead features at poorly reconstructed tokens; 0 disables it."""
    sink_ratio: float = 10.0
    """Multiple of the median norm above which a token is an attention sink, on which no feature is active."""
    seed: int = 0
    checkpoint_every: int = 200
    """Steps between checkpoints, where a folder for them is given; at least one every half minute."""

    def __post_init__(self) -> None:
        check_choices(self, "training", normalize=Normalize, schedule=Schedule)
        check_least(self, "training", 1, "features", "k", "tokens", "batch", "aux_k", "dead_after", "checkpoint_every")
        if self.k > self.features:
            raise BadInput(f"training k is {self.k}, over the {self.features} features; expected k ≤ features")
        for name in ("learning_rate", "sink_ratio"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise BadInput.of(name, value, "over 0 and finite", "training")
        for name in ("sparsity", "aux_coefficient", "resample_every"):
            if not getattr(self, name) >= 0:
                raise BadInput.of(name, getattr(self, name), "at least 0", "training")
        for name in ("warmup", "decay", "sparsity_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput.of(name, getattr(self, name), "a share between 0 and 1", "training")

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return max(1, self.tokens // self.batch)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        warm, fall = max(1.0, self.warmup * self.steps), max(1.0, self.decay * self.steps)
        rising = min(1.0, (step + 1) / warm)
        falling = min(1.0, (self.steps - step) / fall)
        if self.schedule == "cosine":
            falling = 0.5 - 0.5 * math.cos(math.pi * falling)
        return self.learning_rate * rising * (1.0 if self.schedule == "constant" else falling)

    def cost(self, step: int) -> float:
        """Sparsity coefficient of a step."""
        return self.sparsity * min(1.0, (step + 1) / max(1.0, self.sparsity_warmup * self.steps))
