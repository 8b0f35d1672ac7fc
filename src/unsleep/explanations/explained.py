"""explanations.json: the explanations of a dictionary's features, whoever wrote them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from unsleep.core import Site
from unsleep.explanations.record import Explanation
from unsleep.models.model import Named


@dataclass(frozen=True)
class ExplanationsRecord:
    """explanations.json."""

    SCHEMA: ClassVar = "unsleep.explanations/1"

    model: Named
    dictionary: str
    """Hash of the dictionary."""
    site: Site
    features: dict[int, tuple[Explanation, ...]]
    """Feature → its explanations."""
    provenance: dict[str, Any]
