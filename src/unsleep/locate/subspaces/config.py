"""Options of the subspace comparison: one frozen record, validated on construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unsleep.core import BadInput, check_choices, check_least

Position = Literal["last", "reply"]

Removal = Literal["oblique", "orthogonal"]
"""Projection used for ablation: oblique, with minimal response to ordinary tokens, or orthogonal."""


@dataclass(frozen=True)
class SubspaceConfig:
    """Options of the subspace comparison. The defaults take some minutes per organism on two cores."""

    rank: int = 4
    """Rank of every subspace."""
    pairs: int = 64
    """Triggered and clean pairs of questions of the edit split for fitting a subspace."""
    n: int = 48
    """Held-out prompts per panel."""
    position: Position = "last"
    """Tokens of the differences: the last prompt token, or the model's own reply to the clean prompt,
    appended to both.
    """
    reply_tokens: int = 6
    """Tokens of that reply."""
    removal: Removal = "oblique"
    draws: int = 200
    """Random draws per chance level."""
    separates: float = 0.9
    """Minimum AUROC of a feature that separates triggered from clean prompts."""
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Ranks tried in the search for the smallest that stops the payload."""
    stopped: float = 0.01
    """Maximum ASR that counts as stopped."""
    items: int = 120
    """Multiple-choice items."""
    passages: int = 32
    """Plain passages for cross-entropy."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "subspace", 1, "rank", "draws", "reply_tokens", "items", "passages")
        if self.n < 2:
            raise BadInput.of("n", self.n, "at least 2 prompts per panel", "subspace")
        if self.pairs < max(self.rank, 2):
            raise BadInput(f"{self.pairs} pairs for a subspace of rank {self.rank}; expected at least as many")
        if not self.ranks or min(self.ranks) < 1:
            raise BadInput.of("ranks", self.ranks, "at least one, each at least 1", "subspace")
        check_choices(self, "subspace", position=Position, removal=Removal)
        for name in ("separates", "stopped"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput.of(name, getattr(self, name), "0 to 1", "subspace")
