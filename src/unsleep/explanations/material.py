"""Contexts of features from their statistics: half of the text for explanations, the other half for their scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from unsleep.core import Site
from unsleep.explanations.examples import Examples
from unsleep.explanations.judged import HeldOut
from unsleep.explanations.record import Context, FeatureCard
from unsleep.explanations.statistics import FeatureStatistics
from unsleep.models.model import Named


@dataclass(frozen=True, eq=False)
class StatisticsContexts:
    """The features of statistics; the halves are those by which predicates are learned and scored."""

    statistics: FeatureStatistics
    count: int = 40
    """Held-out contexts of each kind, at most; half of the silent ones have a token at which the feature fires
    elsewhere.
    """

    @property
    def model(self) -> Named:
        """The model that the features are of."""
        return self.statistics.model

    @property
    def dictionary(self) -> str:
        """Hash of the dictionary."""
        return self.statistics.dictionary

    @property
    def site(self) -> Site:
        """Its Site."""
        return self.statistics.site

    @cached_property
    def _examples(self) -> Examples:
        return Examples(self.statistics, self.statistics.record.config.seed)

    @cached_property
    def _held_out(self) -> frozenset[tuple[str, int]]:
        """Prompts, as source and row, that are held out."""
        text = self.statistics.text
        sides = zip(text.source, text.number, text.held_out, strict=True)
        return frozenset((text.names[source], int(number)) for source, number, held in sides if held)

    def card(self, feature: int) -> FeatureCard:
        """A feature's card with the contexts of texts that are not held out."""
        card = self.statistics.card(feature)
        return replace(card, contexts=tuple(c for c in card.contexts if (c.source, c.row) not in self._held_out))

    def held_out(self, feature: int) -> HeldOut:
        """Its held-out contexts, the firing ones by activation."""
        _, half = self._examples.of(feature, 0, self.count)
        firing = self._examples.contexts(half.fires, "held-out")
        silent = self._examples.contexts(half.quiet, "held-out")
        return HeldOut(tuple(sorted(filter(_fires, firing), key=lambda c: -max(c.values))), tuple(silent))


def _fires(context: Context) -> bool:
    """True for an activation that does not round to 0."""
    return max(context.values) > 0
