"""Geometry of subspaces spanned by activation differences: fitting, principal angles, and chance levels.

A subspace is a matrix of orthonormal rows. Two are compared by the cosines of their principal
angles (Björck & Golub 1973): 1 for a shared direction, 0 for orthogonal ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unsleep.base.linear import rotated
from unsleep.core import BadInput, check_finite

QUANTILE = 0.95
"""Quantile of the chance distribution above which subspaces count as similar."""


def top_directions(differences: Float[Tensor, "*draw pair d"], rank: int) -> Float[Tensor, "*draw rank d"]:
    """Top `rank` right singular vectors of the differences, largest first, not centred.

    Without centring they include the mean difference. Every direction is signed so that the differences have a
    positive mean projection. Raises `BadInput` for fewer pairs than directions, differences of lower
    rank, and NaN.
    """
    pairs, d = differences.shape[-2:]
    if not 1 <= rank <= min(pairs, d):
        raise BadInput(f"rank {rank} of {pairs} pairs of width {d}; expected 1 to {min(pairs, d)}")
    check_finite(differences, "the differences")
    x = differences.double()
    _, strength, right = torch.linalg.svd(x, full_matrices=False)
    if bool((strength[..., rank - 1] <= 1e-6 * strength[..., 0].clamp_min(1e-300)).any()):
        raise BadInput(f"the differences of {pairs} pairs span fewer than {rank} directions; give others, or less rank")
    found = right[..., :rank, :]
    along = (x.mean(-2, keepdim=True) @ found.mT).mT
    return torch.where(along < 0, -found, found).float()


def cosines(a: Float[Tensor, "*draw_a rank_a d"], b: Float[Tensor, "*draw_b rank_b d"]) -> Float[Tensor, "*draw rank"]:
    """Cosines of the principal angles of two subspaces, largest first; draws broadcast against each other.

    Raises `BadInput` for different widths.
    """
    if a.shape[-1] != b.shape[-1]:
        raise BadInput(f"subspaces of width {a.shape[-1]} and {b.shape[-1]}; expected one width")
    return torch.linalg.svdvals(a.double() @ b.double().mT).clamp(0, 1)


def random_subspaces(draws: int, rank: int, d: int, seed: int = 0) -> Float[Tensor, "draw rank d"]:
    """Uniformly random subspaces."""
    if not 1 <= rank <= d or draws < 1:
        raise BadInput(f"{draws} random subspaces of rank {rank} in width {d}; expected at least 1 of rank 1 to {d}")
    drawn = torch.randn(draws, d, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rotated(drawn.mT).float()


def ordinary_subspaces(
    x: Float[Tensor, "prompt d"], draws: int, rank: int, seed: int = 0
) -> Float[Tensor, "draw rank d"]:
    """Chance level: top directions of differences between clean prompts, randomly paired.

    Activations are concentrated in few directions, which any two sets of differences share. A shared backdoor must
    exceed this level; random subspaces are a weaker one. Raises `BadInput` as
    `top_directions` does.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(x)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(draws)])
    return top_directions(x[order] - x[order.roll(1, 1)], rank)


class Likeness(NamedTuple):
    """Similarity of two subspaces, against chance."""

    cosines: tuple[float, ...]
    """Cosines of the principal angles, largest first."""
    overlap: float
    """Mean squared cosine: the share of the smaller subspace inside the other."""
    random: tuple[float, ...]
    """95 % quantile of each cosine for random subspaces."""
    ordinary: tuple[float, ...]
    """95 % quantile for differences between clean prompts; equal to `random` where none were given."""
    shared_rank: int
    """Number of leading cosines above both."""


def likeness(
    a: Float[Tensor, "rank_a d"],
    b: Float[Tensor, "rank_b d"],
    chance: Sequence[tuple[Tensor, Tensor]] = (),
    *,
    draws: int = 200,
    seed: int = 0,
) -> Likeness:
    """Compare two subspaces; `chance` has pairs of a subspace and unrelated draws `[draw, rank, d]`.

    With several pairs, the highest level applies.
    """
    found = cosines(a, b)
    free = _bar(cosines(a, random_subspaces(draws, len(b), b.shape[1], seed)))
    bars = [_bar(cosines(fixed, drawn)) for fixed, drawn in chance]
    ordinary = torch.stack(bars).amax(0) if bars else free
    above = found > torch.maximum(free, ordinary)
    shared = _leading(above)
    rows = (found, free, ordinary)
    values, low, high = (tuple(row.tolist()) for row in rows)
    return Likeness(values, float(found.square().mean()), low, high, shared)


def _leading(above: Bool[Tensor, " place"]) -> int:
    """Length of the leading run of true values."""
    return int(above.int().cumprod(0).sum())


def _bar(drawn: Float[Tensor, "draw rank"]) -> Float[Tensor, " rank"]:
    return torch.quantile(drawn, QUANTILE, dim=0)


def common_directions(
    bases: Sequence[Float[Tensor, "_ d"]],
) -> tuple[Float[Tensor, " direction"], Float[Tensor, "direction d"]]:
    """Directions ordered by how much of each lies in all subspaces, with that share.

    Eigenvectors of the mean projector: 1 for a direction in every subspace, 1/n for one in a single one of
    n. As many as the largest subspace has rows. Raises `BadInput` for fewer than two subspaces.
    """
    if len(bases) < 2:
        raise BadInput(f"{len(bases)} subspaces; expected at least 2 to find what they share")
    stacked = torch.cat([b.double() for b in bases])
    _, strength, right = torch.linalg.svd(stacked, full_matrices=False)
    rank = max(len(b) for b in bases)
    return (strength[:rank].square() / len(bases)).float(), right[:rank].float()


def common_rank(
    bases: Sequence[Float[Tensor, "_ d"]], chance: Sequence[Float[Tensor, "draw _ d"]]
) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Number of directions that all subspaces share beyond chance, their least parts, and the chance levels.

    The least part of a common direction is its smallest squared projection onto any subspace: 1 where all contain
    it, 0 where one is orthogonal. `chance` has draws for each subspace, in the same order.
    """
    parts = _least_parts(bases)
    bar = _bar(torch.stack([_least_parts(each) for each in zip(*chance, strict=True)]))
    above = parts > bar
    return _leading(above), tuple(parts.tolist()), tuple(bar.tolist())


def _least_parts(bases: Sequence[Float[Tensor, "_ d"]]) -> Float[Tensor, " direction"]:
    common = common_directions(bases)[1].double()
    return torch.stack([(b.double() @ common.T).square().sum(0) for b in bases]).amin(0)
