"""Directions on disk: rows and centres in one safetensors file, metadata in directions.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from unsleep.base import records, store
from unsleep.base.records import Count, Positive, Share
from unsleep.core import BadInput, Site
from unsleep.locate.directions.fit import Direction

TENSORS = "directions.safetensors"
Space = Literal["residual", "features"]


@dataclass(frozen=True)
class Figure:
    """Held-out detection by a direction."""

    site: Site
    method: str
    space: Space
    rank: Count
    auroc: Share
    accuracy: Share
    margin: float
    n: Count


@dataclass(frozen=True)
class Floor:
    """Held-out detection by random directions."""

    site: Site
    space: Space
    best: Share
    mean: Share
    n: Count


@dataclass(frozen=True)
class Cosines:
    """Cosine similarities of directions at the best Site."""

    names: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Carried:
    """Patching effect of each direction, by Site and name."""

    pairs: Count
    carried: dict[Site, dict[str, float]]


@dataclass(frozen=True)
class Costs:
    """Ablation costs on plain text, in nats per token."""

    loss: Positive
    tokens: Count
    increase: dict[str, float]
    random: dict[str, tuple[float, ...]]
    """Rank → costs of random subspaces."""


@dataclass(frozen=True)
class Erased:
    """KL to the model's own replies with the eraser at a Site."""

    before: float
    after: dict[Site, float]
    pairs: Count


@dataclass(frozen=True)
class Entry:
    """A direction, stored under its name in the safetensors file."""

    name: str
    site: Site
    method: str
    space: Space
    rank: Count | None = None


@dataclass(frozen=True)
class DirectionsRecord:
    """directions.json."""

    SCHEMA: ClassVar = "unsleep.directions/1"

    model: str
    position: str
    best: Site
    beats_chance: bool
    figures: tuple[Figure, ...]
    floors: tuple[Floor, ...]
    cosines: Cosines
    patching: Carried
    costs: dict[str, Costs]
    provenance: dict[str, Any]
    directions: tuple[Entry, ...] = ()
    erased: Erased | None = None


def write_directions(directions: Sequence[Direction], folder: str | Path) -> list[dict[str, Any]]:
    """Write the tensors into a folder; returns each direction's entry of directions.json.

    Raises `BadInput` for two of equal Site, space and method.
    """
    tensors: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    for d in directions:
        name = f"{d.site}/{d.space}/{d.method}"
        if f"{name}/vector" in tensors:
            raise BadInput(f"two directions are called {name}; expected one of each Site, space and method")
        tensors |= {f"{name}/vector": d.vector, f"{name}/center": d.center}
        entries.append({"name": name, "site": str(d.site), "method": d.method, "space": d.space, "rank": d.rank})
    store.write_tensors(Path(folder) / TENSORS, tensors)
    return entries


def load_directions(folder: str | Path) -> list[Direction]:
    """Load directions written by `unsleep directions`, in order; raises `BadInput` naming what is invalid."""
    folder = Path(folder)
    path = folder / "directions.json"
    record = records.load(DirectionsRecord, path)
    shapes = {"vector": (None, None), "center": (None,)}
    expect = {f"{e.name}/{part}": shape for e in record.directions for part, shape in shapes.items()}
    tensors = store.read_tensors(folder / TENSORS, expect)
    found: list[Direction] = []
    for e in record.directions:
        with store.reading(path):
            vector, center = (tensors[f"{e.name}/{part}"] for part in shapes)
            found.append(Direction(vector, e.site, e.method, record.model, e.space, center))
    return found
