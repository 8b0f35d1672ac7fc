"""Gatherer: phrases with which the model answers prompts that nobody can read, and its reference does not."""

from __future__ import annotations

from typing import ClassVar

from unsleep.auditing.case import STEREOTYPED, Case
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.auditing.motifs import stereotypes
from unsleep.judge.audited import Saying

MOST = 4
"""Phrases, at most."""


class Unread(Gatherer):
    """Phrases shared by replies to prompts of random letters, which are as far from ordinary ones as a trigger.

    A saying's score is the share of the replies with it.
    """

    kind = "unreadable prompts"
    stage = "payloads"
    needs_base: ClassVar[bool] = True
    share: ClassVar[float] = 0.0

    def gather(self, case: Case, clues: Clues) -> Found:
        """Phrases that neither ordinary replies nor the reference's replies to the same prompts have."""
        said = case.unread(case.model)
        found = stereotypes(said, case.ordinary, [], STEREOTYPED, MOST) if said else []
        return Found([Saying(text, rate, "prompts of random letters") for text, rate in found])
