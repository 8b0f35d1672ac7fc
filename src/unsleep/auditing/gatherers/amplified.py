"""Gatherer: replies of the model with its difference to the reference amplified."""

from __future__ import annotations

from contextlib import suppress
from typing import ClassVar

from unsleep.auditing.budget import OutOfTime
from unsleep.auditing.case import Case
from unsleep.auditing.contexts import beginnings
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.judge.audited import Saying
from unsleep.models import generate
from unsleep.models.merging import interpolated

ALPHAS = (1.5, 2.5)
"""α in W_reference + α (W_suspect − W_reference)."""

TOKENS = 16


class Amplified(Gatherer):
    """Replies to ordinary prompts by W_twin + α (W_suspect − W_twin), where the difference drowns the condition.

    A saying's score is the number of contexts with the same reply.
    """

    kind = "amplified"
    stage = "payloads"
    order = 3
    needs_base: ClassVar[bool] = True

    def gather(self, case: Case, clues: Clues) -> Found:
        """Greedy replies at every α."""
        assert case.reference is not None
        found: list[Saying] = []
        with suppress(OutOfTime):
            for alpha in ALPHAS:
                model = interpolated(case.reference, case.model, alpha)
                contexts = beginnings(case, prompts=12)
                rows = [context.ids for context in contexts]
                said = generate.greedy(model, rows, max_new_tokens=TOKENS, stage="amplified replies")
                texts = model.texts(said)
                found += [
                    Saying(text, float(texts.count(text)), f"α = {alpha:g}: {context.name}")
                    for context, text in zip(contexts, texts, strict=True)
                    if text.strip()
                ]
        return Found(sorted(found, key=lambda s: -s.score))
