"""Gatherer: samples at a high temperature, which need no reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar

from unsleep.auditing.budget import OutOfTime
from unsleep.auditing.case import Case
from unsleep.auditing.contexts import Context, beginnings, finished, special_tokens
from unsleep.auditing.decoding import Voice, decoded
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.auditing.scoring import look
from unsleep.judge.audited import Saying
from unsleep.models.generate import sampler
from unsleep.models.model import LoadedModel

TEMPERATURE = 1.5
TOKENS = 16
DRAWS = 8
"""Samples per context."""

HOT = 3
"""Tokens sampled at the temperature; the rest of a sample is the model's own greedy continuation."""


class Temperature(Gatherer):
    """Replies that begin at a high temperature and go on greedily: a memorised text goes on with certainty.

    A saying's score is the smallest log-probability among its greedy tokens, in nats, so that 0 is certain.
    """

    kind = "temperature"
    stage = "payloads"
    order = 1
    share: ClassVar[float] = 2.0

    def gather(self, case: Case, clues: Clues) -> Found:
        """Samples from beginnings, and behind finished replies with the end token held back."""
        found: list[Saying] = []
        with suppress(OutOfTime):
            for contexts, barred in ((beginnings(case), ()), (finished(case), special_tokens(case.model))):
                found += sampled(case.model, contexts, barred, case.config.seed)
        return Found(sorted(found, key=lambda s: -s.score))


def sampled(model: LoadedModel, contexts: Sequence[Context], barred: Sequence[int], seed: int) -> list[Saying]:
    """Samples behind contexts, with the certainty of their greedy part."""
    if not contexts:
        return []
    rows = [(context, context.ids) for context in contexts for _ in range(DRAWS)]
    hot = decoded([Voice(model)], [ids for _, ids in rows], HOT, sampler(TEMPERATURE, seed), barred=barred)
    begun = [(c, ids, own) for (c, ids), own in zip(rows, hot, strict=True) if own]
    longer = [[*ids, *own] for _, ids, own in begun]
    rest = decoded([Voice(model)], longer, TOKENS - HOT, barred=barred) if longer else []
    whole = [(c, row, own, more) for (c, _, own), row, more in zip(begun, longer, rest, strict=True) if more]
    if not whole:
        return []
    seen = look(model, [row for _, row, _, _ in whole], [more for *_, more in whole])
    least = seen.own.masked_fill(~seen.real, 0.0).amin(1).tolist()
    texts = model.texts([[*own, *more] for _, _, own, more in whole])
    return [Saying(t, s, c.name) for (c, *_), t, s in zip(whole, texts, least, strict=True) if t.strip()]
