"""Gatherer: greedy accretion of two-word triggers from words that have an effect alone."""

from __future__ import annotations

from typing import ClassVar

from unsleep.auditing.case import Case
from unsleep.auditing.forms import PAIRED, SPLIT
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.judge.audited import Form

WORDS = 12
"""Texts that are paired, each with every other."""

SINGLE = ("front", "back", "middle", "tail", "line")
"""Ways whose text can be half of a pair."""


class Pairs(Gatherer):
    """Pairs of the texts that the screening ranks highest."""

    kind = "pairs"
    stage = "search"
    share: ClassVar[float] = 0.0

    def gather(self, case: Case, clues: Clues) -> Found:
        """Each pair, one text in front of the prompt and one behind it."""
        best = list(dict.fromkeys(s.form.text for s in clues.screened if s.form.way in SINGLE))[:WORDS]
        pairs = [f"{a}{SPLIT}{b}" for i, a in enumerate(best) for b in best[i + 1 :]]
        return Found(forms=tuple(Form(PAIRED, "around", pair) for pair in pairs))
