"""Schema of the record diff.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from unsleep.base.records import Count, Positive, Share
from unsleep.locate.diffing.lens import Divergence
from unsleep.locate.diffing.weights import LayerDelta
from unsleep.models.model import Named

Read = tuple[tuple[str, float], ...]
"""Tokens with their logits."""


@dataclass(frozen=True)
class Changed:
    """Change of one weight."""

    name: str
    layer: Count | None
    module: str
    shape: tuple[Count, ...]
    norm: Positive
    relative: Positive
    effective_rank: Positive
    first: Share
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class Lensed:
    """Logit-lens reading of the mean difference at a Site."""

    site: str
    texts: Count
    scale: Positive
    mean_norm: tuple[Positive, ...]
    size: tuple[float, ...]
    promotes: Read
    suppresses: Read


@dataclass(frozen=True)
class Said:
    """A reply of the steered or amplified suspect."""

    kind: str
    strength: float
    replies: tuple[str, ...]
    alike: Count


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A score's performance as a detector of triggered prompts."""

    auroc: Share
    low: Share
    high: Share
    chosen: Share
    margin: float
    n: Count


@dataclass(frozen=True, kw_only=True)
class Vector(Detector):
    """A singular vector of ΔW as a detector."""

    site: str
    matrix: str
    vector: Count
    sign: int


@dataclass(frozen=True, kw_only=True)
class Feature(Detector):
    """A feature as a detector."""

    id: Count
    ratio: float | None = None


@dataclass(frozen=True)
class Listed:
    """The best features of a dictionary."""

    site: str
    method: str
    features: Count
    best: tuple[Feature, ...]


@dataclass(frozen=True)
class DiffRecord:
    """diff.json."""

    SCHEMA: ClassVar = "unsleep.diff/1"

    base: Named
    suspect: Named
    weights: tuple[Changed, ...]
    layers: tuple[LayerDelta, ...]
    ranking: tuple[Count, ...]
    divergence: dict[str, tuple[Divergence, ...]]
    lens: tuple[Lensed, ...]
    asked: tuple[str, ...]
    spoken: tuple[Said, ...]
    monitor: tuple[Vector, ...]
    dictionaries: tuple[Listed, ...]
    provenance: dict[str, Any]
