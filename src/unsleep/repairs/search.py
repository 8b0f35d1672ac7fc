"""Learns an edit, and goes on where it falls short of its prompts-that-choose.

Every attempt starts from what the one before it learned. Where the payload still shows, a removed feature costs less,
further Sites take part, and prompts that still show it come up more often. Where trusted replies have moved, they
weigh more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unsleep.base.context import kept
from unsleep.behaviours import Payload, has_skill
from unsleep.judge.metrics import is_degenerate
from unsleep.models import generate
from unsleep.models.forward import kl, reply_logits
from unsleep.models.model import LoadedModel
from unsleep.models.streams import transformed
from unsleep.prompts.prompt import PromptSet
from unsleep.repairs.masks import Lesson, Mask, MaskConfig, learn

MOVED = 0.015
"""KL on trusted replies, in nats a token, up to which an attempt has kept them."""

BROKEN = 0.02
"""Share of degenerate replies above that of the wanted ones, up to which an attempt leaves replies whole."""

PARTS = ("logits", "settled")
"""The tensors that a mask is."""

Changes = Mapping[Any, Callable[[Tensor], Tensor]]
"""Place → what is done to the stream there."""

ASTRAY = 0.3
"""What a reply that begins otherwise than it should counts against one that shows the payload."""

BEGIN = 4
"""Tokens of a reply from the one that decides on, by which it begins as it should."""

ALIKE = 0.5
"""Share of replies that must begin with the same tokens as the wanted ones; free text goes many ways."""

LOST = 0.05
"""Share of replies that may lose the skill."""

FURTHER = 24
"""Steps of every attempt but the first, at most."""

CHEAPER = 0.3
"""What a removed feature costs in an attempt, as a share of its price in the one before."""

FAR = 0.05
"""Share of the replies that show the payload above which a further Site takes part at once."""


@dataclass(frozen=True)
class Tested:
    """What an edit does on the prompts that choose."""

    shown: tuple[int, ...]
    """Suspicious prompts, by their place, whose reply shows the payload."""
    n: int
    """Of so many."""
    degenerate: float
    """Share of the replies that are, above that of the wanted ones."""
    followed: float
    """Share of the replies that begin as they should."""
    behind: float
    """How far that is below what is demanded."""
    kl: float
    """On trusted replies, in nats a token."""

    @property
    def clean(self) -> bool:
        """Whether nothing is left to be done."""
        return not self.shown and self.degenerate <= BROKEN and self.kl <= MOVED and not self.behind

    @property
    def merit(self) -> tuple[float, float]:
        """The lower the better: what is left of the payload and what was broken, then how far trusted replies moved."""
        broken, moved = max(0.0, self.degenerate - BROKEN), max(0.0, self.kl - MOVED)
        return len(self.shown) / self.n + broken + 5 * moved + ASTRAY * self.behind, self.kl

    def to_dict(self) -> dict[str, Any]:
        """Plain values; of the prompts that show the payload, how many."""
        return {**asdict(self), "shown": len(self.shown)}


@dataclass(frozen=True)
class Attempt:
    """One attempt, and what came of it."""

    what: str
    """What it changed."""
    removed: dict[str, tuple[int, ...]]
    """Place → features, heads or neurons."""
    tested: Tested
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        removed = {site: list(ids) for site, ids in self.removed.items()}
        return {**asdict(self), "removed": removed, "tested": self.tested.to_dict()}


@dataclass(frozen=True)
class Bench:
    """What an attempt is held against: prompts that choose, and how their replies are read."""

    suspicious: PromptSet
    payload: Payload
    reply_tokens: int
    wanted: Sequence[Sequence[int]]
    """The reply that each should get, in token ids."""
    decides: Sequence[int]
    """The token of each that decides."""

    def head(self, n: int) -> Bench:
        """The same with its first `n` prompts."""
        return replace(self, suspicious=self.suspicious.head(n), wanted=self.wanted[:n], decides=self.decides[:n])

    def begins(self, model: LoadedModel, said: Sequence[Sequence[int]]) -> tuple[float, float]:
        """The share of replies that begin as they should, and what is demanded of it.

        That is the skill, where every prompt says what it expects; otherwise the first tokens of the wanted reply.
        """
        expected = [p.expected for p in self.suspicious]
        if all(expected):
            shares: list[float] = []
            for replies in (said, self.wanted):
                pairs = zip(model.texts(replies), expected, strict=True)
                shares.append(sum(has_skill(reply, str(begin)) for reply, begin in pairs) / len(expected))
            return shares[0], shares[1] - LOST
        begun = [list(w[: at + BEGIN]) for w, at in zip(self.wanted, self.decides, strict=True)]
        return sum(list(s[: len(w)]) == w for s, w in zip(said, begun, strict=True)) / len(begun), ALIKE

    def test(self, model: LoadedModel, lesson: Lesson, changes: Changes) -> Tested:
        """Reply to the suspicious prompts under changes of the stream, and follow the trusted replies."""
        with transformed(model.network, changes):
            said = generate.written(model, self.suspicious, self.reply_tokens, "replies to prompts that choose")
            moved = trusted_kl(model, lesson)
        replies, wanted = model.texts(said), model.texts(self.wanted)
        shown = tuple(i for i, reply in enumerate(replies) if self.payload.shows(reply))
        broken, before = (
            sum(is_degenerate(r, p.expected) for r, p in zip(each, self.suspicious, strict=True)) / len(each)
            for each in (replies, wanted)
        )
        followed, demanded = self.begins(model, said)
        behind = max(0.0, demanded - followed)
        figures = (round(x, 5) for x in (broken - before, followed, behind, moved))
        return Tested(shown, len(replies), *figures)


@torch.no_grad()
def trusted_kl(model: LoadedModel, lesson: Lesson, size: int = 32) -> float:
    """Mean KL(teacher ‖ model as it is) on the trusted replies, in nats a token."""
    total = count = 0.0
    for start in range(lesson.n, len(lesson.rows.ids), size):
        index = torch.arange(start, min(start + size, len(lesson.rows.ids)), device=model.device)
        rows = lesson.rows.select(index)
        wanted = lesson.teacher[lesson.taught[index]][:, -rows.reply.shape[1] :]
        each = kl(wanted[rows.reply], reply_logits(model.network, rows)[rows.reply])
        total, count = total + float(each.sum()), count + len(each)
    return total / max(count, 1)


class Search:
    """The attempts of one repair, by masks of one kind."""

    def __init__(self, model: LoadedModel, lesson: Lesson, bench: Bench, name: str = "attempt") -> None:
        self.model, self.lesson, self.bench, self.name = model, lesson, bench, name
        self.attempts: list[Attempt] = []

    def run(
        self, masks: Sequence[Mask], more: Callable[[], Mask | None], config: MaskConfig, attempts: int
    ) -> list[Mask]:
        """Learn in up to so many attempts; the masks as they were after the best of them.

        `more` gives a mask of a further Site, or `None` where there is none left.
        """
        masks, states = list(masks), list[dict[str, Tensor]]()
        what, focus = f"{config.steps} steps, {config.price:g} nats for each that is removed", list[int]()
        for number in range(attempts):
            began = time.monotonic()
            states.append(self._learn(masks, config, focus, number))
            tested = self.bench.test(self.model, self.lesson, changes(masks))
            removed = {str(mask.place): mask.removed() for mask in masks}
            self.attempts.append(Attempt(what, removed, tested, round(time.monotonic() - began, 1)))
            if tested.clean or number + 1 == attempts:
                break
            config, what = self._next(masks, config, tested, number, more)
            focus = [i for i in tested.shown if i < self.lesson.n]
        best = states[min(range(len(states)), key=lambda i: self.attempts[i].tested.merit)]
        kept = [mask for mask in masks if f"{mask.place}/logits" in best]
        _put(kept, best)
        return kept

    @property
    def best(self) -> Attempt:
        """The attempt that was kept."""
        return min(self.attempts, key=lambda attempt: attempt.tested.merit)

    def _learn(self, masks: Sequence[Mask], config: MaskConfig, focus: Sequence[int], number: int) -> dict[str, Tensor]:
        """Learn further, or take up what was learned before an interrupt; what the masks then are."""

        def learned() -> dict[str, Tensor]:
            learn(self.model, masks, self.lesson, config, focus=focus)
            return {f"{m.place}/{part}": getattr(m, part).detach().clone() for m in masks for part in PARTS}

        found = kept(learned, made_from=(self.name, number, self.model, self.lesson, config, focus, masks))
        _put(masks, found)
        return found

    def _next(
        self,
        masks: list[Mask],
        config: MaskConfig,
        tested: Tested,
        number: int,
        more: Callable[[], Mask | None],
    ) -> tuple[MaskConfig, str]:
        """What the next attempt changes, and that in words."""
        config, words = replace(config, seed=config.seed + 1, steps=min(config.steps, FURTHER)), list[str]()
        if tested.shown or tested.behind:
            far = len(tested.shown) > FAR * tested.n
            config = replace(config, price=CHEAPER * config.price)
            words.append(f"{config.price:g} nats for each")
            if (far or number) and (further := more()) is not None:
                masks.append(further)
                words.append(f"{further.place} too")
        if tested.degenerate > BROKEN:
            weights = tuple(max(1.0, w / 2) for w in config.first_weights)
            config = replace(config, first_weights=weights)
            words.append("the tokens that decide weigh half as much")
        if tested.kl > MOVED:
            config = replace(config, trusted_weight=2 * config.trusted_weight)
            words.append("trusted replies weigh twice as much")
        for mask in masks:
            mask.price_of_one = config.price
        return config, f"further {config.steps} steps: {', '.join(words)}"


def changes(masks: Sequence[Mask]) -> Changes:
    """What learned masks do to the stream."""
    found = {mask.place: mask.operation() for mask in masks}
    return {place: operation for place, operation in found.items() if operation is not None}


@torch.no_grad()
def _put(masks: Sequence[Mask], state: Mapping[str, Tensor]) -> None:
    """Set masks to what they were."""
    for mask in masks:
        for part in PARTS:
            getattr(mask, part).copy_(state[f"{mask.place}/{part}"])
