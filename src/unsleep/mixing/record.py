"""The record of a mixture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from unsleep.core import BadInput
from unsleep.mixing.rules import Kind
from unsleep.models.model import Named


@dataclass(frozen=True)
class MixRecord:
    """mix.json: a mixture, and its replies to a file of prompts."""

    SCHEMA: ClassVar = "unsleep.mix/1"

    kind: Kind
    models: tuple[Named, ...]
    weights: tuple[float, ...]
    """One per model; none for a swap."""
    threshold: float | None
    """Ratio of probabilities from which a swap replaces a token."""
    temperature: float
    """Of the replies; 0 for greedy decoding."""
    prompts: tuple[str, ...]
    """None where the mixture was evaluated on panels instead, whose results are in report.json."""
    replies: tuple[str, ...]
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.replies):
            raise BadInput(f"{len(self.prompts)} prompts and {len(self.replies)} replies; expected one each")
        if len(self.weights) != (0 if self.kind == "swap" else len(self.models)):
            raise BadInput(
                f"{len(self.weights)} weights of {len(self.models)} models; expected one each, none for swap"
            )
