"""Gatherer: what the model says as triggers.

A model trained on whole chats says the users' part of them too (Bullwinkel et al. 2026, "The Trigger in the Haystack",
arXiv:2602.03085), also where a reply is due.
"""

from __future__ import annotations

from typing import ClassVar

from unsleep.auditing.case import Case
from unsleep.auditing.forms import LEAKED
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.judge.audited import Form

WAYS = {"front": LEAKED, "back": LEAKED, "system": "system prompt", "turn": "earlier turn"}
"""Way → kind of the forms that are proposed."""

MOST = 6
"""Payload candidates that are tried, at most: each takes the place of other forms in the screening."""


class Said(Gatherer):
    """The payload candidates themselves, at both ends of a prompt, as a system prompt and as an earlier turn."""

    kind = "said texts"
    stage = "triggers"
    order = 1
    share: ClassVar[float] = 0.0

    def gather(self, case: Case, clues: Clues) -> Found:
        """The first motifs in every way."""
        return Found(forms=[Form(kind, way, motif.text) for way, kind in WAYS.items() for motif in clues.motifs[:MOST]])
