"""Partial rank correlations with permutation p-values, for any number of features at once.

1. Ranks of feature x and reward y, ties at their mean, and of the covariates Z with an intercept. With M the projection
   orthogonal to Z, r = cos(M x, M y), Spearman's partial correlation; 0 for a feature that is constant, or a function
   of the covariates.
2. Permutations of M y, projected again: r* = cos(M x, M π M y) (Freedman & Lane 1983, J. Bus. Econ. Stat. 1; Winkler et
   al. 2014, NeuroImage 92). π moves whole prompts among those with as many samples, and shuffles the samples of each,
   so that samples of one prompt count as dependent. All features share the draws: one matrix product a chunk.
3. A feature's statistic is the largest |r| over its poolings, in the data and in every draw, so that the choice of a
   pooling is paid for. p = (1 + #{r* ≥ r}) / (1 + draws), ties counted as exceedances.
4. Only features with fewer than `ENOUGH` exceedances see ten times as many draws in the next stage (after Besag &
   Clifford 1991, Biometrika 78). This keeps p valid: {p ≤ u} is inside {p_1 ≤ u} for u above ENOUGH / (1 + draws of the
   first stage), and inside {p_2 ≤ u} below it. Where `MANY` features or more are left and all of them would be selected
   whatever further draws say, there are none: their number decides, on which a single one has next to no influence.

Exact without covariates where prompts, and the samples of a prompt, are exchangeable; else asymptotically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unsleep.base.context import progress
from unsleep.base.linear import orthonormal
from unsleep.base.stats import ranks
from unsleep.core import BadInput

FIRST = 1000
"""Draws of the first stage."""

ENOUGH = 10
"""Exceedances after which a feature sees no further draws."""

MANY = 100
"""Features that end the draws by their number."""

CHUNK = 1000
"""Draws in one matrix product."""

BLOCK = 1024
"""Features in one matrix product."""

SAME = 1e-10
"""Difference below which two correlations are tied."""

FREEDOM = 6
"""Least number of samples over the covariates' rank."""

Columns = Callable[[Int[Tensor, " chosen"]], Float[Tensor, "pooling chosen sample"]]
"""Unit residual ranks of some features by number, such as `Design.columns` gives them; 0 where constant."""


@dataclass(frozen=True, eq=False)
class Design:
    """Samples with their rewards, prompts and covariates."""

    y: Float[Tensor, " sample"]
    """Residual ranks of the rewards, of norm 1."""
    owner: Int[Tensor, " sample"]
    """Number of each sample's prompt."""
    nuisance: Float[Tensor, "basis sample"]
    """Orthonormal rows that span the intercept and the covariates."""

    @classmethod
    def of(
        cls,
        rewards: Float[Tensor, " sample"],
        owner: Int[Tensor, " sample"],
        covariates: Float[Tensor, "covariate sample"],
    ) -> Design:
        """The design of some samples; `covariates` are taken as they are, such as ranks and indicators.

        Raises `BadInput` for rewards that are constant, by themselves or given the covariates, and for too few samples.
        """
        n = len(rewards)
        if len(rewards.unique()) < 2:
            raise BadInput(f"all {n} rewards are {float(rewards[0]):g}, and nothing is correlated with them; vary them")
        rows = torch.cat([torch.ones(1, n, dtype=torch.float64), covariates.double()])
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
        nuisance = orthonormal(rows, 1e-8)
        if n - len(nuisance) < FREEDOM:
            raise BadInput(
                f"{n} samples leave {n - len(nuisance)} degrees of freedom beside {len(nuisance)} covariates and "
                f"intercept; expected at least {FREEDOM}. Give more samples, coarser topics, or fewer covariates "
                "(--partial)"
            )
        y = residual(ranks(rewards.double()[None]), nuisance)[0]
        if not bool(y.any()):
            raise BadInput(
                f"the rewards of {n} samples are constant given the covariates; give other rewards, or "
                "partial out fewer covariates (--partial)"
            )
        return cls(y, owner.unique(return_inverse=True)[1], nuisance)

    def columns(self, x: Float[Tensor, "*pooling feature sample"]) -> Float[Tensor, "*pooling feature sample"]:
        """Unit residual ranks of features."""
        flat = x.double().reshape(-1, x.shape[-1])
        return residual(ranks(flat), self.nuisance).reshape(x.shape)

    def draws(self, first: int, count: int, seed: int = 0) -> Float[Tensor, "sample draw"]:
        """Permuted rewards as unit residuals, `count` of them; a chunk is determined by its `first` and the seed."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + first) % 2**63)
        drawn = self.y[shuffles(self.owner, count, generator)]
        return residual(drawn, self.nuisance).T.contiguous()


def residual(x: Float[Tensor, "row sample"], nuisance: Float[Tensor, "basis sample"]) -> Float[Tensor, "row sample"]:
    """Rows without what the nuisance rows explain, of norm 1; 0 where nothing is left."""
    left = x - (x @ nuisance.T) @ nuisance
    size = left.norm(dim=1, keepdim=True)
    something = size > 1e-9 * x.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return torch.where(something, left / size.clamp_min(1e-300), 0.0)


def shuffles(owner: Int[Tensor, " sample"], count: int, generator: torch.Generator) -> Int[Tensor, "draw sample"]:
    """Random permutations of samples: prompts trade places where they have as many samples, and shuffle their own.

    `owner` is the number of each sample's prompt.
    """
    number, sizes = owner.unique(return_inverse=True, return_counts=True)[1:]
    members = number.argsort(stable=True)
    start = sizes.cumsum(0) - sizes
    found = torch.empty(count, len(owner), dtype=torch.long)
    for size in sizes.unique().tolist():
        prompts = (sizes == size).nonzero()[:, 0]
        block = members[start[prompts][:, None] + torch.arange(size)]
        traded = block[torch.rand(count, len(prompts), generator=generator).argsort(1)]
        if size > 1:
            traded = traded.gather(2, torch.rand(count, len(prompts), size, generator=generator).argsort(2))
        found[:, block.flatten()] = traded.flatten(1)
    return found


class Tested(NamedTuple):
    """Correlations of features with reward, and their p-values."""

    r: Float[Tensor, "pooling feature"]
    p: Float[Tensor, " feature"]
    """1 for a feature that is constant, or a function of the covariates, in every pooling."""
    draws: Int[Tensor, " feature"]
    """Permutations that each has seen."""

    @property
    def pooling(self) -> Int[Tensor, " feature"]:
        """The pooling with the largest |r| of each feature."""
        return self.r.abs().argmax(0)


def permutation_test(
    columns: Columns, count: int, design: Design, most: int, *, level: float = 0.0, seed: int = 0
) -> Tested:
    """Test `count` features against the reward, two-sided, with up to `most` permutations each (see the module).

    `level` is the false discovery rate at which features will be selected.
    """
    pieces = list(torch.arange(count).split(BLOCK))
    r = torch.cat([columns(some) @ design.y for some in pieces], 1)
    size = r.abs().amax(0)
    over, seen = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    alive, done = (size > 0).nonzero()[:, 0], 0
    for total in stages(most):
        if not len(alive):
            break
        chunks = [(first, min(CHUNK, total - first)) for first in range(done, total, CHUNK)]
        held = [(some, columns(some)) for some in alive.split(BLOCK)] if len(chunks) > 1 else None
        for first, number in chunks:
            drawn = design.draws(first, number, seed)
            for some, x in held or _read(columns, alive):
                over[some] += ((x @ drawn).abs().amax(0) >= size[some, None] - SAME).sum(1)
            progress("permutations", first + number, most)
        seen[alive], done = total, total
        alive = alive[over[alive] < ENOUGH]
        if len(alive) >= MANY and ENOUGH / (1 + total) <= level * len(alive) / count:
            break
    progress("permutations", most, most)
    return Tested(r, torch.where(seen > 0, (1.0 + over) / (1.0 + seen), 1.0).double(), seen)


def _read(columns: Columns, ids: Int[Tensor, " chosen"]) -> Iterator[tuple[Tensor, Tensor]]:
    for some in ids.split(BLOCK):
        yield some, columns(some)


def stages(most: int) -> list[int]:
    """Draws after each stage: ten times as many as before, up to `most`.

    >>> stages(25_000)
    [1000, 10000, 25000]
    """
    found = [min(FIRST, most)]
    while found[-1] < most:
        found.append(min(10 * found[-1], most))
    return found


def one_sided(
    x: Float[Tensor, "feature sample"],
    signs: Float[Tensor, " feature"],
    design: Design,
    draws: int = FIRST,
    seed: int = 0,
) -> tuple[Float[Tensor, " feature"], Float[Tensor, " feature"]]:
    """Correlations of features with the reward, and the p-values of their having the given signs.

    `x` are unit residual ranks, one pooling a feature.
    """
    r = x @ design.y
    drawn = design.draws(0, draws, seed)
    parts = [
        ((each @ drawn) * sign[:, None] >= (value * sign)[:, None] - SAME).sum(1)
        for each, value, sign in zip(x.split(BLOCK), r.split(BLOCK), signs.double().split(BLOCK), strict=True)
    ]
    over = torch.cat(parts) if parts else torch.zeros(0)
    return r, (1.0 + over.double()) / (1.0 + draws)
