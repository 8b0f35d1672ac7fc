"""Decoding in batches, greedy or sampled, and of one prompt token by token.

In a batch, the shared prefix of all prompts runs once, rows are sorted by length, and finished rows
leave the batch. Replies equal those of `model.generate(do_sample=False)` up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from unsleep.base.context import progress
from unsleep.core import BadInput
from unsleep.models.forward import keeps_logits, pad_left, prefix_cache, repeat_cache, shared_tokens, takes_positions
from unsleep.models.hooks import contiguous_head
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Prompts

Choice = Callable[[Float[Tensor, "row vocabulary"]], Int[Tensor, " row"]]
"""Tokens from logits."""


def written(model: LoadedModel, prompts: Prompts, tokens: int, stage: str) -> list[list[int]]:
    """Greedy replies of at most `tokens` tokens, as token ids; progress is reported as `stage`."""
    rows = model.encode(prompts, tokens)
    return greedy(model, rows, max_new_tokens=tokens, batch_size=200, stage=stage)


def deciding_tokens(said: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> list[int]:
    """Index of the first token at which the actual and the wanted reply differ, per reply.

    0 where they agree over the length of the shorter one.
    """
    return [
        next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
        for one, other in zip(said, wanted, strict=True)
    ]


def replies(
    model: LoadedModel,
    texts: Prompts,
    *,
    max_new_tokens: int = 24,
    batch_size: int = 100,
    stage: str = "",
) -> list[str]:
    """Greedy replies to prompts, in order, without special tokens.

    Active hooks (`interventions.applied`) take effect; `stage` as in `greedy`. Raises `BadInput` for a prompt
    that leaves no room for its reply in the context.
    """
    rows = model.encode(texts, max_new_tokens)
    out = greedy(model, rows, max_new_tokens=max_new_tokens, batch_size=batch_size, stage=stage)
    return model.texts(out)


def greedy(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 100,
    stage: str = "",
    share: bool = True,
) -> list[list[int]]:
    """Greedy continuations of rows of token ids, including the end token where it was reached.

    With `share=False` the common prefix runs for every row: hooks then see every token. `stage` is the
    name under which progress is reported, in rows.
    """
    return _decoded(model, rows, likeliest, max_new_tokens, batch_size, stage, share)


def sampled(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 24,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 100,
    stage: str = "",
) -> list[list[int]]:
    """Continuations of rows of token ids, sampled from softmax(logits / temperature), as `greedy` returns its own.

    Raises `BadInput` for a temperature that is not above 0.
    """
    if not temperature > 0:
        raise BadInput.of("temperature", temperature, "over 0; greedy decoding is a function of its own")
    return _decoded(model, rows, sampler(temperature, seed), max_new_tokens, batch_size, stage)


@torch.no_grad()
def _decoded(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    choose: Choice,
    max_new_tokens: int,
    batch_size: int,
    stage: str,
    share: bool = True,
) -> list[list[int]]:
    """Continuations of rows, each token chosen from the logits."""
    network = model.network
    shared = shared_tokens(network, rows, max_new_tokens) if share else 0
    prefix = prefix_cache(network, torch.tensor(rows[0][:shared], device=model.device)) if shared else None
    out: list[list[int]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        ids, mask = pad_left([rows[i][shared:] for i in chunk], model.pad_id, model.device)
        cache = repeat_cache(network, prefix, len(chunk)) if prefix is not None else None
        with contiguous_head(network):
            done = _continue(model, ids, pad(mask, (shared, 0), value=True), cache, max_new_tokens, choose)
        for i, reply in zip(chunk, done, strict=True):
            out[i] = reply
        if stage:
            progress(stage, start + len(chunk), len(order))
    return out


def _continue(
    model: LoadedModel,
    ids: Tensor,
    mask: Tensor,
    cache: DynamicCache | None,
    max_new_tokens: int,
    choose: Choice,
) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in range(len(ids))]
    for picked in _steps(model, ids, mask, cache, max_new_tokens, choose):
        for row, token in picked:
            out[row].append(token)
    return out


def stream(
    model: LoadedModel, row: Sequence[int], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[int]:
    """The token ids of one reply as they are generated, including the end token where it is reached.

    Greedy at temperature 0, else sampled from softmax(logits / temperature). Each token is one forward pass, under the
    hooks that are active when it is asked for: several streams of one model may alternate, each under its own
    interventions, if these do not follow passes. Raises `BadInput` for a temperature below 0.
    """
    if not temperature >= 0:
        raise BadInput.of("temperature", temperature, "0 for greedy decoding, or more")
    ids, mask = pad_left([row], model.pad_id, model.device)
    choose = sampler(temperature, seed) if temperature else likeliest
    for picked in _steps(model, ids, mask, None, max_new_tokens, choose):
        yield picked[0][1]


class Spelling:
    """The text of a growing reply, in pieces that end with whole characters."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.tokens: list[int] = []
        self._said = ""

    @property
    def text(self) -> str:
        """The whole text, without special tokens."""
        return self.model.texts([self.tokens])[0]

    def add(self, token: int) -> str:
        """The text that a token adds; empty inside of a character of several tokens."""
        self.tokens.append(token)
        text = self.text
        if text.endswith("\ufffd") or not text.startswith(self._said):
            return ""
        piece, self._said = text[len(self._said) :], text
        return piece


def likeliest(logits: Tensor) -> Tensor:
    """The tokens with the largest logits; `max` is several times faster than `argmax` in bfloat16."""
    return logits.max(-1).indices


def sampler(temperature: float, seed: int) -> Choice:
    """Choice by sampling from softmax(logits / temperature), with numbers from the CPU, the same by seed everywhere."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        return drawn((logits.float() / temperature).softmax(-1), generator)

    return choose


def drawn(shares: Float[Tensor, "row choice"], generator: torch.Generator, block: int = 256) -> Int[Tensor, " row"]:
    """A choice per row, drawn with probability proportional to its share, at least 0.

    Inverts the cumulative distribution block by block: `torch.multinomial` draws a number for every token of the
    vocabulary, which takes longer than the softmax. Raises `BadInput` for shares that are NaN or infinite.
    """
    parts = pad(shares, (0, -shares.shape[1] % block)).unflatten(1, (-1, block))
    ends = parts.sum(-1, dtype=torch.float64).cumsum(-1)
    if not bool(ends[:, -1].isfinite().all()):
        raise BadInput("the logits of a token hold NaN or infinity, and nothing can be sampled from them")
    below = 1 - 1e-12  # so that rounding never reaches the end, where no share is left
    at = torch.rand(len(shares), 1, dtype=torch.float64, generator=generator).to(ends) * ends[:, -1:] * below
    chosen = torch.searchsorted(ends, at, right=True)
    inside = parts[torch.arange(len(shares), device=shares.device), chosen[:, 0]].double().cumsum(-1)
    left = at - ends.gather(1, (chosen - 1).clamp_min(0)) * (chosen > 0)
    place = torch.searchsorted(inside, torch.minimum(left, inside[:, -1:] * below), right=True)
    return (chosen * block + place)[:, 0]


def _steps(
    model: LoadedModel,
    ids: Tensor,
    mask: Tensor,
    cache: DynamicCache | None,
    max_new_tokens: int,
    choose: Choice,
) -> Iterator[list[tuple[int, int]]]:
    """One forward pass after another: each row that goes on, and its next token."""
    network, ends = model.network, model.end_ids
    alive = list(range(len(ids)))
    for _ in range(max_new_tokens):
        step: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "past_key_values": cache,
            "use_cache": True,
        }
        if takes_positions(network):
            step["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with torch.no_grad():
            result = network(**step, **keeps_logits(network, 1))
        cache = getattr(result, "past_key_values", None)
        chosen = choose(result.logits[:, -1])
        picked: list[int] = chosen.tolist()
        yield list(zip(alive, picked, strict=True))
        going = [i for i, token in enumerate(picked) if token not in ends]
        if not going:
            break
        if len(going) < len(alive):
            keep = torch.tensor(going, device=mask.device)
            if cache is not None:
                cache.reorder_cache(cast("Any", keep))  # recurrent layers lack batch_select_indices
            ids, mask, chosen = ids[keep], mask[keep], chosen[keep]
            alive = [alive[i] for i in going]
        ids = chosen[:, None] if cache is not None else torch.cat([ids, chosen[:, None]], 1)
        mask = pad(mask, (0, 1), value=True)
