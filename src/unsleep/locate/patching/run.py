"""Cross-model activation patching: a donor model's activations in a recipient of the same architecture.

Both models run the prompts with the payload teacher-forced; the recipient is then resumed with every group of
targets in turn (see `engine`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base.context import kept, progress
from unsleep.behaviours import Payload, as_payload
from unsleep.core import BadInput, check_least
from unsleep.interventions.donors import Merge, Patch
from unsleep.interventions.intervention import applied
from unsleep.locate.patching.engine import Resumable, Side, moved, prepare
from unsleep.locate.patching.places import Group, Position, Target
from unsleep.locate.patching.result import Measured, Patched, numbers_of
from unsleep.models import generate
from unsleep.models.alike import check_alike
from unsleep.models.forward import Rows, run, whole_rows
from unsleep.models.model import LoadedModel
from unsleep.models.streams import capture
from unsleep.prompts.prompt import PromptSet

T = TypeVar("T")


@dataclass(frozen=True)
class PatchConfig:
    """Options of a patching run."""

    payload_tokens: int = 4
    """Number of first payload tokens whose log-probability is the metric."""
    batch: int = 50
    """Prompts per forward pass."""
    plain: bool = False
    """Take prompts without the chat template."""

    def __post_init__(self) -> None:
        check_least(self, "patching", 1, "payload_tokens", "batch")


@torch.no_grad()
def patch(
    donor: LoadedModel,
    recipient: LoadedModel,
    prompts: PromptSet,
    payload: Payload | str,
    groups: Sequence[Group],
    config: PatchConfig = PatchConfig(),
) -> Patched:
    """Patch the donor's activations into the recipient, one group at a time, and measure the payload.

    Cross-model activation patching (Prakash et al. 2024, "Fine-tuning enhances existing mechanisms", arXiv:2402.14811).
    The metric is Σ log p of the payload's first tokens, teacher-forced after each prompt; a group's effect is the
    normalised change from the recipient (0) to the donor (1).

    Raises `BadInput` for models that differ in shape, tokenizer or chat template, no groups, a payload without
    a marker text, and places, heads, features or tokens that do not exist.
    """
    check_alike(donor, recipient, chats=not config.plain)
    said = _first_tokens(recipient, as_payload(payload), config.payload_tokens)
    ids = _token_rows(recipient, prompts, groups, len(said), config.plain)
    merges = _merges(recipient, groups)
    positions = list(dict.fromkeys(group.position for group in groups))
    measured = Measured.empty(len(groups), len(ids))
    done = 0
    for chunk in _chunks(ids, config.batch):
        own_ids = [ids[i] for i in chunk]
        rows = whole_rows(recipient, own_ids, said)
        pair = _Late(lambda rows=rows: _Pair.of(donor, recipient, rows, positions))
        for position in positions:
            own = [group for group in groups if group.position == position]
            tail = _Late(lambda pair=pair, position=position, own=own: pair().tail(position, own))
            for i, group in ((i, group) for i, group in enumerate(groups) if group.position == position):
                numbers = kept(
                    lambda tail=tail, group=group: tail().numbers(group, merges),
                    made_from=(donor, recipient, group, own_ids, said),
                )
                measured.put(i, chunk, numbers)
                done += len(chunk)
                progress("patching", done, len(ids) * len(groups))
    return Patched(tuple(groups), measured, (donor.fingerprint, recipient.fingerprint), prompts.hash, tuple(said))


def _first_tokens(model: LoadedModel, payload: Payload, n: int) -> list[int]:
    """The first `n` tokens of a payload; raises `BadInput` without a marker text, or for one without tokens."""
    if payload.marker is None:
        raise BadInput(f"the payload is {payload.words!r}, which cannot be forced; expected a payload of kind contains")
    said = model.token_ids([payload.marker], special=False)[0][:n]
    if not said:
        raise BadInput(f"payload {payload.marker[:40]!r} has no tokens; expected the text that a reply shows")
    return said


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
    """The recipient's greedy replies with each group patched: one list per group, one reply per prompt.

    The prompt's tokens are patched during prefill; generated tokens run unpatched and attend to
    them. Raises `BadInput` as `patch` does, and for a position that includes the reply.
    """
    check_alike(donor, recipient, chats=not plain)
    for group in groups:
        if group.position.reply:
            raise BadInput(f"{group.name}: generation patches the prompt alone; expected 'prompt' instead of 'all'")
    ids = _token_rows(recipient, prompts, groups, max_new_tokens, plain)
    merges = _merges(recipient, groups)
    out: list[list[str]] = [[""] * len(ids) for _ in groups]
    done = 0

    def said(own: Sequence[Sequence[int]], group: Group) -> list[str]:
        rows = whole_rows(recipient, own)
        where = group.position.columns(rows)
        with capture(donor.network, [target.place for target in group.targets]) as held:
            run(donor.network, moved(rows, donor.device), 1)
        taken = {place: x[where.to(x.device)] for place, x in held.items()}
        patches = [Patch(t.place, taken[t.place], where, merges[t]) for t in group.targets]
        with applied(recipient, patches):
            tokens = generate.greedy(recipient, own, max_new_tokens=max_new_tokens, batch_size=len(own), share=False)
        return recipient.texts(tokens)

    for chunk in _chunks(ids, batch):
        own = [ids[i] for i in chunk]
        for number, group in enumerate(groups):
            replies = kept(said, own, group, made_from=(donor, recipient, max_new_tokens))
            for i, reply in zip(chunk, replies, strict=True):
                out[number][i] = reply
            done += len(chunk)
            progress("patched replies", done, len(ids) * len(groups))
    return out


def _token_rows(
    model: LoadedModel, prompts: PromptSet, groups: Sequence[Group], behind: int, plain: bool
) -> list[list[int]]:
    """Token ids of every prompt, after validating the groups against them and the model."""
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
    """Prompt indices in batches of similar length."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def _merges(recipient: LoadedModel, groups: Sequence[Group]) -> dict[Target, Merge]:
    return {target: target.merge(recipient.network) for group in groups for target in group.targets}


class _Late(Generic[T]):
    """A lazily computed value."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make

    @cached_property
    def _value(self) -> T:
        return self._make()

    def __call__(self) -> T:
        return self._value


class _Pair(NamedTuple):
    """Both models on the same rows, with the KV caches of the tokens before the first patched one."""

    donor: Side
    recipient: Side

    @classmethod
    def of(cls, donor: LoadedModel, recipient: LoadedModel, rows: Rows, positions: Sequence[Position]) -> _Pair:
        """Run both up to the last starting column of the positions."""
        sides = [Side(m, moved(rows, m.device)) for m in (donor, recipient)]
        before = max(sides[1].first(position.columns(rows)) for position in positions)
        return cls(sides[0].up_to(before), sides[1].up_to(before))

    def tail(self, position: Position, groups: Sequence[Group]) -> _Tail:
        """Both models from a position's first column on, unpatched."""
        where, rows = position.columns(self.recipient.rows), self.recipient.rows
        start = self.recipient.first(where)
        places = dict.fromkeys(target.place for group in groups for target in group.targets)
        ready = prepare(self.donor, self.recipient, places, where[:, start:], start, rows.reply.shape[1] + 1)
        donor, mine = (torch.log_softmax(logits[:, :-1].float(), -1) for logits in ready.clean)
        return _Tail(ready, (donor, mine))


class _Tail(NamedTuple):
    """Both models from a column on."""

    ready: Resumable
    clean: tuple[Float[Tensor, "row reply vocabulary"], Float[Tensor, "row reply vocabulary"]]
    """Unpatched log-probabilities of the donor and of the recipient."""

    def numbers(self, group: Group, merges: Mapping[Target, Merge]) -> dict[str, Tensor]:
        """The values of the recipient with a group patched."""
        patched = self.ready.patched({target.place: merges[target] for target in group.targets})[:, :-1]
        return numbers_of(patched, self.clean, self.ready.recipient.rows.targets)
