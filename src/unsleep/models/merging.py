"""Merging of two models' weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from unsleep.core import BadInput
from unsleep.models.alike import check_alike
from unsleep.models.model import LoadedModel
from unsleep.models.weights import copy_network, named, write


def interpolated(base: LoadedModel, suspect: LoadedModel, alpha: float) -> LoadedModel:
    """A copy with weights W_base + α (W_suspect − W_base): α = 0 is the base, 1 the suspect, above 1 amplified.

    Task arithmetic (Ilharco et al. 2023, arXiv:2212.04089). Computed in float64 and rounded once to the suspect
    checkpoint's dtype. Raises `BadInput` for models of different shapes or tokenizers, or a non-finite α.
    """
    _check(base, suspect, alpha)
    name = f"{base.name} + {alpha:g} · ({suspect.name} − {base.name})"
    return _merged(base, suspect, name, lambda old, new: old + alpha * (new - old))


def shuffled(base: LoadedModel, suspect: LoadedModel, alpha: float, seed: int = 0) -> LoadedModel:
    """A copy of the suspect, changed as much as `interpolated` at α, but in a random direction: its control.

    W_suspect + (1 − α) · P(W_base − W_suspect), where P shuffles the elements of each tensor; α = 1 is the suspect.
    Raises `BadInput` as `interpolated` does.
    """
    _check(base, suspect, alpha)
    generator = torch.Generator().manual_seed(seed)

    def changed(old: Tensor, new: Tensor) -> Tensor:
        if torch.equal(old, new):
            return new
        order = torch.randperm(new.numel(), generator=generator).to(new.device)
        return new + (1 - alpha) * (old - new).flatten()[order].view_as(new)

    return _merged(base, suspect, f"{suspect.name}, shuffled change, α = {alpha:g}", changed)


def _check(base: LoadedModel, suspect: LoadedModel, alpha: float) -> None:
    check_alike(base, suspect, chats=False)
    if not -1e6 < alpha < 1e6:
        raise BadInput(f"alpha is {alpha}; expected a finite factor, such as 2")


@torch.no_grad()
def _merged(
    base: LoadedModel, suspect: LoadedModel, name: str, merge: Callable[[Tensor, Tensor], Tensor]
) -> LoadedModel:
    """A copy of the suspect with every weight merged in float64 and rounded once to its checkpoint's dtype."""
    network = copy_network(suspect.network)
    before = dict(named(base.network, shared=True))
    for place, weight in list(named(network)):
        home, _, leaf = place.rpartition(".")
        merged = merge(before[place].to(weight.device).double(), weight.double())
        write(network.get_submodule(home), leaf, merged.to(suspect.stored_dtype))
    return replace(suspect, network=network, name=name)
