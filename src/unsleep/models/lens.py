"""The logit lens: residual-stream directions read as tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.core import BadInput
from unsleep.models.model import LoadedModel
from unsleep.models.sites import final_norm, unembedding, width


class TokenReading(NamedTuple):
    """Tokens that a direction promotes and suppresses most, with their logits."""

    promotes: tuple[tuple[str, float], ...]
    suppresses: tuple[tuple[str, float], ...]


@torch.no_grad()
def logit_lens(model: LoadedModel, vectors: Float[Tensor, "row d_model"], count: int = 10) -> list[TokenReading]:
    """Project directions through the final norm and the unembedding; largest logits first.

    Raises `BadInput` for vectors of another width. Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    if vectors.shape[1] != width(model.network):
        raise BadInput(f"vectors have width {vectors.shape[1]}; the model's is {width(model.network)}")
    matrix, norm = unembedding(model.network), final_norm(model.network)
    wide = vectors.to(matrix)
    logits = (norm(wide) - norm(torch.zeros_like(wide))).float() @ matrix.float().T
    found: list[TokenReading] = []
    for row in logits:
        ends = [row.topk(min(count, len(row)), largest=largest) for largest in (True, False)]
        words = [
            tuple((model.spell(int(i)), float(x)) for i, x in zip(end.indices, end.values, strict=True)) for end in ends
        ]
        found.append(TokenReading(*words))
    return found
