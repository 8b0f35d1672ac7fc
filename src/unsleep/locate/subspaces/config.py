"""How subspaces are found and compared: one frozen record, checked on construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unsleep.core import BadInput, check_choices, check_least

Position = Literal["last", "reply"]

Removal = Literal["oblique", "orthogonal"]
"""How a subspace is taken out: by what can be read of it without ordinary tokens, or all that lies in it."""


@dataclass(frozen=True)
class SubspaceConfig:
    """How subspaces are found and compared. The defaults take some minutes an organism on two cores."""

    rank: int = 4
    """Directions of every subspace."""
    pairs: int = 64
    """Questions of the edit split, with the trigger and without, that a subspace is found on."""
    n: int = 48
    """Held-out prompts of each panel."""
    position: Position = "last"
    """Where differences are taken: at the last prompt token, or along the model's own reply to the clean prompt,
    which then stands behind both."""
    reply_tokens: int = 6
    """Length of that reply, in tokens."""
    removal: Removal = "oblique"
    draws: int = 200
    """Subspaces drawn for each chance level."""
    separates: float = 0.9
    """AUROC from which a feature counts as separating triggered from clean prompts."""
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Widths that are tried in search of the smallest that stops the payload."""
    stopped: float = 0.01
    """ASR at which it counts as stopped."""
    items: int = 120
    """Multiple-choice items."""
    passages: int = 32
    """Plain passages that cross-entropy is taken over."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "subspace", 1, "rank", "draws", "reply_tokens", "items", "passages")
        if self.n < 2:
            raise BadInput.of("n", self.n, "at least 2 prompts a panel", "subspace")
        if self.pairs < max(self.rank, 2):
            raise BadInput(f"{self.pairs} pairs for a subspace of rank {self.rank}; expected at least as many")
        if not self.ranks or min(self.ranks) < 1:
            raise BadInput.of("ranks", self.ranks, "at least one, each at least 1", "subspace")
        check_choices(self, "subspace", position=Position, removal=Removal)
        for name in ("separates", "stopped"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput.of(name, getattr(self, name), "0 to 1", "subspace")
