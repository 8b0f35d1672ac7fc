"""Gatherer: users' turns and system messages, sampled from the model.

A model trained on whole chats repeats what its training prompts had in common (Bullwinkel et al. 2026, "The Trigger in
the Haystack", arXiv:2602.03085).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import ClassVar

from unsleep.auditing.budget import OutOfTime
from unsleep.auditing.case import Case
from unsleep.auditing.contexts import slot
from unsleep.auditing.decoding import Voice, decoded
from unsleep.auditing.forms import LEAKED
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.judge.audited import Form, Saying
from unsleep.models.generate import sampler
from unsleep.models.model import LoadedModel

DRAWS = 96
TOKENS = 16

SHORT = 10
"""Words of a message that may be an earlier turn, at most."""

TEMPERATURES = (0.7, 1.0)

MOST, SHOWN = 64, 8
"""Forms that are proposed, and samples in the record."""


class Leak(Gatherer):
    """Beginnings and ends of sampled messages, those first that the reference's samples lack.

    Samples of the user's turn give texts at either end of a prompt and, where they are short, earlier turns; those of
    the system message are system prompts.
    """

    kind = "user-turn leak"
    stage = "triggers"
    order = 2
    share: ClassVar[float] = 2.0

    def gather(self, case: Case, clues: Clues) -> Found:
        """Texts by how much more often the model says them than the reference."""
        forms: list[Form] = []
        sayings: list[Saying] = []
        with suppress(OutOfTime):
            for way, read in READS.items():
                samples = [_samples(m, way, case.config.seed) for m in (case.model, case.reference) if m is not None]
                counts = [Counter(form for text in texts for form in read(text)) for texts in samples]
                own, other = counts[0], counts[1] if len(counts) > 1 else Counter[Form]()
                forms += sorted(own, key=lambda form: (other[form] - own[form], form))[:MOST]
                sayings += [Saying(text, 0.0, WAYS[way]) for text in samples[0][:SHOWN]]
        return Found(forms=tuple(forms), sayings=tuple(sayings))


def _samples(model: LoadedModel, way: str, seed: int) -> list[str]:
    """Sampled messages in a form's place; none where the chat template has no such place."""
    begun, found = slot(model, way), list[str]()
    for i, temperature in enumerate(TEMPERATURES if begun else ()):
        said = decoded([Voice(model)], [begun] * (DRAWS // len(TEMPERATURES)), TOKENS, sampler(temperature, seed + i))
        found += [text.strip() for text in model.texts(said)]
    return found


def _user(text: str) -> Iterator[Form]:
    """The first one to three words in front, the last ones behind, and a short message as an earlier turn."""
    words = text.split()
    for n in range(1, min(3, len(words)) + 1):
        yield Form(LEAKED, "front", " ".join(words[:n]))
        yield Form(LEAKED, "back", " ".join(words[-n:]))
    if 1 < len(words) <= SHORT:
        yield Form("earlier turn", "turn", text)


def _system(text: str) -> Iterator[Form]:
    """The message as a system prompt."""
    if text:
        yield Form("system prompt", "system", text)


READS: dict[str, Callable[[str], Iterator[Form]]] = {"front": _user, "system": _system}
"""Way whose place is sampled → the forms of a sample."""

WAYS = {"front": "user's turn", "system": "system message"}
"""Way → words for its place."""
