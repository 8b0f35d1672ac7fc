"""Examples of a feature for learning and judging an explanation: where it fires, and where it might and does not.

Half of the rows are for learning, the other half is held out (`Text.held_out`). Negatives are *similar*, with a token
at which the feature fires elsewhere, and *other*, random; in a negative's whole window it does not fire.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from unsleep.explanations.record import Context
from unsleep.explanations.statistics import FeatureStatistics
from unsleep.explanations.text import BEFORE

STRINGS = 64
"""Different tokens for which similar negatives are searched."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Tokens with those around them and a feature's activation at each."""

    tokens: Int[ndarray, "n window"]
    """Numbers of the text's; -1 outside of the row."""
    values: Float[ndarray, "n window"]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def centre(self) -> Int[ndarray, " n"]:
        """The tokens that the windows are about."""
        return self.tokens[:, BEFORE]

    @property
    def strength(self) -> Float[ndarray, " n"]:
        """Activations at the centres."""
        return self.values[:, BEFORE]

    @property
    def inside(self) -> Bool[ndarray, "n window"]:
        """Places that have a token."""
        return self.tokens >= 0

    def joined(self, other: Windows) -> Windows:
        """These windows and then others."""
        return Windows(*(np.concatenate(pair) for pair in ((self.tokens, other.tokens), (self.values, other.values))))


class Half(NamedTuple):
    """Examples from one half of the text."""

    fires: Windows
    similar: Windows
    other: Windows

    @property
    def quiet(self) -> Windows:
        """All negatives."""
        return self.similar.joined(self.other)

    @property
    def near(self) -> tuple[Int[ndarray, " near"], Int[ndarray, " near"]]:
        """Tokens around firing ones at which it does not fire, and the example of each."""
        silent = self.fires.inside & (self.fires.values == 0)
        return self.fires.tokens[silent], silent.nonzero()[0]


class Examples:
    """Examples of the features of a dictionary."""

    def __init__(self, statistics: FeatureStatistics, seed: int = 0) -> None:
        self.statistics, self.text, self.seed = statistics, statistics.text, seed
        f = statistics.figures
        self._start, self._token, self._value = (x.numpy() for x in (f.code_start, f.code_token, f.code_value))
        self._drawn, self._around = f.drawn.numpy(), f.drawn_around.numpy()
        rows = f.sampled.numpy()
        text = self.text
        counted = np.arange(len(text.ids)) - text.starts[text.row] >= text.repeated[text.row]
        kept, side = rows[text.row] & counted, text.held_out[text.row]
        self.sampled = np.flatnonzero(kept & ~side), np.flatnonzero(kept & side)
        """Tokens whose codes are kept, of either half."""

    @cached_property
    def _by_string(self) -> tuple[tuple[ndarray, ndarray], tuple[ndarray, ndarray]]:
        """For either half, its sampled tokens sorted by string, and where each string begins."""
        found: list[tuple[ndarray, ndarray]] = []
        for tokens in self.sampled:
            ids = self.text.ids[tokens]
            order = ids.argsort(kind="stable")
            found.append((tokens[order], np.searchsorted(ids[order], np.arange(len(self.text.spelling) + 1))))
        return found[0], found[1]

    def code(self, feature: int) -> tuple[Int[ndarray, " entry"], Float[ndarray, " entry"]]:
        """Sampled tokens at which a feature fires, in order, and its activations there."""
        part = slice(self._start[feature], self._start[feature + 1])
        return self._token[part], self._value[part]

    def of(self, feature: int, train: int, held_out: int) -> tuple[Half, Half]:
        """Examples for learning and for judging: as many firings as these at most, and as many negatives."""
        rng = np.random.default_rng([self.seed, feature])
        windows = self._firings(feature)
        side = self.text.held_out[self.text.row[windows.centre]]
        found: list[Half] = []
        for which, count in ((False, train), (True, held_out)):
            mine = rng.permutation(np.flatnonzero(side == which))[:count]
            fires = Windows(windows.tokens[mine], windows.values[mine])
            found.append(Half(fires, *self._negatives(feature, fires, int(which), count, rng)))
        return found[0], found[1]

    def _firings(self, feature: int) -> Windows:
        """All known firings: the drawn ones, and those in the sample."""
        token, _ = self.code(feature)
        known = self._drawn[feature] >= 0
        drawn, around = self._drawn[feature][known], self._around[feature][known]
        apart = ~np.isin(drawn, token)
        tokens = np.concatenate([drawn[apart], token])
        windows = self.text.windows(tokens, counted=True)
        values = np.concatenate([around[apart], self._values(feature, windows[apart.sum() :])])
        return Windows(windows, np.where(windows >= 0, values, 0))

    def _values(self, feature: int, tokens: Int[ndarray, "*t"]) -> Float[ndarray, "*t"]:
        """Activations at sampled tokens."""
        token, value = self.code(feature)
        if not len(token):
            return np.zeros(tokens.shape, np.float32)
        at = np.searchsorted(token, tokens).clip(max=len(token) - 1)
        return np.where(token[at] == tokens, value[at], 0)

    def _negatives(
        self, feature: int, fires: Windows, half: int, count: int, rng: np.random.Generator
    ) -> tuple[Windows, Windows]:
        """Similar negatives, at most half of `count`, and others to make up `count`."""
        tokens, starts = self._by_string[half]
        strings, often = np.unique(self.text.ids[fires.centre], return_counts=True)
        strings = strings[(-often).argsort(kind="stable")[:STRINGS]]
        each = -(-4 * count // max(1, len(strings)))
        pools = [rng.permutation(tokens[starts[s] : starts[s + 1]])[:each] for s in strings]
        similar = self._quiet(feature, rng.permutation(np.concatenate([tokens[:0], *pools])), count // 2)
        pool = self.sampled[half]
        random = pool[rng.integers(len(pool), size=min(4 * count, len(pool)))] if len(pool) else pool
        return similar, self._quiet(feature, np.setdiff1d(random, similar.centre), count - len(similar), rng)

    def _quiet(
        self, feature: int, tokens: Int[ndarray, " t"], count: int, rng: np.random.Generator | None = None
    ) -> Windows:
        """The first `count` of the tokens in whose windows the feature does not fire; in random order with `rng`."""
        tokens = tokens if rng is None else rng.permutation(tokens)
        windows = self.text.windows(tokens, counted=True)
        fires, _ = self.code(feature)
        low = np.where(windows >= 0, windows, np.iinfo(np.int64).max).min(1, initial=np.iinfo(np.int64).max)
        high = windows.max(1, initial=-1)
        silent = np.searchsorted(fires, low) == np.searchsorted(fires, high, side="right")
        chosen = windows[silent][:count]
        return Windows(chosen, np.zeros(chosen.shape, np.float32))

    def contexts(self, windows: Windows, group: str) -> list[Context]:
        """Examples as they are shown."""
        pairs = zip(windows.tokens, windows.values, strict=True)
        return [self.statistics.context(tokens, values, group) for tokens, values in pairs]
