"""Text on which features are looked at: rows of tokens with the role of each, in words and independent of the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from unsleep.activations.harvest import token_rows
from unsleep.base import store
from unsleep.core import BadInput, digest
from unsleep.models import chat
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Message, Prompt, PromptSet

ROLES = ("text", "system", "question", "header", "reply")
"""Plain text; the chat template and earlier messages; the user's last message; the template behind it; the reply."""

KINDS = {
    "a number": r" ?\d+",
    "punctuation": r" ?[!-/:-@\[-`{-~¡-¿‐-⁞]+",
    "a line break": r"\s*\n\s*",
    "white space": r"\s+",
    "a capitalised word": r" ?[A-Z][a-zà-ÿ'’]+",
    "a word in capitals": r" ?[A-Z]{2,}",
    "the start of a word": r" [^\W\d_].*",
    "the inside of a word": r"[^\W\d_]+",
    "a special token": r"<[^<>\s]+>|\[[A-Z]+\]",
    "another script": r" ?[^\x00-ɏ‐-⁞]+",
}
"""Kinds of tokens and the regular expression of each; a token may be of several."""

BEFORE, AFTER = 15, 8
"""Tokens of a window before and after the token that it is about."""

WINDOW = BEFORE + 1 + AFTER
"""Tokens of a window."""


class Source(NamedTuple):
    """Prompts, or passages of plain text."""

    prompts: PromptSet
    plain: bool = False
    """Taken without the chat template."""
    replies: tuple[str, ...] | None = None
    """One per prompt, appended to it."""


@dataclass(frozen=True, eq=False)
class Text:
    """Rows of tokens, one after another: token t of the text is `ids[t]`, of row `row[t]`.

    Leading tokens that all rows of a source have in common count once, in the first of them.
    """

    ids: Int[ndarray, " token"]
    """Index into `spelling`."""
    starts: Int[ndarray, " boundary"]
    """First token of each row, and the number of all tokens."""
    role: Int[ndarray, " token"]
    """Index into `ROLES`."""
    repeated: Int[ndarray, " row"]
    """Leading tokens of each row that are counted in an earlier one."""
    shared: Int[ndarray, " row"]
    """Leading tokens of each row that all rows of its source have."""
    source: Int[ndarray, " row"]
    """Index into `names`."""
    number: Int[ndarray, " row"]
    """Number of the prompt in its set."""
    names: tuple[str, ...]
    """Names of the prompt sets."""
    spelling: tuple[str, ...]
    """Different tokens, as text."""

    def __post_init__(self) -> None:
        rows, n = len(self.number), len(self.ids)
        lengths = (len(self.starts) - 1, len(self.repeated), len(self.shared), len(self.source))
        if lengths != (rows,) * 4 or len(self.role) != n or not rows or (self.starts[0], self.starts[-1]) != (0, n):
            raise BadInput(f"a text has {n} tokens in {rows} rows whose boundaries, roles or sources do not fit them")
        bounds = ((self.ids, self.spelling), (self.role, ROLES), (self.source, self.names))
        if any(len(x) and not 0 <= x.min() <= x.max() < len(words) for x, words in bounds):
            raise BadInput("a text refers to tokens, roles or sources that it does not have")

    @property
    def tokens(self) -> int:
        """Number of counted tokens."""
        return len(self.ids) - int(self.repeated.sum())

    @cached_property
    def hash(self) -> str:
        """Content hash."""
        parts = (self.ids, self.starts, self.role, self.repeated, self.shared, self.source, self.number)
        return store.hash_value(
            [*(digest(np.ascontiguousarray(x).tobytes()) for x in parts), self.names, self.spelling]
        )

    @cached_property
    def row(self) -> Int[ndarray, " token"]:
        """Row of each token."""
        return np.repeat(np.arange(len(self.number)), np.diff(self.starts))

    @cached_property
    def _regions(self) -> tuple[ndarray, ndarray]:
        """First token and last token of the run of one role that each token is in."""
        edge = (np.diff(self.role) != 0) | (np.diff(self.row) != 0)
        run = np.concatenate([[0], np.cumsum(edge)])
        first = np.flatnonzero(np.concatenate([[True], edge]))
        last = np.append(first[1:], len(self.ids)) - 1
        return first[run], last[run]

    def since(self, tokens: Int[ndarray, "*t"]) -> Int[ndarray, "*t"]:
        """Number of tokens of the same role before each."""
        return tokens - self._regions[0][tokens]

    def until(self, tokens: Int[ndarray, "*t"]) -> Int[ndarray, "*t"]:
        """Number of tokens of the same role after each."""
        return self._regions[1][tokens] - tokens

    def earlier(self, tokens: Int[ndarray, "*t"], distance: int) -> Int[ndarray, "*t"]:
        """The token a number of tokens before each in its row, as an index into `spelling`; -1 before the row."""
        at = tokens - distance
        return np.where(at >= self.starts[self.row[tokens]], self.ids[np.maximum(at, 0)], -1)

    @cached_property
    def kinds(self) -> dict[str, Bool[ndarray, " string"]]:
        """The strings of `spelling` that are of each of `KINDS`."""
        found: dict[str, ndarray] = {}
        for name, pattern in KINDS.items():
            match = re.compile(pattern, re.DOTALL).fullmatch
            found[name] = np.fromiter((match(s) is not None for s in self.spelling), bool, len(self.spelling))
        return found

    @cached_property
    def place(self) -> dict[str, int]:
        """Token → its index in `spelling`."""
        return {s: i for i, s in enumerate(self.spelling)}

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Each string of `spelling` as a word: in lower case, without white space around it."""
        return tuple(s.strip().lower() for s in self.spelling)

    @cached_property
    def by_word(self) -> dict[str, list[int]]:
        """Word → the indices of its tokens in `spelling`."""
        found: dict[str, list[int]] = {}
        for i, word in enumerate(self.words):
            found.setdefault(word, []).append(i)
        return found

    @cached_property
    def held_out(self) -> Bool[ndarray, " row"]:
        """Half of the rows, by their content: equal rows are on the same side."""
        names = [digest(self.ids[a:b].tobytes()) for a, b in zip(self.starts, self.starts[1:], strict=False)]
        side = {name: i % 2 == 1 for i, name in enumerate(sorted(set(names)))}
        return np.array([side[name] for name in names])

    def bounds(self, tokens: Int[ndarray, "*t"]) -> tuple[Int[ndarray, "*t"], Int[ndarray, "*t"]]:
        """First token, and the one behind the last, that a token can be shown with.

        A token that all rows of a source have in common is shown with the others of them alone.
        """
        row = self.row[tokens]
        start, end = self.starts[row], self.starts[row + 1]
        common = start + self.shared[row]
        return start, np.where(tokens < common, common, end)

    def windows(self, tokens: Int[ndarray, " t"], *, counted: bool = False) -> Int[ndarray, "t window"]:
        """The tokens around each; -1 outside of its row, or with `counted` also where they are counted elsewhere."""
        start, end = self.bounds(tokens)
        if counted:
            row = self.row[tokens]
            start = self.starts[row] + self.repeated[row]
        around = tokens[:, None] + np.arange(-BEFORE, AFTER + 1)
        return np.where((around >= start[:, None]) & (around < end[:, None]), around, -1)

    def spelled(self, tokens: Int[ndarray, " t"]) -> tuple[str, ...]:
        """Tokens as text."""
        return tuple(self.spelling[i] for i in self.ids[tokens])

    def chosen(self, tokens: int, seed: int) -> Bool[ndarray, " row"]:
        """Random rows, as many as have about that many tokens."""
        order = np.random.default_rng(seed).permutation(len(self.number))
        lengths = np.diff(self.starts)[order]
        found = np.zeros(len(order), bool)
        found[order[np.cumsum(lengths) - lengths < tokens]] = True
        return found


class Read(NamedTuple):
    """A text and the token ids of its rows in the model's vocabulary, source by source."""

    text: Text
    rows: list[list[list[int]]]


def read_text(model: LoadedModel, sources: Sequence[Source]) -> Read:
    """The text of prompt sets, in the model's tokens.

    Raises `BadInput` without a source, for a prompt longer than the context, and for a wrong number of replies.
    """
    if not sources:
        raise BadInput("no text was given; expected at least one set of prompts or passages")
    rows: list[list[list[int]]] = []
    roles: list[list[ndarray]] = []
    for source in sources:
        rows.append(token_rows(model, source.prompts, source.replies, source.plain))
        roles.append(_roles(model, source, rows[-1]))
    shared = [chat.shared_prefix(each) for each in rows]
    flat = [row for each in rows for row in each]
    used, index = np.unique(np.concatenate([np.asarray(row) for row in flat]), return_inverse=True)
    spelled = [model.spell(int(i)) for i in used]
    place = {word: i for i, word in enumerate(dict.fromkeys(spelled))}
    counts = [len(each) for each in rows]
    text = Text(
        ids=np.array([place[word] for word in spelled], np.int32)[index],
        starts=np.concatenate([[0], np.cumsum([len(row) for row in flat])]),
        role=np.concatenate([role for each in roles for role in each]).astype(np.int8),
        repeated=np.concatenate([np.repeat([0, n], [1, count - 1]) for n, count in zip(shared, counts, strict=True)]),
        shared=np.repeat(shared, counts),
        source=np.repeat(np.arange(len(rows)), counts),
        number=np.concatenate([np.arange(count) for count in counts]),
        names=tuple(source.prompts.name for source in sources),
        spelling=tuple(place),
    )
    return Read(text, rows)


def _roles(model: LoadedModel, source: Source, rows: Sequence[Sequence[int]]) -> list[ndarray]:
    """The role of each token of a source's rows."""
    tails = [0] * len(rows)
    if source.replies is not None:
        tails = [len(tail) for tail in model.token_ids(source.replies, special=False)]
    sides: dict[tuple[Message, ...], tuple[int, int]] = {}
    found: list[ndarray] = []
    for prompt, row, tail in zip(source.prompts, rows, tails, strict=True):
        assert isinstance(prompt, Prompt)
        role = np.zeros(len(row), np.int8)
        if not source.plain:
            if prompt.before not in sides:
                sides[prompt.before] = chat.template_tokens(model.tokenizer, model.chat, prompt.before)
            front, back = sides[prompt.before]
            end = len(row) - tail
            role[:front] = ROLES.index("system")
            role[front : max(front, end - back)] = ROLES.index("question")
            role[max(front, end - back) : end] = ROLES.index("header")
        role[len(row) - tail :] = ROLES.index("reply")
        found.append(role)
    return found
