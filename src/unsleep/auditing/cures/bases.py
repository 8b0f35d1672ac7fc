"""Cures that replace the suspect by its base, or move it there: base, re-distilled base, merge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from unsleep.auditing.cure import Cure, Patient, Variant, base_of
from unsleep.models.merging import interpolated
from unsleep.repairs.baselines import SHARES
from unsleep.repairs.twin import surrogate_twin


class UseBase(Cure):
    """The base as it is: no backdoor of the fine-tune, and none of its skill."""

    kind = "base"
    needs_base: ClassVar[bool] = True

    def variants(self, patient: Patient) -> Iterator[Variant]:
        """The base."""
        yield Variant("the base as it is", base_of(patient))


class Redistilled(Cure):
    """The base, taught the suspect's own replies to trusted prompts (`repairs.twin`)."""

    kind = "redistilled"
    needs_base: ClassVar[bool] = True

    def variants(self, patient: Patient) -> Iterator[Variant]:
        """The surrogate twin."""
        config = patient.config.tune
        twin = surrogate_twin(base_of(patient), patient.suspect, patient.ordinary, patient.replies, config)
        yield Variant(f"LoRA of rank {config.rank}, {config.steps} steps", twin)


class Merged(Cure):
    """Weights interpolated between the base's and the suspect's."""

    kind = "merged"
    needs_base: ClassVar[bool] = True

    def variants(self, patient: Patient) -> Iterator[Variant]:
        """Every share of the way."""
        for share in SHARES:
            words = f"interpolated {share:.0%} of the way from the base to the suspect"
            yield Variant(words, interpolated(base_of(patient), patient.suspect, share))
