"""Streaming figures of one dictionary: firing, histogram and contexts of every feature, in bounded memory.

The figures do not depend on the order or the size of the batches (sums: up to rounding in float64). Every operation is
over all entries of a batch's sparse code at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unsleep.core import Encoded
from unsleep.explanations.text import AFTER, BEFORE, WINDOW

FINE = 256
"""Bins of the streamed histogram, from 0 to the power of two above the largest activation so far."""

UNSET = -(2**30)
"""Exponent of the range of a feature that has not fired."""

SMALLEST = -100
"""Least exponent of a range; smaller activations share the first bin."""

LATEST = 2**32 - 1
"""Token numbers count down from here in keys, so that of equal activations the first is kept."""


class Batch(NamedTuple):
    """Tokens of a forward pass, the same for all dictionaries."""

    token: Int[Tensor, " t"]
    """Number of each in the text."""
    row: Int[Tensor, " t"]
    slot: Int[Tensor, "t window"]
    """Place of the tokens around each among the prefix's tokens and then the batch's own; -1 for none."""
    sampled: Bool[Tensor, " t"]
    """Tokens of which the whole code is kept."""
    prefix: int
    """Tokens of the shared prefix, which has been run before."""


def batch_of(
    token: Int[Tensor, " t"],
    position: Int[Tensor, " t"],
    row: Int[Tensor, " t"],
    length: Int[Tensor, " t"],
    prefix: int,
    sampled: Bool[Tensor, " t"],
    device: torch.device,
) -> Batch:
    """A batch from each token's number, position in its row, row, and length of the row; rows in one piece each."""
    around = torch.arange(-BEFORE, AFTER + 1)
    at = position[:, None] + around
    own = prefix + torch.arange(len(token))[:, None] + around
    slot = torch.where(at < prefix, at, own).masked_fill((at < 0) | (at >= length[:, None]), -1)
    return Batch(token.to(device), row.to(device), slot.to(device), sampled.to(device), prefix)


class Entries(NamedTuple):
    """The active features of a batch."""

    feature: Int[Tensor, " entry"]
    t: Int[Tensor, " entry"]
    """Index into the batch."""
    value: Float[Tensor, " entry"]


def entries(code: Encoded) -> Entries:
    """The entries of a code that are above 0."""
    active = code.values > 0
    return Entries(code.ids[active], active.nonzero()[:, 0], code.values[active].float())


def mixed(x: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Pseudo-random keys of 63 bits from whole numbers: the finaliser of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ ((x >> 30) & 2**34 - 1)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 2**37 - 1)) * -0x6B2FB644ECCEEE15
    return (x ^ ((x >> 31) & 2**33 - 1)) & 2**63 - 1


class Kept:
    """Every feature's entries with the largest keys, with the activations around each."""

    def __init__(self, features: int, count: int, device: torch.device) -> None:
        self.key = torch.full((features, count), -1, dtype=torch.long, device=device)
        """Largest first; -1 where fewer were offered."""
        self.token = torch.full_like(self.key, -1)
        self.around = torch.zeros(features, count, WINDOW, device=device)

    def above(self, feature: Int[Tensor, " entry"], key: Int[Tensor, " entry"]) -> Bool[Tensor, " entry"]:
        """Entries that could be kept."""
        return key > self.key[:, -1][feature]

    def offer(
        self,
        feature: Int[Tensor, " entry"],
        key: Int[Tensor, " entry"],
        t: Int[Tensor, " entry"],
        token: Int[Tensor, " t"],
        look: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Keep those of the entries whose keys are among the largest of their features.

        `look(feature, t)` gives the activations around entries, `[entry, window]`; it is asked for those kept alone.
        """
        if not len(feature):
            return
        count = self.key.shape[1]
        order = key.argsort(descending=True)
        order = order[feature[order].argsort(stable=True)]
        feature, key, t = feature[order], key[order], t[order]
        features, local, sizes = feature.unique_consecutive(return_inverse=True, return_counts=True)
        rank = torch.arange(len(feature), device=feature.device) - (sizes.cumsum(0) - sizes)[local]
        offered = torch.full((len(features), min(count, int(sizes.max()))), -1, dtype=torch.long, device=key.device)
        places = torch.zeros_like(offered)
        within = rank < count
        offered[local[within], rank[within]] = key[within]
        places[local[within], rank[within]] = t[within]
        best = torch.cat([self.key[features], offered], 1).topk(count, 1)
        fresh = (best.indices >= count) & (best.values >= 0)
        old = best.indices.clamp_max(count - 1)
        places = places.gather(1, (best.indices - count).clamp_min(0))
        tokens = torch.where(fresh, token[places], self.token[features].gather(1, old))
        around = self.around[features].gather(1, old[..., None].expand(-1, -1, WINDOW))
        around[fresh] = look(features[:, None].expand_as(fresh)[fresh], places[fresh])
        self.key[features], self.token[features], self.around[features] = best.values, tokens, around


class Tally:
    """The figures of one dictionary so far."""

    def __init__(self, features: int, top: int, drawn: int, seed: int, device: torch.device) -> None:
        self.features, self.device = features, device
        self.seed = int(mixed(torch.tensor(seed)))
        self.count = torch.zeros(features, dtype=torch.long, device=device)
        self.total = torch.zeros(features, dtype=torch.float64, device=device)
        self.largest = torch.zeros(features, device=device)
        self.exponent = torch.full((features,), UNSET, dtype=torch.int32, device=device)
        self.histogram = torch.zeros(features, FINE, dtype=torch.int32, device=device)
        self.top = Kept(features, top, device)
        """The strongest contexts, one per row."""
        self.drawn = Kept(features, drawn, device)
        """Random firings, each with the same probability."""
        self.sample: list[Entries] = []
        """Codes of the sampled rows, with token numbers."""
        none = torch.zeros(0, dtype=torch.long, device=device)
        self.prefix = Entries(none, none, torch.zeros(0, device=device))

    def begin(self, prefix: Encoded | None) -> None:
        """Start another source, with the code of its shared prefix."""
        self.prefix = entries(prefix) if prefix is not None else Entries(*(x[:0] for x in self.prefix))

    def add(self, code: Encoded, batch: Batch) -> None:
        """Count a batch."""
        found = entries(code)
        feature, t, value = found
        self.count += torch.bincount(feature, minlength=self.features)
        self.total.index_add_(0, feature, value.double())
        peak = torch.zeros_like(self.largest).scatter_reduce_(0, feature, value, "amax")
        self.largest = torch.maximum(self.largest, peak)
        self._bin(found, peak)
        sampled = batch.sampled[t]
        kept = (feature[sampled].int(), batch.token[t[sampled]].int(), value[sampled])
        self.sample.append(Entries(*(x.cpu() for x in kept)))
        look = self._looker(found, batch.prefix)
        token = batch.token[t]
        strength = (value.view(torch.int32).long() << 32) | (LATEST - token)
        chosen = self.top.above(feature, strength)
        chosen = chosen.nonzero()[:, 0]
        chosen = chosen[_first_of_each(feature[chosen], batch.row[t[chosen]], strength[chosen])]
        args = batch.token, lambda f, t: look(f, batch.slot[t])
        self.top.offer(feature[chosen], strength[chosen], t[chosen], *args)
        chance = mixed(mixed(token ^ self.seed) + feature)
        chosen = self.drawn.above(feature, chance)
        self.drawn.offer(feature[chosen], chance[chosen], t[chosen], *args)

    def _bin(self, found: Entries, peak: Float[Tensor, " feature"]) -> None:
        """Count activations in the histogram, of twice the range where one exceeds it."""
        needed = torch.where(peak > 0, torch.frexp(peak).exponent.clamp_min(SMALLEST), UNSET)
        fires = self.exponent != UNSET
        growth = torch.where(fires, needed - self.exponent, 0)
        while len(rows := (growth > 0).nonzero()[:, 0]):
            pairs = self.histogram[rows].unflatten(1, (-1, 2)).sum(-1, dtype=torch.int32)
            self.histogram[rows] = torch.nn.functional.pad(pairs, (0, FINE // 2))
            growth[rows] -= 1
        self.exponent = torch.maximum(self.exponent, needed)
        scale = torch.ldexp(torch.full_like(self.largest, FINE), -self.exponent.clamp_min(SMALLEST))
        at = found.feature * FINE + (found.value * scale[found.feature]).long().clamp_max(FINE - 1)
        self.histogram.view(-1).index_add_(0, at, torch.ones_like(at, dtype=torch.int32))

    def _looker(self, found: Entries, prefix: int) -> Callable[[Tensor, Tensor], Tensor]:
        """A function of features and slots, `[entry]` and `[entry, window]`, that gives their activations."""
        feature = torch.cat([self.prefix.feature, found.feature]) if prefix else found.feature
        slot = torch.cat([self.prefix.t, found.t + prefix]) if prefix else found.t
        value = torch.cat([self.prefix.value, found.value]) if prefix else found.value
        size = int(slot.max()) + 1 if len(slot) else 1
        key, order = (feature * size + slot).sort()
        value = value[order]

        def look(wanted: Tensor, slots: Tensor) -> Tensor:
            asked = wanted[:, None] * size + slots
            at = torch.searchsorted(key, asked).clamp_max(len(key) - 1)
            return torch.where((key[at] == asked) & (slots >= 0) & (slots < size), value[at], 0)

        return look

    def state(self) -> dict[str, Tensor]:
        """Everything so far, to be saved."""
        named = {name: getattr(self, name) for name in ("count", "total", "largest", "exponent", "histogram")}
        for name, kept in (("top", self.top), ("drawn", self.drawn)):
            named |= {f"{name}.key": kept.key, f"{name}.token": kept.token, f"{name}.around": kept.around}
        feature, token, value = self.codes()
        return named | {"sample.feature": feature, "sample.token": token, "sample.value": value}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state."""
        for name in ("count", "total", "largest", "exponent", "histogram"):
            setattr(self, name, state[name].to(self.device))
        for name, kept in (("top", self.top), ("drawn", self.drawn)):
            for part in ("key", "token", "around"):
                setattr(kept, part, state[f"{name}.{part}"].to(self.device))
        self.sample = [Entries(state["sample.feature"], state["sample.token"], state["sample.value"])]

    def codes(self) -> Entries:
        """The codes of the sampled rows, as features, token numbers and values, on the CPU."""
        none = Entries(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0))
        joined = Entries(*(torch.cat(parts) for parts in zip(*(self.sample or [none]), strict=True)))
        self.sample = [joined]
        return joined


def _first_of_each(
    feature: Int[Tensor, " entry"], row: Int[Tensor, " entry"], key: Int[Tensor, " entry"]
) -> Int[Tensor, " kept"]:
    """The entry of the largest key of each feature in each row."""
    if not len(feature):
        return feature
    group = feature * (int(row.max()) + 1) + row
    order = key.argsort(descending=True)
    order = order[group[order].argsort(stable=True)]
    sorted_ = group[order]
    first = torch.ones_like(sorted_, dtype=torch.bool)
    first[1:] = sorted_[1:] != sorted_[:-1]
    return order[first]
