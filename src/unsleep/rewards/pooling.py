"""Features pooled over the tokens of outputs: maximum, mean and last token, for all Sites in one pass of the model.

A batch's sparse codes update the pooled values and are dropped: no prompt × token × feature tensor exists. The result
takes 12 bytes per sample and feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unsleep.activations.batches import TokenSource
from unsleep.activations.harvest import token_rows
from unsleep.base.context import progress
from unsleep.core import BadInput, Site, check_finite
from unsleep.dictionaries.coders import Coder
from unsleep.models.model import LoadedModel
from unsleep.rewards.samples import Samples

Pooling = Literal["max", "mean", "last"]

POOLINGS: tuple[Pooling, ...] = ("max", "mean", "last")


class Tokens(NamedTuple):
    """Samples as token rows of a model: a prompt with its output behind it."""

    rows: list[list[int]]
    asked: Int[Tensor, " sample"]
    """Tokens before the output: its position."""

    @property
    def length(self) -> Int[Tensor, " sample"]:
        """Tokens of the output."""
        return torch.tensor([len(row) for row in self.rows]) - self.asked


def tokens_of(model: LoadedModel, samples: Samples, *, plain: bool = False) -> Tokens:
    """Token rows of samples, under the chat template unless `plain`.

    Raises `BadInput` for an output without tokens, or a sample longer than the model's context.
    """
    tails = model.token_ids(samples.outputs, special=False)
    if empty := [text for text, ids in zip(samples.outputs, tails, strict=True) if not ids]:
        raise BadInput(f"the output {empty[0][:40]!r} has no tokens; leave the sample out")
    rows = token_rows(model, samples.prompt_set(), samples.outputs, plain)
    return Tokens(rows, torch.tensor([len(row) - len(tail) for row, tail in zip(rows, tails, strict=True)]))


class Piece(NamedTuple):
    """The outputs' tokens of one batch."""

    sample: Int[Tensor, " token"]
    last: Bool[Tensor, " token"]
    """True at the last token of an output."""
    activations: dict[Site, Float[Tensor, "token d_model"]]


@torch.no_grad()
def pieces(model: LoadedModel, tokens: Tokens, sites: Sequence[Site], batch_tokens: int = 4096) -> Iterator[Piece]:
    """The activations at Sites on the tokens of all outputs, batch by batch.

    Raises `BadInput` for activations that are NaN or infinite.
    """
    source = TokenSource(model, tokens.rows, sites, most=int(tokens.asked.min()))
    ends, done = tokens.asked + tokens.length - 1, 0
    batches = source.batches(batch_tokens)
    for index, tensors in zip(batches, source.stream(batches, with_prefix=False), strict=True):
        sample, position = tensors["prompt_index"], tensors["position"]
        own = position >= tokens.asked[sample]
        held = {site: tensors[str(site)][own.to(model.device)] for site in sites}
        for site, x in held.items():
            check_finite(x, f"activations at {site}")
        sample, position = sample[own], position[own]
        yield Piece(sample, position == ends[sample], held)
        done += len(index)
        progress("features of outputs", done, len(tokens.rows))


def pooled(
    model: LoadedModel, dictionaries: Sequence[Coder], tokens: Tokens, batch_tokens: int = 4096
) -> dict[Site, Float[Tensor, "pooling sample feature"]]:
    """Maximum, mean and last activation of every feature over each output; dictionaries of different Sites.

    `batch_tokens` are the padded tokens of a forward pass.
    """
    coders = [d.to(d.decoder.dtype, model.device) for d in dictionaries]
    n = len(tokens.rows)
    found = {c.site: torch.zeros(len(POOLINGS), n, c.n_features) for c in coders}
    for piece in pieces(model, tokens, list(found), batch_tokens):
        for coder in coders:
            code = coder.encode_sparse(piece.activations[coder.site].to(coder.decoder))
            values = code.values.float().cpu()
            at = piece.sample[:, None] * coder.n_features + code.ids.cpu()
            peak, total, last = (each.view(-1) for each in found[coder.site])
            peak.scatter_reduce_(0, at.flatten(), values.flatten(), "amax")
            total.index_add_(0, at.flatten(), values.flatten())
            last.index_add_(0, at[piece.last].flatten(), values[piece.last].flatten())
    for each in found.values():
        each[POOLINGS.index("mean")] /= tokens.length[:, None]
    return found


def pooled_along(
    model: LoadedModel,
    directions: Mapping[Site, Float[Tensor, "direction d_model"]],
    tokens: Tokens,
    batch_tokens: int = 4096,
) -> dict[Site, Float[Tensor, "pooling sample direction"]]:
    """The same of the projections on directions, such as principal components."""
    n = len(tokens.rows)
    found = {site: torch.zeros(len(POOLINGS), n, len(rows)) for site, rows in directions.items()}
    for each in found.values():
        each[POOLINGS.index("max")] = -torch.inf
    for piece in pieces(model, tokens, list(found), batch_tokens):
        for site, rows in directions.items():
            along = (piece.activations[site].float() @ rows.to(model.device).float().T).cpu()
            peak, total, last = found[site]
            peak.scatter_reduce_(0, piece.sample[:, None].expand_as(along), along, "amax")
            total.index_add_(0, piece.sample, along)
            last.index_add_(0, piece.sample[piece.last], along[piece.last])
    for each in found.values():
        each[POOLINGS.index("mean")] /= tokens.length[:, None]
    return found
