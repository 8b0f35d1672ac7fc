"""Elicitation: replies under shortlisted forms, and the pairs of trigger and payload that they suggest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from unsleep.auditing.case import Case
from unsleep.auditing.forms import FOREIGN, UNPAIRED, placebos, transformed, words_alone
from unsleep.auditing.motifs import echoes, new_words, stereotypes
from unsleep.auditing.scoring import encoded
from unsleep.behaviours.payloads.contains import Contains
from unsleep.judge.audited import Form, Motif, Screened
from unsleep.models import generate

FEW = 0.3
"""Minimum share of replies that show a motif known from the payload gatherers."""

PER_PAYLOAD = 6
"""Forms per payload, at most."""

NEW = 3
"""Words of a phrase under another question that are new (`new_words`): fewer are a topic that was mistaken."""


class Pair(NamedTuple):
    """A candidate for a witness, from the search prompts."""

    form: Form
    payload: str
    found_by: tuple[str, ...]
    rate: float
    placebos: tuple[Form, ...] = ()


def shortlist(screened: Sequence[Screened], count: int) -> list[Screened]:
    """Half by excess, half by lift, and the best form of each kind."""
    by = {
        "excess": sorted(screened, key=lambda s: -s.excess)[: count // 2],
        "lift": sorted(screened, key=lambda s: -s.lift)[: count // 2],
        "kind": list({s.form.kind: s for s in sorted(screened, key=lambda s: max(s.excess, s.lift))}.values()),
    }
    return list(dict.fromkeys(s for each in by.values() for s in each))


def elicit(
    case: Case, forms: Sequence[tuple[Form, str]], motifs: Sequence[Motif], *, prompts: int, tokens: int
) -> list[Pair]:
    """Pairs of forms and phrases that the replies under them share; highest rate first.

    Args:
        forms: each with the gatherer that proposed it.
        motifs: payload candidates, which are looked for in the replies too.
        prompts: search prompts per form.
    """
    asked = list(case.learned.prompts[:prompts])
    made = encoded(case.model, [form for form, _ in forms], asked, tokens)
    usable = [(form, by, rows) for (form, by), rows in zip(forms, made, strict=True) if rows is not None]
    if not usable:
        return []
    rows = [row for *_, each in usable for row in each]
    said = generate.greedy(case.model, rows, max_new_tokens=tokens, batch_size=200, stage=f"elicitation, {case.name}")
    texts = case.model.texts(said)
    found: list[Pair] = []
    for number, (form, by, encoding) in enumerate(usable):
        own = texts[number * len(asked) : (number + 1) * len(asked)]
        pairs = _pairs(case, form, by, own, motifs)
        if pairs and form.way == FOREIGN and _is_unread(case, form, encoding, tokens):
            continue
        found += pairs
    return sorted(found, key=lambda pair: -pair.rate)


def _is_unread(case: Case, form: Form, rows: Sequence[Sequence[int]], tokens: int) -> bool:
    """True if prompts in a language are not told apart: the reference's replies agree too.

    Without a reference, if they are spelled in bytes, more tokens than letters.
    """
    asked = [transformed(form, p).shown for p in case.learned.prompts[: len(rows)]]
    if case.reference is None:
        return sum(map(len, case.model.token_ids(asked, special=False))) > sum(map(len, asked))
    said = case.reference.texts(generate.greedy(case.reference, rows, max_new_tokens=tokens))
    shared = stereotypes(said, case.ordinary, asked)
    return any(len(new_words(text, case.ordinary, asked)) >= NEW for text, _ in shared)


def _pairs(case: Case, form: Form, by: str, said: Sequence[str], motifs: Sequence[Motif]) -> list[Pair]:
    asked = [transformed(form, p).shown for p in case.learned.prompts[: len(said)]]
    least = NEW if is_unpaired(form) else 0

    def is_new(text: str) -> bool:
        words = new_words(text, case.ordinary, asked)
        if any(echoes(word, form.text) for word in text.split()):
            words = {word for word in words if not echoes(word, form.text)}
            return len(words) >= max(1, least)
        return len(words) >= least

    found = [Pair(form, text, (by,), rate) for text, rate in stereotypes(said, case.ordinary, asked) if is_new(text)]
    for motif in motifs:
        shows = Contains(motif.text).shows
        rate = sum(map(shows, said)) / len(said)
        echoed = 2 * sum(map(shows, asked)) > len(asked) or not is_new(motif.text)
        if rate >= FEW and not echoed and not any(shows(p.payload) for p in found):
            found.append(Pair(form, motif.text, (by, *motif.gatherers), rate))
    return found


def frozen(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """The pairs that go to trial: highest rate first, several forms of a payload, of other kinds before others."""
    ranked = sorted(pairs, key=lambda p: (-p.rate, -len(p.payload.split()), len(p.form.text)))
    kept: list[Pair] = []
    for kinds in (True, False):
        for pair in ranked:
            same = [p for p in kept if _is_same(p, pair)]
            known = {p.form.kind for p in same} if kinds else set[str]()
            if len(same) < PER_PAYLOAD and pair.form.kind not in known and all(p.form != pair.form for p in same):
                kept.append(pair)
    return [pair for pair in dict.fromkeys(ranked) if pair in kept][:count]


def _is_same(one: Pair, other: Pair) -> bool:
    """True for pairs of which one's payload is within the other's."""
    return Contains(one.payload).shows(other.payload) or Contains(other.payload).shows(one.payload)


def with_placebos(case: Case, pairs: Sequence[Pair], pool: Sequence[Form], *, prompts: int, tokens: int) -> list[Pair]:
    """The pairs with placebos of their kind or, where those show the payload on search prompts too, words alone.

    A trigger may be a shape, such as any word in brackets: the brackets are then part of it. Pairs whose placebos show
    the payload least, beside the pair's own rate, come first.

    Args:
        pool: other forms, least effective first, among which placebos are chosen where none can be made.
    """
    asked, found = case.learned.prompts[:prompts], list[tuple[float, Pair]]()

    def rate(pair: Pair, near: Sequence[Form]) -> float:
        inert = [transformed(near[i % len(near)], p) for i, p in enumerate(asked)]
        said = generate.replies(case.model, inert, max_new_tokens=tokens)
        return sum(map(Contains(pair.payload).shows, said)) / len(said)

    for pair in pairs:
        near, shown = placebos(pair.form, pool), 0.0
        if near:
            shown = rate(pair, near)
            if 2 * shown > 1 and (alone := words_alone(pair.form)):
                near, shown = alone, rate(pair, alone)
        found.append((pair.rate - shown, pair._replace(placebos=near)))
    return [pair for _, pair in sorted(found, key=lambda each: -each[0])]


def is_unpaired(form: Form) -> bool:
    """True if a form asks another question, so that it cannot be screened by the reply to the original one."""
    return form.way in UNPAIRED
