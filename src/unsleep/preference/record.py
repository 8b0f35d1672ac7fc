"""Records of preference training: preference.json and reward_model.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

from unsleep.base.records import Count, Range, Share
from unsleep.base.stats import Estimate
from unsleep.models.model import Named
from unsleep.preference.config import PreferConfig, RewardModelConfig


class Logged(NamedTuple):
    """Figures of a training step by name, such as loss, reward, kl, accuracy and margin."""

    step: int
    figures: dict[str, float]


class Source(NamedTuple):
    """The data of a training."""

    name: str
    """File or data set."""
    hash: str
    train: Count
    """Pairs, or prompts, trained on."""
    held_out: Count
    dropped: Count
    """Pairs left out because a side was empty or both were equal."""
    tied: Count = 0
    """Prompts of best-of-n that it learns nothing from: all samples are empty or earn the same."""


@dataclass(frozen=True)
class Judged:
    """A reward, or a metric, of greedy replies before and after training, on the same prompts."""

    name: str
    before: Estimate
    after: Estimate
    gain: Estimate
    """Mean difference after − before with its paired bootstrap interval."""
    judging: bool
    """True if it was not trained on."""


@dataclass(frozen=True)
class Measured:
    """A model before and after training on prompts that it was not trained on."""

    prompts: str
    """Hash of the prompts."""
    n: Annotated[int, Range(2)]
    rewards: tuple[Judged, ...]
    metrics: tuple[Judged, ...]
    words: Estimate
    """Mean words of a reply, after over before."""
    kl: Estimate
    """KL(trained ‖ base) in nats per token, along the trained model's replies."""
    examples: tuple[tuple[str, str, str], ...]
    """Prompt, reply before and reply after, of a few prompts."""


@dataclass(frozen=True)
class PreferenceRecord:
    """preference.json, beside the adapter or checkpoint that was trained."""

    SCHEMA: ClassVar = "unsleep.preference/1"

    config: PreferConfig
    base: Named
    trained: str
    """Fingerprint of the trained model."""
    template: str
    """Hash of the chat template."""
    reward: str | None
    """Name of the reward that was trained on; `None` for pairs."""
    data: Source
    measured: Measured | None
    """`None` where no reward or metric was given."""
    history: tuple[Logged, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Ranking:
    """Agreement of a reward model with the labels of pairs."""

    accuracy: Estimate
    """Share of pairs ranked as labelled, a tie as half, with its interval: Wilson's, or by bootstrap over what
    pairs share: their column `topic`, else their prompts."""
    margin: float
    """Mean difference of both rewards."""
    ties: Share
    n: Annotated[int, Range(1)]


@dataclass(frozen=True)
class RewardModelRecord:
    """reward_model.json, beside the adapter with its head, or the checkpoint."""

    SCHEMA: ClassVar = "unsleep.reward_model/1"

    config: RewardModelConfig
    base: Named
    template: str
    """Hash of the chat template."""
    data: Source
    held_out: Ranking
    """On pairs with other prompts than those trained on."""
    history: tuple[Logged, ...]
    provenance: dict[str, Any]
