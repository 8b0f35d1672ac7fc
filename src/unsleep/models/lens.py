"""The logit lens: residual-stream directions read as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unsleep.core import BadInput
from unsleep.models.model import LoadedModel
from unsleep.models.sites import final_norm, unembedding, width


class TokenReading(NamedTuple):
    """Tokens that a direction promotes and suppresses most, with their logits."""

    promotes: tuple[tuple[str, float], ...]
    suppresses: tuple[tuple[str, float], ...]


class Written(NamedTuple):
    """The end of the vocabulary on which a direction acts most."""

    verb: Literal["promotes", "suppresses"]
    tokens: tuple[str, ...]
    """The largest |logit| first."""


def stronger(promotes: Sequence[Any], suppresses: Sequence[Any], count: int = 4) -> Written | None:
    """The end with the larger |logit|, of pairs of a token and its logit, largest first; `None` where both are empty.

    A direction whose promoted tokens are all alike and unreadable may still suppress one token strongly.
    """
    low = abs(suppresses[0][1]) if suppresses else -1.0
    if not promotes and not suppresses:
        return None
    if not promotes or low > abs(promotes[0][1]):
        return Written("suppresses", tuple(token for token, _ in suppresses[:count]))
    return Written("promotes", tuple(token for token, _ in promotes[:count]))


class Ends(NamedTuple):
    """The vocabulary's ends under a projection of directions: the largest logits, or the smallest, first."""

    ids: Int[Tensor, "row count"]
    logits: Float[Tensor, "row count"]


CHUNK = 256
"""Directions projected at a time: their logits take CHUNK · vocabulary floats."""


@torch.no_grad()
def vocabulary_ends(model: LoadedModel, vectors: Float[Tensor, "row d_model"], count: int = 10) -> tuple[Ends, Ends]:
    """Tokens that each direction promotes and suppresses most through final norm and unembedding, on the CPU.

    Raises `BadInput` for vectors of another width. Sources: nostalgebraist 2020, "interpreting GPT: the logit lens";
    of decoder rows, VocabProj (Gur-Arieh et al. 2025, arXiv:2501.08319).
    """
    if vectors.shape[1] != width(model.network):
        raise BadInput(f"vectors have width {vectors.shape[1]}; the model's is {width(model.network)}")
    matrix, norm = unembedding(model.network), final_norm(model.network)
    wide = matrix.float().T
    found: list[list[Ends]] = [[], []]
    for part in vectors.split(CHUNK):
        rows = part.to(matrix)
        logits = (norm(rows) - norm(torch.zeros_like(rows))).float() @ wide
        for end, largest in zip(found, (True, False), strict=True):
            best = logits.topk(min(count, logits.shape[1]), largest=largest)
            end.append(Ends(best.indices.cpu(), best.values.cpu()))
    up, down = (Ends(torch.cat([e.ids for e in end]), torch.cat([e.logits for e in end])) for end in found)
    return up, down


def logit_lens(model: LoadedModel, vectors: Float[Tensor, "row d_model"], count: int = 10) -> list[TokenReading]:
    """`vocabulary_ends` in words; raises as it does."""
    words = [
        [
            tuple(zip(map(model.spell, ids), logits, strict=True))
            for ids, logits in zip(*map(Tensor.tolist, end), strict=True)
        ]
        for end in vocabulary_ends(model, vectors, count)
    ]
    return [TokenReading(*both) for both in zip(*words, strict=True)]
