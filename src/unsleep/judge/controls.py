"""Random controls of an edit: as many other features, matched in firing rate and strength; random subspaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base.linear import rotated
from unsleep.core import BadInput, Dictionary
from unsleep.interventions.features import Edit
from unsleep.interventions.subspaces import Projection


class Firing(NamedTuple):
    """Firing statistics of each feature over a set of tokens."""

    rate: Float[Tensor, " feature"]
    """Share of tokens on which it is active."""
    strength: Float[Tensor, " feature"]
    """Mean activation where active; 0 where it never is. Decoder rows have norm 1, so this is
    also the mean norm of what the feature writes.
    """


def firing(dictionary: Dictionary, x: Float[Tensor, "token d_model"]) -> Firing:
    """Firing rate and mean strength of every feature over tokens; raises `BadInput` for no tokens."""
    if not len(x):
        raise BadInput(f"firing rates were asked of 0 tokens at {dictionary.site}; expected at least 1")
    count = torch.zeros(dictionary.n_features)
    total = torch.zeros(dictionary.n_features)
    for _, (values, ids) in dictionary.encode_in_pieces(x):
        count.index_add_(0, ids.flatten(), (values > 0).float().flatten())
        total.index_add_(0, ids.flatten(), values.flatten())
    return Firing(count / len(x), total / count.clamp_min(1))


def matched_random(edit: Edit, fires: Firing, seed: int = 0) -> Edit:
    """The same edit on random features: each removed one is replaced by a kept one with similar firing statistics.

    See `matched_features`; raises `BadInput` where fewer features are kept than removed.
    """
    n = edit.dictionary.n_features
    if 2 * len(edit.removed) > n:
        raise BadInput(
            f"{len(edit.removed)} of {n} features are removed; a matched control needs as many that are kept"
        )
    return Edit(edit.site, edit.dictionary, matched_features(edit.removed, fires, seed), edit.error)


def matchable(chosen: Sequence[int], fires: Firing) -> bool:
    """True if there are as many other features: at most half are chosen."""
    return 2 * len(chosen) <= len(fires.rate)


def matched_features(chosen: Sequence[int], fires: Firing, seed: int = 0) -> tuple[int, ...]:
    """As many random other features, each with firing statistics similar to a chosen one's.

    For every chosen feature the candidates are a fresh random half of the others; the nearest in log firing rate and
    log strength is taken, each at most once. Raises `BadInput` where over half of the features are chosen.
    """
    n = len(fires.rate)
    if not matchable(chosen, fires):
        raise BadInput(f"{len(chosen)} of {n} features are chosen; a matched control needs as many others")
    place = torch.stack([fires.rate.clamp_min(1e-7).log(), fires.strength.clamp_min(1e-7).log()], dim=1)
    generator = torch.Generator().manual_seed(seed)
    free = torch.ones(n, dtype=torch.bool)
    free[list(chosen)] = False
    found: list[int] = []
    for feature in chosen:
        distance = (place - place[feature]).norm(dim=1)
        open_to_choice = free & (torch.rand(n, generator=generator) < 0.5)
        if not bool(open_to_choice.any()):
            open_to_choice = free
        pick = int(torch.where(open_to_choice, distance, torch.inf).argmin())
        free[pick] = False
        found.append(pick)
    return tuple(found)


def random_subspace(projection: Projection, seed: int = 0) -> Projection:
    """The same projection of a random subspace of equal rank and obliqueness: the read rows R have the same norms.

    With B the random basis, R = B + T, where T's rows are random, orthogonal to B, and scaled so that each row of R
    has the norm of the projection's own.
    """
    (rank, d_model), generator = projection.basis.shape, torch.Generator().manual_seed(seed)
    both = rotated(torch.randn(d_model, 2 * rank, generator=generator, dtype=torch.float64).T)
    basis, reads = both[:rank], None
    if projection.reads is not None and 2 * rank <= d_model:
        lengths = (projection.reads.double().square().sum(1).cpu() - 1).clamp_min(0).sqrt()
        reads = (basis + lengths[:, None] * both[rank:]).to(projection.basis)
    return replace(projection, basis=basis.to(projection.basis), reads=reads)
