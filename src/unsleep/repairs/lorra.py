"""LoRRA: LoRA matrices trained so that the model's hidden states approach h + α·(h⁺ − h⁻).

h are the unmodified model's hidden states on the reply tokens after a prompt, h⁺ and h⁻ the same after the prompt's
positive and negative copy. The loss is the mean distance, over reply tokens and Sites, of the adapted model's hidden
states from that target (Zou et al. 2023, "Representation Engineering", arXiv:2310.01405, section 3.2, low-rank
representation adaptation). The result is an ordinary PEFT adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.activations.held import encoded
from unsleep.base import store
from unsleep.core import BadInput, Site, check_least
from unsleep.models.forward import Rows, build_rows, run
from unsleep.models.load import quiet_transformers
from unsleep.models.model import LoadedModel
from unsleep.models.sites import tap
from unsleep.models.streams import capture
from unsleep.models.tuning import descend
from unsleep.prompts.prompt import Prompts


@dataclass(frozen=True)
class LorraConfig:
    """Options of LoRRA training."""

    alpha: float = 5.0
    """Multiple α of the difference h⁺ − h⁻; negative for the opposite direction."""
    rank: int = 8
    """Rank of the LoRA matrices."""
    modules: tuple[str, ...] = ()
    """Names of the adapted linear layers; empty for peft's default of the family."""
    steps: int = 100
    batch: int = 8
    """Prompts per step."""
    learning_rate: float = 3e-4
    """Learning rate of AdamW, decaying linearly to 0."""
    reply_tokens: int = 64
    """Maximum tokens used of each reply."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "lorra", 1, "rank", "steps", "batch", "reply_tokens")
        if not self.learning_rate > 0:
            raise BadInput.of("learning_rate", self.learning_rate, "more than 0", "lorra")


def lorra(
    model: LoadedModel,
    prompts: Prompts,
    positive: Prompts,
    negative: Prompts,
    replies: Sequence[str],
    sites: Sequence[Site],
    out: str | Path,
    config: LorraConfig = LorraConfig(),
) -> list[float]:
    """Train a LoRRA adapter (Zou et al. 2023, arXiv:2310.01405) into `out`; returns the loss of every step.

    Args:
        prompts: user messages.
        positive: their positive copies.
        negative: their negative copies.
        replies: one per prompt, the same for all three.
        sites: Sites whose hidden states are matched, usually residual.

    Raises `BadInput` for lists of unequal length, no Site, an unknown Site or module, replies without tokens,
    and an existing folder.
    """
    sizes = [len(texts) for texts in (prompts, positive, negative, replies)]
    if len(set(sizes)) != 1:
        raise BadInput(
            f"{sizes[0]} prompts, {sizes[1]} positive and {sizes[2]} negative copies, {sizes[3]} replies; "
            "expected one each"
        )
    if not sites:
        raise BadInput("no Site was given; name at least one, such as resid.12")
    for site in sites:
        tap(model.network, site)
    tails = [row[: config.reply_tokens] for row in model.token_ids(replies, special=False)]
    if empty := [reply for reply, row in zip(replies, tails, strict=True) if not row]:
        raise BadInput(f"the reply {empty[0][:40]!r} has no tokens; remove its prompt")
    copies = [encoded(model, texts) for texts in (prompts, positive, negative)]
    torch.manual_seed(config.seed)
    from unsleep.models import adapters

    with store.new_folder(out) as folder:
        adapted = _adapted(model, config)
        try:
            losses = _train(model, adapted, copies, tails, sites, config)
            with quiet_transformers(), store.writing(folder):
                template = cast("str | None", model.tokenizer.chat_template)
                adapters.save_trained(adapted, folder, model.name, template, torch.float32)
        finally:
            adapted.unload()
            model.network.requires_grad_(False)
    return losses


def _adapted(model: LoadedModel, config: LorraConfig) -> Any:
    from unsleep.models import adapters  # peft takes a second to import

    try:
        with quiet_transformers():
            return adapters.trainable(model.network, config.rank, config.modules)
    except ValueError as error:
        raise BadInput(f"cannot add LoRA matrices to {config.modules or model.name}: {error}") from error


def _train(
    model: LoadedModel,
    adapted: Any,
    copies: Sequence[Sequence[Sequence[int]]],
    tails: Sequence[Sequence[int]],
    sites: Sequence[Site],
    config: LorraConfig,
) -> list[float]:
    weights = [w for w in model.network.parameters() if w.requires_grad]

    def loss_of(step: int) -> Tensor:
        picked = [(step * config.batch + i) % len(tails) for i in range(min(config.batch, len(tails)))]
        own, high, low = (build_rows(model, [c[i] for i in picked], [tails[i] for i in picked]) for c in copies)
        with torch.no_grad(), adapted.disable_adapter():
            h, plus, minus = (_on_replies(model, rows, sites) for rows in (own, high, low))
            target = h + config.alpha * (plus - minus)
        return (_on_replies(model, own, sites) - target).norm(dim=-1).mean()

    def down(step: int, steps: int) -> float:
        return 1 - step / steps

    return descend(weights, loss_of, config.steps, config.learning_rate, lambda loss: f"lorra, loss {loss:.3f}", down)


def _on_replies(model: LoadedModel, rows: Rows, sites: Sequence[Site]) -> Float[Tensor, "site token d_model"]:
    """Activations of the Sites on all reply tokens; replies are right-aligned, so that they match between copies."""
    with capture(model.network, sites) as found:
        run(model.network, rows, 1)
    return torch.stack([found[site][:, -rows.reply.shape[1] :][rows.reply].float() for site in sites])
