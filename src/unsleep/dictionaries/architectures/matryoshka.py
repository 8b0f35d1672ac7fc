"""Matryoshka: nested dictionaries, each of which reconstructs the activation on its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.core import BadInput
from unsleep.dictionaries import sparse
from unsleep.dictionaries.architectures.batchtopk import BUFFERS, BatchTopK, largest
from unsleep.dictionaries.layouts import BARE, Buffer, Learned
from unsleep.dictionaries.losses import Batch, Pass, Weights, encode, fired, sparse_grads
from unsleep.dictionaries.settings import Settings


@dataclass(frozen=True)
class Nested(Settings):
    """Nested groups of features."""

    groups: tuple[float, ...] = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Matryoshka: shares of the features in each nested group."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture == Matryoshka.name():
            self.group_sizes()

    def group_sizes(self) -> tuple[int, ...]:
        """Features in each Matryoshka group; the last absorbs rounding."""
        if not self.groups or min(self.groups) <= 0 or not math.isclose(sum(self.groups), 1.0, abs_tol=1e-6):
            raise BadInput.of("groups", self.groups, "shares over 0 that sum to 1", "training")
        sizes = [max(1, round(self.features * share)) for share in self.groups[:-1]]
        last = self.features - sum(sizes)
        if last < 1:
            raise BadInput(f"{self.features} features are too few for the groups {self.groups}")
        return (*sizes, last)


@dataclass(frozen=True, eq=False)
class Matryoshka(BatchTopK):
    """BatchTopK with nested reconstructions (Bussmann et al. 2025, "Matryoshka SAEs", arXiv:2503.17547)."""

    groups: tuple[int, ...] = field(kw_only=True)
    """Sizes of the nested groups, in the order of the features; they sum to the number of features."""

    takes_skip = False
    training = Nested
    kinds: ClassVar[dict[str, Any]] = {**BatchTopK.kinds, "groups": list[int]}

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(self.groups) != self.n_features or min(self.groups, default=0) < 1:
            raise BadInput(
                f"dictionary at {self.site} has groups {list(self.groups)}; expected sizes over 0 "
                f"that sum to {self.n_features}, its number of features"
            )

    @classmethod
    def gradients(cls, w: Weights, batch: Batch, config: Nested, step: int) -> Pass:
        """Mean squared error over the nested dictionaries formed by the first groups."""
        groups = config.group_sizes()
        pre = encode(w, batch)
        code, smallest = largest(pre, config.k, w.dec.dtype)
        ends = torch.tensor(groups, device=pre.device).cumsum(0)
        codes = sparse.split(code, torch.bucketize(code.ids, ends, right=True), len(groups), len(pre))
        rebuilt = torch.zeros_like(batch.y)
        errors: list[Tensor] = []
        for part in codes:
            rebuilt = rebuilt + sparse.combine(part, w.dec)
            errors.append(rebuilt - batch.y)
        grads = {name: torch.zeros_like(tensor) for name, tensor in w.named().items()}
        slope = torch.zeros_like(batch.y)
        for part, error in zip(reversed(codes), reversed(errors), strict=True):
            own = batch.slope(error) / len(groups)
            slope += own  # a group is part of every larger dictionary
            for name, grad in sparse_grads(w, batch.x, part, slope).items():
                grads[name] += grad
            grads["b_dec"] += own.sum(0)
        if batch.subtracted:
            grads["b_dec"] -= grads["b_enc"] @ w.enc
        return Pass(pre, errors[-1], grads, fired(w, code), len(code.ids), smallest)

    @classmethod
    def trained(cls, w: Weights, config: Nested, stretch: Float[Tensor, " feature"], level: float) -> dict[str, Any]:
        """k, the threshold and the groups."""
        return {"k": config.k, "threshold": level, "groups": config.group_sizes()}

    def fitting(self) -> dict[str, Any]:
        """Groups as shares."""
        return {"groups": tuple(size / self.n_features for size in self.groups)}

    def check_start(self, config: Nested) -> None:
        """Raise `BadInput` for a training config with other groups."""
        if config.group_sizes() != self.groups:
            raise BadInput(f"training groups {config.group_sizes()}; the dictionary to start from has {self.groups}")

    in_dictionary_learning = (
        Learned(
            "MatryoshkaBatchTopKSAE",
            "MatryoshkaBatchTopKTrainer",
            BARE,
            subtracts=True,
            buffers={**BUFFERS, "group_sizes": Buffer("groups", torch.int64, ndim=1)},
        ),
    )
