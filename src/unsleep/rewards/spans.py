"""Subspaces that keep what is rewarded: principal components, spans of features and their unions, on one frontier.

Everything outside of a kept subspace is replaced by the mean of trusted tokens, or by 0. Subspaces are compared at
equal rank, or at equal retained variance of the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.activations.collect import sink_norm, without_sinks
from unsleep.base.linear import Principal, complement, orthonormal, principal, rotated
from unsleep.core import BadInput, Dictionary, Site
from unsleep.interventions.subspaces import Projection

Basis = Float[Tensor, "_ d_model"]
"""Orthonormal rows."""


def span(dictionary: Dictionary, features: Sequence[int]) -> Basis:
    """The span of features' decoder rows; raises `BadInput` for no feature."""
    if not features:
        raise BadInput(f"no feature of {dictionary.site} is kept; its span is empty")
    return orthonormal(dictionary.decoder[list(features)].float().cpu(), 1e-5)


def union(bases: Iterable[Basis]) -> Basis:
    """The joint span of subspaces."""
    return orthonormal(torch.cat([each.double() for each in bases]), 1e-5).float()


def rank_retaining(found: Principal, share: float) -> int:
    """Fewest principal components with at least a share of the variance, at least 1."""
    reached = (found.share.double().cumsum(0) < share - 1e-6).sum()
    return min(int(reached) + 1, len(found.share))


def retained_in(basis: Basis, x: Float[Tensor, "token d_model"]) -> float:
    """Share of the variance of tokens within a subspace."""
    centred = x.double() - x.double().mean(0)
    inside = (centred @ basis.double().T).square().sum()
    return float(inside / centred.square().sum().clamp_min(1e-300))


def keeping_span(
    site: Site,
    basis: Basis,
    trusted: Float[Tensor, "token d_model"],
    *,
    model: str = "",
    mean: bool = True,
) -> Projection:
    """Keep a subspace: what is orthogonal to it is replaced by the mean of trusted tokens, or by 0.

    Attention sinks are unchanged. `model` is the fingerprint of the model it was fitted on. Raises `BadInput` for a
    subspace that is everything, of which nothing can be replaced.
    """
    rest = complement(basis)
    if not len(rest):
        raise BadInput(f"the subspace at {site} has the full rank {len(basis)}; nothing would be replaced")
    limit = sink_norm(trusted)
    center = without_sinks(trusted, limit).mean(0) if mean else None
    return Projection(site, rest, center, model, sink_norm=limit)


class Kept(NamedTuple):
    """A kept subspace of a frontier."""

    name: str
    basis: Basis
    rank: int
    retained: float
    """Share of the variance of the tuned model's trusted tokens."""


def frontier(
    rewarded: Basis,
    own: Float[Tensor, "token d_model"],
    base: Float[Tensor, "other d_model"] | None = None,
    *,
    rewarded_components: Sequence[int] = (),
    base_share: float = 0.9,
    variances: Mapping[str, float] | None = None,
    random: int = 3,
    seed: int = 0,
) -> list[Kept]:
    """Subspaces to be kept, comparable at equal rank and at equal retained variance.

        rewarded                        span of the rewarded features
        components, equal rank          first principal components of the tuned model, as many
        components, equal variance      as many as retain as much
        random, equal rank              random subspaces
        rewarded components             the principal components that are correlated with reward
        base                            first principal components of the base
        union                           of base and rewarded
        components, rank of the union   first principal components of the tuned model, as many
        components, variance of the union
        components, variance of X       first principal components that retain as much as an edit X of `variances`

    Args:
        rewarded: orthonormal rows (`span`); none where no feature is rewarded.
        own, base: trusted tokens of both models at the Site, without attention sinks.
        rewarded_components: indices of `principal(own)`'s rows that are rewarded (`pooling.pooled_along`).
        base_share: share of the base's variance that its components retain.
        variances: edit → share of the variance of `own` that it retains (`keeping.retained`).

    Full subspaces are left out, because nothing outside of them can be replaced.
    """
    found, rank = principal(own), len(rewarded)
    bases: dict[str, Tensor] = {"rewarded": rewarded, "components, equal rank": found.rows[:rank]}
    bases["components, equal variance"] = found.rows[: rank_retaining(found, retained_in(rewarded, own))]
    for i in range(random):
        draw = torch.randn(rank, own.shape[1], generator=torch.Generator().manual_seed(seed + i))
        bases[f"random {i + 1}, equal rank"] = rotated(draw)
    for name, share in (variances or {}).items():
        bases[f"components, variance of {name}"] = found.rows[: rank_retaining(found, share)]
    if rewarded_components:
        bases["rewarded components"] = found.rows[list(rewarded_components)]
    if base is not None:
        theirs = principal(base)
        bases["base"] = theirs.rows[: rank_retaining(theirs, base_share)]
        bases["union"] = union([bases["base"], rewarded])
        bases["components, rank of the union"] = found.rows[: len(bases["union"])]
        share = retained_in(bases["union"], own)
        bases["components, variance of the union"] = found.rows[: rank_retaining(found, share)]
    return _kept(bases, own)


def _kept(bases: Mapping[str, Basis], own: Float[Tensor, "token d_model"]) -> list[Kept]:
    return [
        Kept(name, basis.float(), len(basis), retained_in(basis, own))
        for name, basis in bases.items()
        if len(basis) < own.shape[1]
    ]
