"""The surrogate twin: the base, taught by LoRA what the suspect replies to ordinary prompts.

It has the suspect's skill and none of its backdoor, but for what those prompts themselves wake. As a teacher it says
what a repaired model should reply where nothing can be taken out of a suspicious prompt; as a model of its own it is
the repair by distillation that an edit has to be compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unsleep.core import BadInput, Report
from unsleep.models.alike import check_alike
from unsleep.models.forward import build_rows, kl, reply_logits
from unsleep.models.load import quiet_transformers
from unsleep.models.model import LoadedModel
from unsleep.models.weights import copy_network
from unsleep.prompts.prompt import PromptSet
from unsleep.store import NOTHING_KEPT, Steps


@dataclass(frozen=True)
class TwinConfig:
    """How a surrogate twin is taught."""

    rank: int = 16
    """Of the LoRA matrices, over every linear layer of the blocks."""
    steps: int = 120
    batch: int = 16
    """Prompts a step."""
    learning_rate: float = 1e-3
    """AdamW's, after a warm-up over a tenth of the steps and down to zero."""
    seed: int = 0


def surrogate_twin(
    base: LoadedModel,
    suspect: LoadedModel,
    ordinary: PromptSet,
    replies: Sequence[Sequence[int]],
    config: TwinConfig = TwinConfig(),
    *,
    steps: Steps = NOTHING_KEPT,
    report: Report | None = None,
) -> LoadedModel:
    """Teach a copy of the base the suspect's distribution along its own replies to ordinary prompts.

    Args:
        replies: the suspect's token ids in reply to `ordinary`, one reply a prompt.

    Raises:
        BadInput: base and suspect differ in shape or tokens.
    """
    try:
        check_alike(suspect, base, chats=False)
    except BadInput as error:
        raise BadInput(
            f"the base is not the suspect's: {error}. Give the one that it was made from with --base"
        ) from None
    if len(replies) != len(ordinary):
        raise BadInput(f"{len(replies)} replies to {len(ordinary)} ordinary prompts; expected one each")
    from unsleep.models import adapters  # peft takes a second to import

    torch.manual_seed(config.seed)
    with quiet_transformers():
        adapted: Any = adapters.trainable(copy_network(base.network), config.rank, "all-linear")
    prompts = suspect.encode(ordinary, max(map(len, replies)))

    def learned() -> dict[str, Tensor]:
        _teach(adapted, suspect, prompts, replies, config, report)
        return adapters.trained_state(adapted)

    adapters.take_state(adapted, steps.tensors("surrogate twin", learned))
    with quiet_transformers():
        network = adapted.merge_and_unload().requires_grad_(False)
    return replace(suspect, network=network, name=f"{base.name}, taught the replies of {suspect.name}")


def _teach(
    adapted: Any,
    suspect: LoadedModel,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    config: TwinConfig,
    report: Report | None,
) -> None:
    student = adapted.get_base_model()
    trained = [w for w in student.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    warm = max(1, config.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, (config.steps - s) / max(1, config.steps - warm))
    )
    generator = torch.Generator().manual_seed(config.seed)
    order: list[int] = []
    for step in range(config.steps):
        while len(order) < config.batch:
            order += torch.randperm(len(prompts), generator=generator).tolist()
        picked, order = order[: config.batch], order[config.batch :]
        rows = build_rows(suspect, [prompts[i] for i in picked], [replies[i] for i in picked])
        with torch.no_grad():
            wanted = reply_logits(suspect.network, rows)[rows.reply]
        loss = kl(wanted, reply_logits(student, rows)[rows.reply]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if report:
            report(f"surrogate twin, KL {loss.item():.3f}", step + 1, config.steps)
