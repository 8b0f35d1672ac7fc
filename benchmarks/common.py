"""What the measurements share: ways of doing a thing timed in turn, and the record that is kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from unsleep.base import store

RESULTS = Path(__file__).parent / "results"
ROOT = RESULTS.parents[1]


def alternating(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round.

    Every round runs each way once, in the opposite order of the round before, so that whatever else
    the machine does falls on all of them. One round before the first is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways) if number % 2 else reversed(list(ways)):
            start = time.perf_counter()
            ways[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(over: list[float], under: list[float]) -> float:
    """The quotient of two medians."""
    return median(over) / median(under)


def record_of(name: str) -> Path:
    """The file of a measurement: `results/NAME.json`, and `results/NAME_cuda.json` of one on a GPU."""
    return RESULTS / f"{name}{'_cuda' if torch.cuda.is_available() else ''}.json"


def machine() -> dict[str, Any]:
    """Description of the machine."""
    return {**store.provenance(0)["machine"], "cores": os.cpu_count()}


def told(argument: str) -> str:
    """An argument of the command without the place of this checkout, or of any other folder."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name)


def keep(name: str, figures: Mapping[str, Any], path: Path | None = None) -> Path:
    """Write the file of a measurement: the figures, and the versions, machine and date they belong to.

    The path is that of `record_of`, where none is given.
    """
    origin = store.provenance(0)
    origin |= {"command": list(map(told, origin["command"])), "machine": machine()}
    path = path or record_of(name)
    store.write_json(path, {"schema": "unsleep.benchmark/1", "name": name, **figures, "provenance": origin})
    return path


def table(rows: list[list[str]]) -> str:
    """Rows with a head, as wide as they need to be."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
