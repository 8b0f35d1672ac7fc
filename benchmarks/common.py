"""What the measurements share: ways of doing a thing timed in turn, and the record that is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

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


def in_own_process(script: str, point: Mapping[str, Any]) -> dict[str, Any]:
    """The last line that a script prints for `--point`, in a process of its own, whose memory is measured."""
    words = [sys.executable, script, "--point", json.dumps(point)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def placeless(value: Any) -> Any:
    """A record in which paths are without the place of this checkout, or of any other folder."""
    if isinstance(value, Mapping):
        return {key: placeless(each) for key, each in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [placeless(each) for each in cast("Sequence[Any]", value)]
    if not isinstance(value, str) or not value.startswith("/"):
        return value
    path = Path(value)
    if len(path.parts) < 2 or not os.path.exists(value):  # noqa: PTH110  # no error for a text that is no path
        return value
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name)


def keep(name: str, figures: Mapping[str, Any], path: Path | None = None) -> Path:
    """Write the file of a measurement: the figures, and the versions, machine and date they belong to.

    The path is that of `record_of`, where none is given.
    """
    origin = store.provenance(0) | {"machine": machine()}
    path = path or record_of(name)
    found = {"schema": "unsleep.benchmark/1", "name": name, **figures, "provenance": origin}
    store.write_json(path, placeless(found))
    return path


def table(rows: list[list[str]]) -> str:
    """Rows with a head, as wide as they need to be."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
