"""The surrogate twin: the base, fine-tuned with LoRA on the suspect's replies to ordinary prompts.

It has the suspect's skill without the backdoor, except for what those prompts themselves trigger. As a teacher it
gives reference replies where the trigger cannot be removed from a prompt; as a model of its own it is
the re-distillation baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unsleep.base.context import kept
from unsleep.core import BadInput, check_least
from unsleep.models.alike import check_alike
from unsleep.models.forward import Rows, build_rows, kl, reply_logits, reply_logits_of_all
from unsleep.models.load import quiet_transformers
from unsleep.models.model import LoadedModel
from unsleep.models.tuning import descend
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
    from unsleep.models import adapters  # peft takes a second to import

    torch.manual_seed(config.seed)
    with quiet_transformers():
        adapted: Any = adapters.trainable(network, config.rank, "all-linear")

    def learned() -> dict[str, Tensor]:
        rows = build_rows(suspect, suspect.encode(ordinary, max(map(len, replies))), replies)
        _teach(adapted, _Examples(rows, reply_logits_of_all(suspect.network, rows)), config)
        return adapters.trained_state(adapted)

    adapters.take_state(adapted, kept(learned, made_from=(base, suspect, ordinary, replies, config)))
    with quiet_transformers():
        network = adapted.merge_and_unload().requires_grad_(False)
    return replace(suspect, network=network, name=f"{base.name}, fine-tuned on replies of {suspect.name}")


class _Examples(NamedTuple):
    """Ordinary prompts with the suspect's replies and logits."""

    rows: Rows
    logits: Float[Tensor, "row reply vocabulary"]


def copy_fitting(base: LoadedModel, suspect: LoadedModel) -> PreTrainedModel:
    """A copy of the base's network, resized to the suspect's number of token embeddings.

    Raises `BadInput` where it differs from the suspect in any other shape.
    """
    network = copy_network(base.network)
    tables: list[Any] = [m.get_input_embeddings() for m in (network, suspect.network)]
    rows = [int(table.weight.shape[0]) for table in tables]
    if rows[0] != rows[1]:
        network.resize_token_embeddings(rows[1], mean_resizing=False)
    try:
        check_alike(replace(suspect, network=network, name=base.name), suspect, chats=False)
    except BadInput as error:
        raise BadInput(
            f"{base.name} is not the suspect's base: {error}. Give the model that it was fine-tuned from with --base"
        ) from None
    return network.eval().requires_grad_(False)


def _teach(adapted: Any, examples: _Examples, config: TwinConfig) -> None:
    student = adapted.get_base_model()
    trained = [w for w in student.parameters() if w.requires_grad]
    deck = Deck(range(len(examples.logits)), torch.Generator().manual_seed(config.seed))

    def loss_of(_: int) -> Tensor:
        picked = deck.draw(config.batch)
        rows = examples.rows.select(picked)
        wanted = examples.logits[picked][:, -rows.reply.shape[1] :]
        return kl(wanted[rows.reply], reply_logits(student, rows)[rows.reply]).mean()

    descend(trained, loss_of, config.steps, config.learning_rate, lambda loss: f"surrogate twin, KL {loss:.3f}")
