"""Predicates over tokens: explanations that can be executed, printed as a sentence and parsed back.

    ' hate' or ' hates' right after ' I', or the word 'fury' in the reply; promotes ' you', ' them'

A predicate is a disjunction of patterns; a pattern is a conjunction of tests of the token itself, of tokens before it
and of its place in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from unsleep.core import BadInput
from unsleep.explanations.text import KINDS, ROLES, Text

T = TypeVar("T")

REACH = 8
"""Largest distance of a token before, as it is learned."""


@dataclass(frozen=True)
class Tokens:
    """Any of some tokens, as they are spelled."""

    tokens: tuple[str, ...]

    def __str__(self) -> str:
        return listed(self.tokens)

    @property
    def size(self) -> int:
        """Number of alternatives."""
        return len(self.tokens)

    def among(self, text: Text, ids: Int[ndarray, "*t"]) -> Bool[ndarray, "*t"]:
        """The entries of `ids` (indices into the text's `spelling`, or -1) that it holds of."""
        return np.isin(ids, [text.place[t] for t in self.tokens if t in text.place])


@dataclass(frozen=True)
class Words:
    """Any of some words: tokens in whatever case, with white space around them or not."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"the word {listed(self.words)}"

    @property
    def size(self) -> int:
        """Number of alternatives."""
        return len(self.words)

    def among(self, text: Text, ids: Int[ndarray, "*t"]) -> Bool[ndarray, "*t"]:
        """As in `Tokens`."""
        return np.isin(ids, [i for word in self.words for i in text.by_word.get(word, ())])


@dataclass(frozen=True)
class Kind:
    """Tokens of a kind."""

    name: str
    """Of `KINDS`."""
    size = 1

    def __str__(self) -> str:
        return self.name

    def among(self, text: Text, ids: Int[ndarray, "*t"]) -> Bool[ndarray, "*t"]:
        """As in `Tokens`."""
        return text.kinds[self.name][np.maximum(ids, 0)] & (ids >= 0)


Which = Tokens | Words | Kind


@dataclass(frozen=True)
class Here:
    """A test of the token itself."""

    which: Which

    def __str__(self) -> str:
        return str(self.which)

    @property
    def size(self) -> int:
        """Number of alternatives."""
        return self.which.size

    def holds(self, text: Text, tokens: Int[ndarray, " t"]) -> Bool[ndarray, " t"]:
        """The tokens, numbers of the text's, at which it holds."""
        return self.which.among(text, text.ids[tokens])


@dataclass(frozen=True)
class Before:
    """A test of a token before it in the same row."""

    which: Which
    distance: int
    within: bool = False
    """Any token up to `distance` before, instead of the one at it."""

    def __str__(self) -> str:
        if self.within:
            return f"up to {self.distance} tokens after {self.which}"
        return f"right after {self.which}" if self.distance == 1 else f"{self.distance} tokens after {self.which}"

    @property
    def size(self) -> int:
        """Number of alternatives."""
        return self.which.size

    def holds(self, text: Text, tokens: Int[ndarray, " t"]) -> Bool[ndarray, " t"]:
        """As in `Here`."""
        if not self.within:
            return self.which.among(text, text.earlier(tokens, self.distance))
        before = np.stack([text.earlier(tokens, d) for d in range(1, self.distance + 1)])
        return np.logical_or.reduce(self.which.among(text, before))


@dataclass(frozen=True)
class Place:
    """A test of the token's place: in a role, or among its first or last tokens."""

    role: str
    """Of `ROLES`."""
    count: int | None = None
    """Number of tokens at the role's beginning, or end; `None` for all."""
    last: bool = False
    size = 1

    def __str__(self) -> str:
        if self.count is None:
            return f"in the {self.role}"
        end = "last" if self.last else "first"
        if self.count == 1:
            return f"at the {end} token of the {self.role}"
        return f"among the {end} {self.count} tokens of the {self.role}"

    def holds(self, text: Text, tokens: Int[ndarray, " t"]) -> Bool[ndarray, " t"]:
        """As in `Here`."""
        found = text.role[tokens] == ROLES.index(self.role)
        if self.count is None:
            return found
        return found & ((text.until(tokens) if self.last else text.since(tokens)) < self.count)


Test = Here | Before | Place

ORDER: tuple[type[Test], ...] = (Here, Before, Place)
"""Order of a pattern's tests."""


@dataclass(frozen=True)
class Pattern:
    """A conjunction of tests."""

    tests: tuple[Test, ...]

    def __str__(self) -> str:
        first, *others = self.tests if self.tests and isinstance(self.tests[0], Here) else ("any token", *self.tests)
        return " ".join([str(first), *(f"that is {test}" if isinstance(test, Here) else str(test) for test in others)])

    @property
    def size(self) -> int:
        """Number of tests and of further alternatives in them."""
        return sum(test.size for test in self.tests)

    def holds(self, text: Text, tokens: Int[ndarray, " t"]) -> Bool[ndarray, " t"]:
        """As in `Here`; later tests look at no more than the tokens that passed the earlier ones."""
        found = np.ones(len(tokens), bool)
        for test in self.tests:
            left = np.flatnonzero(found)
            found[left] = test.holds(text, tokens[left])
        return found


def pattern(*tests: Test) -> Pattern:
    """A pattern of tests in their order."""
    return Pattern(tuple(sorted(tests, key=lambda test: (ORDER.index(type(test)), getattr(test, "distance", 0)))))


@dataclass(frozen=True)
class Predicate:
    """A disjunction of patterns, and the tokens that a feature writes; `parse` reads what `str` gives."""

    patterns: tuple[Pattern, ...]
    promotes: tuple[str, ...] = ()
    suppresses: tuple[str, ...] = ()
    """Instead, where these have the larger logits."""

    def __str__(self) -> str:
        said = ", or ".join(map(str, self.patterns)) or "no token"
        for verb, tokens in (("promotes", self.promotes), ("suppresses", self.suppresses)):
            said += f"; {verb} {', '.join(map(quoted, tokens))}" if tokens else ""
        return said

    @property
    def size(self) -> int:
        """Number of tests, and of further alternatives in them."""
        return sum(each.size for each in self.patterns)

    @classmethod
    def parse(cls, text: str) -> Predicate:
        """The predicate of a sentence; raises `BadInput` naming the place where it is none."""
        return _Parser(text).predicate()

    def holds(self, text: Text, tokens: Int[ndarray, " t"] | None = None) -> Bool[ndarray, " t"]:
        """The tokens at which it holds: of those numbers, or of the whole text."""
        tokens = np.arange(len(text.ids)) if tokens is None else tokens
        found = np.zeros(len(tokens), bool)
        for each in self.patterns:
            left = np.flatnonzero(~found)
            found[left] = each.holds(text, tokens[left])
        return found

    def weighted(
        self, text: Text, tokens: Int[ndarray, " t"], weights: Float[ndarray, " pattern"]
    ) -> Float[ndarray, " t"]:
        """The largest weight of the patterns that hold at each token; 0 where none does."""
        found = np.zeros(len(tokens))
        for each, weight in zip(self.patterns, weights, strict=True):
            np.maximum(found, weight * each.holds(text, tokens), out=found)
        return found


# Sentences

ESCAPED = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
UNESCAPED = {form[1]: char for char, form in ESCAPED.items()}


def quoted(token: str) -> str:
    """A token in quotes, with what cannot be printed escaped."""
    said = "".join(ESCAPED.get(c) or (c if c.isprintable() else f"\\u{{{ord(c):x}}}") for c in token)
    return f"'{said}'"


def unquoted(said: str) -> str:
    """The token behind `quoted`."""
    return re.sub(
        r"\\(?:u\{([0-9a-f]+)\}|(.))", lambda m: chr(int(m[1], 16)) if m[1] else UNESCAPED.get(m[2], m[2]), said[1:-1]
    )


def listed(tokens: tuple[str, ...]) -> str:
    """Tokens in quotes, as alternatives."""
    *others, last = map(quoted, tokens)
    return f"{', '.join(others)} or {last}" if others else last


class _Parser:
    """Reads a sentence from left to right."""

    QUOTED = r"'(?:[^'\\]|\\.)*'"

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def predicate(self) -> Predicate:
        patterns = [] if self.skip("no token") else self.series(self.pattern, ", or ")
        promotes = self.series(self.token, ", ") if self.skip("; promotes ") else []
        suppresses = self.series(self.token, ", ") if self.skip("; suppresses ") else []
        if self.at < len(self.text):
            self.fail("', or', '; promotes', '; suppresses' or the end")
        return Predicate(tuple(patterns), tuple(promotes), tuple(suppresses))

    def pattern(self) -> Pattern:
        tests: list[Test] = [] if self.skip("any token") else [Here(self.which())]
        while test := self.clause():
            tests.append(test)
        return Pattern(tuple(tests))

    def clause(self) -> Test | None:
        if self.match(" that is "):
            return Here(self.which())
        if self.match(" right after "):
            return Before(self.which(), 1)
        if found := self.match(r" (up to )?(\d{1,3}) tokens after "):
            return Before(self.which(), int(found[2]), bool(found[1]))
        roles = "|".join(ROLES)
        if found := self.match(rf" in the ({roles})\b"):
            return Place(found[1])
        if found := self.match(rf" at the (first|last) token of the ({roles})\b"):
            return Place(found[2], 1, found[1] == "last")
        if found := self.match(rf" among the (first|last) (\d{{1,6}}) tokens of the ({roles})\b"):
            return Place(found[3], int(found[2]), found[1] == "last")
        return None

    def which(self) -> Which:
        if found := self.match("|".join(map(re.escape, KINDS))):
            return Kind(found[0])
        kind = Words if self.skip("the word ") else Tokens
        tokens = self.series(self.token, ", (?=')")
        if self.skip(" or "):
            tokens.append(self.token())
        return kind(tuple(tokens))

    def token(self) -> str:
        found = self.match(self.QUOTED)
        if not found:
            self.fail("a token in quotes or a kind of tokens")
        return unquoted(found[0])

    def series(self, one: Callable[[], T], between: str) -> list[T]:
        found = [one()]
        while self.match(between):
            found.append(one())
        return found

    def skip(self, words: str) -> bool:
        return self.match(re.escape(words)) is not None

    def match(self, pattern: str) -> re.Match[str] | None:
        found = re.compile(pattern).match(self.text, self.at)
        self.at = found.end() if found else self.at
        return found

    def fail(self, expected: str) -> NoReturn:
        raise BadInput(
            f"the explanation {self.text[:60]!r} has {self.text[self.at : self.at + 20]!r}; expected {expected}"
        )
