"""Token alignment by role between a triggered prompt and its reference, for prompts of unequal length.

A prompt with a trigger and its near miss never have as many tokens. Their templates and the tokens that both messages
have are set against each other one by one; where they differ, each token of the trigger is set against the mean of what
stands in its place. What a node is compared with is always taken from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unsleep.core import BadInput
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

    def batch(self, start: int, size: int) -> Aligned:
        """Some of the rows, padded as they were."""
        part = slice(start, start + size)
        rows, reference = self.rows.at(part), self.reference.at(part)
        return Aligned(rows, reference, self.role[part], self.weights[part], self.roles, self.inserted)

    def brought(self, x: Float[Tensor, "row other width"]) -> Float[Tensor, "row position width"]:
        """Reference activations, aligned to the tokens of the prompt."""
        return torch.bmm(self.weights.to(x), x)


def align(
    model: LoadedModel,
    prompts: PromptSet,
    references: PromptSet,
    payload: Sequence[int],
    *,
    begun: Sequence[Sequence[int]] | None = None,
    plain: bool = False,
) -> Aligned:
    """Set prompts against their references, the first tokens of a payload forced behind both.

    Args:
        begun: token ids of what is said before the payload, for each prompt.
        plain: take prompts as plain text, without the chat template.

    Raises `BadInput` where they are not as many, no payload, or a pair that does not differ.
    """
    if len(prompts) != len(references) or not len(prompts):
        raise BadInput(
            f"{len(prompts)} prompts were given with {len(references)} references; expected as many, at least 1"
        )
    if not payload:
        raise BadInput("the payload has no tokens; expected the beginning of what a triggered reply says")
    one, other = (model.encode(each, plain=plain) for each in (prompts, references))
    said = begun if begun is not None else [[]] * len(one)
    before, behind = (0, 0) if plain else template_tokens(model.tokenizer, model.chat)
    rows, reference = (
        whole_rows(model, [[*prompt, *start] for prompt, start in zip(each, said, strict=True)], payload)
        for each in (one, other)
    )
    roles = (*ROLES, *(f"payload {k}" for k in range(1, len(payload) + 1)))
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
        pairs += [(4, [len(theirs) + k]) for k in range(len(said[i]))]
        length = len(theirs) + len(said[i])
        pairs += [(len(ROLES) + k, [length + k]) for k in range(len(payload))]
        start, shift = rows.ids.shape[1] - len(pairs), reference.ids.shape[1] - length - len(payload)
        for at, (kind, sources) in enumerate(pairs, start):
            role[i, at] = kind
            weights[i, at, [shift + s for s in sources]] = 1 / len(sources)
        inserted += missing
        triggered += sum(kind == 1 for kind, _ in pairs)
    device = rows.ids.device
    return Aligned(rows, reference, role.to(device), weights.to(device), roles, inserted / triggered)


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
            each = [[i] for i in block] if b - a == d - c else [block] * (d - c)
            found += [(1, sources) for sources in each]
    found += [(3, [len(theirs) - behind + i]) for i in range(behind)]
    return found, missing
