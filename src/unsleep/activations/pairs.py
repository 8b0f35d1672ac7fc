"""Activations of two models on the same tokens, paired from their harvests, and the difference Δh.

Two harvests pair where they have the same rows of token ids: the same prompts and replies through the same
tokenizer. A token that either harvest left out as an attention sink is left out
of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unsleep.activations.harvest import Harvest
from unsleep.base import store
from unsleep.core import Activations, ActivationStream, BadInput, Site


@dataclass(frozen=True)
class Pair:
    """Activations of two models at one Site on the same tokens, in the same order and shards."""

    before: ActivationStream
    """The reference model: base, clean twin, an earlier checkpoint."""
    after: ActivationStream
    """The model under investigation."""
    prompt_index: Int[Tensor, " token"]
    """Prompt index of each token."""
    left_out: int
    """Tokens left out because one of the harvests counted them as attention sinks."""

    def difference(self) -> ActivationStream:
        """Δh = h_after − h_before of every token, in float32, read shard by shard.

        The training data of a diff-SAE. The norm of Δh has a long tail, which may carry the behaviour:
        train with a `sink_ratio` so large that no token counts as a sink.

        Raises `BadInput` where both harvests are of one model: Δh would be rounding errors.
        """
        if self.before.model == self.after.model:
            raise BadInput(
                f"both harvests are of model {self.after.model}: their difference is zero; "
                "harvest the same prompts with the other model"
            )

        def read(i: int) -> Float[Tensor, "token d_model"]:
            return self.after.read(i).float() - self.before.read(i).float()

        name = f"{self.after.model} - {self.before.model}"
        return ActivationStream(self.after.sizes, read, self.after.site, name, self.after.prompts)

    def load_difference(self) -> Activations:
        """`difference` in memory, with each token's prompt index."""
        stream = self.difference()
        tensor = torch.cat([stream.read(i) for i in range(len(stream.sizes))])
        return Activations(tensor, self.prompt_index, stream.site, stream.model, stream.prompts)


class _Piece(NamedTuple):
    """One shard of the first model's harvest, and the locations of the same tokens in the second's."""

    before: Harvest
    shard: int
    rows: Int[Tensor, " token"]
    after: Harvest
    parts: list[tuple[int, Int[Tensor, " token"]]]
    """Shards of the second harvest, and rows in them."""


def paired(before: Sequence[Harvest], after: Sequence[Harvest], site: Site) -> Pair:
    """Pair harvests of one model with those of another, in order.

    Raises:
        BadInput: unequal numbers of harvests, several models on one side, models of different widths, a Site
            that one lacks, prompts or replies that differ, or no common token.
    """
    if not before or len(before) != len(after):
        raise BadInput(
            f"{len(before)} harvests of one model and {len(after)} of the other; expected as many, at least 1"
        )
    for side in (before, after):
        models = sorted({h.manifest["model"] for h in side})
        if len(models) != 1:
            raise BadInput(f"one side's harvests are of {len(models)} models ({', '.join(models)}); expected one")
    pieces: list[_Piece] = []
    owners: list[Tensor] = []
    left_out = 0
    for one, other in zip(before, after, strict=True):
        _check(one, other, site)
        found, owner = _align(one, other)
        pieces += found
        owners.append(owner)
        left_out += one.tokens + other.tokens - 2 * len(owner)

    def first(i: int) -> Tensor:
        p = pieces[i]
        return p.before.read(p.shard, site)[0][p.rows]

    def second(i: int) -> Tensor:
        p = pieces[i]
        return torch.cat([p.after.read(shard, site)[0][rows] for shard, rows in p.parts])

    sizes = tuple(len(p.rows) for p in pieces)
    prompts = store.hash_value([h.hash for h in (*before, *after)])
    names = (before[0].manifest["model"], after[0].manifest["model"])
    streams = [
        ActivationStream(sizes, read, site, name, prompts) for read, name in zip((first, second), names, strict=True)
    ]
    return Pair(streams[0], streams[1], torch.cat(owners), left_out)


def _check(one: Harvest, other: Harvest, site: Site) -> None:
    """Raise `BadInput` for two harvests of different tokens, or without a common Site."""
    for h in (one, other):
        if site not in h.sites:
            raise BadInput(f"{h.folder} has no Site {site}; it has {', '.join(h.manifest['sites'])}")
    for key, words, fix in (
        ("prompts", "prompts", "harvest the same prompts, with the same replies, by models with one tokenizer"),
        ("d_model", "width", "compare models of the same width"),
        ("shared", "number of tokens that all prompts begin with", "compare models of one family"),
    ):
        if one.manifest[key] != other.manifest[key]:
            raise BadInput(
                f"{one.folder} and {other.folder} do not pair: their {words} is {one.manifest[key]} and "
                f"{other.manifest[key]}; {fix}"
            )


class _Tokens(NamedTuple):
    """The kept tokens of a harvest, in order."""

    owner: Int[Tensor, " token"]
    position: Int[Tensor, " token"]
    shard: Int[Tensor, " token"]
    row: Int[Tensor, " token"]
    """Row in the shard."""


def _tokens(h: Harvest) -> _Tokens:
    found: list[tuple[Tensor, ...]] = []
    for i, entry in enumerate(h.manifest["shards"]):
        n = entry["tokens"]
        expect = {"prompt_index": (n,), "position": (n,)}
        tensors = store.read_tensors(h.folder / entry["file"], expect, only=expect)
        found.append((tensors["prompt_index"], tensors["position"], torch.full((n,), i), torch.arange(n)))
    return _Tokens(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _align(one: Harvest, other: Harvest) -> tuple[list[_Piece], Int[Tensor, " token"]]:
    """The shards of two harvests restricted to common tokens, and each token's prompt index."""
    a, b = _tokens(one), _tokens(other)
    width = 1 + max(int(a.position.max()), int(b.position.max()))
    keys = [t.owner * width + t.position for t in (a, b)]
    in_a, in_b = (torch.isin(*order).nonzero().squeeze(1) for order in (keys, keys[::-1]))
    if not len(in_a):
        raise BadInput(f"{one.folder} and {other.folder} have no token in common: each left out what the other kept")
    if not torch.equal(keys[0][in_a], keys[1][in_b]):
        raise BadInput(
            f"{one.folder} and {other.folder} hold their tokens in different orders; harvest one of them again"
        )
    pieces: list[_Piece] = []
    for shard in range(len(one.manifest["shards"])):
        mine = (a.shard[in_a] == shard).nonzero().squeeze(1)
        theirs = in_b[mine]
        parts = [(int(s), b.row[theirs][b.shard[theirs] == s]) for s in b.shard[theirs].unique()]
        if len(mine):
            pieces.append(_Piece(one, shard, a.row[in_a][mine], other, parts))
    return pieces, a.owner[in_a]
