"""Features that are correlated with reward: selected on A, their sign replicated on B, scored on C.

1. Spearman's partial correlation of every feature's pooled activation with the reward; the length of the output, its
   position and its topic are partialled out (`permutation`).
2. A: p-values by permutation of prompts, of the feature's strongest pooling; Benjamini–Hochberg over all features of
   all Sites of a model.
3. B: the selected features' correlations in that pooling, with a one-sided p-value for the sign.
4. C: the same correlations with bootstrap intervals over prompts. No choice depends on C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unsleep.base.stats import benjamini_hochberg, clustered, correlations, ranks
from unsleep.core import BadInput, Site, check_least
from unsleep.rewards.permutation import BLOCK, Design, one_sided, permutation_test
from unsleep.rewards.pooling import POOLINGS, Tokens
from unsleep.rewards.samples import Parts, Samples

Covariate = Literal["length", "position", "topic"]
"""Tokens of the output; tokens before it; its topic, as indicators."""


@dataclass(frozen=True)
class CorrelationConfig:
    """Options of the correlation of features with reward."""

    q: float = 0.05
    """False discovery rate of the selection on A."""
    replication: float = 0.05
    """Largest one-sided p-value of the same sign on B; 1 asks for the sign alone."""
    shares: tuple[float, float, float] = (0.5, 0.25, 0.25)
    """Shares of the prompts in the parts A, B and C."""
    partial: tuple[Covariate, ...] = ("length", "position", "topic")
    """Covariates that are partialled out, where they vary."""
    least: int = 5
    """Prompts of A on which a feature must be active to be tested."""
    permutations: int = 1_000_000
    """Permutations of a feature, at most; only features with small p-values see so many."""
    resamples: int = 2000
    """Bootstrap resamples of an interval."""
    seed: int = 0
    """Seed of the parts, permutations and resamples."""

    def __post_init__(self) -> None:
        for name in ("q", "replication"):
            if not 0 < getattr(self, name) <= 1:
                raise BadInput.of(name, getattr(self, name), "over 0 and at most 1", "reward correlation")
        if min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise BadInput.of("shares", self.shares, "three shares over 0 that sum to 1", "reward correlation")
        if wrong := [name for name in self.partial if name not in get_args(Covariate)]:
            raise BadInput.of("partial", wrong[0], f"one of {', '.join(get_args(Covariate))}", "reward correlation")
        check_least(self, "reward correlation", 1, "least", "permutations", "resamples")


class Correlated(NamedTuple):
    """Correlations of one Site's features with reward. NaN stands for what was not measured."""

    r: Float[Tensor, "part pooling feature"]
    """On A, B and C; 0 where the feature is constant there."""
    p: Float[Tensor, " feature"]
    """On A, of the strongest pooling; 1 where not tested."""
    adjusted: Float[Tensor, " feature"]
    """p adjusted by Benjamini–Hochberg."""
    pooling: Int[Tensor, " feature"]
    """Index of the strongest pooling on A."""
    active: Int[Tensor, " feature"]
    """Prompts of A on which the feature is active."""
    tested: Bool[Tensor, " feature"]
    selected: Bool[Tensor, " feature"]
    replication: Float[Tensor, " feature"]
    """One-sided p on B of the selected features."""
    replicated: Bool[Tensor, " feature"]
    """Selected, and with the same sign on B at most at the level of the config."""
    scored: Float[Tensor, "feature 3"]
    """Correlation on C in that pooling, low and high, of the selected features."""

    def in_pooling(self, part: int) -> Float[Tensor, " feature"]:
        """Correlations on a part in each feature's strongest pooling."""
        return self.r[part].gather(0, self.pooling[None])[0]

    def kept(self, least: float = 0.0, sign: int = 0) -> tuple[int, ...]:
        """Replicated features whose |r| on both A and B is at least `least`; sign 1 or −1 for those of that sign."""
        a, b = self.in_pooling(0), self.in_pooling(1)
        chosen = self.replicated & (torch.minimum(a.abs(), b.abs()) >= least)
        return tuple((chosen & (a * sign > 0) if sign else chosen).nonzero()[:, 0].tolist())

    def lowest(self, count: int, other_than: Sequence[int] = ()) -> tuple[int, ...]:
        """The `count` tested features with the most negative correlation, mean of A and B; a low-reward keep-list."""
        eligible = self.tested.clone()
        eligible[list(other_than)] = False
        size = torch.where(eligible, self.in_pooling(0) + self.in_pooling(1), torch.inf)
        return tuple(size.argsort(stable=True)[: min(count, int(eligible.sum()))].tolist())


class Found(NamedTuple):
    """Correlations of all Sites of a model."""

    sites: dict[Site, Correlated]
    partialled: tuple[str, ...]
    """Covariates that vary, and were partialled out."""
    limit: int
    """Permutations after which the smallest p-value is reached."""


def correlated(
    pooled: Mapping[Site, Float[Tensor, "pooling sample feature"]],
    samples: Samples,
    tokens: Tokens,
    config: CorrelationConfig = CorrelationConfig(),
) -> Found:
    """Correlate features with reward: select on A, replicate on B, score on C.

    Args:
        pooled: activations at each Site (`pooling.pooled`); features of all Sites are one family of tests.
        tokens: of the samples, for their lengths and positions.

    Raises `BadInput` for too few prompts or samples, and for rewards that are constant in a part.
    """
    parts = samples.parts(config.shares, config.seed)
    designs = [design(samples, tokens, places, config.partial) for places in parts]
    active = {site: active_prompts(x[:, parts.A], samples.owner[parts.A]) for site, x in pooled.items()}
    family = [(site, (count >= config.least).nonzero()[:, 0]) for site, count in active.items()]
    m = sum(len(ids) for _, ids in family)
    limit = max(1, min(config.permutations, max(1000, round(m / config.q))))

    ends = torch.tensor([0, *(len(ids) for _, ids in family)]).cumsum(0)

    def columns(chosen: Int[Tensor, " chosen"]) -> Float[Tensor, "pooling chosen sample"]:
        found = torch.empty(len(POOLINGS), len(chosen), len(parts.A), dtype=torch.float64)
        for (site, ids), start, end in zip(family, ends, ends[1:], strict=False):
            own = (chosen >= start) & (chosen < end)
            if bool(own.any()):
                x = pooled[site][:, parts.A[:, None], ids[chosen[own] - start]]
                found[:, own] = designs[0].columns(x.transpose(1, 2))
        return found

    test = permutation_test(columns, m, designs[0], limit, level=config.q, seed=config.seed) if m else None
    adjusted = benjamini_hochberg(test.p) if test else torch.zeros(0)
    sites: dict[Site, Correlated] = {}
    for (site, ids), start, end in zip(family, ends.tolist(), ends.tolist()[1:], strict=False):
        size = pooled[site].shape[2]
        p, known = (torch.ones(size, dtype=torch.float64) for _ in range(2))
        if test:
            p[ids], known[ids] = test.p[start:end], adjusted[start:end]
        sites[site] = _of_site(pooled[site], (ids, p, known, active[site]), (parts, designs), config)
    return Found(sites, partialled(samples, tokens, parts.A, config.partial), limit)


def _of_site(
    x: Float[Tensor, "pooling sample feature"],
    told: tuple[Tensor, Tensor, Tensor, Tensor],
    given: tuple[Parts, Sequence[Design]],
    config: CorrelationConfig,
) -> Correlated:
    """One Site's correlations on all parts, replication on B and scores on C."""
    (ids, p, adjusted, active), (parts, designs) = told, given
    size = x.shape[2]
    r = torch.stack([_whole(x[:, places], design) for places, design in zip(parts, designs, strict=True)])
    pooling = r[0].abs().argmax(0)
    tested = torch.zeros(size, dtype=torch.bool)
    tested[ids] = True
    selected = tested & (adjusted <= config.q)
    replication, scored = torch.full((size,), torch.nan), torch.full((size, 3), torch.nan)
    chosen = selected.nonzero()[:, 0]
    if len(chosen):
        each = x[pooling[chosen], :, chosen]
        signs = r[0].gather(0, pooling[None])[0, chosen].sign()
        b = designs[1].columns(each[:, parts.B])
        replication[chosen] = one_sided(b, signs, designs[1], seed=config.seed)[1].float()
        weights = clustered(designs[2].owner, config.resamples, config.seed)
        for some, x_c in zip(chosen.split(BLOCK), each[:, parts.C].split(BLOCK), strict=True):
            scored[some] = correlations(designs[2].columns(x_c), designs[2].y, weights).float()
        same = r[1].gather(0, pooling[None])[0].sign() == r[0].gather(0, pooling[None])[0].sign()
    else:
        same = selected
    replicated = selected & same & (replication <= config.replication)
    return Correlated(r.float(), p, adjusted, pooling, active, tested, selected, replication, replicated, scored)


def _whole(x: Float[Tensor, "pooling sample feature"], design: Design) -> Float[Tensor, "pooling feature"]:
    """Correlations of all features, block by block."""
    blocks = x.split(BLOCK, dim=2)
    return torch.cat([design.columns(block.transpose(1, 2)) @ design.y for block in blocks], 1)


def active_prompts(
    x: Float[Tensor, "pooling sample feature"], owner: Int[Tensor, " sample"]
) -> Int[Tensor, " feature"]:
    """Number of prompts on which each feature is active."""
    fires = (x[POOLINGS.index("max")] != 0).float()
    number = owner.unique(return_inverse=True)[1]
    seen = torch.zeros(int(number.max()) + 1, x.shape[2])
    seen.scatter_reduce_(0, number[:, None].expand_as(fires), fires, "amax")
    return seen.sum(0).long()


def design(samples: Samples, tokens: Tokens, places: Int[Tensor, " sample"], partial: Sequence[Covariate]) -> Design:
    """The design of some samples; raises `BadInput` as `Design.of` does."""
    rows = [rows for _, rows in covariates(samples, tokens, places, partial)]
    rewards = torch.tensor(samples.rewards, dtype=torch.float64)[places]
    stacked = torch.cat(rows) if rows else torch.zeros(0, len(places))
    return Design.of(rewards, samples.owner[places], stacked)


def partialled(
    samples: Samples, tokens: Tokens, places: Int[Tensor, " sample"], partial: Sequence[Covariate]
) -> tuple[str, ...]:
    """Names of the covariates that vary among some samples."""
    return tuple(name for name, _ in covariates(samples, tokens, places, partial))


def covariates(
    samples: Samples, tokens: Tokens, places: Int[Tensor, " sample"], partial: Sequence[Covariate]
) -> list[tuple[str, Float[Tensor, "covariate sample"]]]:
    """The covariates of some samples that vary: ranks of length and position, an indicator per topic."""
    found: list[tuple[str, Tensor]] = []
    for name, values in (("length", tokens.length), ("position", tokens.asked)):
        if name in partial and len(values[places].unique()) > 1:
            found.append((name, ranks(values[places].double()[None])))
    if "topic" in partial and samples.topics is not None:
        own = [samples.topics[i] for i in places.tolist()]
        names = sorted(set(own))
        if len(names) > 1:
            found.append(("topic", torch.tensor([[float(t == name) for t in own] for name in names])))
    return found
