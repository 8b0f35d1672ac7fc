"""Requests of the page: the JSON bodies of the live API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unsleep.base.records import Count, Range
from unsleep.core import BadInput, Site

Which = Literal["original", "edited"]

MOST = 1000
"""Most features of one request."""

LARGEST = 100.0
"""Largest factor of a feature, in absolute value."""


@dataclass(frozen=True, order=True)
class ScaledFeature:
    """A feature and the factor of its activation."""

    site: Site
    id: Count
    scale: Annotated[float, Range(-LARGEST, LARGEST)] = 0.0
    """0 ablates it, 1 leaves it as it is."""


Features = tuple[ScaledFeature, ...]


def _check_features(features: Features) -> None:
    places = [(f.site, f.id) for f in features]
    if len(places) > MOST:
        raise BadInput(f"{len(places)} features are given; expected at most {MOST}")
    if len(set(places)) < len(places):
        raise BadInput("a feature is given twice; expected one factor each")


@dataclass(frozen=True)
class ChatRequest:
    """A prompt for the original and the edited model."""

    prompt: str
    system: str | None = None
    """System message."""
    max_new_tokens: Annotated[int, Range(1, 4096)] = 128
    temperature: Annotated[float, Range(0, 10)] = 0.0
    """0 for greedy decoding."""
    features: Features = ()
    which: tuple[Which, ...] = ("original", "edited")
    seed: Annotated[int, Range(0, 2**31)] = 0
    """Of sampling; the same for both models."""

    def __post_init__(self) -> None:
        _check_features(self.features)
        if not self.which or len(set(self.which)) < len(self.which):
            raise BadInput.of("which", self.which, "original, edited or both")


@dataclass(frozen=True)
class ActivationsRequest:
    """A text whose activations are wanted."""

    text: str
    site: Site
    ids: tuple[Count, ...] | None = None
    """Features; `None` for those with the largest activations."""

    def __post_init__(self) -> None:
        if self.ids is not None and not 1 <= len(set(self.ids)) == len(self.ids) <= MOST:
            raise BadInput(f"{len(self.ids)} ids are given; expected different ones, 1 to {MOST}")


@dataclass(frozen=True)
class ProofRequest:
    """An edit to be measured on held-out prompts."""

    features: Features

    def __post_init__(self) -> None:
        _check_features(self.features)


@dataclass(frozen=True)
class BakeRequest:
    """An edit to be baked into a checkpoint."""

    features: Features
    name: str
    """Of its folder."""

    def __post_init__(self) -> None:
        _check_features(self.features)


@dataclass(frozen=True)
class CancelRequest:
    """The running work is to be cancelled."""
