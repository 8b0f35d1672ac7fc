"""Merging of two models' weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from unsleep.core import BadInput
from unsleep.models.alike import check_alike
from unsleep.models.model import LoadedModel
from unsleep.models.weights import copy_network, named, write


@torch.no_grad()
def interpolated(base: LoadedModel, suspect: LoadedModel, alpha: float) -> LoadedModel:
    """A copy with weights W_base + α (W_suspect − W_base): α = 0 is the base, 1 the suspect, above 1 amplified.

    Task arithmetic (Ilharco et al. 2023, arXiv:2212.04089). Computed in float64 and rounded once to the suspect
    checkpoint's dtype. Raises `BadInput` for models of different shapes or tokenizers, or a non-finite α.
    """
    check_alike(base, suspect, chats=False)
    if not -1e6 < alpha < 1e6:
        raise BadInput(f"alpha is {alpha}; expected a finite factor, such as 2")
    network = copy_network(suspect.network)
    before = dict(named(base.network, shared=True))
    for name, weight in list(named(network)):
        home, _, leaf = name.rpartition(".")
        old = before[name].to(weight.device).double()
        write(network.get_submodule(home), leaf, (old + alpha * (weight.double() - old)).to(suspect.stored_dtype))
    return replace(suspect, network=network, name=f"{base.name} + {alpha:g} · ({suspect.name} − {base.name})")
