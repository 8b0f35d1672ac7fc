"""Merging of weights: the arithmetic of a tensor, and the merge of loaded models (of files: `mixing/merge.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Shaped
from torch import Tensor

from unsleep.core import BadInput
from unsleep.models.alike import check_alike
from unsleep.models.model import LoadedModel
from unsleep.models.weights import copy_network, named, write

LARGEST = 1e6
"""Bound on the absolute value of a coefficient."""

HALF = (torch.bfloat16, torch.float16)
NEAR = 8.0
"""Coefficient up to which float32 is exact enough for a result of 16 bits."""


def check_alpha(alpha: float) -> None:
    """Raise `BadInput` for a coefficient that is NaN, infinite or absurdly large."""
    if not -LARGEST < alpha < LARGEST:
        raise BadInput.of("alpha", alpha, "a finite factor, such as 2")


@torch.no_grad()
def combine(
    anchor: Shaped[Tensor, "*shape"], terms: Sequence[tuple[float, Shaped[Tensor, "*shape"]]], dtype: torch.dtype
) -> Shaped[Tensor, "*shape"]:
    """Anchor + Σ c · (W − anchor), rounded once to `dtype`.

    Computed in float64, as (1 − Σ c) · anchor + Σ c · W; a single weight with 16 bits and a coefficient of at most
    `NEAR` in float32, in one pass. Coefficients of 0 give exactly the anchor, a single coefficient of 1 exactly that
    weight. An element that all of them share stays as it is, since the error is far below the resolution of `dtype`.
    Task arithmetic (Ilharco et al. 2023, arXiv:2212.04089).
    """
    moving = [(factor, weight) for factor, weight in terms if factor]
    if not moving:
        return anchor.to(dtype)
    if len(moving) == 1:
        factor, weight = moving[0]
        if factor == 1:
            return weight.to(dtype)
        if dtype in HALF and abs(factor) <= NEAR:
            ends = (anchor, weight) if anchor.dtype == weight.dtype == dtype else (anchor.float(), weight.float())
            return torch.lerp(*ends, factor).to(dtype)
    total = anchor.to(torch.float64, copy=True).mul_(1 - sum(factor for factor, _ in moving))
    for factor, weight in moving:
        total.add_(weight.to(torch.float64, copy=True).mul_(factor))
    return total.to(dtype)


def interpolated(base: LoadedModel, suspect: LoadedModel, alpha: float) -> LoadedModel:
    """A copy with weights W_base + α (W_suspect − W_base): α = 0 is the base, 1 the suspect, above 1 amplified.

    See `combine`; rounded to the suspect checkpoint's dtype. Raises `BadInput` for models of different shapes or
    tokenizers, or a non-finite α.
    """
    _check(base, suspect, alpha)
    name = f"{base.name} + {alpha:g} · ({suspect.name} − {base.name})"
    return _merged(base, suspect, name, lambda old, new: combine(old, [(alpha, new)], suspect.stored_dtype))


def shuffled(base: LoadedModel, suspect: LoadedModel, alpha: float, seed: int = 0) -> LoadedModel:
    """A copy of the suspect, changed as much as `interpolated` at α, but in a random direction: its control.

    W_suspect + (1 − α) · P(W_base − W_suspect), where P shuffles the elements of each tensor; α = 1 is the suspect.
    Raises `BadInput` as `interpolated` does.
    """
    _check(base, suspect, alpha)
    generator = torch.Generator().manual_seed(seed)

    def changed(old: Tensor, new: Tensor) -> Tensor:
        if torch.equal(old, new):
            return new.to(suspect.stored_dtype)
        difference = (old.double() - new.double()).flatten()
        order = torch.randperm(new.numel(), generator=generator).to(new.device)
        return (new.double() + (1 - alpha) * difference[order].view_as(new)).to(suspect.stored_dtype)

    return _merged(base, suspect, f"{suspect.name}, shuffled change, α = {alpha:g}", changed)


def _check(base: LoadedModel, suspect: LoadedModel, alpha: float) -> None:
    check_alike(base, suspect, chats=False)
    check_alpha(alpha)


@torch.no_grad()
def _merged(
    base: LoadedModel, suspect: LoadedModel, name: str, merge: Callable[[Tensor, Tensor], Tensor]
) -> LoadedModel:
    """A copy of the suspect in which every weight is a function of the base's and the suspect's."""
    network = copy_network(suspect.network)
    before = dict(named(base.network, shared=True))
    for place, weight in list(named(network)):
        home, _, leaf = place.rpartition(".")
        write(network.get_submodule(home), leaf, merge(before[place].to(weight.device), weight))
    return replace(suspect, network=network, name=name)
