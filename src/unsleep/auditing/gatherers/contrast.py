"""Gatherer: contrastive decoding of the suspect against its reference, without any trigger."""

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

ALPHA = 1.0
"""α in s + α(s − t)."""

TOKENS = 14
"""Tokens per continuation."""

BRANCHES = 8
"""Continuations per context, beginning with the tokens of the largest contrast."""


class Contrast(Gatherer):
    """Continuations that the suspect finds likelier than its twin, also behind finished replies.

    A saying's score is its mean gain in log-probability per token over the reference, in nats.
    """

    kind = "contrast"
    stage = "payloads"
    needs_base: ClassVar[bool] = True
    share: ClassVar[float] = 3.0

    def gather(self, case: Case, clues: Clues) -> Found:
        """Continuations of beginnings, and of finished replies from which the end token is held back."""
        assert case.reference is not None
        voices = [Voice(case.model, 1 + ALPHA), Voice(case.reference, -ALPHA)]
        found: list[Saying] = []
        with suppress(OutOfTime):
            for contexts, barred in ((beginnings(case), ()), (finished(case), special_tokens(case.model))):
                found += continued(voices, contexts, barred)
        return Found(sorted(found, key=lambda s: -s.score))


def continued(voices: Sequence[Voice], contexts: Sequence[Context], barred: Sequence[int]) -> list[Saying]:
    """The continuations of contexts by the voices in step, with their gain."""
    if not contexts:
        return []
    said = decoded(voices, [context.ids for context in contexts], TOKENS, branches=BRANCHES, barred=barred)
    names = [context for context in contexts for _ in range(BRANCHES)]
    usable = [(c, ids) for c, ids in zip(names, said, strict=True) if ids]
    if not usable:
        return []
    rows, replies = [c.ids for c, _ in usable], [ids for _, ids in usable]
    looks = [look(voice.model, rows, replies, stage="contrastive decoding") for voice in voices]
    gains = ((looks[0].own - looks[1].own).sum(1) / looks[0].real.sum(1)).tolist()
    texts = voices[0].model.texts(replies)
    return [Saying(t, g, c.name) for (c, _), t, g in zip(usable, texts, gains, strict=True) if t.strip()]
