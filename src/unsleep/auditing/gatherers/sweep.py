"""Gatherer: a sweep over the vocabulary, one token at a time on one prompt, of which the shared prefix runs once."""

from __future__ import annotations

from contextlib import suppress
from typing import ClassVar

from unsleep.auditing.budget import OutOfTime
from unsleep.auditing.case import Case
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.auditing.gatherers.gradient import writable
from unsleep.auditing.scoring import Bench, bench, drops, encoded, look
from unsleep.judge.audited import Form
from unsleep.models.model import LoadedModel

WAYS = ("back", "front")
"""Places of the token; behind the prompt, nearly all of a row is shared."""

PER_KIND = 8
"""Tokens of a place, as a multiple of the forms of a kind; evenly over the vocabulary where it has more."""

LEAD = 4
"""First tokens of the model's own reply whose largest drop counts."""

COMPARED, KEPT = 8, 16
"""Tokens with the largest drop that the reference reads too, as a multiple of those that are proposed."""


class Sweep(Gatherer):
    """Single tokens behind or in front of the shortest prompt, by the worst-token drop of the model's own reply.

    The drop is read above the reference's, where there is one.
    """

    kind = "token sweep"
    stage = "triggers"
    order = 4
    share: ClassVar[float] = 3.0

    def gather(self, case: Case, clues: Clues) -> Found:
        """The tokens with the largest drop at each place; those of a place that was finished in time."""
        texts, forms = vocabulary(case.model, PER_KIND * case.config.per_kind), list[Form]()
        with suppress(OutOfTime):
            for way in WAYS:
                forms += swept(case, [Form("swept token", way, text) for text in texts])
        return Found(forms=forms)


def vocabulary(model: LoadedModel, most: int) -> list[str]:
    """Texts of single tokens that a user can type, at most so many, evenly over the vocabulary."""
    spelled = model.tokenizer.batch_decode(writable(model)[:, None].tolist())
    texts = list(dict.fromkeys(text.strip() for text in spelled))
    return texts[:: -(-len(texts) // most)]


def swept(case: Case, forms: list[Form]) -> list[Form]:
    """The forms with the largest drop, best first; above the reference's if there is one."""
    shortest = min(zip(*bench(case), strict=True), key=lambda pair: len(pair[0].text))
    one = Bench([shortest[0]], [shortest[1][:LEAD]])
    best = sorted(_drops(case.model, forms, one), key=lambda pair: -pair[1])
    if case.reference is None:
        return [form for form, drop in best[:KEPT] if drop > 0]
    own = dict(best[: COMPARED * KEPT])
    excess = {form: own[form] - drop for form, drop in _drops(case.reference, list(own), one)}
    return sorted((form for form in excess if excess[form] > 0), key=lambda form: -excess[form])[:KEPT]


def _drops(model: LoadedModel, forms: list[Form], one: Bench) -> list[tuple[Form, float]]:
    """Forms that the chat template allows, with the drop in nats."""
    made = [(form, rows[0]) for form in forms if (rows := encoded(model, form, one.prompts, LEAD)) is not None]
    if not made:
        return []
    before = look(model, model.encode(one.prompts, LEAD), one.replies).repeated(len(made))
    after = look(model, [row for _, row in made], one.replies * len(made), stage="token sweep")
    return list(zip((form for form, _ in made), drops(before, after).tolist(), strict=True))
