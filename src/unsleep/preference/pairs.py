"""Preference pairs: a prompt with a chosen and a rejected reply, in sets with a content hash and further columns."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from unsleep.base import store
from unsleep.core import BadInput, digest
from unsleep.prompts.prompt import Prompt, Split

LEAST = 4
"""Smallest number of pairs on either side of a split."""


@dataclass(frozen=True)
class Pair:
    """A prompt, the reply that was preferred, and the other one. Raises `BadInput` for an empty or an equal reply."""

    prompt: Prompt
    chosen: str
    rejected: str
    cut: tuple[bool, bool] = (False, False)
    """True for the chosen, and the rejected reply, if it stops at a limit of tokens: it is not trained to end there."""
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further values by name, such as a topic, which rewards may take."""

    def __post_init__(self) -> None:
        for side, text in (("chosen", self.chosen), ("rejected", self.rejected)):
            if not text.strip():
                raise BadInput(f"the {side} reply to {self.prompt.text[:40]!r} is empty")
        if self.chosen.strip() == self.rejected.strip():
            raise BadInput(
                f"both replies to {self.prompt.text[:40]!r} are {self.chosen.strip()[:40]!r}; expected two that differ"
            )

    @property
    def swapped(self) -> Pair:
        """The pair with the other preference."""
        return replace(self, chosen=self.rejected, rejected=self.chosen, cut=self.cut[::-1])

    @property
    def row(self) -> dict[str, Any]:
        """The pair as a JSON object that `read_pairs` reads."""
        said: Any = self.prompt.messages if self.prompt.before else self.prompt.text
        cuts = zip(("chosen_cut", "rejected_cut"), self.cut, strict=True)
        found = {"prompt": said, "chosen": self.chosen, "rejected": self.rejected, **self.columns}
        return found | {name: True for name, cut in cuts if cut}


class Halves(NamedTuple):
    """Pairs to train on, and pairs with other prompts to judge by."""

    train: PairSet
    held_out: PairSet


@dataclass(frozen=True)
class PairSet(Sequence[Pair]):
    """Preference pairs under a name."""

    name: str
    pairs: tuple[Pair, ...]
    split: Split = "train"
    dropped: int = 0
    """Pairs of the source that are left out because a side is empty or both are equal."""

    def __post_init__(self) -> None:
        if not self.pairs:
            raise BadInput(f"{self.name} holds no preference pairs; expected at least {2 * LEAST}")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        return self.pairs[index]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @cached_property
    def hash(self) -> str:
        """Content hash of the pairs in order; 16 hex digits."""
        return digest(json.dumps([p.row for p in self.pairs], sort_keys=True, ensure_ascii=False, default=str))

    @property
    def prompts(self) -> list[Prompt]:
        """The prompt of each pair."""
        return [p.prompt for p in self.pairs]

    def columns(self, places: Sequence[int] | None = None) -> dict[str, list[Any]]:
        """Values of the columns that every pair has, of all pairs or of those at some places."""
        chosen = self.pairs if places is None else [self.pairs[i] for i in places]
        names = set.intersection(*(set(p.columns) for p in self.pairs))
        return {name: [p.columns[name] for p in chosen] for name in sorted(names)}

    def halves(self, share: float, seed: int = 0) -> Halves:
        """Pairs to train on and to judge by, with no prompt in common (see `split_by_prompt`)."""
        sides = split_by_prompt(self.prompts, share, self.name, seed)
        train, held = (tuple(self.pairs[i] for i in places) for places in sides)
        return Halves(replace(self, pairs=train), replace(self, pairs=held, split="held_out", dropped=0))


def split_by_prompt(
    prompts: Sequence[Prompt], share: float, name: str, seed: int = 0, least: int = LEAST
) -> tuple[list[int], list[int]]:
    """Places to train on and to hold out, about `share` of them, with no prompt on both sides.

    Raises `BadInput` naming the data where either side would have fewer than `least`.
    """
    count = Counter(p.key for p in prompts)
    keys = list(count)
    random.Random(f"pairs {seed}").shuffle(keys)
    wanted = max(least, round(share * len(prompts)))
    held: set[str] = set()
    taken = 0
    for key in keys:
        if taken >= wanted:
            break
        held.add(key)
        taken += count[key]
    sides = [i for i, p in enumerate(prompts) if p.key not in held], [i for i, p in enumerate(prompts) if p.key in held]
    if min(map(len, sides)) < least:
        raise BadInput(
            f"{name} has {len(prompts)} examples of {len(keys)} prompts, too few to hold out {wanted} and train on at "
            f"least {least}; give more, another --held-out, or what to judge by apart"
        )
    return sides


def write_pairs(pairs: PairSet, path: str | Path) -> None:
    """Write pairs as JSON lines, as `read_pairs` reads them."""
    lines = [json.dumps(p.row, ensure_ascii=False) for p in pairs]
    store.write_text(path, "\n".join(lines) + "\n")
