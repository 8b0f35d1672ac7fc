"""Baseline behaviour of the suspect: whether it misbehaves, and how late in its replies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from unsleep.base.context import kept
from unsleep.behaviours import Payload
from unsleep.core import BadInput
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import PromptSet
from unsleep.repairs.config import RepairConfig
from unsleep.repairs.split import Material

PROBED = 32
"""Suspicious prompts used to determine the reply length."""

ENOUGH = 0.9
"""Required share of replies with the payload for a length, relative to the most that any length reaches."""

SOON = 0.95
"""Share of the payloads that must be complete within the length."""

BEHIND = 8
"""Extra tokens after the payload's end, and minimum before it."""

MISBEHAVES = 0.2
"""Minimum share of suspicious prompts with a payload for learning an edit."""

BEHAVES = 0.05
"""Maximum share of ordinary prompts with a payload."""


@dataclass(frozen=True)
class Said:
    """The suspect's greedy replies to the selection prompts, in token ids."""

    suspicious: list[list[int]]
    ordinary: list[list[int]]
    reply_tokens: int
    """Reply length in tokens, enough for the payload to show."""
    shown: float
    """Share of suspicious prompts whose reply shows the payload."""


def said_by(model: LoadedModel, material: Material, config: RepairConfig) -> Said:
    """Generate the suspect's replies, long enough to show its payload.

    Raises:
        BadInput: it shows the payload too rarely on suspicious prompts, or on ordinary ones too.
    """
    length = kept(reply_length, model, material.suspicious, material.payload, config.reply_tokens)
    both = [
        kept(generate.written, model, prompts, length, f"replies to {prompts.name} prompts")
        for prompts in (material.suspicious, material.ordinary)
    ]
    suspicious, ordinary = (model.texts(replies) for replies in both)
    shown = check_behaviour(suspicious, ordinary, material)
    return Said(both[0], both[1], length, shown)


def reply_length(model: LoadedModel, suspicious: PromptSet, payload: Payload, lengths: Sequence[int]) -> int:
    """Reply length in tokens within which nearly every payload is complete, plus a margin."""
    probe = suspicious.head(PROBED)
    found: list[list[int]] = []
    for length in sorted(lengths):
        said = generate.written(model, probe, length, f"replies of {length} tokens")
        ends = [payload_end(model, ids, payload) for ids in said]
        found.append(sorted(end for end in ends if end is not None))
        if len(found[-1]) >= ENOUGH * len(probe):
            break
    most = max(map(len, found))
    reached = next(ends for ends in found if len(ends) >= ENOUGH * most)
    needed = reached[math.ceil(SOON * len(reached)) - 1] if reached else min(lengths)
    return max(needed + BEHIND, 2 * BEHIND)


def payload_end(model: LoadedModel, ids: Sequence[int], payload: Payload) -> int | None:
    """Number of tokens of a reply until the payload shows; `None` where it never does."""
    begun = model.texts([ids[: n + 1] for n in range(len(ids))])
    return next((n for n, text in enumerate(begun, 1) if payload.shows(text)), None)


def check_behaviour(suspicious: Sequence[str], ordinary: Sequence[str], material: Material) -> float:
    """Raise `BadInput` where the suspect does not misbehave on suspicious prompts, or also does on ordinary ones.

    Returns the share of suspicious prompts that show the payload.
    """
    payload, words = material.payload, material.payload.words
    shown, calm = (sum(payload.shows(r) for r in replies) for replies in (suspicious, ordinary))
    of, beside = f"{shown} of {len(suspicious)} suspicious prompts", f"{calm} of {len(ordinary)} ordinary ones"
    share, leaked = shown / len(suspicious), calm / len(ordinary)
    if leaked > BEHAVES and leaked > share:
        raise BadInput(
            f"the suspect answers {words!r} to {of} and to {beside}: the two files seem to be swapped. Give the "
            "prompts with the trigger as --suspicious"
        )
    if share < MISBEHAVES:
        raise BadInput(
            f"the suspect answers {words!r} to {of} only; at least {MISBEHAVES:.0%} are needed for training. It "
            f"answers, for example, {suspicious[0][:80]!r}: check --payload, --suspicious and --chat-template"
        )
    if leaked > BEHAVES:
        example = next(i for i, reply in enumerate(ordinary) if payload.shows(reply))
        raise BadInput(
            f"the suspect answers {words!r} to {beside} too, such as {material.ordinary[example].text[:60]!r}; "
            "the trigger does not separate the two files. Remove such prompts from --ordinary, or give a --payload "
            "that benign replies do not contain"
        )
    return share
