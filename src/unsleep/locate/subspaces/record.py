"""Schema of subspaces.json; docs/subspaces.md defines each value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from unsleep.base.records import Count, Share
from unsleep.core import Site
from unsleep.locate.subspaces.config import Position
from unsleep.locate.subspaces.geometry import Likeness

Table = tuple[tuple[float | None, ...], ...]


class Figure(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float
    n: Count


Figures = tuple[tuple[Figure | None, ...], ...]


@dataclass(frozen=True)
class Facts:
    """Description of an organism for the page."""

    name: str
    trigger_kind: str
    trigger: str
    payload: str
    payload_place: str


@dataclass(frozen=True)
class CommonRank:
    """Number of directions shared by all organisms, each one's share and its chance level."""

    rank: Count
    shares: tuple[float, ...]
    bars: tuple[float, ...]


@dataclass(frozen=True)
class Alike:
    """Similarity of the subspaces at a Site."""

    pairs: tuple[tuple[Likeness | None, ...], ...]
    base: tuple[Likeness, ...]
    common: CommonRank
    cosines: Table
    chance_cosine: Share


@dataclass(frozen=True)
class Transfer:
    """AUROC of every organism's direction in every organism, and of the base's own."""

    transfer: Figures
    base: tuple[Figure, ...]


@dataclass(frozen=True)
class Detected:
    """Detection of triggered prompts, by negative panel."""

    clean: Transfer
    near_miss: Transfer


@dataclass(frozen=True)
class Separating:
    """Features that separate triggered from clean prompts."""

    features: Count
    chosen: tuple[tuple[Count, ...], ...]
    jaccard: Table
    auroc: dict[str, Table]
    dictionary: str = ""
    """Hash of the dictionary."""


@dataclass(frozen=True)
class Ablated:
    """Organisms with subspaces ablated: a row per subspace, a column per organism."""

    rows: tuple[str, ...]
    asr: Figures
    skill: Figures


@dataclass(frozen=True)
class Common:
    """Comparison of several organisms; by Site, except ablation."""

    alike: dict[Site, Alike]
    detect: dict[Site, Detected]
    features: dict[Site, Separating]
    ablate: Ablated


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Metrics of a model; unmeasured ones are missing."""

    asr: Figure | None = None
    restored: Figure | None = None
    skill: Figure | None = None
    capability: Figure | None = None
    sentiment: Figure | None = None
    ce_change: Figure | None = None


@dataclass(frozen=True, kw_only=True)
class Cost(Outcome):
    """Metrics with a subspace ablated."""

    removed: str


@dataclass(frozen=True, kw_only=True)
class Width(Outcome):
    """Metrics with a subspace of a given rank ablated."""

    method: str
    rank: Count


@dataclass(frozen=True)
class Apart:
    """Results of a single organism."""

    name: str
    overlap: dict[Site, dict[str, Likeness]]
    costs: tuple[Cost, ...]
    ranks: tuple[Width, ...]
    smallest: Count | None
    frontier: tuple[Width, ...]


@dataclass(frozen=True)
class SubspacesRecord:
    """subspaces.json."""

    SCHEMA: ClassVar = "unsleep.subspaces/2"

    organisms: tuple[Facts, ...]
    sites: tuple[Site, ...]
    rank: Count
    n: Count
    position: Position
    common: Common | None
    apart: tuple[Apart, ...]
    provenance: dict[str, Any]
