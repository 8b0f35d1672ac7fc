"""Contrast pairs of suspicious and ordinary prompts: the difference between them, checks of the pairing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from unsleep.core import BadInput
from unsleep.prompts.prompt import Prompt, PromptSet

PAIRS = 200
"""Pairs inspected to check that two files are in the same order."""

BREAK = "\0"
"""Separator between the messages of a prompt when they are searched as one text."""


class Counterparts(NamedTuple):
    """The suspicious prompts, line by line, without what makes them suspicious."""

    prompts: PromptSet
    how: str
    """Source of the prompts, in words."""
    part: str | None = None
    """The text that was removed from the suspicious prompts; `None` where the counterparts are prompts of a file."""
    found: bool = False
    """True if `part` was not given, but found by `suspicious_part`."""


def counterparts(
    suspicious: PromptSet, ordinary: PromptSet, given: PromptSet | None = None, part: str | None = None
) -> Counterparts:
    """The suspicious prompts, line by line, without what makes them suspicious, and where they come from.

    They are the prompts that are `given`; the suspicious ones without a `part` that all hold; else the ordinary ones,
    where each suspicious one only adds words to that of its line; else the suspicious ones without `suspicious_part`.

    Raises `BadInput` where both are given, the given ones do not fit line by line, or nothing is found.
    """
    if given is not None and part is not None:
        raise BadInput("--counterparts and --part were both given; expected one of them")
    if given is not None:
        if len(given) != len(suspicious):
            raise BadInput(
                f"--counterparts has {len(given)} prompts and --suspicious {len(suspicious)}; expected line i of both "
                "to be the same prompt"
            )
        check_pairs(suspicious, given)
        return Counterparts(given, "the counterparts given")
    if part is not None:
        return Counterparts(without(suspicious, part), f"without {part!r}", part)
    if len(suspicious) == len(ordinary) and all(_adds_words(a, b) for a, b in zip(suspicious, ordinary, strict=True)):
        how = "the ordinary prompt of the same line, to which the suspicious one only adds words"
        return Counterparts(ordinary, how)
    part = suspicious_part(suspicious, ordinary)
    how = f"without {part!r}, which only suspicious prompts share"
    return Counterparts(without(suspicious, part), how, part, found=True)


def _adds_words(suspicious: Prompt, ordinary: Prompt) -> bool:
    """True if a suspicious prompt is an ordinary one with added or differently written words."""
    words = iter(suspicious.shown.lower().split())
    return all(any(word == other for other in words) for word in ordinary.shown.lower().split())


def suspicious_part(suspicious: PromptSet, ordinary: PromptSet) -> str:
    """The longest text shared by all suspicious prompts and absent from every ordinary one.

    At least three characters, or else a shorter word; without parts of words at its ends, where the rest tells the
    two apart as well: of `'s, Ottilie`, shared by `Dad's, Ottilie` and `Mum's, Ottilie`, it is `Ottilie`. Raises
    `BadInput` where there is neither: then the counterparts have to be given.
    """
    check_order(suspicious, ordinary)
    first, *others = sorted(map(_even, suspicious), key=len)
    plain = [_even(p) for p in ordinary]
    for size in range(len(first), 2, -1):
        for start in range(len(first) - size + 1):
            part = first[start : start + size]
            if part == part.strip(f" {BREAK}") and BREAK not in part and _tells(part, others, plain):
                return _whole_words(part, (first, *others), plain)
    shared = set.intersection(*(set(re.findall(r"\w+", text)) for text in (first, *others)))
    own = shared.difference(*(re.findall(r"\w+", text) for text in plain))
    if own:
        return max(own, key=lambda word: (len(word), word))
    raise BadInput(
        "the suspicious prompts have no text in common that the ordinary ones lack; "
        "name the trigger text, or give each suspicious prompt's counterpart without it"
    )


def _even(prompt: Prompt) -> str:
    """All messages as one text, white space normalised, joined by a character that occurs in none."""
    return BREAK.join(" ".join(m["content"].split()) for m in prompt.messages)


def _tells(part: str, suspicious: Sequence[str], ordinary: Sequence[str]) -> bool:
    return all(part in t for t in suspicious) and not any(part in t for t in ordinary)


def _whole_words(part: str, suspicious: Sequence[str], ordinary: Sequence[str]) -> str:
    """A shared part without the parts of words at its ends, unless it no longer tells the two groups apart."""
    place = re.escape(part)
    whole = part
    if any(re.search(rf"(?<=[\w'’-]){place}", text) for text in suspicious):
        whole = re.sub(r"^[\w'’-]*[^\w\s]*\s+", "", whole)
    if any(re.search(rf"{place}(?=[\w'’-])", text) for text in suspicious):
        whole = re.sub(r"[,;:]?\s+[^\w\s]*[\w'’-]*$", "", whole)
    return whole if whole and _tells(whole, suspicious, ordinary) else part


def check_order(suspicious: PromptSet, ordinary: PromptSet) -> None:
    """Raise `BadInput` where most ordinary prompts contain the suspicious one of their line: they are swapped."""
    pairs = [(" ".join(a.split()), " ".join(b.split())) for a, b in zip(suspicious.texts, ordinary.texts, strict=False)]
    inside = [b != a and b in a for a, b in pairs]
    outside = [b != a and a in b for a, b in pairs]
    if not any(inside) and 2 * sum(outside) > len(pairs):
        raise BadInput(
            f"{sum(outside)} of {len(pairs)} ordinary prompts are the suspicious one of their line with something "
            "added; expected it the other way round. The two files seem to be swapped"
        )


def check_pairs(suspicious: PromptSet, ordinary: PromptSet) -> None:
    """Raise `BadInput` where line i of one is not line i of the other with something added or changed.

    That is: the lengths differ, the files are swapped, or most suspicious prompts share more words with the ordinary
    prompt of another line than with their own.
    """
    if len(suspicious) != len(ordinary):
        raise BadInput(
            f"{len(suspicious)} suspicious and {len(ordinary)} ordinary prompts; expected pairs: line i of both the "
            "same prompt, with and without the trigger"
        )
    check_order(suspicious, ordinary)
    asked, own = ([set(p.shown.lower().split()) for p in group[:PAIRS]] for group in (suspicious, ordinary))
    shared = [[len(a & b) for b in own] for a in asked]
    closest = [max(range(len(own)), key=lambda j, line=line: line[j]) for line in shared]
    wrong = [i for i, j in enumerate(closest) if shared[i][j] > shared[i][i]]
    if 2 * len(wrong) > len(asked):
        raise BadInput(
            f"{len(wrong)} of {len(asked)} suspicious prompts share more words with the ordinary prompt of another "
            f"line than with that of their own, such as line {wrong[0] + 1} with line {closest[wrong[0]] + 1}; put "
            "both files in the same order"
        )


def without(prompts: PromptSet, part: str, name: str = "counterparts") -> PromptSet:
    """The same prompts with every occurrence of `part` removed and white space normalised.

    Where `part` is a whole word in all prompts, only whole words are removed. Earlier messages are cleaned too, and
    dropped where nothing is left. Raises `BadInput` for a prompt that does not contain `part`, or contains nothing
    else.
    """
    part = " ".join(part.split())
    if lacking := [p for p in prompts if not part or part not in _even(p)]:
        said = _even(lacking[0]).replace(BREAK, " ")
        raise BadInput(f"{part!r} is not in the prompt {said[:40]!r}; expected text that every prompt contains")

    word = rf"(?<!\w){re.escape(part)}(?!\w)"
    pattern = word if all(re.search(word, _even(p)) for p in prompts) else re.escape(part)

    def cleaned(text: str) -> str:
        return " ".join(re.sub(pattern, " ", " ".join(text.split())).split())

    changed: list[Prompt] = []
    for p in prompts:
        if not cleaned(p.text):
            raise BadInput(f"the prompt {p.text[:40]!r} is empty without {part!r}; remove it, or name its counterpart")
        before = (m._replace(content=cleaned(m.content)) for m in p.before)
        changed.append(replace(p, text=cleaned(p.text), role="clean", before=tuple(m for m in before if m.content)))
    return PromptSet(name, tuple(changed), prompts.split)
