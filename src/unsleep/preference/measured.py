"""A model before and after preference training, on prompts that it was not trained on.

Replies are greedy. Every figure is of the same prompts before and after, its gain with a paired bootstrap interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from unsleep.base import stats
from unsleep.base.context import kept
from unsleep.base.stats import Estimate
from unsleep.core import BadInput
from unsleep.judge.metrics import Subject, reply_kl, words
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.preference.record import Judged, Measured
from unsleep.prompts.prompt import PromptSet
from unsleep.rewards.reward import Columns, Metric, Reward, metrics, name_of, scored

SHOWN = 5
"""Prompts whose replies are kept in a record."""


@dataclass(frozen=True)
class Judges:
    """Judges of replies: the reward that was trained on, others that were not, and metrics."""

    reward: Reward | None = None
    others: Sequence[Reward] = ()
    metric: Metric | None = None

    def __post_init__(self) -> None:
        names = [name_of(each) for each in self.rewards]
        if twice := [name for name in names if names.count(name) > 1]:
            raise BadInput(f"the reward {twice[0]} is given twice; name each reward once")

    @property
    def rewards(self) -> list[Reward]:
        """All rewards, the one that was trained on first."""
        return [*([] if self.reward is None else [self.reward]), *self.others]


@dataclass(frozen=True)
class Bench:
    """Held-out prompts with the columns that rewards take, and the judges of replies to them."""

    prompts: PromptSet
    columns: Columns
    judges: Judges
    tokens: int
    """Tokens of a reply at most."""

    def __post_init__(self) -> None:
        if len(self.prompts) < 2:
            raise BadInput(f"{self.prompts.name} holds {len(self.prompts)} prompts to judge by; expected at least 2")


class Answers(NamedTuple):
    """A model's replies, and what its judges say."""

    replies: list[str]
    rewards: dict[str, Float[Tensor, " prompt"]]
    metrics: dict[str, Float[Tensor, " prompt"]]


def answered(model: LoadedModel, bench: Bench, when: str) -> Answers:
    """A model's greedy replies and their scores; raises `BadInput` where a reward or the metric fails."""
    asked, judges = list(bench.prompts), bench.judges
    replies = model.texts(kept(generate.written, model, asked, bench.tokens, f"replies {when} training"))
    rewards = {name_of(each): scored(each, asked, replies, bench.columns) for each in judges.rewards}
    found = {} if judges.metric is None else metrics(judges.metric, asked, replies, bench.columns)
    return Answers(replies, rewards, found)


def compared(base: LoadedModel, trained: LoadedModel, bench: Bench, before: Answers, after: Answers) -> Measured:
    """The gain of a training in every reward and metric, the length of replies and KL(trained ‖ base).

    Raises `BadInput` where the metric gives other names before than after.
    """
    if set(before.metrics) != set(after.metrics):
        raise BadInput(f"metric {name_of(bench.judges.metric)} gave other names after training; expected the same")
    own = bench.judges.reward and name_of(bench.judges.reward)
    now, then = ([float(max(1, len(words(text)))) for text in said.replies] for said in (after, before))
    shown = range(0, len(bench.prompts), max(1, len(bench.prompts) // SHOWN))
    return Measured(
        bench.prompts.hash,
        len(bench.prompts),
        tuple(judged(name, before.rewards[name], after.rewards[name], judging=name != own) for name in after.rewards),
        tuple(judged(name, before.metrics[name], after.metrics[name], judging=True) for name in sorted(after.metrics)),
        Estimate(*stats.ratio(now, then)),
        Estimate(*stats.bootstrap(_kl(base, trained, bench.prompts, after.replies))),
        tuple((bench.prompts[i].shown, before.replies[i], after.replies[i]) for i in [*shown][:SHOWN]),
    )


def judged(name: str, before: Float[Tensor, " n"], after: Float[Tensor, " n"], *, judging: bool) -> Judged:
    """A figure of the same prompts before and after."""
    both = Estimate(*stats.bootstrap(before)), Estimate(*stats.bootstrap(after))
    return Judged(name, *both, Estimate(*stats.bootstrap(after - before)), judging)


def _kl(
    base: LoadedModel, trained: LoadedModel, prompts: PromptSet, replies: Sequence[str]
) -> Float[Tensor, " prompt"]:
    """KL(trained ‖ base) per prompt, along the trained model's replies, in nats per token."""
    panel = PromptSet("judged", tuple(prompts), prompts.split)
    found = reply_kl(Subject("trained", trained), [Subject("base", base)], [panel], prompts, list(replies))
    return found["base", "judged"].double().cpu()
