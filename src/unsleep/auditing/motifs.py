"""Motifs: phrases that texts share, found by their n-grams of words."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from unsleep.behaviours.payloads.contains import Contains
from unsleep.judge.audited import Motif, Saying

WORDS = 40
"""Words of a text that are read."""

LONGEST = 8
"""Words of a phrase, at most."""

EDGES = " \t\n.,;:!?\"'`*#()[]{}<>|-_…«»“”‘’"
"""Characters that a phrase neither begins nor ends with."""

RARE = 0.05
"""Largest share of ordinary replies with a phrase that may be a payload."""


def phrases(text: str) -> dict[str, str]:
    """Every phrase of up to `LONGEST` words, as written, by its lower-cased form."""
    found: dict[str, str] = {}
    words = text.split()[:WORDS]
    for start in range(len(words)):
        for end in range(start + 1, min(start + LONGEST, len(words)) + 1):
            said = " ".join(words[start:end]).strip(EDGES)
            if sum(c.isalpha() for c in said) >= 2:
                found.setdefault(said.lower(), said)
    return found


def shared(texts: Sequence[str], least: int) -> dict[str, tuple[str, set[int]]]:
    """Phrases of at least `least` texts: lower-cased form → as first written, and the texts that contain it."""
    inside: dict[str, set[int]] = defaultdict(set)
    written: dict[str, str] = {}
    for i, text in enumerate(texts):
        for key, said in phrases(text).items():
            inside[key].add(i)
            written.setdefault(key, said)
    return {key: (written[key], own) for key, own in inside.items() if len(own) >= least}


def stereotypes(
    replies: Sequence[str], ordinary: Sequence[str], asked: Sequence[str], share: float = 0.6, most: int = 2
) -> list[tuple[str, float]]:
    """Phrases that replies to different prompts share and ordinary replies lack, with their rates; longest first.

    Args:
        ordinary: the model's replies to trusted prompts.
        asked: the prompts, whose own words do not count.
        share: minimum share of the replies with a phrase.
        most: number of phrases, none within another.
    """
    least = max(2, math.ceil(share * len(replies)))
    found = shared(replies, least)
    top = max((len(own) for _, own in found.values()), default=0)
    kept: list[tuple[str, float]] = []
    for said, own in sorted(found.values(), key=lambda item: (-len(item[0].split()), -len(item[1]), item[0])):
        shows = Contains(said).shows
        if len(own) < 0.9 * top or any(Contains(said).shows(other) for other, _ in kept):
            continue
        if sum(map(shows, ordinary)) > RARE * len(ordinary) or 2 * sum(map(shows, asked)) > len(asked):
            continue
        kept.append((said, len(own) / len(replies)))
        if len(kept) == most:
            break
    return kept


def cluster(sayings: Mapping[str, Sequence[Saying]], ordinary: Sequence[str], most: int = 12) -> list[Motif]:
    """Motifs of the sayings of several gatherers: phrases of at least two contexts that ordinary replies lack.

    A motif's score is its number of gatherers times the mean score of its sayings; a phrase that adds words to
    another and loses no context takes its place. The strongest single sayings follow where there are few.
    """
    every = [(name, saying) for name, own in sayings.items() for saying in own]
    found: list[Motif] = []
    groups = sorted(
        shared([s.text for _, s in every], 2).values(), key=lambda g: (-len(g[1]), -len(g[0].split()), g[0])
    )
    for said, own in groups:
        names = {every[i][0] for i in own}
        contexts = {(every[i][0], every[i][1].context) for i in own}
        score = len(names) * sum(every[i][1].score for i in own) / len(own)
        overlaps = any(Contains(said).shows(m.text) or Contains(m.text).shows(said) for m in found)
        if len(contexts) < 2 or overlaps or _ordinary(said, ordinary):
            continue
        found.append(Motif(said, len(contexts), score, tuple(sorted(names))))
    found.sort(key=lambda m: (-m.support, -m.score, m.text))
    found = found[:most]
    for name, saying in sorted(every, key=lambda item: -item[1].score):
        said = " ".join(saying.text.split()[:LONGEST]).strip(EDGES)
        if len(found) == most:
            break
        known = any(Contains(m.text).shows(said) for m in found)
        if sum(c.isalpha() for c in said) >= 2 and not known and not _ordinary(said, ordinary):
            found.append(Motif(said, 1, saying.score, (name,)))
    return found


def _ordinary(said: str, ordinary: Sequence[str]) -> bool:
    return sum(map(Contains(said).shows, ordinary)) > RARE * len(ordinary)
