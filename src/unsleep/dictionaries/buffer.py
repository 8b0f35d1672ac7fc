"""Shuffled batches of activations, from memory or from shards larger than memory.

Every epoch reads the shards in a new order, one group at a time, a group holding at least
`pool` tokens; tokens are shuffled within the group and cut into batches. The order depends only on
seed and epoch, so that a resumed run sees the same batches without reading earlier ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.core import Activations, ActivationStream, BadInput, check_finite
from unsleep.dictionaries import parallel


def streamed(source: Activations | ActivationStream) -> ActivationStream:
    """Activations as a stream of one shard; a stream unchanged."""
    if isinstance(source, ActivationStream):
        return source
    x = source.tensor
    check_finite(x, f"activations at {source.site}")
    return ActivationStream((len(x),), lambda _: x, source.site, source.model, source.prompts)


class _Group(NamedTuple):
    """Shards that are in memory at the same time."""

    pieces: list[int]
    batches: int


def batches(
    stream: ActivationStream, batch: int, steps: int, *, seed: int = 0, pool: int = 2**20, start: int = 0
) -> Iterator[Float[Tensor, "token d"]]:
    """Batches of steps `start` to `steps`, in the dtype of the shards.

    Under torchrun each process gets its own share of every batch. Raises `BadInput` for
    fewer tokens than processes.
    """
    size = min(batch, stream.tokens)
    rank, ranks = parallel.place()
    if size < ranks:
        raise BadInput(f"batch of {size} tokens for {ranks} processes; expected at least one token per process")
    step, epoch = 0, 0
    while step < steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for number, group in enumerate(_groups(stream, size, pool, generator)):
            done = min(group.batches, max(0, start - step))
            if done < group.batches and step + done < steps:
                tokens = [stream.piece(i) for i in group.pieces]
                held = tokens[0] if len(tokens) == 1 else torch.cat(tokens)
                shuffle = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 8191 + number)
                order = torch.randperm(len(held), generator=shuffle)
                for i in range(done, min(group.batches, steps - step)):
                    yield held[order[i * size : (i + 1) * size][rank::ranks]]
            step += group.batches
        epoch += 1


def _groups(stream: ActivationStream, size: int, pool: int, generator: torch.Generator) -> list[_Group]:
    """Shards in random order, cut into groups of at least `pool` tokens and one batch."""
    groups: list[_Group] = []
    open_group: list[int] = []
    held = 0
    for i in torch.randperm(len(stream.sizes), generator=generator).tolist():
        open_group.append(i)
        held += stream.sizes[i]
        if held >= max(pool, size):
            groups.append(_Group(open_group, held // size))
            open_group, held = [], 0
    if held >= size:
        groups.append(_Group(open_group, held // size))
    elif open_group and groups:  # fewer than one batch
        last = groups.pop()
        total = held + sum(stream.sizes[i] for i in last.pieces)
        groups.append(_Group([*last.pieces, *open_group], total // size))
    return groups
