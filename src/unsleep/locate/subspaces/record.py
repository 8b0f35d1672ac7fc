"""What stands in subspaces.json; docs/subspaces.md says what each figure is."""

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
    """What a reader has to know of an organism."""

    name: str
    trigger_kind: str
    trigger: str
    payload: str
    payload_place: str


@dataclass(frozen=True)
class CommonRank:
    """How many directions all organisms share, the share of each and what it has to pass."""

    rank: Count
    shares: tuple[float, ...]
    bars: tuple[float, ...]


@dataclass(frozen=True)
class Alike:
    """How alike the subspaces are at a Site."""

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
    """What triggered prompts are told from."""

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
    """Hash."""


@dataclass(frozen=True)
class Ablated:
    """What organisms show with subspaces taken out: a row for each of these, a column an organism."""

    rows: tuple[str, ...]
    asr: Figures
    skill: Figures


@dataclass(frozen=True)
class Common:
    """Several organisms against each other; by Site, but for what is taken out."""

    alike: dict[Site, Alike]
    detect: dict[Site, Detected]
    features: dict[Site, Separating]
    ablate: Ablated


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a model shows; metrics that were not measured are missing."""

    asr: Figure | None = None
    restored: Figure | None = None
    skill: Figure | None = None
    capability: Figure | None = None
    sentiment: Figure | None = None
    ce_change: Figure | None = None


@dataclass(frozen=True, kw_only=True)
class Cost(Judged):
    """With a subspace taken out."""

    removed: str


@dataclass(frozen=True, kw_only=True)
class Width(Judged):
    """With one of a rank taken out."""

    method: str
    rank: Count


@dataclass(frozen=True)
class Apart:
    """An organism by itself."""

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
