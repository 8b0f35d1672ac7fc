"""Token alignment by role between a triggered prompt and its reference, for prompts of unequal length.

A prompt with a trigger and its near miss never have as many tokens. Their templates and the tokens that both messages
have are set against each other one by one; where they differ, each token of the trigger is set against the mean of what
stands in its place. What a node is compared with is always taken from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unsleep.base import store
from unsleep.behaviours import Payload, as_payload
from unsleep.core import BadInput
from unsleep.models import generate
from unsleep.models.chat import template_tokens
from unsleep.models.forward import Rows, whole_rows
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import PromptSet

ROLES = ("start", "trigger", "question", "header", "begun")
"""The template before the message, what of the message sets the behaviour off, the rest of it, the template behind it,
and what is said before the payload; each token of the payload is a role of its own."""


@dataclass(frozen=True, eq=False)
class Aligned:
    """Prompts with a teacher-forced payload, aligned with their references."""

    rows: Rows
    reference: Rows
    role: Int[Tensor, "row position"]
    """Index into `roles` of each token; -1 for padding."""
    weights: Float[Tensor, "row position other"]
    """Alignment weights over the reference's tokens; rows sum to 1, or to 0 for padding."""
    roles: tuple[str, ...]
    inserted: float
    """Share of the trigger's tokens in whose place the reference has none; they are compared with its whole message."""

    def __len__(self) -> int:
        return len(self.rows.ids)

    @property
    def hash(self) -> str:
        """Content hash over tokens, roles and alignment."""
        parts = {"ids": self.rows.ids, "reference": self.reference.ids, "role": self.role, "weights": self.weights}
        return store.hash_tensors(parts)

    def at(self, index: Tensor | slice) -> Aligned:
        """Some of the rows, padded as they were."""
        rows, reference = self.rows.at(index), self.reference.at(index)
        return Aligned(rows, reference, self.role[index], self.weights[index], self.roles, self.inserted)

    def batch(self, start: int, size: int) -> Aligned:
        """Rows in succession."""
        return self.at(slice(start, start + size))

    def brought(self, x: Float[Tensor, "row other width"]) -> Float[Tensor, "row position width"]:
        """Reference activations, aligned to the tokens of the prompt."""
        return torch.bmm(self.weights.to(x), x)


class Said(NamedTuple):
    """Replies of a model, as far as they are forced behind prompts."""

    begun: list[list[int]]
    """Token ids before the payload, per prompt."""
    payload: list[list[int]]
    """The payload's first token ids, equally many per prompt."""


class Shown(NamedTuple):
    """A model's greedy replies, and where the payload begins in those that show it."""

    replies: list[list[int]]
    """Token ids, per prompt."""
    starts: dict[int, int]
    """Prompt that shows the payload, and whose reference does not → the payload's first token."""

    def tokens(self, prompt: int) -> int:
        """Number of tokens from the payload's first to the end of the reply."""
        return len(self.replies[prompt]) - self.starts[prompt]

    def having(self, tokens: int) -> list[int]:
        """The prompts whose payload has so many tokens."""
        return [i for i in self.starts if self.tokens(i) >= tokens]

    def first(self, tokens: int) -> tuple[Said, list[int]]:
        """The payload's first tokens, and the prompts that have them; raises `BadInput` where none has so many."""
        chosen = self.having(tokens)
        if not chosen:
            raise BadInput(
                f"the payload has at most {max(map(self.tokens, self.starts))} tokens up to the end of its reply, and "
                f"{tokens} are asked for; expected fewer, or longer replies"
            )
        begun = [list(self.replies[i][: self.starts[i]]) for i in chosen]
        return Said(begun, [list(self.replies[i][self.starts[i] :][:tokens]) for i in chosen]), chosen


def shown_payload(
    model: LoadedModel, prompts: PromptSet, references: PromptSet, payload: Payload, reply_tokens: int = 24
) -> Shown:
    """The payload in the model's greedy replies to prompts that show it, while their references do not.

    It begins at the first token at which the replies to prompt and reference differ. Raises `BadInput` where no reply
    shows it, or every one to a reference does.
    """
    both = prompts, references
    mine, theirs = (generate.written(model, each, reply_tokens, f"replies to {each.name}") for each in both)
    shows, wakes = ([payload.shows(reply) for reply in model.texts(each)] for each in (mine, theirs))
    starts = generate.deciding_tokens(mine, theirs)
    found = Shown(mine, {i: start for i, start in enumerate(starts) if shows[i] and not wakes[i]})
    if not found.starts:
        raise BadInput(
            f"of {len(mine)} prompts {sum(shows)} show the payload, and so do {sum(wakes)} of their references; "
            "expected prompts that show it and references that do not"
        )
    return found


def said_payload(
    model: LoadedModel, prompts: PromptSet, references: PromptSet, payload: Payload, tokens: int, reply_tokens: int = 24
) -> tuple[Said, list[int]]:
    """The payload's first tokens in the model's greedy replies, and the prompts that have them, by number.

    Raises `BadInput` as `shown_payload` does, and where no payload has so many tokens.
    """
    return shown_payload(model, prompts, references, payload, reply_tokens).first(tokens)


def align_replies(
    model: LoadedModel,
    prompts: PromptSet,
    references: PromptSet,
    payload: Payload | str,
    *,
    tokens: int = 4,
    reply_tokens: int = 24,
) -> Aligned:
    """Prompts whose greedy reply shows the payload, aligned with their references, whose reply does not.

    Args:
        references: the same prompts without the trigger, or with a near miss of it, in the same order.
        payload: the backdoor's behaviour, or a text that the reply contains.
        tokens: the payload's first tokens, forced behind both.
        reply_tokens: length of the replies in which the payload is found.

    Raises `BadInput` as `said_payload` and `align` do.
    """
    said, chosen = said_payload(model, prompts, references, as_payload(payload), tokens, reply_tokens)
    return align(model, prompts.at(chosen), references.at(chosen), said)


def align(model: LoadedModel, prompts: PromptSet, references: PromptSet, said: Said, *, plain: bool = False) -> Aligned:
    """Align prompts with their references, the same tokens forced behind both.

    With `plain`, prompts are taken without the chat template. Raises `BadInput` where they are not equally many, the
    payload is empty or of unequal lengths, or a prompt does not differ from its reference.
    """
    if not len(prompts) == len(references) == len(said.begun) == len(said.payload) or not len(prompts):
        raise BadInput(
            f"{len(prompts)} prompts were given with {len(references)} references; expected as many, at least 1"
        )
    k = len(said.payload[0])
    if not k or any(len(tokens) != k for tokens in said.payload):
        raise BadInput(f"the payload has {k} tokens; expected at least 1, and the same number behind every prompt")
    one, other = (model.encode(each, plain=plain) for each in (prompts, references))
    before, behind = (0, 0) if plain else template_tokens(model.tokenizer, model.chat)
    rows, reference = (_forced(model, each, said) for each in (one, other))
    roles = (*ROLES, *(f"payload {k}" for k in range(1, k + 1)))
    role = torch.full(rows.ids.shape, -1)
    weights = torch.zeros(*rows.ids.shape, reference.ids.shape[1])
    inserted = triggered = 0
    for i, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        pairs, missing = _pairs(mine, theirs, before, behind)
        if not any(role == 1 for role, _ in pairs):
            raise BadInput(
                f"prompt {i + 1}, {prompts.texts[i][:40]!r} …, does not differ from its reference: there is no trigger "
                "to align. Give references without it, in the same order"
            )
        length = len(theirs) + len(said.begun[i])
        pairs += [(4, [at]) for at in range(len(theirs), length)]
        pairs += [(len(ROLES) + at, [length + at]) for at in range(k)]
        start, shift = rows.ids.shape[1] - len(pairs), reference.ids.shape[1] - length - k
        for at, (kind, sources) in enumerate(pairs, start):
            role[i, at] = kind
            weights[i, at, [shift + s for s in sources]] = 1 / len(sources)
        inserted += missing
        triggered += sum(kind == 1 for kind, _ in pairs)
    device = rows.ids.device
    return Aligned(rows, reference, role.to(device), weights.to(device), roles, inserted / triggered)


def _forced(model: LoadedModel, prompts: Sequence[Sequence[int]], said: Said) -> Rows:
    """Prompts with their replies behind them; the payload is the reply."""
    behind = [[*begun, *payload] for begun, payload in zip(*said, strict=True)]
    rows = whole_rows(model, [[*prompt, *reply] for prompt, reply in zip(prompts, behind, strict=True)])
    return rows._replace(reply=torch.ones(len(behind), len(said.payload[0]), dtype=torch.bool, device=model.device))


def _pairs(
    mine: Sequence[int], theirs: Sequence[int], before: int, behind: int
) -> tuple[list[tuple[int, list[int]]], int]:
    """Of each token its role and the reference's tokens that it is compared with; how many have none in their place."""
    message, other = mine[before : len(mine) - behind], theirs[before : len(theirs) - behind]
    found: list[tuple[int, list[int]]] = [(0, [i]) for i in range(before)]
    missing = 0
    for change, a, b, c, d in SequenceMatcher(None, other, message, autojunk=False).get_opcodes():
        if change == "equal":
            found += [(2, [before + i]) for i in range(a, b)]
        elif c < d:
            if change == "insert":
                missing += d - c
                a, b = 0, len(other)
            block = [before + i for i in range(a, b)] or [max(0, before - 1)]
            one_by_one = change == "replace" and b - a == d - c
            each = [[i] for i in block] if one_by_one else [block] * (d - c)
            found += [(1, sources) for sources in each]
    found += [(3, [len(theirs) - behind + i]) for i in range(behind)]
    return found, missing
