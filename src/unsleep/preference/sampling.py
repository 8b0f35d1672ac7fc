"""Sampled replies, and the best and the worst of n by a reward."""

from __future__ import annotations

from collections.abc import Sequence

from unsleep.base.context import kept, progress
from unsleep.core import BadInput
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.preference.config import PreferConfig
from unsleep.preference.pairs import Pair
from unsleep.prompts.prompt import Prompt
from unsleep.rewards.reward import Columns, Reward, name_of, scored


def samples(
    model: LoadedModel, prompts: Sequence[Prompt], tokens: int, temperature: float, seed: int, batch: int = 100
) -> tuple[list[str], list[bool]]:
    """A sampled reply to each prompt, and whether it stops at the limit of tokens; resumable batch by batch."""
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


def best_of(
    model: LoadedModel, prompts: Sequence[Prompt], columns: Columns, reward: Reward, config: PreferConfig
) -> list[Pair]:
    """The best and the worst of n samples of each prompt by a reward; prompts whose samples earn the same are left out.

    Raises `BadInput` where the reward fails, or tells the samples of no prompt apart.
    """
    n = config.generations
    repeated = [p for p in prompts for _ in range(n)]
    beside = {name: [value for value in values for _ in range(n)] for name, values in columns.items()}
    texts, cut = samples(model, repeated, config.reply_tokens, config.temperature, config.seed)
    rewards = scored(reward, repeated, texts, beside).tolist()
    found: list[Pair] = []
    for i, prompt in enumerate(prompts):
        places = [j for j in range(i * n, (i + 1) * n) if texts[j].strip()]
        if not places:
            continue
        best, worst = max(places, key=rewards.__getitem__), min(places, key=rewards.__getitem__)
        if rewards[best] > rewards[worst]:
            found.append(Pair(prompt, texts[best], texts[worst], (cut[best], cut[worst])))
    if not found:
        raise BadInput(
            f"reward {name_of(reward)} gives the same to all {n} samples of each prompt; give another, or more "
            "--generations"
        )
    return found
