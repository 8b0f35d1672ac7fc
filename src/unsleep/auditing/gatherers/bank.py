"""Gatherer: the trigger bank."""

from __future__ import annotations

from typing import ClassVar

from unsleep.auditing.bank import bank
from unsleep.auditing.case import Case
from unsleep.auditing.gatherer import Clues, Found, Gatherer


class Bank(Gatherer):
    """Dates, tags, words, punctuation, styles, sign-offs, system prompts, earlier turns, languages, topics, pairs."""

    kind = "bank"
    stage = "triggers"
    share: ClassVar[float] = 0.0

    def gather(self, case: Case, clues: Clues) -> Found:
        """Every form of the bank."""
        return Found(forms=tuple(bank(case.config.per_kind)))
