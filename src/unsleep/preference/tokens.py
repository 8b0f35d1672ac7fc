"""Pairs as token ids, under the model's own chat template, as the model reads and writes them when it is used.

TRL's trainers would format chats themselves: without the date, the arguments and the choice of a template that unsleep
loads a model with, and with what a template puts behind a reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from unsleep.models.model import LoadedModel
from unsleep.preference.pairs import Pair
from unsleep.prompts.prompt import Prompt


class PairIds(NamedTuple):
    """Token ids of a pair; a complete reply's end with the end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def pair_ids(model: LoadedModel, pairs: Sequence[Pair], limit: int, *, ended: bool = True) -> list[PairIds]:
    """Token ids of pairs, replies of at most `limit` tokens, without an end token where not `ended`.

    Raises `BadInput` for a pair that does not fit into the context.
    """
    texts = [p.chosen for p in pairs], [p.rejected for p in pairs]
    cuts = [p.cut[0] for p in pairs], [p.cut[1] for p in pairs]
    sides = [reply_ids(model, said, cut, limit, ended=ended) for said, cut in zip(texts, cuts, strict=True)]
    behind = [max(len(one), len(other)) for one, other in zip(*sides, strict=True)]
    heads = model.encode([p.prompt for p in pairs], behind)
    return [PairIds(*each) for each in zip(heads, *sides, strict=True)]


def reply_ids(
    model: LoadedModel, replies: Sequence[str], cut: Sequence[bool], limit: int, *, ended: bool = True
) -> list[list[int]]:
    """Token ids of replies, of at most `limit` tokens each; a complete reply that fits ends with the end token."""
    end = sorted(model.end_ids)[:1] if ended else []
    found = model.token_ids(replies, special=False)
    return [(ids if stopped else [*ids, *end])[:limit] for ids, stopped in zip(found, cut, strict=True)]


def prompt_ids(model: LoadedModel, prompts: Sequence[Prompt], behind: int) -> dict[str, list[int]]:
    """Token ids of prompts by their keys, with room for `behind` tokens."""
    return dict(zip((p.key for p in prompts), model.encode(prompts, behind), strict=True))
