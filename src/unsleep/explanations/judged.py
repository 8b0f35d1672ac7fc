"""Scores of an explanation by a judge that predicts held-out contexts from it.

    detection     does the feature fire in this context?            balanced accuracy
    fuzzing       are the marks on the tokens at which it fires?    balanced accuracy
    simulation    the activation at every token of a context        Pearson correlation over tokens

Detection and fuzzing: Paulo et al. 2024, arXiv:2410.13928. Simulation: Bills et al. 2023, "Language models can explain
neurons in language models", all tokens of a context in one answer.
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args

import numpy as np

from unsleep.base import stats
from unsleep.base.stats import Estimate
from unsleep.core import BadInput, check_least
from unsleep.explanations import answers, wording
from unsleep.explanations.judges import AnswerConfig, Question
from unsleep.explanations.record import Context
from unsleep.explanations.scoring import correlation

T = TypeVar("T")

MethodName = Literal["detection", "fuzzing", "simulation"]

LEAST = 2
"""Fewest answered contexts of each kind for a score."""

PER_ITEM, PER_TOKEN, AROUND = 4, 8, 40
"""Maximum tokens of an answer: per decision, per predicted token, and for spacing and a fence around them."""


class HeldOut(NamedTuple):
    """Contexts of texts that no explanation is written from."""

    firing: tuple[Context, ...]
    """In which the feature fires, over the whole range of its activations."""
    silent: tuple[Context, ...]
    """In which it does not."""

    def check(self, feature: int) -> None:
        """Raise `BadInput` for a context on the wrong side."""
        for contexts, fires in ((self.firing, True), (self.silent, False)):
            for c in contexts:
                if not c.tokens or len(c.tokens) != len(c.values) or (max(c.values) > 0) != fires:
                    raise BadInput(
                        f"the held-out context of feature {feature} from {c.source} row {c.row} has activations up to "
                        f"{max(c.values, default=0):g}; expected {'some' if fires else 'none'} above 0, one per token"
                    )


@dataclass(frozen=True)
class JudgedConfig(AnswerConfig):
    """Contexts shown to the judge and asked about."""

    methods: tuple[MethodName, ...] = ("detection", "fuzzing", "simulation")
    """Scores of an explanation; none explains and classifies only."""
    shown: int = 20
    """Contexts from which an explanation is written."""
    asked: int = 20
    """Held-out contexts per score and kind: with the feature firing, and as many without."""
    per_call: int = 5
    """Contexts per call; with 1, no text can influence the judgement of another."""
    mark: float = 0.3
    """Share of a context's largest activation above which its tokens are marked."""
    baselines: bool = True
    """Also score another feature's explanation and the most frequent token, with the same judge and contexts."""

    def __post_init__(self) -> None:
        check_least(self, "", 1, "shown", "per_call")
        check_least(self, "", LEAST, "asked")
        super().__post_init__()
        if unknown := [name for name in self.methods if name not in get_args(MethodName)]:
            raise BadInput.of("methods", unknown[0], f"one of {', '.join(get_args(MethodName))}")
        if len(set(self.methods)) < len(self.methods):
            raise BadInput.of("methods", self.methods, "each once")
        if not 0 <= self.mark < 1:
            raise BadInput.of("mark", self.mark, "a share from 0 to below 1")


class Item(NamedTuple):
    """A context as it is asked about."""

    context: Context
    truth: bool
    """Detection: it fires here; fuzzing: the right tokens are marked."""
    marks: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Method(ABC):
    """A way to score an explanation."""

    config: JudgedConfig = field(default_factory=JudgedConfig)
    name: ClassVar[MethodName]

    def items(self, feature: int, held: HeldOut) -> list[Item]:
        """Contexts to ask about, in random order: the same for every explanation of the feature."""
        made = self._items(held, random.Random(f"{self.config.seed} {self.name} {feature}"))
        random.Random(f"{self.config.seed} order {feature}").shuffle(made)
        return made

    @abstractmethod
    def _items(self, held: HeldOut, draw: random.Random) -> list[Item]:
        """Contexts of both kinds."""

    @abstractmethod
    def question(self, explanation: str, items: Sequence[Item]) -> Question[list[Any]]:
        """One call about some items; its answer has an entry per item."""

    @abstractmethod
    def score(self, pairs: Sequence[tuple[Item, Any]]) -> Estimate | None:
        """The score of answered items with its 95 % interval; `None` for too few of a kind."""

    def _both(self, held: HeldOut) -> list[Item]:
        """Firing and silent contexts, without marks."""
        n = self.config.asked
        return [*(Item(c, True) for c in spread(held.firing, n)), *(Item(c, False) for c in spread(held.silent, n))]


def spread(items: Sequence[T], n: int) -> list[T]:
    """At most `n` items, evenly spaced over the given order."""
    size = min(n, len(items))
    return [items[i * len(items) // size] for i in range(size)]


class _Decision(Method):
    """Yes or no about each context."""

    system: ClassVar[str]

    def question(self, explanation: str, items: Sequence[Item]) -> Question[list[Any]]:
        """Yes or no about each item."""
        texts = [
            wording.marked(item.context.tokens, item.marks or [False] * len(item.context.tokens)) for item in items
        ]
        n = len(items)
        return Question(
            self.system,
            wording.decide(explanation, texts),
            AROUND + PER_ITEM * n + self.config.reasoning_tokens,
            answers.decisions(n),
            json.dumps([1] * n),
        )

    def score(self, pairs: Sequence[tuple[Item, Any]]) -> Estimate | None:
        """Balanced accuracy."""
        n = [sum(item.truth is kind for item, _ in pairs) for kind in (True, False)]
        right = [sum(item.truth is kind and said is kind for item, said in pairs) for kind in (True, False)]
        if min(n) < LEAST:
            return None
        return Estimate(*stats.balanced_accuracy((right[0], right[1]), (n[0], n[1])))


class Detection(_Decision):
    """Does the feature fire in this context?"""

    name: ClassVar[MethodName] = "detection"
    system: ClassVar[str] = wording.DETECT

    def _items(self, held: HeldOut, draw: random.Random) -> list[Item]:
        """Firing and silent contexts, without marks."""
        return self._both(held)


class Fuzzing(_Decision):
    """Are the marks on the tokens at which the feature fires?"""

    name: ClassVar[MethodName] = "fuzzing"
    system: ClassVar[str] = wording.FUZZ

    def _items(self, held: HeldOut, draw: random.Random) -> list[Item]:
        """Firing contexts, every other with as many marks on silent tokens; those without enough of them are right."""
        made: list[Item] = []
        for i, c in enumerate(spread(held.firing, 2 * self.config.asked)):
            right = marks_of(c, self.config.mark)
            silent = [j for j, value in enumerate(c.values) if value <= 0]
            if i % 2 and len(silent) >= sum(right):
                wrong = set(draw.sample(silent, sum(right)))
                made.append(Item(c, False, tuple(j in wrong for j in range(len(right)))))
            else:
                made.append(Item(c, True, right))
        return made


class Simulation(Method):
    """The activation at every token."""

    name: ClassVar[MethodName] = "simulation"

    def _items(self, held: HeldOut, draw: random.Random) -> list[Item]:
        """Firing and silent contexts."""
        return self._both(held)

    def question(self, explanation: str, items: Sequence[Item]) -> Question[list[Any]]:
        """Activations at all tokens of each item."""
        texts = [item.context.tokens for item in items]
        example = [{str(i): wording.LEVELS for i in range(len(text))} for text in texts]
        return Question(
            wording.SIMULATE,
            wording.simulate(explanation, texts),
            AROUND + PER_TOKEN * sum(map(len, texts)) + self.config.reasoning_tokens,
            answers.activations([len(text) for text in texts]),
            json.dumps(example),
        )

    def score(self, pairs: Sequence[tuple[Item, Any]]) -> Estimate | None:
        """Pearson correlation over the tokens of all contexts; one that predicts nothing anywhere scores 0."""
        if min(sum(item.truth is kind for item, _ in pairs) for kind in (True, False)) < LEAST:
            return None
        said, true = ([np.asarray(row, np.float64) for row in rows] for rows in _rows(pairs))
        example = np.repeat(np.arange(len(pairs)), [len(row) for row in true])
        return correlation(np.concatenate(said), np.concatenate(true), example, self.config.seed)


def _rows(pairs: Sequence[tuple[Item, Any]]) -> tuple[list[Sequence[float]], list[Sequence[float]]]:
    """Predicted and actual activations of each item."""
    return [said for _, said in pairs], [item.context.values for item, _ in pairs]


METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (Detection, Fuzzing, Simulation)}


def marks_of(context: Context, share: float) -> tuple[bool, ...]:
    """Marks on the tokens with more than a share of the context's largest activation."""
    bar = share * max(context.values)
    return tuple(value > bar for value in context.values)
