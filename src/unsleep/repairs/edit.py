"""Builds the edit that removes a behaviour: a learned mask, or ablation by attribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from unsleep.core import Features, Site, check_least
from unsleep.dictionaries.coders import Coder
from unsleep.interventions.features import Edit, edits_for, merged
from unsleep.models.model import LoadedModel
from unsleep.repairs.masks import Lesson, MaskConfig, learn_mask


@dataclass(frozen=True)
class EditConfig:
    """Options of an edit."""

    method: Literal["mask", "ablate"] = "mask"
    """Learn which candidates to remove (see `masks`), or remove the top `ablate` by attribution."""
    candidates: int = 60
    """Candidate features per Site, by attribution, for a mask."""
    ablate: int = 32
    """Features that ablation removes, over all Sites."""
    mask: MaskConfig = MaskConfig()

    def __post_init__(self) -> None:
        check_least(self, "", 1, "candidates", "ablate")


def edit(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    ranking: Mapping[Site, Features],
    lesson: Lesson,
    config: EditConfig = EditConfig(),
) -> list[Edit]:
    """Build the edit that removes the behaviour: one Edit per Site, features in order of their weight.

    Args:
        ranking: Site → features by attribution (`features.find`).
        lesson: training prompts with reference replies (`masks.prepare_lesson`).
    """
    if config.method == "mask":
        candidates = {site: features.head(config.candidates) for site, features in ranking.items()}
        return learn_mask(model, dictionaries, lesson, candidates, config.mask)
    return list(edits_for(merged(ranking), dictionaries, config.ablate, config.mask.error))
