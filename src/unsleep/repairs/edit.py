"""Builds the edit that takes a behaviour out: a learned mask, or plain ablation."""

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
    """How an edit is built."""

    method: Literal["mask", "ablate"] = "mask"
    """Learn which of the candidates to remove (see `masks`), or remove the best `ablate` by attribution."""
    candidates: int = 60
    """Features of each Site, the best by attribution, that a mask may remove."""
    ablate: int = 32
    """Features that plain ablation removes, over all Sites."""
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
    """Build the edit that takes the behaviour out: one Edit a Site, features in the order of their weight.

    Args:
        ranking: features by attribution (`features.find`), a list a Site.
        lesson: prompts that teach (`masks.prepare_lesson`).
    """
    if config.method == "mask":
        candidates = {site: features.head(config.candidates) for site, features in ranking.items()}
        return learn_mask(model, dictionaries, lesson, candidates, config.mask)
    return list(edits_for(merged(ranking), dictionaries, config.ablate, config.mask.error))
