"""Batches of token rows through a model: the activations at Sites of every token, without padding, one pass for all.

Rows are sorted by length and cut into batches; the prefix shared by all rows runs once. Each forward pass stops at the
deepest Site.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from unsleep.core import Site
from unsleep.models import chat
from unsleep.models.forward import Rows, pad_left, repeat_cache, shared_tokens, takes_positions
from unsleep.models.model import LoadedModel
from unsleep.models.streams import stopping, watched

SHARED = -1
"""Prompt index of tokens of the shared prefix."""


def batched(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Row indices of each batch, shortest rows first, at most `batch_tokens` padded tokens in each, or one row."""
    batches: list[list[int]] = []
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and lengths[i] * (len(batch) + 1) > batch_tokens:
            batches.append(batch)
            batch = []
        batch.append(i)
    return [*batches, batch]


class TokenSource:
    """Runs batches of rows and returns the Sites' activations of their tokens."""

    def __init__(
        self, model: LoadedModel, rows: Sequence[Sequence[int]], sites: Sequence[Site], most: int | None = None
    ) -> None:
        self.model, self.rows, self.sites = model, rows, sites
        common = chat.shared_prefix(rows)
        self.shared = common if most is None else min(common, most)
        """Number of leading tokens common to all rows, at most `most`."""
        self.apart = min(self.shared, shared_tokens(model.network, rows))
        """Number of them that run separately: all, or none where that would not be exact."""
        self.cache: DynamicCache | None = None

    def batches(self, batch_tokens: int) -> list[list[int]]:
        """Row indices of each batch (see `batched`)."""
        return batched([len(row) - self.apart for row in self.rows], batch_tokens)

    @torch.no_grad()
    def stream(self, batches: Sequence[Sequence[int]], *, with_prefix: bool) -> Iterator[dict[str, Tensor]]:
        """Each batch's activations, one row per token; optionally preceded by those of the shared prefix.

        Yields tensors by name: `prompt_index` (`SHARED` in the prefix) and `position` on the CPU, and each Site's
        activations `[token, d_model]` on the model's device. Rows are in the batch's order, tokens in the row's.
        """
        if (self.apart and self.cache is None) or (self.shared and with_prefix):
            prefix = self._prefix()
            if with_prefix:
                yield prefix
        for index in batches:
            yield self._batch(index)

    def _prefix(self) -> dict[str, Tensor]:
        """The shared prefix as one row; keeps its KV cache where rows resume from it."""
        ids = torch.tensor([self.rows[0][: self.shared]], device=self.model.device)
        arguments: dict[str, Any] = {"use_cache": False}
        if self.apart:
            self.cache = DynamicCache(config=self.model.network.config)
            arguments = {"use_cache": True, "past_key_values": self.cache}
        found = self._run(input_ids=ids, **arguments)
        where = {"prompt_index": torch.full((self.shared,), SHARED), "position": torch.arange(self.shared)}
        return {**where, **{str(s): x[0] for s, x in found.items()}}

    def _batch(self, index: Sequence[int]) -> dict[str, Tensor]:
        """Activations of the batch's own tokens, one row per token, without padding."""
        ids, mask = pad_left([self.rows[i][self.apart :] for i in index], self.model.pad_id, self.model.device)
        rows = Rows(torch.empty(self.apart), ids, mask, mask[:, :0], self.shared)
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": rows.full_mask.long(), "use_cache": False}
        if self.cache is not None:
            cache = repeat_cache(self.model.network, self.cache, len(index))
            arguments |= {"past_key_values": cache, "use_cache": True, "position_ids": rows.positions}
        elif takes_positions(self.model.network):
            arguments["position_ids"] = rows.positions
        found = self._run(**arguments)
        own = rows.own
        owners = torch.tensor(index)[:, None].expand(own.shape)[own.cpu()]
        where = {"prompt_index": owners, "position": rows.positions[own].cpu()}
        return {**where, **{str(s): x[own] for s, x in found.items()}}

    def _run(self, **arguments: Any) -> dict[Site, Float[Tensor, "row position d_model"]]:
        found: dict[Site, Tensor] = {}
        watchers = {s: lambda x, s=s: found.__setitem__(s, x.clone()) for s in self.sites}
        with watched(self.model.network, watchers, stop_after_last=True), stopping():
            self.model.network(**arguments)
        return found
