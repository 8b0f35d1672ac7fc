"""Record of `unsleep rewarded`: rewarded.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from unsleep.base.records import Count, Positive, Share
from unsleep.base.stats import Estimate
from unsleep.core import Site
from unsleep.locate.diffing.weights import LayerDelta
from unsleep.models.model import Named
from unsleep.rewards.pooling import Pooling

Of = Literal["model", "base"]
"""The tuned model, or its base."""


class PartSize(NamedTuple):
    """Size of a part of the samples."""

    name: str
    prompts: Count
    samples: Count


@dataclass(frozen=True)
class SiteRow:
    """Counts of one dictionary's features."""

    of: Of
    site: Site
    dictionary: str
    """Hash."""
    size: Count
    tested: Count
    """Features that are active on enough prompts of A."""
    selected: Count
    """Selected on A."""
    replicated: Count
    """Of them, those whose sign is replicated on B."""
    strength: Positive | None
    """Mean |r| on C of the replicated features."""
    floor: Positive
    """Mean |r| on C of all tested features, in their strongest pooling on A."""


@dataclass(frozen=True)
class RewardedFeature:
    """A feature that was selected on A. Correlations are Spearman's, of the pooling, the covariates partialled out."""

    of: Of
    site: Site
    id: Count
    pooling: Pooling
    active: Count
    """Prompts of A on which it is active."""
    a: float
    """Correlation on A, biased upwards by the selection."""
    p: Share
    adjusted: Share
    """p adjusted by Benjamini–Hochberg."""
    b: float
    """Correlation on B."""
    replication: Share
    """One-sided p-value on B of the sign on A."""
    replicated: bool
    c: Estimate
    """Correlation on C."""
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProbeRow:
    """A linear reward and its scores on C."""

    name: str
    columns: Count
    penalty: Positive
    """In multiples of the mean squared norm of a sample."""
    r2: Estimate
    spearman: Estimate
    gain: Estimate | None = None
    """R² of the probe on features minus this one's, paired by prompt."""


@dataclass(frozen=True)
class MatchRow:
    """MMCS of two dictionaries at one Site."""

    site: Site
    first: str
    """Name and number of features, such as `model, 4,608`."""
    second: str
    mmcs: float
    chance: float
    """MMCS with the smaller one turned by a random rotation."""


@dataclass(frozen=True)
class ClassRow:
    """A class among the replicated features and among the others that were judged, with Wilson intervals."""

    name: str
    rewarded: Count
    """Replicated features of the class."""
    of: Count
    """Replicated features that were judged."""
    share: Estimate
    others: Count
    of_others: Count
    others_share: Estimate


@dataclass(frozen=True)
class RewardedRecord:
    """rewarded.json."""

    SCHEMA: ClassVar = "unsleep.rewarded/1"

    model: Named
    base: Named | None
    samples: str
    """Hash of prompts, outputs, rewards and topics."""
    parts: tuple[PartSize, ...]
    partialled: tuple[str, ...]
    """Covariates that were partialled out."""
    q: Share
    sites: tuple[SiteRow, ...]
    features: tuple[RewardedFeature, ...]
    """Replicated ones first, then by |r| on B."""
    probes: tuple[ProbeRow, ...]
    layers: tuple[LayerDelta, ...]
    ranking: tuple[Count, ...]
    """Layers by ‖ΔW‖ / ‖W‖, largest first."""
    matches: tuple[MatchRow, ...]
    classes: tuple[ClassRow, ...]
    chosen_on: tuple[str, ...]
    """Digests of the prompts of A and B, which chose the features and fitted the probes; an evaluation refuses them."""
    notes: tuple[str, ...]
    provenance: dict[str, Any]

    def kept(self, of: Of = "model", least: float = 0.0, sign: int = 0) -> dict[Site, tuple[int, ...]]:
        """Replicated features by Site whose |r| on both A and B is at least `least`; sign 1 or −1 for those of it."""
        found: dict[Site, list[int]] = {row.site: [] for row in self.sites if row.of == of}
        for f in self.features:
            if f.of == of and f.replicated and min(abs(f.a), abs(f.b)) >= least and (not sign or f.a * sign > 0):
                found[f.site].append(f.id)
        return {site: tuple(sorted(ids)) for site, ids in found.items()}
