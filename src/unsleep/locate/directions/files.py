"""Directions on disk: their rows and centres in one safetensors file, what they are beside it in directions.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unsleep.base import store
from unsleep.core import BadInput, Site
from unsleep.locate.directions.fit import Direction

SCHEMA = "unsleep.directions/1"
TENSORS = "directions.safetensors"


def write_directions(directions: Sequence[Direction], folder: str | Path) -> list[dict[str, Any]]:
    """Write the tensors into a folder; returns what directions.json says of each.

    Raises `BadInput` for two of one Site, space and method.
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
    """Directions that `unsleep directions` found, in their order; raises `BadInput` naming what does not fit."""
    folder = Path(folder)
    path = folder / "directions.json"
    record = store.read_record(path, SCHEMA, {"model": str, "directions": list})
    kinds = {"name": str, "site": str, "method": str, "space": str}
    entries = [store.fields_of(e, kinds, f"{path}: directions[{i}]") for i, e in enumerate(record["directions"])]
    expect = {f"{e['name']}/vector": (None, None) for e in entries} | {f"{e['name']}/center": (None,) for e in entries}
    tensors = store.read_tensors(folder / TENSORS, expect)
    found: list[Direction] = []
    for e in entries:
        with store.reading(path):
            if e["space"] not in ("residual", "features"):
                raise BadInput(f"{e['name']}: space is {e['space']!r}; expected residual or features")
            vector, center = (tensors[f"{e['name']}/{part}"] for part in ("vector", "center"))
            found.append(Direction(vector, Site.parse(e["site"]), e["method"], record["model"], e["space"], center))
    return found
