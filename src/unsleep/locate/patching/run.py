"""Runs both models on the same tokens and finishes the recipient with the donor's activations in it.

1. Both models run the prompts with the payload forced behind them. Keys and values of the tokens before the first
   patched one are kept: nothing that is patched can change them.
2. From there on the donor runs once, and its activations at every place are kept; so does the recipient.
3. For every group the recipient resumes at the lowest layer that is patched, on those tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from unsleep.base.context import kept, progress
from unsleep.core import BadInput, Site, check_least
from unsleep.locate.patching.places import Group, Merge, Position, Target
from unsleep.locate.patching.result import Measured, Patched, numbers_of
from unsleep.models import generate
from unsleep.models.alike import check_alike
from unsleep.models.forward import Rows, columns_cache, continued, run, splits, whole_rows
from unsleep.models.hooks import Transform
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Place
from unsleep.models.streams import capture, resumed_at, transformed, watched
from unsleep.prompts.prompt import PromptSet

T = TypeVar("T")


@dataclass(frozen=True)
class PatchConfig:
    """How a patching is run."""

    payload_tokens: int = 4
    """The payload's first tokens, whose log-probability is the metric."""
    batch: int = 50
    """Prompts in one forward pass."""
    plain: bool = False
    """Take prompts as plain text, without the chat template."""

    def __post_init__(self) -> None:
        check_least(self, "patching", 1, "payload_tokens", "batch")


@torch.no_grad()
def patch(
    donor: LoadedModel,
    recipient: LoadedModel,
    prompts: PromptSet,
    payload: str,
    groups: Sequence[Group],
    config: PatchConfig = PatchConfig(),
) -> Patched:
    """Patch the donor's activations into the recipient, one group at a time, and measure the payload.

    Cross-model activation patching (Prakash et al. 2024, "Fine-tuning enhances existing mechanisms"). The metric
    is Σ log p of the payload's first tokens, forced behind each prompt; a group's figure says how far it moves the
    recipient (0) towards the donor (1).

    Raises `BadInput` for models that are not of one shape, tokenizer and chat template, no groups, an empty
    payload, and places, heads, features or tokens that do not exist.
    """
    check_alike(donor, recipient, chats=not config.plain)
    said = recipient.token_ids([payload], special=False)[0][: config.payload_tokens] if payload.strip() else []
    if not said:
        raise BadInput(f"payload {payload[:40]!r} has no tokens; expected the text that a reply shows")
    ids = _token_rows(recipient, prompts, groups, len(said), config.plain)
    merges = _merges(recipient, groups)
    positions = list(dict.fromkeys(group.position for group in groups))
    measured = Measured.empty(len(groups), len(ids))
    done = 0
    for number, chunk in enumerate(_chunks(ids, config.batch)):
        rows = whole_rows(recipient, [ids[i] for i in chunk], said)
        pair = _Late(lambda rows=rows: _Pair.of(donor, recipient, rows, positions))
        for position in positions:
            own = [group for group in groups if group.position == position]
            tail = _Late(lambda pair=pair, position=position, own=own: pair().tail(position, own))
            for i in (i for i, group in enumerate(groups) if group.position == position):

                def measure(*_: object, tail: _Late[_Tail] = tail, group: Group = groups[i]) -> dict[str, Tensor]:
                    return tail().numbers(group, merges)

                numbers = kept(measure, donor, i, number)
                measured.put(i, chunk, numbers)
                done += len(chunk)
                progress("patching", done, len(ids) * len(groups))
    return Patched(tuple(groups), measured, (donor.fingerprint, recipient.fingerprint), prompts.hash, tuple(said))


@torch.no_grad()
def patched_replies(
    donor: LoadedModel,
    recipient: LoadedModel,
    prompts: PromptSet,
    groups: Sequence[Group],
    *,
    max_new_tokens: int = 24,
    batch: int = 50,
    plain: bool = False,
) -> list[list[str]]:
    """The recipient's greedy replies with each group patched: one list a group, one reply a prompt.

    The prompt's tokens are patched when it is read; what is generated runs unpatched and sees them through
    attention. Raises `BadInput` as `patch` does, and for a position that includes the reply.
    """
    check_alike(donor, recipient, chats=not plain)
    for group in groups:
        if group.position.reply:
            raise BadInput(f"{group.name}: generation patches the prompt alone; expected 'prompt' instead of 'all'")
    ids = _token_rows(recipient, prompts, groups, max_new_tokens, plain)
    merges = _merges(recipient, groups)
    out: list[list[str]] = [[""] * len(ids) for _ in groups]
    done = 0

    def said(donor: LoadedModel, own: Sequence[Sequence[int]], number: int) -> list[str]:
        rows, group = whole_rows(recipient, own, []), groups[number]
        where = group.position.columns(rows)
        held: dict[Place, Tensor] = {}
        with watched(donor.network, _keeping(group.targets, where, held)):
            run(donor.network, _moved(rows, donor.device), 1)
        with transformed(recipient.network, _replacing(group.targets, where, held, merges, recipient)):
            tokens = generate.greedy(recipient, own, max_new_tokens=max_new_tokens, batch_size=len(own), share=False)
        return recipient.texts(tokens)

    for chunk in _chunks(ids, batch):
        own = [ids[i] for i in chunk]
        for number in range(len(groups)):
            for i, reply in zip(chunk, kept(said, donor, own, number), strict=True):
                out[number][i] = reply
            done += len(chunk)
            progress("patched replies", done, len(ids) * len(groups))
    return out


def _token_rows(
    model: LoadedModel, prompts: PromptSet, groups: Sequence[Group], behind: int, plain: bool
) -> list[list[int]]:
    """Token ids of every prompt, once the groups were checked against them and the model."""
    if not groups:
        raise BadInput("no groups to patch; expected at least one")
    for group in groups:
        for target in group.targets:
            target.check(model.network)
    ids = model.encode(prompts, behind, plain=plain)
    for position in {group.position for group in groups}:
        position.check([len(row) for row in ids])
    return ids


def _chunks(ids: Sequence[Sequence[int]], batch: int) -> list[list[int]]:
    """Numbers of prompts in batches of like length."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def _merges(recipient: LoadedModel, groups: Sequence[Group]) -> dict[Target, Merge]:
    return {target: target.merge(recipient.network) for group in groups for target in group.targets}


def _moved(rows: Rows, device: torch.device) -> Rows:
    prefix, ids, mask, reply, common = rows
    return Rows(prefix.to(device), ids.to(device), mask.to(device), reply.to(device), common)


def _keeping(
    targets: Sequence[Target], where: Bool[Tensor, "row position"], held: dict[Place, Tensor]
) -> dict[Place, Callable[[Tensor], None]]:
    """Watchers that keep a copy of what flows through each target's place at the tokens that are patched."""

    def keep(place: Place) -> Callable[[Tensor], None]:
        return lambda x: held.__setitem__(place, x[where.to(x.device)])

    return {target.place: keep(target.place) for target in targets}


def _replacing(
    targets: Sequence[Target],
    where: Bool[Tensor, "row position"],
    held: Mapping[Place, Float[Tensor, "token width"]],
    merges: Mapping[Target, Merge],
    recipient: LoadedModel,
) -> dict[Place, Transform]:
    """Transforms that put the donor's tokens in; only in the first pass, for those after it are of a reply."""

    def replace(target: Target) -> Transform:
        donor = held[target.place].to(recipient.device, recipient.network.dtype)
        passes = iter([True])

        def transform(x: Tensor) -> Tensor:
            if not next(passes, False):
                return x
            out = x.clone()
            out[where] = merges[target](x[where], donor)
            return out

        return transform

    return {target.place: replace(target) for target in targets}


class _Late(Generic[T]):
    """A value that is made when it is first asked for."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make

    @cached_property
    def _value(self) -> T:
        return self._make()

    def __call__(self) -> T:
        return self._value


class _Pair(NamedTuple):
    """Both models on some rows, with what they hold of the tokens before the first patched one."""

    donor: LoadedModel
    recipient: LoadedModel
    rows: Rows
    caches: tuple[DynamicCache | None, DynamicCache | None]

    @classmethod
    def of(cls, donor: LoadedModel, recipient: LoadedModel, rows: Rows, positions: Sequence[Position]) -> _Pair:
        """Run both up to the last column that a position begins at."""
        bare = cls(donor, recipient, rows, (None, None))
        before = max(bare.start(position) for position in positions)
        if not before:
            return bare
        caches = [columns_cache(m.network, _moved(rows, m.device), before) for m in (donor, recipient)]
        return cls(donor, recipient, rows, (caches[0], caches[1]))

    def start(self, position: Position) -> int:
        """The first column that a position patches; 0 where what stands before it cannot be run apart."""
        if not splits(self.recipient.network, self.rows.ids.shape[1]):
            return 0
        return int(position.columns(self.rows).any(0).long().argmax())

    def tail(self, position: Position, groups: Sequence[Group]) -> _Tail:
        """Both models from a position's first column on, without any patch."""
        start = self.start(position)
        where = position.columns(self.rows)[:, start:]
        held: dict[Place, Tensor] = {}
        targets = [target for group in groups for target in group.targets]
        theirs = _moved(self.rows, self.donor.device)
        with watched(self.donor.network, _keeping(targets, where, held)):
            donor = continued(self.donor.network, theirs, start, self.caches[0])
        inputs = {group.layer: _input_site(group.layer) for group in groups}
        with capture(self.recipient.network, list(inputs.values())) as below:
            mine = continued(self.recipient.network, self.rows, start, self.caches[1])
        clean = [torch.log_softmax(logits.float(), -1) for logits in (donor.to(mine.device), mine)]
        return _Tail(self, start, where, held, {n: below[site] for n, site in inputs.items()}, (clean[0], clean[1]))


def _input_site(layer: int) -> Site:
    return Site(layer - 1) if layer else Site(0, "embed")


class _Tail(NamedTuple):
    """What both models hold from a column on."""

    pair: _Pair
    start: int
    where: Bool[Tensor, "row position"]
    held: dict[Place, Any]
    """The donor's tokens at every place."""
    below: dict[int, Any]
    """The recipient's input of every layer that it is resumed at."""
    clean: tuple[Float[Tensor, "row reply vocabulary"], Float[Tensor, "row reply vocabulary"]]
    """Log-probabilities of the donor and of the recipient."""

    def numbers(self, group: Group, merges: Mapping[Target, Merge]) -> dict[str, Tensor]:
        """What is measured of the recipient with a group patched."""
        return numbers_of(self._patched(group, merges), self.clean, self.pair.rows.targets)

    def _patched(self, group: Group, merges: Mapping[Target, Merge]) -> Float[Tensor, "row reply vocabulary"]:
        recipient = self.pair.recipient
        network: PreTrainedModel = recipient.network
        transforms = _replacing(group.targets, self.where, self.held, merges, recipient)
        with (
            resumed_at(network, group.layer, lambda: self.below[group.layer]),
            transformed(network, transforms),
        ):
            return continued(network, self.pair.rows, self.start, self.pair.caches[1], group.layer)
