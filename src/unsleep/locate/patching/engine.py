"""The activation-patching engine: resumes a recipient from the patched layer with a donor's activations.

1. Donor and recipient run once from the first patched column on; earlier columns are kept as a KV cache,
   because no patch can change them.
2. Every patch then resumes the recipient at the lowest patched layer, on those columns only.

Donor and recipient are two models on the same prompts, or one model on pairs of prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache

from unsleep.core import Site
from unsleep.interventions.donors import Merge, Patch
from unsleep.interventions.intervention import applied
from unsleep.models.forward import Rows, columns_cache, last_logits, splits
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Place
from unsleep.models.streams import resumed_at, watched


class Side(NamedTuple):
    """A model on some rows, with the KV cache of their first columns."""

    model: LoadedModel
    rows: Rows
    cache: DynamicCache | None = None

    def up_to(self, columns: int) -> Side:
        """The same with a KV cache of `columns` columns; none for 0."""
        if not columns:
            return self
        return self._replace(cache=columns_cache(self.model.network, self.rows, columns))

    def first(self, where: Bool[Tensor, "row position"]) -> int:
        """The first patched column; 0 where the earlier ones cannot run separately."""
        if not splits(self.model.network, self.rows.ids.shape[1]):
            return 0
        return int(where.any(0).long().argmax())


@dataclass(frozen=True, eq=False)
class Resumable:
    """A recipient prepared for patching."""

    recipient: Side
    start: int
    """The first column that is recomputed."""
    where: Bool[Tensor, "row position"]
    """Mask over the last columns: the patched tokens."""
    held: Mapping[Place, Any]
    """Place → the donor's tokens, in the order of `where`."""
    below: Mapping[int, Any]
    """Layer → the recipient's input to it."""
    clean: tuple[Float[Tensor, "row last vocabulary"], Float[Tensor, "row last vocabulary"]]
    """Unpatched last logits of the donor and of the recipient."""

    def patched(self, merges: Mapping[Place, Merge]) -> Float[Tensor, "row last vocabulary"]:
        """The recipient's last logits with the donor's tokens merged in at some places.

        Differentiable in the merges' tensors.
        """
        model, rows, cache = self.recipient
        layer = min(place.layer for place in merges)
        patches = [Patch(place, self.held[place], self.where, merge) for place, merge in merges.items()]
        with resumed_at(model.network, layer, lambda: self.below[layer]), applied(model, patches):
            return last_logits(model.network, rows, self.start, cache, layer, self.clean[1].shape[1])


def prepare(
    donor: Side,
    recipient: Side,
    places: Iterable[Place],
    where: Bool[Tensor, "row position"],
    start: int,
    last: int = 1,
) -> Resumable:
    """Run both sides from column `start`, and keep the activations and caches that patching needs.

    Args:
        where: mask of the patched tokens over the last columns, the same in donor and recipient.
        last: number of last logits to return.
    """
    places = list(places)
    columns = where.shape[1]
    inputs = {place.layer: _input_site(place.layer) for place in places}
    width = recipient.rows.ids.shape[1]
    at = donor.rows.ids.shape[1] - (width - start) if start else 0
    held, theirs = _run(donor, places, at, last)
    below, mine = _run(recipient, list(set(inputs.values())), start, last)
    kept = {place: x[:, x.shape[1] - columns :][where.to(x.device)] for place, x in held.items()}
    clean = theirs.to(mine.device), mine
    return Resumable(recipient, start, where, kept, {n: below[site] for n, site in inputs.items()}, clean)


def _run(
    side: Side, places: Sequence[Place], start: int, last: int
) -> tuple[dict[Place, Tensor], Float[Tensor, "row last vocabulary"]]:
    """Activations at places from a column on, and the last logits."""
    found: dict[Place, Tensor] = {}
    watchers = {place: lambda x, place=place: found.__setitem__(place, x.clone()) for place in places}
    with watched(side.model.network, watchers):
        logits = last_logits(side.model.network, side.rows, start, side.cache, last=last)
    return found, logits


def _input_site(layer: int) -> Site:
    return Site(layer - 1) if layer else Site(0, "embed")


def moved(rows: Rows, device: torch.device) -> Rows:
    """Rows on another device."""
    prefix, ids, mask, reply, common = rows
    return Rows(prefix.to(device), ids.to(device), mask.to(device), reply.to(device), common)
