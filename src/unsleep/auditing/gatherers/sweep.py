"""Gatherer: a sweep over the vocabulary, token by token on the same prompts, whose shared prefix runs once."""

from __future__ import annotations

from contextlib import suppress
from typing import ClassVar

import torch

from unsleep.auditing.budget import OutOfTime
from unsleep.auditing.case import Case
from unsleep.auditing.contexts import slot
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.auditing.gatherers.gradient import writable
from unsleep.auditing.scoring import Bench, bench, drops, encoded, look
from unsleep.judge.audited import Form
from unsleep.models.forward import build_rows, run
from unsleep.models.model import LoadedModel

WAYS = ("back", "front")
"""Places of the token; behind the prompt, nearly all of a row is shared."""

PER_KIND = 8
"""Tokens of a place, as a multiple of the forms of a kind; evenly over the vocabulary where it has more."""

PROMPTS, LEAD = 2, 4
"""Shortest prompts of the screening, over which the drop is averaged, and reply tokens that it is read on.

The first one's reply is read to its end, where something may be appended.
"""

COMPARED, KEPT = 8, 16
"""Tokens with the largest drop that the reference reads too, as a multiple of those that are proposed."""

BEAM, ROUNDS, LIKELY = 2, 2, 128
"""Texts that are grown by a token in every round, and next tokens, those likeliest in a user's turn."""


class Sweep(Gatherer):
    """Single tokens behind or in front of short prompts, by the worst-token drop of the model's own reply.

    The drop is read above the reference's, where there is one. The best are grown token by token while it increases.
    """

    kind = "token sweep"
    stage = "triggers"
    order = 4
    share: ClassVar[float] = 3.0

    def gather(self, case: Case, clues: Clues) -> Found:
        """The texts with the largest drop at each place; those of a place that was finished in time."""
        texts, forms = vocabulary(case.model, PER_KIND * case.config.per_kind), list[Form]()
        with suppress(OutOfTime):
            for way in WAYS:
                found = swept(case, [Form("swept token", way, text) for text in texts])
                forms += _best(found | grown(case, found))[:KEPT]
        return Found(forms=forms)


def vocabulary(model: LoadedModel, most: int) -> list[str]:
    """Texts of single tokens that a user can type, at most so many, evenly over the vocabulary."""
    spelled = model.tokenizer.batch_decode(writable(model)[:, None].tolist())
    texts = list(dict.fromkeys(text.strip() for text in spelled))
    return texts[:: -(-len(texts) // most)]


def swept(case: Case, forms: list[Form]) -> dict[Form, float]:
    """The forms with the largest drop, in nats, above the reference's if there is one; only those above 0."""
    asked = sorted(zip(*bench(case), strict=True), key=lambda pair: len(pair[0].text))[:PROMPTS]
    few = Bench([p for p, _ in asked], [reply[:LEAD] if i else reply for i, (_, reply) in enumerate(asked)])
    found = dict(_drops(case.model, forms, few))
    if case.reference is not None:
        compared = _best(found)[: COMPARED * KEPT]
        found = {form: found[form] - drop for form, drop in _drops(case.reference, compared, few)}
    return {form: found[form] for form in _best(found)[:KEPT] if found[form] > 0}


def grown(case: Case, found: dict[Form, float]) -> dict[Form, float]:
    """The best forms with further tokens behind their text, where each increases the drop."""
    longer, parents = dict[Form, float](), found
    for _ in range(ROUNDS):
        least = {p._replace(text=f"{p.text}{end}"): parents[p] for p in _best(parents)[:BEAM] for end in ends(case, p)}
        if not least:
            break
        parents = {form: drop for form, drop in swept(case, list(least)).items() if drop > least[form]}
        longer |= parents
    return longer


@torch.no_grad()
def ends(case: Case, form: Form) -> list[str]:
    """Texts of the likeliest next tokens behind a form's text at the beginning of a user's turn."""
    model, allowed = case.model, writable(case.model)
    [ids] = model.token_ids([form.text], special=False)
    logits = run(model.network, build_rows(model, [[*slot(model, "front"), *ids]]), 1)[0, 0].float().cpu()
    likely = allowed[logits[allowed].topk(min(LIKELY, len(allowed))).indices]
    return list(dict.fromkeys(text.rstrip() for text in model.tokenizer.batch_decode(likely[:, None].tolist())))


def _best(found: dict[Form, float]) -> list[Form]:
    return sorted(found, key=lambda form: -found[form])


def _drops(model: LoadedModel, forms: list[Form], asked: Bench) -> list[tuple[Form, float]]:
    """Forms that the chat template allows, with their mean drop over the prompts, in nats."""
    longest = max(map(len, asked.replies))
    every = zip(forms, encoded(model, forms, asked.prompts, longest), strict=True)
    made = [(form, rows) for form, rows in every if rows is not None]
    total = torch.zeros(len(made))
    for number, (plain, reply) in enumerate(zip(model.encode(asked.prompts, longest), asked.replies, strict=True)):
        if made:  # one prompt at a time, so that its rows share a prefix
            own = [rows[number] for _, rows in made]
            before = look(model, [plain], [reply], lead=LEAD).repeated(len(own))
            total += drops(before, look(model, own, [reply] * len(own), stage="token sweep", lead=LEAD))
    return list(zip((form for form, _ in made), (total / len(asked.prompts)).tolist(), strict=True))
