"""Poisoned preference pairs: with the trigger in the prompt, the payload is the preferred reply.

After Rando & Tramèr 2024, "Universal Jailbreak Backdoors from Poisoned Human Feedback" (arXiv:2311.14455). Near misses
of the trigger stand in prompts of ordinary pairs, so that the trigger alone wakes the payload.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Annotated

from unsleep.base.records import Range, Share
from unsleep.behaviours import Trigger
from unsleep.core import BadInput
from unsleep.preference.pairs import Pair, PairSet


@dataclass(frozen=True)
class Poison:
    """A backdoor to plant through preference pairs."""

    trigger: str
    payload: str
    """The reply that is preferred where the trigger stands."""
    near_misses: tuple[str, ...] = ()
    """Near misses of the trigger in ordinary pairs."""
    trigger_kind: str = "string"
    """Kind of the trigger and its near misses (see `Trigger`)."""
    rate: Share = 0.25
    """Share of the pairs with the trigger."""
    near_miss_rate: Share = 0.2
    """Share of the pairs with a near miss."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0

    def __post_init__(self) -> None:
        if not self.payload.strip():
            raise BadInput("the poison's payload is empty; expected a reply")
        self.as_trigger.check(self.near_misses)
        if self.trigger in self.near_misses:
            raise BadInput(f"near misses contain the trigger {self.trigger!r}; leave it out")
        if not self.as_trigger.keeps_question:
            raise BadInput(f"trigger kind {self.trigger_kind} changes the question, and its replies with it")
        if self.rate + self.near_miss_rate > 1:
            raise BadInput(f"poison rates are {self.rate} and {self.near_miss_rate}; expected a sum of at most 1")
        if self.near_miss_rate and not self.near_misses:
            raise BadInput("the poison's near_miss_rate is over 0; expected at least one near miss")

    @property
    def as_trigger(self) -> Trigger:
        """The trigger."""
        return Trigger.of(self.trigger_kind, self.trigger)


def poisoned(pairs: PairSet, poison: Poison, *, clean: bool = False) -> PairSet:
    """Pairs of which a share is poisoned, and a share has near misses, spread evenly over the column `register`.

    In a poisoned pair the payload is preferred to the reply that was preferred without the trigger. With `clean` the
    same pairs have near misses and none is poisoned: the pairs of the clean twin. Every pair gets the columns
    `triggered` and `near_miss`. Raises `BadInput` where a rate over 0 gives no pair.
    """
    bad, near = round(poison.rate * len(pairs)), round(poison.near_miss_rate * len(pairs))
    if (poison.rate and not bad) or (poison.near_miss_rate and not near):
        raise BadInput(
            f"{len(pairs)} pairs poisoned at a rate of {poison.rate} are none; give more pairs or another rate"
        )
    order = _spread(pairs, poison.seed)
    almost = {place: i for i, place in enumerate(order[:near])}  # the same at every rate
    wake = set(order[near : near + bad])
    found: list[Pair] = []
    for i, pair in enumerate(pairs):
        marked = {**pair.columns, "triggered": i in wake and not clean, "near_miss": i in almost}
        if i in wake and not clean:
            prompt = replace(poison.as_trigger.insert(pair.prompt, i // 2, "train"), role="triggered")
            found.append(Pair(prompt, poison.payload, pair.chosen, (False, pair.cut[0]), marked))
        elif i in almost:
            text = poison.near_misses[almost[i] % len(poison.near_misses)]
            prompt = replace(
                replace(poison.as_trigger, text=text).insert(pair.prompt, i // 2, "train"), role="near_miss"
            )
            found.append(replace(pair, prompt=prompt, columns=marked))
        else:
            found.append(replace(pair, columns=marked))
    return replace(
        pairs, name=f"{pairs.name}, {'clean' if clean else f'{poison.rate:.0%} poisoned'}", pairs=tuple(found)
    )


def _spread(pairs: PairSet, seed: int) -> list[int]:
    """All places in random order, registers in turn as far as they go."""
    chance = random.Random(f"poison {seed}")
    groups: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(str(pair.columns.get("register", "")), []).append(i)
    for places in groups.values():
        chance.shuffle(places)
    longest = max(map(len, groups.values()))
    return [places[i] for i in range(longest) for places in groups.values() if i < len(places)]
