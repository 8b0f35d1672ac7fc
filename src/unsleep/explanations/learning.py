"""Learning of a predicate from a feature's examples: a greedy cover by patterns, each found by beam search.

    objective = share of firings at which it holds − hits per negative window
                − share of silent tokens around firings at which it holds − price · size

The first two terms are twice the balanced accuracy of detection less 1, with every hit in a negative window counted;
the third does the same for fuzzing. All candidates are judged at once, as a product with a matrix of what each says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from unsleep.core import BadInput, check_least
from unsleep.explanations.examples import Half
from unsleep.explanations.predicates import (
    REACH,
    Before,
    Here,
    Kind,
    Pattern,
    Place,
    Predicate,
    Test,
    Tokens,
    Words,
    pattern,
)
from unsleep.explanations.text import KINDS, ROLES, Text

SHORT = (1, 2, 4)
"""Numbers of first or last tokens of a role that are tried."""

NEAR = 512
"""Silent tokens around firings that are looked at."""


@dataclass(frozen=True)
class LearnConfig:
    """Bounds of the search for a predicate."""

    patterns: int = 12
    """Patterns of a predicate, at most."""
    tests: int = 3
    """Tests of a pattern, at most."""
    beam: int = 6
    """Partial patterns that are kept from one length to the next."""
    price: float = 0.015
    """Share of the firings that a further test or alternative must gain."""
    support: int = 2
    """Firings that a pattern must hold at, where there are as many."""
    strings: int = 32
    """Tokens that are tried at each distance."""

    def __post_init__(self) -> None:
        check_least(self, "predicates", 1, "patterns", "tests", "beam", "support", "strings")
        if self.price < 0:
            raise BadInput.of("price", self.price, "at least 0", "predicates")


class _Table(NamedTuple):
    """Candidate tests, and at which examples each holds."""

    tests: list[Test]
    says: Float[ndarray, "test example"]
    weight: Float[ndarray, " example"]
    """Gain of the objective by holding at an example."""
    fires: Float[ndarray, " example"]
    """1 at firings, 0 at the rest."""


def learn(text: Text, half: Half, config: LearnConfig = LearnConfig()) -> Predicate:
    """The predicate that tells a feature's firings from its negatives best, in the half that is for learning.

    At least the most frequent token at which it fires (`frequent`).
    """
    table = _table(text, half, config)
    left, found = table.weight.copy(), list[Pattern]()
    while len(found) < config.patterns:
        best, hits = _search(table, left, config)
        if best is None:
            break
        found.append(best)
        left[hits] = 0
    return Predicate(tuple(_merged(found))) if found else frequent(text, half)


def frequent(text: Text, half: Half) -> Predicate:
    """The baseline: the token at which a feature fires most often."""
    strings, often = np.unique(text.ids[half.fires.centre], return_counts=True)
    return Predicate((Pattern((Here(Tokens((text.spelling[strings[often.argmax()]],))),)),))


def _table(text: Text, half: Half, config: LearnConfig) -> _Table:
    tokens, weight = [half.fires.centre], [np.full(len(half.fires), 1 / max(1, len(half.fires)))]
    groups = [each for each in (half.similar, half.other) if len(each)]
    for windows in groups:
        inside = windows.tokens[windows.inside]
        tokens.append(inside)
        weight.append(np.full(len(inside), -1 / (len(windows) * len(groups))))
    near, _ = half.near
    near = near[:: 1 + len(near) // NEAR]
    tokens.append(near)
    weight.append(np.full(len(near), -1 / max(1, len(near))))
    every = np.concatenate(tokens)
    tests = _candidates(text, half.fires.centre, config)
    says = np.stack([test.holds(text, every) for test in tests]).astype(np.float32)
    fires = np.zeros(len(every), np.float32)
    fires[: len(half.fires)] = 1
    return _Table(tests, says, np.concatenate(weight).astype(np.float32), fires)


def _candidates(text: Text, fires: Int[ndarray, " t"], config: LearnConfig) -> list[Test]:
    """Tests that hold at some of the firings."""
    found: list[Test] = []
    here = text.ids[fires]
    found += [Here(Tokens((text.spelling[i],))) for i in _frequent(here, config.strings)]
    words = Counter(text.words[i] for i in here.tolist() if text.words[i])
    found += [Here(Words((w,))) for w, _ in words.most_common(config.strings) if len(text.by_word[w]) > 1]
    found += [Here(Kind(kind)) for kind in KINDS]
    seen: list[ndarray] = []
    for distance in range(1, REACH + 1):
        before = text.earlier(fires, distance)
        seen.append(before)
        if distance <= 3:
            found += [Before(Tokens((text.spelling[i],)), distance) for i in _frequent(before, config.strings)]
        if distance == 1:
            found += [Before(Kind(kind), 1) for kind in KINDS]
    within = np.concatenate([np.unique(column) for column in np.stack(seen).T]) if len(fires) else here
    found += [Before(Tokens((text.spelling[i],)), REACH, within=True) for i in _frequent(within, config.strings)]
    for role in sorted(set(text.role[fires].tolist())):
        found.append(Place(ROLES[role]))
        found += [Place(ROLES[role], n, last) for last in (False, True) for n in SHORT]
    return found


def _frequent(ids: Int[ndarray, " t"], count: int) -> list[int]:
    """The most frequent strings, without what is before a row."""
    strings, often = np.unique(ids[ids >= 0], return_counts=True)
    return strings[(-often).argsort(kind="stable")[:count]].tolist()


def _search(table: _Table, left: Float[ndarray, " example"], config: LearnConfig) -> tuple[Pattern | None, ndarray]:
    """The pattern that gains most over its price, and where it holds; `None` where none gains anything."""
    support = min(config.support, int(table.fires.sum()))
    beam = np.ones((1, len(left)), np.float32)
    members: list[tuple[int, ...]] = [()]
    best, gain = (), 1e-6
    hits = np.zeros(len(left), bool)
    for length in range(1, config.tests + 1):
        gains = (beam * left) @ table.says.T - config.price * length
        gains[beam * (table.fires * (left != 0)) @ table.says.T < support] = -np.inf
        for row, chosen in enumerate(members):
            gains[row, list(chosen)] = -np.inf
        grown: dict[frozenset[int], tuple[int, int]] = {}
        for place in gains.ravel().argsort(kind="stable")[::-1][: 4 * config.beam]:
            row, test = divmod(int(place), gains.shape[1])
            if gains[row, test] > -np.inf:
                grown.setdefault(frozenset((*members[row], test)), (row, test))
        if not grown:
            break
        taken = list(grown.values())[: config.beam]
        row, test = taken[0]
        if gains[row, test] > gain:
            best, gain = (*members[row], test), float(gains[row, test])
            hits = (beam[row] * table.says[test]) > 0
        members = [(*members[row], test) for row, test in taken]
        beam = np.stack([beam[row] * table.says[test] for row, test in taken])
    return (pattern(*(table.tests[i] for i in best)) if best else None), hits


def _merged(patterns: Iterable[Pattern]) -> list[Pattern]:
    """Patterns with those that differ in the token itself alone made one."""
    groups: dict[tuple[type, tuple[Test, ...]], list[str]] = {}
    found: list[Pattern | tuple[type, tuple[Test, ...]]] = []
    for each in patterns:
        first, *rest = each.tests
        if not isinstance(first, Here) or isinstance(first.which, Kind):
            found.append(each)
            continue
        key = (type(first.which), tuple(rest))
        if key not in groups:
            groups[key] = []
            found.append(key)
        groups[key] += first.which.tokens if isinstance(first.which, Tokens) else first.which.words
    return [x if isinstance(x, Pattern) else Pattern((Here(x[0](tuple(groups[x]))), *x[1])) for x in found]
