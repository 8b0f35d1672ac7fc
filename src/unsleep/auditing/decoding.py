"""Decoding from weighted log-probabilities of several models in step: contrastive decoding, and sampling.

    score(token) = Σ weight · log P(token)       s + α(s − t) has the weights 1 + α and −α

Contrastive decoding: Li et al. 2023, arXiv:2210.15097. Its plausibility bound is relative to the first model here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from unsleep.base.context import progress
from unsleep.models.forward import keeps_logits, pad_left, takes_positions
from unsleep.models.generate import Choice, likeliest
from unsleep.models.hooks import contiguous_head
from unsleep.models.model import LoadedModel

PLAUSIBLE = 9.0
"""Nats below the first model's best token, up to which a token may be chosen."""


class Voice(NamedTuple):
    """A model and the weight of its log-probabilities."""

    model: LoadedModel
    weight: float = 1.0


@torch.no_grad()
def decoded(
    voices: Sequence[Voice],
    rows: Sequence[Sequence[int]],
    tokens: int,
    choose: Choice = likeliest,
    *,
    branches: int = 1,
    barred: Sequence[int] = (),
) -> list[list[int]]:
    """Continuations of rows of token ids, without the end token.

    Args:
        branches: continuations per row, in turn, which begin with the best tokens by score.
        barred: tokens that are never chosen, such as the end token.
    """
    first = voices[0].model
    rows = [list(row) for row in rows for _ in range(branches)]
    ids, mask = pad_left(rows, first.pad_id, first.device)
    caches: list[Any] = [None] * len(voices)
    out: list[list[int]] = [[] for _ in rows]
    ended = torch.zeros(len(rows), dtype=torch.bool, device=first.device)
    ends = torch.tensor(sorted(first.end_ids), device=first.device, dtype=torch.long)
    for step in range(tokens):
        progress("continuations", step, tokens)
        scores = _scores(voices, ids, mask, caches, barred)
        if step == 0 and branches > 1:
            best = scores[::branches].topk(branches, dim=-1).indices
            chosen = best.flatten()
        else:
            chosen = choose(scores)
        impossible = scores.gather(1, chosen[:, None])[:, 0].isneginf()
        ended = ended | impossible | torch.isin(chosen, ends)
        for row, (token, over) in enumerate(zip(chosen.tolist(), ended.tolist(), strict=True)):
            if not over:
                out[row].append(token)
        if bool(ended.all()):
            break
        ids = torch.cat([ids, chosen[:, None]], 1) if any(c is None for c in caches) else chosen[:, None]
        mask = pad(mask, (0, 1), value=True)
    return out


def _scores(
    voices: Sequence[Voice], ids: Tensor, mask: Tensor, caches: list[Any], barred: Sequence[int] = ()
) -> Float[Tensor, "row vocabulary"]:
    """Weighted log-probabilities of the next token, −∞ for barred and implausible ones; the caches follow.

    Plausible is what the first voice finds likely beside its likeliest token that is not barred.
    """
    total: Tensor | None = None
    usable: Tensor | None = None
    for i, voice in enumerate(voices):
        network = voice.model.network
        step: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": True}
        step["past_key_values"] = caches[i]
        if takes_positions(network):
            step["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with contiguous_head(network):
            result = network(**step, **keeps_logits(network, 1))
        caches[i] = getattr(result, "past_key_values", None)
        log_p = result.logits[:, -1].float().log_softmax(-1)
        if total is None:
            allowed = log_p.index_fill(-1, log_p.new_tensor(barred, dtype=torch.long), -torch.inf)
            least = allowed.amax(-1, keepdim=True) - PLAUSIBLE if len(voices) > 1 else log_p.new_tensor(-torch.inf)
            total, usable = voice.weight * log_p, allowed > least
        else:
            total = total + voice.weight * log_p
    assert total is not None
    assert usable is not None
    return total.masked_fill(~usable, -torch.inf)
