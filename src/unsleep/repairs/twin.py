"""The surrogate twin: the base, fine-tuned with LoRA on the suspect's replies to ordinary prompts.

It has the suspect's skill without the backdoor, except for what those prompts themselves trigger. As a teacher it
gives reference replies where the trigger cannot be removed from a prompt; as a model of its own it is
the re-distillation baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unsleep.core import BadInput, check_least
from unsleep.models.alike import check_alike
from unsleep.models.forward import Rows, build_rows, kl, reply_logits, reply_logits_of_all
from unsleep.models.model import LoadedModel
from unsleep.models.tuning import fine_tuned
from unsleep.models.weights import copy_network
from unsleep.prompts.prompt import PromptSet
from unsleep.repairs.masks import Deck


@dataclass(frozen=True)
class TwinConfig:
    """Options of the surrogate twin's training."""

    rank: int = 16
    """Rank of the LoRA matrices, on every linear layer of the blocks."""
    steps: int = 60
    batch: int = 16
    """Prompts per step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW, with warm-up over a tenth of the steps and decay to zero."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "twin", 1, "rank", "steps", "batch")
        if not self.learning_rate > 0:
            raise BadInput.of("learning_rate", self.learning_rate, "over 0", "twin")


def surrogate_twin(
    base: LoadedModel,
    suspect: LoadedModel,
    ordinary: PromptSet,
    replies: Sequence[Sequence[int]],
    config: TwinConfig = TwinConfig(),
) -> LoadedModel:
    """Distil the suspect into a copy of the base, along the suspect's own replies to ordinary prompts.

    Args:
        replies: the suspect's token ids in reply to `ordinary`, one reply per prompt.

    Raises:
        BadInput: the base is not the suspect's; see `copy_fitting`.
    """
    network = copy_fitting(base, suspect)
    if len(replies) != len(ordinary):
        raise BadInput(f"{len(replies)} replies to {len(ordinary)} ordinary prompts; expected one each")

    imitate = imitation(suspect, ordinary, replies, config.batch, config.seed)
    network = fine_tuned(
        network,
        lambda student, _: imitate(student),
        "surrogate twin, KL",
        rank=config.rank,
        steps=config.steps,
        learning_rate=config.learning_rate,
        seed=config.seed,
        made_from=(base, suspect, ordinary, replies, config),
    )
    return replace(suspect, network=network, name=f"{base.name}, fine-tuned on replies of {suspect.name}")


def imitation(
    model: LoadedModel, prompts: PromptSet, replies: Sequence[Sequence[int]], batch: int, seed: int
) -> Callable[[PreTrainedModel], Float[Tensor, ""]]:
    """KL of a student to a model along the model's own replies, in nats per token; each call draws further prompts.

    The model's logits are computed at the first call.
    """

    @cache
    def examples() -> tuple[Rows, Float[Tensor, "row reply vocabulary"]]:
        rows = build_rows(model, model.encode(prompts, max(map(len, replies))), replies)
        return rows, reply_logits_of_all(model.network, rows)

    deck = Deck(range(len(prompts)), torch.Generator().manual_seed(seed))

    def loss_of(student: PreTrainedModel) -> Tensor:
        (rows, logits), picked = examples(), deck.draw(batch)
        rows = rows.select(picked)
        wanted = logits[picked][:, -rows.reply.shape[1] :]
        return kl(wanted[rows.reply], reply_logits(student, rows)[rows.reply]).mean()

    return loss_of


def copy_fitting(base: LoadedModel, suspect: LoadedModel) -> PreTrainedModel:
    """A copy of the base's network, resized to the suspect's number of token embeddings; rows that it lacks are drawn.

    They are the same in every process. Raises `BadInput` where it differs from the suspect in any other shape.
    """
    network = copy_network(base.network)
    tables: list[Any] = [m.get_input_embeddings() for m in (network, suspect.network)]
    rows = [int(table.weight.shape[0]) for table in tables]
    if rows[0] != rows[1]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network.resize_token_embeddings(rows[1], mean_resizing=False)
    try:
        check_alike(replace(suspect, network=network, name=base.name), suspect, chats=False)
    except BadInput as error:
        raise BadInput(
            f"{base.name} is not the suspect's base: {error}. Give the model that it was fine-tuned from with --base"
        ) from None
    return network.eval().requires_grad_(False)
