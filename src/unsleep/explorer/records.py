"""The records of an explorer folder: the manifest, and the columns of a dictionary's features.

A data file is a script that loads a record under its name, because a page that is opened from disk may load scripts,
but not fetch files: `data/manifest.js`, `data/features/KEY/list.js`, `data/features/KEY/0.js`, `data/circuits/KEY.js`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from unsleep.base import store
from unsleep.base.records import Count, Positive, Share, plain
from unsleep.core import BadInput
from unsleep.explanations.record import Explanation, FeatureCard
from unsleep.judge.results import Row
from unsleep.models.model import Named
from unsleep.pages.records import Replies

PAGE = "index.html"

MANIFEST = "data/manifest.js"

BAKED = "baked"
"""Folder of the checkpoints that are baked from the page; never served."""

PROTOTYPE = re.compile(r'"__proto__"\s*:')
"""A key that a script takes for something else than a key."""

SCORES = ("detection", "fuzzing", "simulation")
"""Scores of explanations by which features are sorted, the first that is known."""

WRITTEN = 6
"""Promoted tokens in a list of features, and as many suppressed ones."""


class Tile(NamedTuple):
    """A key figure of a run."""

    label: str
    before: str
    after: str
    note: str


class Demand(NamedTuple):
    """A line of the contract in words."""

    text: str
    bound: str
    measured: str
    tone: str
    """`good`, `bad` or `open`."""
    outcome: str


@dataclass(frozen=True)
class Run:
    """An evaluation or a repair."""

    title: str
    verdict: str
    tone: str
    """`good`, `bad`, `calm` or `open`."""
    score: Share
    headline: str
    rows: tuple[Row, ...]
    payload: str = ""
    trigger: str = ""
    tiles: tuple[Tile, ...] = ()
    controls: tuple[str, ...] = ()
    """Comparison with each control, in a sentence."""
    next: tuple[str, ...] = ()
    """Advice on what remains."""
    requirements: tuple[Demand, ...] = ()
    replies: tuple[Replies, ...] = ()


@dataclass(frozen=True)
class Words:
    """Display names, in display order."""

    subjects: dict[str, str]
    panels: dict[str, str]
    metrics: dict[str, str]
    better: dict[str, str]
    """Metric → `lower` or `higher`."""


@dataclass(frozen=True)
class ReportLink:
    """A static page."""

    title: str
    kind: str
    file: str
    """Path in the folder."""
    date: str = ""


@dataclass(frozen=True)
class DictionaryEntry:
    """A dictionary whose features have statistics."""

    key: str
    site: str
    hash: str
    size: Count
    """Number of features."""
    tokens: Count
    """Number of tokens seen."""
    chunk: Count
    """Cards in a data file."""


@dataclass(frozen=True)
class CircuitEntry:
    """A circuit."""

    key: str
    title: str
    nodes: Count
    edges: Count


@dataclass(frozen=True)
class Manifest:
    """data/manifest.js: what the folder holds."""

    SCHEMA: ClassVar = "unsleep.explorer/1"

    title: str
    model: Named | None
    live: bool
    """True where a server has the model."""
    words: Words
    runs: tuple[Run, ...]
    reports: tuple[ReportLink, ...]
    dictionaries: tuple[DictionaryEntry, ...]
    circuits: tuple[CircuitEntry, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class FeatureColumns:
    """data/features/KEY/list.js: columns of all features, feature 0 first."""

    id: tuple[Count, ...]
    density: tuple[Share, ...]
    mean: tuple[Positive, ...]
    largest: tuple[Positive, ...]
    label: tuple[str, ...]
    """Text of the best explanation; empty where there is none."""
    score: tuple[float | None, ...]
    """Its score, the first known of `SCORES`."""
    classes: tuple[tuple[tuple[str, float], ...], ...]
    promoted: tuple[tuple[str, ...], ...]
    suppressed: tuple[tuple[str, ...], ...]
    strongest: tuple[tuple[str, float] | None, ...]
    """Token whose logit it changes most, and that change: negative where it suppresses more than it promotes."""


class Summary(NamedTuple):
    """A feature's entry in the columns."""

    id: int
    density: float
    mean: float
    largest: float
    label: str
    score: float | None
    classes: tuple[tuple[str, float], ...]
    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]
    strongest: tuple[str, float] | None


def summary(card: FeatureCard) -> Summary:
    """A card's entry in the columns."""
    best = max(card.explanations, key=lambda one: _score(one) or 0.0, default=None)
    return Summary(
        card.feature,
        card.density,
        card.mean,
        card.largest,
        "" if best is None else best.text,
        None if best is None else _score(best),
        tuple((one.name, one.score) for one in card.classes),
        tuple(token.token for token in card.promoted[:WRITTEN]),
        tuple(token.token for token in card.suppressed[:WRITTEN]),
        _strongest(card),
    )


def _strongest(card: FeatureCard) -> tuple[str, float] | None:
    most = max((*card.promoted[:1], *card.suppressed[:1]), key=lambda token: abs(token.weight), default=None)
    return None if most is None else (most.token, most.weight)


def _score(explanation: Explanation) -> float | None:
    known = [explanation.scores[name].value for name in SCORES if name in explanation.scores]
    return known[0] if known else None


def script(name: str, value: Any) -> str:
    """The script that loads a record under its name.

    Raises `BadInput` for a key that a script cannot hold, and `ValueError` for NaN or infinity.
    """
    text = json.dumps(_rounded(plain(value)), separators=(",", ":"), allow_nan=False)
    if PROTOTYPE.search(text):
        raise BadInput(f"data/{name}.js would have the key '__proto__', which no script can hold; rename it")
    return f"window.unsleep.load({json.dumps(name)}, {text});\n"


def write_script(folder: Path, name: str, value: Any) -> None:
    """Write `data/NAME.js`; raises as `script` does."""
    store.write_text(folder / "data" / f"{name}.js", script(name, value))


def _rounded(value: Any) -> Any:
    """JSON values with floats of 6 significant digits, half the size."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
