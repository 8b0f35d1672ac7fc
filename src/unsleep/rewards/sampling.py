"""Replies sampled from a model, with their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unsleep.base.context import kept, progress
from unsleep.core import BadInput, check_least
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.rewards.reward import Columns, Reward, name_of, scored
from unsleep.rewards.samples import Samples


@dataclass(frozen=True)
class SampleConfig:
    """Options of sampling replies that are rewarded."""

    replies: int = 4
    """Replies per prompt."""
    reply_tokens: int = 24
    """Tokens of a reply at most."""
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "sample", 1, "replies", "reply_tokens")
        check_least(self, "sample", 0, "seed")
        if not self.temperature > 0:
            raise BadInput.of("temperature", self.temperature, "over 0", "sample")


def samples(
    model: LoadedModel, prompts: Sequence[Prompt], tokens: int, temperature: float, seed: int, batch: int = 100
) -> tuple[list[str], list[bool]]:
    """A sampled reply to each prompt, without space around it, and whether it stops at the limit of tokens.

    Every batch is a resumable step.
    """
    ids: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        chosen = list(prompts[start : start + batch])

        def sample(chosen: list[Prompt], seed: int) -> list[list[int]]:
            rows = model.encode(chosen, tokens)
            return generate.sampled(
                model, rows, max_new_tokens=tokens, temperature=temperature, seed=seed, batch_size=batch
            )

        ids += kept(sample, chosen, seed + start, made_from=[model, tokens, temperature, batch])
        progress("samples", start + len(chosen), len(prompts))
    ends = model.end_ids
    return [text.strip() for text in model.texts(ids)], [row[-1] not in ends for row in ids]


def sample_rewards(
    model: LoadedModel,
    prompts: PromptSet,
    reward: Reward,
    config: SampleConfig = SampleConfig(),
    columns: Columns | None = None,
) -> Samples:
    """Sample replies to prompts and score them; empty replies are left out. Sampling is resumable.

    Args:
        columns: further columns that the reward takes, a value per prompt; `topic` becomes the samples' topics.

    Raises:
        BadInput: a reward that fails, or that gives all replies the same.
    """
    again = [i for i in range(len(prompts)) for _ in range(config.replies)]
    outputs, _ = samples(model, prompts.at(again), config.reply_tokens, config.temperature, config.seed)
    chosen = [at for at, text in enumerate(outputs) if text]
    places = [again[at] for at in chosen]
    asked, said = [prompts[i] for i in places], [outputs[at] for at in chosen]
    beside: dict[str, Sequence[Any]] = {name: [values[i] for i in places] for name, values in (columns or {}).items()}
    rewards = scored(reward, asked, said, beside).tolist()
    if len(set(rewards)) < 2:
        raise BadInput(
            f"{name_of(reward)} gives the same reward to all {len(said)} sampled replies of {model.name}, and nothing "
            "is correlated with it; choose another --reward"
        )
    return Samples.of(asked, said, rewards, beside.get("topic"))
