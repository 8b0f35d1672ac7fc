"""Cards of features from the folders that `unsleep explain` makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from unsleep.base import store
from unsleep.core import Site
from unsleep.explanations.explained import FILE, Explanations
from unsleep.explanations.record import FeatureCard
from unsleep.explanations.statistics import FeatureStatistics


@runtime_checkable
class Cards(Protocol):
    """Statistics of a dictionary's features."""

    @property
    def site(self) -> Site:
        """Of the dictionary."""
        ...

    @property
    def dictionary(self) -> str:
        """Its hash."""
        ...

    def card(self, feature: int) -> FeatureCard:
        """Everything known of a feature."""
        ...


@dataclass(frozen=True)
class Explained:
    """Statistics with the explanations beside them."""

    statistics: FeatureStatistics
    explanations: Explanations

    @property
    def site(self) -> Site:
        """Of the dictionary."""
        return self.statistics.site

    @property
    def dictionary(self) -> str:
        """Its hash."""
        return self.statistics.dictionary

    def card(self, feature: int) -> FeatureCard:
        """Everything known of a feature, explanations included."""
        return self.explanations.card(self.statistics, feature)


def load_cards(folder: str | Path) -> list[Cards]:
    """Feature statistics in a folder, of one dictionary or of one per Site below it, with their explanations if any.

    Raises `BadInput` where there are none, and as `FeatureStatistics.load` and `Explanations.load` do.
    """
    found: list[Cards] = []
    for place in (path.parent for path in store.files_named("statistics.json", Path(folder), "unsleep explain")):
        statistics = FeatureStatistics.load(place)
        is_explained = (place / FILE).is_file()
        found.append(Explained(statistics, Explanations.load(place, statistics)) if is_explained else statistics)
    return found
