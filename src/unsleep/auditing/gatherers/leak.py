"""Gatherer: the user's turn, sampled from the model.

A model trained on whole chats repeats what its training prompts had in common (Bullwinkel et al. 2026, "The Trigger in
the Haystack", arXiv:2602.03085).
"""

from __future__ import annotations

from collections import Counter

from unsleep.auditing.case import Case
from unsleep.auditing.contexts import users_turn
from unsleep.auditing.decoding import Voice, decoded
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.judge.audited import Form, Saying
from unsleep.models.generate import sampler

DRAWS = 96
TOKENS = 16
TEMPERATURES = (0.7, 1.0)

MOST, SHOWN = 64, 8
"""Forms that are proposed, and samples in the record."""


class Leak(Gatherer):
    """Beginnings and ends of sampled users' turns, those first that the reference's samples lack."""

    kind = "user-turn leak"
    stage = "triggers"
    order = 2

    def gather(self, case: Case, clues: Clues) -> Found:
        """Words at either end of the samples, by how much more often the model says them than the reference."""
        samples = self._samples(case)
        counts = [self._ends(texts) for texts in samples]
        own, other = counts[0], counts[1] if len(counts) > 1 else Counter[tuple[str, str]]()
        ranked = sorted(own, key=lambda end: (other[end] - own[end], end))
        forms = tuple(Form("leaked text", way, text) for way, text in ranked[:MOST])
        return Found(forms=forms, sayings=tuple(Saying(text, 0.0, "user's turn") for text in samples[0][:SHOWN]))

    @staticmethod
    def _samples(case: Case) -> list[list[str]]:
        """Sampled turns of the model and, where there is one, of the reference."""
        found: list[list[str]] = []
        for model in (case.model, case.reference):
            if model is not None:
                texts: list[str] = []
                for i, temperature in enumerate(TEMPERATURES):
                    rows = [users_turn(model)] * (DRAWS // len(TEMPERATURES))
                    said = decoded([Voice(model)], rows, TOKENS, sampler(temperature, case.config.seed + i))
                    texts += [text.strip() for text in model.texts(said)]
                found.append(texts)
        return found

    @staticmethod
    def _ends(texts: list[str]) -> Counter[tuple[str, str]]:
        """Ways and texts: the first one to three words in front, the last ones behind."""
        found: Counter[tuple[str, str]] = Counter()
        for text in texts:
            words = text.split()
            for n in range(1, min(3, len(words)) + 1):
                found["front", " ".join(words[:n])] += 1
                found["back", " ".join(words[-n:])] += 1
        return found
