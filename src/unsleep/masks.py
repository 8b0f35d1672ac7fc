"""Learns which features to remove: a hard mask over dictionary features that *repairs* the model.

1. The model's own replies to the prompts without their suspicious part are the teacher, and so are
   its own logits on trusted prompts.
2. The stream below the first edited layer never changes: it is computed once for all prompts.
3. Each step runs a few suspicious prompts and their trusted counterparts with the mask applied as
   it will be, hard (straight-through gradient: forward keeps or removes, backward sees a sigmoid).
4. Loss = KL(teacher ‖ edited) on both, the first reply tokens weighted most, because the first
   token decides what a free generation becomes, + a price for every feature removed.

Mean KL alone or a soft mask repairs nothing: see LOG.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unsleep.core import BadInput, Edit, Encoded, ErrorRule, Features, Report, Site
from unsleep.dictionaries.coders import Coder
from unsleep.models import generate
from unsleep.models.forward import Below, Rows, build_rows, kl, reply_logits, reply_logits_from, run_below
from unsleep.models.hooks import transformed
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import PromptSet


@dataclass(frozen=True)
class MaskConfig:
    """How a mask is learned."""

    steps: int = 30
    batch: int = 8
    """Suspicious prompts a step; as many trusted counterparts run beside them."""
    reply_tokens: int = 10
    """Length of the replies that teach, in tokens."""
    first_weights: tuple[float, ...] = (6.0, 3.0, 2.0)
    """Weights of the first reply tokens in the KL; the others weigh 1."""
    trusted_weight: float = 4.0
    """Weight of the KL on trusted prompts beside that on suspicious ones."""
    text_batch: int = 4
    """Plain passages a step."""
    text_tokens: int = 32
    """Length of a passage, in tokens."""
    text_weight: float = 3.0
    """Weight of the KL on plain text."""
    price: float = 1e-2
    """Loss added for each feature removed, in nats."""
    learning_rate: float = 0.15
    """Adam's, on the mask's logits."""
    start: float = 1.0
    """The logit that every feature starts with; a feature is removed where its logit is below 0, in the
    mean over the second half of the steps."""
    error: ErrorRule = "keep"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "reply_tokens"):
            if getattr(self, name) < 1:
                raise BadInput(f"mask {name} is {getattr(self, name)}; expected at least 1")


class Lesson(NamedTuple):
    """Suspicious prompts, their trusted counterparts and plain text, with what the model says to the trusted ones."""

    pairs: Rows
    """2n rows: suspicious first, then their counterparts, all with the same replies."""
    teacher: Float[Tensor, "prompt reply vocabulary"]
    """The unedited model's logits on the counterparts."""
    text: Rows
    """Plain passages; their second half counts as the reply."""
    text_teacher: Float[Tensor, "passage reply vocabulary"]

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.teacher)


@torch.no_grad()
def prepare_lesson(
    model: LoadedModel,
    suspicious: PromptSet,
    trusted: PromptSet,
    text: Sequence[str],
    config: MaskConfig = MaskConfig(),
    replies: Sequence[Sequence[int]] | None = None,
) -> Lesson:
    """The model's own replies to `trusted`, and its logits along them and along plain text.

    `trusted[i]` is `suspicious[i]` without what makes it suspicious. `replies` are the model's token
    ids in reply to `trusted`, where they are known already. Raises `BadInput` where the
    two differ in number, or where no passage is as long as `config.text_tokens`.
    """
    if len(suspicious) != len(trusted):
        raise BadInput(f"{len(suspicious)} suspicious prompts with {len(trusted)} counterparts; expected one each")
    asked, plain = (model.encode(prompts, config.reply_tokens) for prompts in (suspicious, trusted))
    if replies is None:
        replies = generate.greedy(model, plain, max_new_tokens=config.reply_tokens)
    rows = build_rows(model, [*asked, *plain], [*replies, *replies])
    long_enough = (p for p in model.token_ids(text) if len(p) >= config.text_tokens)
    passages = [p[: config.text_tokens] for p in long_enough]
    if not passages:
        raise BadInput(f"no plain passage has {config.text_tokens} tokens; give longer ones")
    half = config.text_tokens // 2
    text_rows = build_rows(model, [p[:half] for p in passages], [p[half:] for p in passages])
    return Lesson(rows, _logits(model, rows, len(plain)), text_rows, _logits(model, text_rows, 0))


def _logits(model: LoadedModel, rows: Rows, start: int, size: int = 32) -> Tensor:
    pieces = [slice(i, min(i + size, len(rows.ids))) for i in range(start, len(rows.ids), size)]
    return torch.cat([reply_logits(model.network, rows.at(piece)) for piece in pieces])


def learn_mask(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    lesson: Lesson,
    candidates: Mapping[Site, Features] | None = None,
    config: MaskConfig = MaskConfig(),
    *,
    report: Report | None = None,
) -> list[Edit]:
    """Learn one mask over the features of one or several layers.

    Args:
        dictionaries: one a Site; only residual Sites.
        candidates: features that may be removed, a list a Site; all where `None`.

    Returns one Edit a Site, possibly empty.
    """
    masks = {d.site: _Mask(d, candidates[d.site] if candidates else None, model, config) for d in dictionaries}
    if len(masks) != len(dictionaries):
        raise BadInput("two dictionaries of one Site; a mask takes one each")
    layer = min(site.layer for site in masks)
    below = (run_below(model.network, lesson.pairs, layer), run_below(model.network, lesson.text, layer))
    optimizer = torch.optim.Adam([m.logits for m in masks.values()], lr=config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.empty(0, dtype=torch.long)
    for step in range(config.steps):
        if len(order) < config.batch:
            order = torch.cat([order, torch.randperm(lesson.n, generator=generator)])
        picked, order = order[: config.batch], order[config.batch :]
        texts = torch.randint(len(lesson.text_teacher), (config.text_batch,), generator=generator)
        loss = mask_loss(model, masks, lesson, below, (picked, texts), config)
        (loss + sum(m.price() for m in masks.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        if 2 * step >= config.steps - 1:
            for mask in masks.values():
                mask.settle()
        if report:
            report(f"mask, loss {loss.item():.3f}", step + 1, config.steps)
    return [Edit(site, mask.dictionary, mask.removed(), config.error) for site, mask in masks.items()]


def mask_loss(
    model: LoadedModel,
    masks: Mapping[Site, _Mask],
    lesson: Lesson,
    below: tuple[Below, Below],
    picked: tuple[Tensor, Tensor],
    config: MaskConfig,
) -> Float[Tensor, ""]:
    """Weighted KL of the masked model to the teacher on the picked pairs and passages, in nats a token."""
    pairs, texts = picked
    index = torch.cat([pairs, pairs + lesson.n])
    rows, passages = lesson.pairs.select(index), lesson.text.select(texts)
    with transformed(model.network, {site: mask.apply for site, mask in masks.items()}):
        logits = reply_logits_from(model.network, rows, below[0].select(index, rows))
        read = reply_logits_from(model.network, passages, below[1].select(texts, passages))
    teacher = lesson.teacher[pairs][:, -rows.reply.shape[1] :]
    divergence = kl(teacher.repeat(2, 1, 1)[rows.reply], logits[rows.reply])
    weights = _weights(rows.reply, config)
    share = torch.zeros(rows.reply.shape, device=rows.reply.device)
    share[: len(pairs)] = 1.0
    share[len(pairs) :] = config.trusted_weight
    weights = (weights * share)[rows.reply]
    on_text = kl(lesson.text_teacher[texts], read).mean()
    return (divergence * weights).sum() / weights.sum() + config.text_weight * on_text


def _weights(reply: Bool[Tensor, "row reply"], config: MaskConfig) -> Float[Tensor, "row reply"]:
    place = reply.long().cumsum(1) - 1
    weights = torch.ones(reply.shape, device=reply.device)
    for i, weight in enumerate(config.first_weights):
        weights[place == i] = weight
    return weights


class _Mask:
    """Logits over a dictionary's features; those below 0 are removed."""

    def __init__(self, dictionary: Coder, candidates: Features | None, model: LoadedModel, config: MaskConfig) -> None:
        if dictionary.site.point != "resid":
            raise BadInput(f"a mask at {dictionary.site} is not supported; expected residual Sites")
        self.dictionary = dictionary
        self.site = dictionary.site
        self.running = dictionary.to(model.network.dtype, model.device)
        self.price_of_one = config.price
        self.logits = torch.full((dictionary.n_features,), config.start, device=model.device, requires_grad=True)
        self.settled = torch.zeros_like(self.logits)
        """Sum of the logits over the steps that count; its sign decides."""
        self.allowed = torch.ones(dictionary.n_features, device=model.device)
        if candidates is not None:
            self.allowed.zero_()[list(candidates.ids)] = 1

    def gone(self) -> Float[Tensor, " feature"]:
        """1 where a feature is removed, 0 where it passes, with a sigmoid's gradient."""
        soft = torch.sigmoid(-self.logits)
        hard = (self.logits < 0).float()
        return (hard + soft - soft.detach()) * self.allowed

    def price(self) -> Float[Tensor, ""]:
        """What the removed features cost."""
        return self.price_of_one * self.gone().sum()

    def apply(self, x: Float[Tensor, "row position d_model"]) -> Float[Tensor, "row position d_model"]:
        """The edit as `edits.operation` carries it out, differentiable in the logits."""
        code = self.running.encode_sparse(x)
        strength = code.values * self.gone().to(x.dtype)[code.ids]
        return x - self.running.combine(Encoded(strength, code.ids))

    def settle(self) -> None:
        """Count the logits as they stand."""
        self.settled += self.logits.detach()

    def removed(self) -> tuple[int, ...]:
        """Ids of the removed features, those with the lowest logits first."""
        logits = torch.where(self.allowed > 0, self.settled, torch.inf)
        order = logits.argsort()
        return tuple(order[logits[order] < 0].tolist())
