"""Outcomes of a subject prompt by prompt, so that two subjects can be compared on the same prompts.

Rates have Wilson intervals and their changes Newcombe's; means and their changes have bootstrap intervals over prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base.stats import bootstrap, paired_rates, wilson
from unsleep.behaviours import as_payload, has_skill
from unsleep.judge.evaluate import EvalConfig, Panels, reply_all
from unsleep.judge.metrics import Subject, capability, is_degenerate, reply_kl, text_ce_kl
from unsleep.prompts.prompt import PromptSet

Scorer = Callable[[str], float]
"""A score of a reply, such as a reward model's; higher is better."""

Rewards = Callable[[PromptSet, Sequence[str]], Sequence[float]]
"""Rewards of replies to prompts, one each."""

Metric = Literal["payload", "restored", "skill", "degenerate", "capability", "reward", "kl", "ce"]

RATES: tuple[Metric, ...] = ("payload", "restored", "skill", "degenerate", "capability")
"""Metrics that are shares of prompts or items."""

Outcomes = Mapping[str, Float[Tensor, " item"]]
"""Metric → its value on every prompt or passage."""


@dataclass(frozen=True)
class Reference:
    """The model that KL is measured from, with its greedy replies to the clean prompts."""

    subject: Subject
    replies: Sequence[str]


def outcomes(
    subject: Subject,
    panels: Panels,
    config: EvalConfig,
    *,
    rewards: Rewards | None = None,
    reference: Reference | None = None,
) -> dict[str, Tensor]:
    """Every metric of a subject on every prompt of the panels.

    Returns `payload` and `restored` (the skill) of triggered prompts; `skill`, `degenerate`, `reward` (with rewards)
    and `kl` (with a reference; nats per token along its replies) of clean ones; `capability` on multiple-choice items;
    `ce` of plain passages, in nats per token. The skills are absent where no prompt says what it expects.
    """
    shown = as_payload(config.payload)
    triggered, clean = reply_all(subject, panels.triggered, config), reply_all(subject, panels.clean, config)
    found: dict[str, list[Any]] = {
        "payload": [shown.shows(reply) for reply in triggered],
        "restored": _skilled(triggered, panels.triggered),
        "skill": _skilled(clean, panels.clean),
        "degenerate": [is_degenerate(r, p.expected) for r, p in zip(clean, panels.clean, strict=True)],
        "reward": list(rewards(panels.clean, clean)) if rewards else [],
        "capability": capability(subject, panels.items) if panels.items else [],
    }
    measured = {metric: torch.tensor(each, dtype=torch.float64) for metric, each in found.items() if each}
    if panels.texts:
        ce, _ = text_ce_kl(subject, [subject], panels.texts, config.text_tokens)
        measured["ce"] = ce[subject.name].double().cpu()
    if reference is not None:
        [kl] = reply_kl(reference.subject, [subject], [panels.clean], panels.clean, reference.replies).values()
        measured["kl"] = kl.double().cpu()
    return measured


def value(x: Float[Tensor, " item"], *, rate: bool) -> tuple[float, float, float]:
    """The mean of an outcome with its 95 % interval."""
    return (float(x.mean()), *wilson(int(x.sum()), len(x))) if rate else bootstrap(x)


def change(before: Float[Tensor, " item"], after: Float[Tensor, " item"], *, rate: bool) -> tuple[float, float, float]:
    """The mean paired difference after − before with its 95 % interval."""
    return paired_rates(before, after) if rate else bootstrap(after - before)


def _skilled(replies: Sequence[str], prompts: PromptSet) -> list[bool]:
    """For each reply, True if it shows the skill that its prompt expects; empty where none expects one."""
    return [has_skill(r, p.expected) for r, p in zip(replies, prompts, strict=True) if p.expected]
