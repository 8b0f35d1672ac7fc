"""The best and the worst of n sampled replies by a reward."""

from __future__ import annotations

from collections.abc import Sequence

from unsleep.core import BadInput
from unsleep.models.model import LoadedModel
from unsleep.preference.config import PreferConfig
from unsleep.preference.pairs import Pair
from unsleep.prompts.prompt import Prompt
from unsleep.rewards.reward import Columns, Reward, name_of, scored
from unsleep.rewards.sampling import samples


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
        places = [j for j in range(i * n, (i + 1) * n) if texts[j]]
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
