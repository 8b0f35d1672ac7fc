"""Record of a feature: where it fires, what it writes, its explanations and its classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from unsleep.base.records import Count, Positive, Share
from unsleep.base.stats import Estimate
from unsleep.models.lens import Written, stronger


class Context(NamedTuple):
    """Some tokens of a text, with a feature's activation at each."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    at: Count
    """Index of the token for which the context was kept."""
    source: str
    """Name of its prompt set."""
    row: Count
    """Number of its prompt there."""
    group: str
    """`top`, or the quantile of the activation, such as `0.5–0.75`."""


class TokenWeight(NamedTuple):
    """A token of the vocabulary and a change of its logit."""

    token: str
    weight: float


class Cofiring(NamedTuple):
    """Another feature of the dictionary that fires at the same tokens."""

    feature: Count
    overlap: Share
    """Jaccard index: tokens at which both fire, over tokens at which one does."""


@dataclass(frozen=True)
class Explanation:
    """A text that says when a feature fires, and how well it predicts that on held-out contexts."""

    text: str
    source: str
    """`predicate`, or the language model that wrote it."""
    scores: dict[str, Estimate]
    """Such as detection, fuzzing (balanced accuracy), simulation (Pearson), precision, recall."""


class ClassScore(NamedTuple):
    """A class and the confidence that a feature is of it."""

    name: str
    """Such as trigger, payload, reward, sentiment, skill, language, other, unclear."""
    score: Share


@dataclass(frozen=True)
class FeatureCard:
    """Everything known of one feature."""

    feature: Count
    density: Share
    """Share of tokens at which it fires."""
    mean: Positive
    """Mean activation where it fires."""
    largest: Positive
    histogram: tuple[Count, ...]
    """Tokens by activation, in bins of equal width from 0 to `largest`; without those at which it does not fire."""
    contexts: tuple[Context, ...]
    promoted: tuple[TokenWeight, ...]
    """VocabProj: decoder row → final norm → unembedding, largest logits first."""
    suppressed: tuple[TokenWeight, ...]
    changed: tuple[TokenWeight, ...] = ()
    """TokenChange: mean change of logits with the feature driven high on random texts, largest first."""
    cofiring: tuple[Cofiring, ...] = ()
    explanations: tuple[Explanation, ...] = ()
    classes: tuple[ClassScore, ...] = ()

    @property
    def written(self) -> Written | None:
        """The tokens that it promotes or suppresses, whichever have the larger logits; `None` where none are known."""
        return stronger(self.promoted, self.suppressed)
