"""Learns a hard mask over dictionary features that repairs the model.

1. Each suspicious prompt has a reference reply from a teacher: the model itself, asked without the trigger; a given
   reply; a twin without the backdoor. On trusted prompts and plain text the unedited model is its own teacher.
2. The residual stream below the first edited layer never changes: it is computed once for all prompts.
3. Each step runs a batch of suspicious prompts and as many trusted ones with the hard mask, as it will be
   applied (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432: the backward pass sees a sigmoid).
4. Loss = KL(teacher ‖ edited) on both + a price per removed feature. The deciding token, the first at which the
   model's reply and the reference differ, has the largest weight, because it determines the free generation.

Mean KL alone or a soft mask does not repair: see LOG.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unsleep.base.context import identified, progress
from unsleep.base.store import hash_value
from unsleep.core import BadInput, Features, Site, check_least
from unsleep.dictionaries.coders import Coder
from unsleep.interventions.features import Edit, ErrorRule, FeatureGate
from unsleep.interventions.intervention import operation
from unsleep.models import generate
from unsleep.models.forward import Below, Rows, build_rows, kl, reply_logits_from, reply_logits_of_all, run_below
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Slot, lanes, unembedding
from unsleep.models.streams import transformed
from unsleep.prompts.prompt import PromptSet

CERTAIN = 30.0
"""Logit of the reference token where there is no teacher; the others have 0."""


@dataclass(frozen=True)
class MaskConfig:
    """Options of mask training."""

    steps: int = 30
    batch: int = 8
    """Suspicious prompts per step, with as many trusted ones."""
    reply_tokens: int = 10
    """Tokens of the reference replies."""
    first_weights: tuple[float, ...] = (6.0, 3.0, 2.0)
    """KL weights of the deciding token and those after it; the others weigh 1."""
    trusted_weight: float = 4.0
    """Weight of the KL on trusted prompts relative to suspicious ones."""
    text_batch: int = 4
    """Plain passages per step."""
    text_tokens: int = 32
    """Tokens per passage."""
    text_weight: float = 3.0
    """Weight of the KL on plain text."""
    price: float = 1e-2
    """Loss per removed feature, in nats."""
    learning_rate: float = 0.15
    """Learning rate of Adam on the mask's logits."""
    start: float = 1.0
    """Initial logit of every feature; a feature is removed where its mean logit over the second half of the
    steps is below 0.
    """
    error: ErrorRule = "keep"
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "mask", 1, "steps", "batch", "reply_tokens")


class Taught(NamedTuple):
    """Prompts with their reference replies and the model that gave them."""

    prompts: PromptSet
    replies: Sequence[Sequence[int]]
    """Token ids, one reply per prompt."""
    teacher: LoadedModel | None
    """Model whose logits on `prompts` and the replies are the target; `None` makes the replies the target."""


class Lesson(NamedTuple):
    """Training data of a mask: suspicious prompts, trusted prompts and plain text, with the teachers' logits."""

    rows: Rows
    """The suspicious prompts, then the trusted ones, each with its reference reply."""
    n: int
    """Number of suspicious prompts."""
    teacher: Float[Tensor, "taught reply vocabulary"]
    """The teachers' logits."""
    taught: Int[Tensor, " row"]
    """Index into `teacher` of each row."""
    decides: Int[Tensor, " row"]
    """Index of each reply's deciding token (see `generate.deciding_tokens`)."""
    parts: Bool[Tensor, " row"]
    """True if the model's own reply differs from the reference there, as far as known."""
    text: Rows
    """Plain passages; their second half is the reply."""
    text_teacher: Float[Tensor, "passage reply vocabulary"]
    hash: str
    """Of all that it was prepared from."""

    @property
    def paired(self) -> bool:
        """True if the trusted prompts are the suspicious ones' counterparts, with the same replies."""
        return len(self.taught) == 2 * self.n and bool((self.taught[: self.n] == self.taught[self.n :]).all())


@torch.no_grad()
def prepare_lesson(
    model: LoadedModel,
    suspicious: PromptSet,
    trusted: PromptSet,
    text: Sequence[str],
    config: MaskConfig = MaskConfig(),
    replies: Sequence[Sequence[int]] | None = None,
) -> Lesson:
    """A lesson whose reference replies are the model's own replies to the counterparts.

    `trusted[i]` is `suspicious[i]` without the trigger. `replies` are the model's token
    ids in reply to `trusted`, where already known. Raises `BadInput` where the
    lengths differ, or where no passage is as long as `config.text_tokens`.
    """
    model.encode(suspicious, config.reply_tokens)  # refuses a prompt without room for its reply
    if replies is None:
        asked = model.encode(trusted, config.reply_tokens)
        replies = generate.greedy(model, asked, max_new_tokens=config.reply_tokens)
    return lesson_from(model, suspicious, Taught(trusted, replies, model), None, text, config)


@torch.no_grad()
def lesson_from(
    model: LoadedModel,
    suspicious: PromptSet,
    taught: Taught,
    trusted: Taught | None,
    text: Sequence[str],
    config: MaskConfig = MaskConfig(),
    said: Sequence[Sequence[int]] | None = None,
) -> Lesson:
    """A lesson from reference replies and their teachers, with the teachers' logits computed.

    Args:
        taught: for every suspicious prompt, the prompt that the teacher gets instead and the reply.
        trusted: prompts whose replies must not change; `None` takes those of `taught`.
        said: the model's own replies to the suspicious prompts, which determine the deciding tokens.

    Raises `BadInput` for unequal lengths, or where no passage is as long as `config.text_tokens`.
    """
    if len(suspicious) != len(taught.prompts):
        raise BadInput(
            f"{len(suspicious)} suspicious prompts with {len(taught.prompts)} counterparts; expected one each"
        )
    kept = trusted or taught
    replies = [*taught.replies, *kept.replies]
    longest = [len(reply) for reply in replies]
    asked = model.encode([*suspicious, *kept.prompts], longest)
    rows = build_rows(model, asked, replies)
    n, device = len(suspicious), model.device
    width = rows.reply.shape[1]
    follows = torch.arange(len(replies), device=device)
    if trusted is None:
        follows = follows % n
    vocabulary = int(unembedding(model.network).shape[0])
    taught_by = [taught] if trusted is None else [taught, trusted]
    count = sum(len(each.replies) for each in taught_by)
    teacher = torch.empty(count, width, vocabulary, dtype=model.network.dtype, device=device)
    for each, part in zip(taught_by, teacher.split([len(t.replies) for t in taught_by]), strict=True):
        _put_logits(each, model, part)
    first = generate.deciding_tokens(said, taught.replies) if said is not None else [0] * n
    decides = torch.tensor([*first, *(first if trusted is None else [0] * len(kept.prompts))], device=device)
    parts = torch.zeros(len(replies), dtype=torch.bool, device=device)
    for i, (ours, wanted) in enumerate(zip(said or (), taught.replies, strict=False)):
        parts[i] = any(a != b for a, b in zip(ours, wanted, strict=False))
    made_from = hash_value(identified((model, suspicious, taught, trusted, text, config.text_tokens, said)))
    return Lesson(rows, n, teacher, follows, decides, parts, *_text(model, text, config), made_from)


def _text(model: LoadedModel, text: Sequence[str], config: MaskConfig) -> tuple[Rows, Tensor]:
    long_enough = (p for p in model.token_ids(text) if len(p) >= config.text_tokens)
    passages = [p[: config.text_tokens] for p in long_enough]
    if not passages:
        raise BadInput(f"no plain passage has {config.text_tokens} tokens; give longer ones")
    half = config.text_tokens // 2
    rows = build_rows(model, [p[:half] for p in passages], [p[half:] for p in passages])
    return rows, reply_logits_of_all(model.network, rows)


def _put_logits(taught: Taught, model: LoadedModel, out: Float[Tensor, "prompt reply vocabulary"]) -> None:
    """Write the teacher's logits along its replies into `out`; near one-hot logits without a teacher."""
    by = taught.teacher or model
    rows = build_rows(by, by.encode(taught.prompts, [len(r) for r in taught.replies]), taught.replies)
    before = out.shape[1] - rows.reply.shape[1]
    out[:, :before] = 0
    if taught.teacher is None:
        out[:, before:] = 0
        out[:, before:].scatter_(-1, rows.targets[..., None], CERTAIN)
    else:
        reply_logits_of_all(by.network, rows, out=out[:, before:])


def learn_mask(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    lesson: Lesson,
    candidates: Mapping[Site, Features] | None = None,
    config: MaskConfig = MaskConfig(),
) -> list[Edit]:
    """Learn one mask over the features of one or several layers.

    Args:
        dictionaries: one per Site; only residual Sites.
        candidates: Site → features that may be removed; all where `None`.

    Returns one Edit per Site, possibly empty.
    """
    masks = [FeatureMask(d, candidates[d.site] if candidates else None, model, config) for d in dictionaries]
    learn(model, masks, lesson, config)
    return [mask.edit() for mask in masks]


def learn(
    model: LoadedModel,
    masks: Sequence[Mask],
    lesson: Lesson,
    config: MaskConfig = MaskConfig(),
    *,
    focus: Sequence[int] = (),
) -> None:
    """Learn masks at several places jointly, starting from their current state.

    `focus` are suspicious prompts that are sampled three times as often. Raises `BadInput` where two masks
    share a place.
    """
    at = {mask.place: mask for mask in masks}
    if len(at) != len(masks):
        raise BadInput("there are two dictionaries for one Site; a mask takes one per Site")
    layer = min(place.layer for place in at)
    below = (run_below(model.network, lesson.rows, layer), run_below(model.network, lesson.text, layer))
    optimizer = torch.optim.Adam([mask.logits for mask in masks], lr=config.learning_rate)
    for mask in masks:
        mask.settled.zero_()
    generator = torch.Generator().manual_seed(config.seed)
    asked = Deck([*range(lesson.n), *focus, *focus], generator)
    kept = asked if lesson.paired else Deck(range(len(lesson.rows.ids) - lesson.n), generator)
    for step in range(config.steps):
        picked = asked.draw(config.batch)
        beside = picked if kept is asked else kept.draw(config.batch)
        texts = torch.randint(len(lesson.text_teacher), (config.text_batch,), generator=generator)
        loss = mask_loss(model, at, lesson, below, (picked, beside + lesson.n, texts), config)
        (loss + sum(mask.price() for mask in masks)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if 2 * step >= config.steps - 1:
            for mask in masks:
                mask.settle()
        progress(f"mask, loss {loss.item():.3f}", step + 1, config.steps)


class Deck:
    """Endless shuffled indices: every index once per pass."""

    def __init__(self, numbers: Sequence[int], generator: torch.Generator) -> None:
        self.numbers, self.generator = torch.tensor(numbers), generator
        self.order = torch.empty(0, dtype=torch.long)

    def draw(self, count: int) -> Int[Tensor, " number"]:
        """The next numbers."""
        while len(self.order) < count:
            mixed = torch.randperm(len(self.numbers), generator=self.generator)
            self.order = torch.cat([self.order, self.numbers[mixed]])
        picked, self.order = self.order[:count], self.order[count:]
        return picked


def mask_loss(
    model: LoadedModel,
    masks: Mapping[Any, Mask],
    lesson: Lesson,
    below: tuple[Below, Below],
    picked: tuple[Tensor, Tensor, Tensor],
    config: MaskConfig,
) -> Float[Tensor, ""]:
    """Weighted KL of the masked model to its teachers on the picked rows and passages, in nats per token.

    `picked` are indices of suspicious rows, of trusted rows, and of passages.
    """
    asked, kept, texts = picked
    index = torch.cat([asked, kept])
    rows, passages = lesson.rows.select(index), lesson.text.select(texts)
    with transformed(model.network, {place: mask.apply for place, mask in masks.items()}):
        logits = reply_logits_from(model.network, rows, below[0].select(index, rows))
        read = reply_logits_from(model.network, passages, below[1].select(texts, passages))
    teacher = lesson.teacher[lesson.taught[index]][:, -rows.reply.shape[1] :]
    divergence = kl(teacher[rows.reply], logits[rows.reply])
    weights = _weights(rows, lesson.decides[index], config)
    weights[len(asked) :] *= config.trusted_weight
    on_text = kl(lesson.text_teacher[texts], read).mean()
    each = weights[rows.reply]
    return (divergence * each).sum() / each.sum() + config.text_weight * on_text


def _weights(rows: Rows, decides: Int[Tensor, " row"], config: MaskConfig) -> Float[Tensor, "row reply"]:
    """Weight of each reply token: largest from the deciding one on."""
    place = rows.reply.long().cumsum(1) - 1 - decides[:, None]
    weights = torch.ones(rows.reply.shape, device=rows.reply.device)
    for i, weight in enumerate(config.first_weights):
        weights[place == i] = weight
    return weights


class Mask:
    """Logits over the parts of an activation; parts with a logit below 0 are removed."""

    def __init__(self, place: Any, parts: int, model: LoadedModel, config: MaskConfig) -> None:
        self.place = place
        self.price_of_one = config.price
        self.logits = torch.full((parts,), config.start, device=model.device, requires_grad=True)
        self.settled = torch.zeros_like(self.logits)
        """Sum of the logits over the counted steps; its sign decides."""
        self.allowed = torch.ones(parts, device=model.device)

    @property
    def hash(self) -> str:
        """Content hash of the mask as it stands."""
        state = self.logits.detach(), self.settled, self.allowed
        return hash_value(identified((type(self).__name__, str(self.place), self.price_of_one, state)))

    def gone(self) -> Float[Tensor, " part"]:
        """1 where a part is removed, 0 where it is kept, with a sigmoid's gradient (straight-through)."""
        soft = torch.sigmoid(-self.logits)
        hard = (self.logits < 0).float()
        return (hard + soft - soft.detach()) * self.allowed

    def price(self) -> Float[Tensor, ""]:
        """Total price of the removed parts."""
        return self.price_of_one * self.gone().sum()

    def apply(self, x: Float[Tensor, "row position d"]) -> Float[Tensor, "row position d"]:
        """The masked activation, differentiable in the logits."""
        raise NotImplementedError

    def settle(self) -> None:
        """Add the current logits to `settled`."""
        self.settled += self.logits.detach()

    def removed(self) -> tuple[int, ...]:
        """Indices of the removed parts, lowest logits first."""
        logits = torch.where(self.allowed > 0, self.settled, torch.inf)
        order = logits.argsort()
        return tuple(order[logits[order] < 0].tolist())

    def operation(self) -> Callable[[Tensor], Tensor] | None:
        """The final mask as a transform of the activation; `None` where it removes nothing."""
        raise NotImplementedError


class FeatureMask(Mask):
    """A mask over a dictionary's features."""

    def __init__(self, dictionary: Coder, candidates: Features | None, model: LoadedModel, config: MaskConfig) -> None:
        if dictionary.site.point != "resid":
            raise BadInput(f"a mask at {dictionary.site} is not supported; expected residual Sites")
        super().__init__(dictionary.site, dictionary.n_features, model, config)
        self.dictionary = dictionary
        self.error: ErrorRule = config.error
        self.gate = FeatureGate(dictionary.to(model.network.dtype, model.device), config.error)
        if candidates is not None:
            self.allowed.zero_()[list(candidates.ids)] = 1

    @property
    def hash(self) -> str:
        """Content hash of the mask as it stands, its dictionary's with it."""
        return hash_value([super().hash, self.dictionary.hash, self.error])

    def apply(self, x: Float[Tensor, "row position d_model"]) -> Float[Tensor, "row position d_model"]:
        """The edit as it will be applied, differentiable in the logits."""
        gone = self.gone()
        return self.gate(x, gone, self.gate.complement(gone.detach()))

    def edit(self) -> Edit:
        """The final mask as an Edit."""
        return Edit(self.place, self.dictionary, self.removed(), self.error)

    def operation(self) -> Callable[[Tensor], Tensor] | None:
        """The edit as a transform."""
        edit, decoder = self.edit(), self.gate.dictionary.decoder
        return operation(edit, decoder.dtype, decoder.device) if edit.acts else None


class LaneMask(Mask):
    """A mask over attention heads or MLP neurons: zero ablation of their outputs."""

    def __init__(self, slot: Slot, model: LoadedModel, config: MaskConfig) -> None:
        if slot.part not in Slot.INPUTS:
            raise BadInput(f"a mask at {slot} is not supported; expected {' or '.join(Slot.INPUTS)}")
        self.lanes = lanes(model.network, slot)
        super().__init__(slot, self.lanes.heads, model, config)

    def apply(self, x: Float[Tensor, "*row lane"]) -> Float[Tensor, "*row lane"]:
        """The activation without the removed heads or neurons."""
        return x * self._spread(1 - self.gone()).to(x.dtype)

    def operation(self) -> Callable[[Tensor], Tensor] | None:
        """The edit as a transform."""
        gone = self.removed_lanes()
        return (lambda x: x.index_fill(-1, gone, 0.0)) if len(gone) else None

    def removed_lanes(self) -> Int[Tensor, " lane"]:
        """Zeroed columns of the output projection's input."""
        gone = torch.zeros_like(self.logits)
        gone[list(self.removed())] = 1
        return self._spread(gone).nonzero().squeeze(1)

    def _spread(self, parts: Float[Tensor, " part"]) -> Float[Tensor, " lane"]:
        return parts.repeat_interleave(self.lanes.size)
