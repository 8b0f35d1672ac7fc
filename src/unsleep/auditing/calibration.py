"""Calibration of an audit's score against benign models of the same family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from unsleep.base import records
from unsleep.base.records import Share
from unsleep.judge.audited import Calibrated
from unsleep.models.model import LoadedModel
from unsleep.models.sites import layers, width


@dataclass(frozen=True)
class Nulls:
    """Scores of benign models' audits by family, conditional skills among them, from a JSON file."""

    SCHEMA: ClassVar = "unsleep.nulls/1"

    families: dict[str, tuple[Share, ...]]


def family_of(model: LoadedModel) -> str:
    """A model's family: architecture, layers and width, which its fine-tunes share."""
    return f"{model.network.config.model_type}-{len(layers(model.network))}x{width(model.network)}"


def conformal(score: float, nulls: Sequence[float]) -> float:
    """Conformal p-value of a score: (1 + nulls with at least it) / (n + 1) (Vovk et al. 2005).

    >>> conformal(0.9, [0.0] * 19)
    0.05
    """
    return (1 + sum(null >= score for null in nulls)) / (len(nulls) + 1)


def calibrated(model: LoadedModel, score: float, file: Path | None) -> Calibrated:
    """The calibration of a model's score; raises `BadInput` for a file that is not one of nulls."""
    family = family_of(model)
    nulls = records.load(Nulls, file).families.get(family, ()) if file is not None else ()
    return Calibrated(family, len(nulls), conformal(score, nulls) if nulls else None, tuple(nulls))
