"""Gatherer: the activation difference on unrelated text, read by the logit lens and by steering.

Minder et al. 2025, "Narrow finetuning leaves clearly readable traces in activation differences" (arXiv:2510.13900).
"""

from __future__ import annotations

from contextlib import suppress
from typing import ClassVar

from unsleep.auditing.budget import OutOfTime
from unsleep.auditing.case import Case
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.base.context import progress
from unsleep.core import Site
from unsleep.judge.audited import Form, Saying
from unsleep.locate.diffing.lens import activation_differences, steered_replies
from unsleep.models.lens import logit_lens
from unsleep.models.sites import layers
from unsleep.prompts import sets

DEPTHS = (0.4, 0.6, 0.8)
"""Layers at which it is read, as shares of the depth."""

TEXTS, WORDS = 64, 10
STRENGTHS = (0.5, 1.0)
"""Steering strengths, in multiples of the residual stream's norm."""

PROMPTS, TOKENS = 4, 12


class Difference(Gatherer):
    """Tokens that mean Δh to the reference promotes, and replies steered along it.

    A saying's score is the number of prompts that got the same reply.
    """

    kind = "activation difference"
    stage = "payloads"
    order = 4
    needs_base: ClassVar[bool] = True

    def gather(self, case: Case, clues: Clues) -> Found:
        """Steered replies as payloads, promoted tokens as triggers."""
        assert case.reference is not None
        depth = len(layers(case.model.network))
        sites = sorted({Site(min(depth - 1, round(share * depth))) for share in DEPTHS})
        passages = sets.plain_text("edit")[:TEXTS]
        found = activation_differences(case.reference, case.model, passages, sites)
        asked = case.learned.texts[:PROMPTS]
        sayings: list[Saying] = []
        words: dict[str, None] = {}
        with suppress(OutOfTime):
            for lens in found:
                if not float(lens.direction.norm()) > 0:
                    continue
                reading = logit_lens(case.model, lens.direction[None], WORDS)[0]
                words |= dict.fromkeys(word.strip() for word, _ in reading.promotes if word.strip().isprintable())
                for strength in STRENGTHS:
                    progress("steering along the difference", len(sayings), len(found) * len(STRENGTHS) * PROMPTS)
                    said = steered_replies(
                        case.model, lens.site, lens.direction, asked, strength, scale=lens.scale, max_new_tokens=TOKENS
                    )
                    place = f"steered × {strength:g} at {lens.site}: "
                    sayings += [
                        Saying(t, float(said.count(t)), f"{place}{text}")
                        for t, text in zip(said, asked, strict=True)
                        if t.strip()
                    ]
        forms = tuple(Form("promoted token", "front", word) for word in words if word and "\ufffd" not in word)
        return Found(sorted(sayings, key=lambda s: -s.score), forms)
