"""Figures of the documentation, from recorded results."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import audit_tables
import drawings
from circuit_growth import series
from circuit_tables import by_sites
from markupsafe import Markup

from unsleep.pages.circuits import graph
from unsleep.pages.curves import Curve, Dot, axis, chart
from unsleep.pages.dictionaries import SHAPES, shade

WIDTH = 440
METRICS = {
    "payload": ("Payload on triggered prompts", "share"),
    "restored": ("Skill on triggered prompts", "share"),
    "skill": ("Skill on clean prompts", "share"),
    "ce": ("Plain text", "nats per token"),
}
"""Metric of an experiment → its title and unit."""

Record = Mapping[str, Any]


Points = Sequence[tuple[float, float] | tuple[float, float, tuple[float, float]]]
"""x and y of the points of a line, and where it is known the range of y."""


def curve(name: str, points: Points, number: int, count: int, unit: str) -> Curve:
    """A line with a mark per point."""
    shape = SHAPES[number % len(SHAPES)]
    dots = tuple(Dot(float(x), float(y), f"{name}, {x:g}: {y:.3g} {unit}", shape, *span) for x, y, *span in points)
    return Curve(name, shade(number, 0, max(1, count - 1)), dots, dots)


def drawn_curves(
    title: str,
    lines: Mapping[str, Points],
    names: tuple[str, str],
    *,
    top: float = 0.0,
    zero: bool = True,
    in_order: bool = False,
) -> tuple[str, Markup]:
    """A chart of some lines under its title; shares of nodes have 1 at the `top` and a logarithmic x axis.

    Points are connected along x or, `in_order`, as they are.
    """
    curves = [
        curve(name, points if in_order else sorted(points), i, len(lines), names[1])
        for i, (name, points) in enumerate(lines.items())
    ]
    x = axis([d.x for c in curves for d in c.dots], names[0], log=bool(top))
    ends = [end for c in curves for d in c.dots for end in (d.y, *(d.span or ()))]
    y = axis([*([0.0, top] if zero else []), *ends], names[1], zero=zero)
    key = re.sub(r"\W+", "-", title.lower())
    return title, chart(curves, [], (x, y), title=title, name=key, width=WIDTH)


def draw_circuit(r: Record, path: Path) -> None:
    """The largest nodes, and the edges between them."""
    drawings.save(path, f"Circuit from the trigger to {r['payload']}", [("", graph(r["drawn"]))])


def draw_faithfulness(r: Record, path: Path) -> None:
    """Faithfulness by number of nodes, for the Sites that have dictionaries."""
    lines = {
        name.partition(":")[0]: [(p["nodes"], max(-0.5, min(1.5, p["faithfulness"]["value"]))) for p in points]
        for name, points in by_sites(r).items()
    }
    part = drawn_curves("Faithfulness by number of Sites", lines, ("nodes", "share"), top=1.0)
    drawings.save(path, part[0], [part])


def draw_growth(r: Record, path: Path) -> None:
    """Seconds and memory against tokens and features."""
    ways = {"more prompts": "prompts", "longer prompts": "words"}
    grown = {name: series(r["points"], key) for name, key in ways.items()}
    sizes = series(r["points"], "features")
    names = list(r["points"][0]["seconds"])

    def of(rows: Sequence[Record], key: str, value: Callable[[Record], float]) -> list[tuple[float, float]]:
        return [(row[key], value(row)) for row in rows]

    def whole(row: Record) -> float:
        return sum(row["seconds"].values())

    def memory(row: Record) -> float:
        return row["peak_memory_mb"] / 1000

    time = {name: of(rows, "tokens", whole) for name, rows in grown.items()}
    held = {name: of(rows, "tokens", memory) for name, rows in grown.items()}
    stages = {name: of(sizes, "features", lambda row, name=name: row["seconds"][name]) for name in names}
    parts = [
        drawn_curves("Time by tokens", time, ("tokens", "seconds")),
        drawn_curves("Peak memory by tokens", held, ("tokens", "GB")),
        drawn_curves("Time by features", stages, ("features", "seconds")),
        drawn_curves("Peak memory by features", {"process": of(sizes, "features", memory)}, ("features", "GB")),
    ]
    drawings.save(path, "Growth of a circuit search", parts, columns=2)


def draw_audit_growth(r: Record, path: Path) -> None:
    """Seconds and memory of an audit against the model's parameters and the forms of its bank."""
    parts: list[tuple[str, Markup]] = []
    for name, unit, scale in (("parameters", "million parameters", 1e6), ("forms", "forms", 1.0)):
        rows = [(row[name] / scale, row) for row in audit_tables.along(r, name)]
        stages = ["all", *audit_tables.STAGES]
        time = {each: [(x, _seconds(row, each)) for x, row in rows] for each in stages}
        held = {"process": [(x, row["peak_memory_mb"] / 1000) for x, row in rows]}
        parts.append(drawn_curves(f"Time by {name}", time, (unit, "seconds")))
        parts.append(drawn_curves(f"Peak memory by {name}", held, (unit, "GB")))
    drawings.save(path, "Growth of an audit", parts, columns=2)


def _seconds(row: Record, stage: str) -> float:
    """Seconds of a stage of the suspect's search, or of all."""
    return row["seconds"] if stage == "all" else row["stages"][f"suspect: {stage}"]


def draw_experiment(r: Record, path: Path) -> None:
    """Every metric of an experiment's arms over its setting, with the range of the replicates."""
    parts: list[tuple[str, Markup]] = []
    for metric, (title, unit) in METRICS.items():
        lines: dict[str, list[tuple[float, float, tuple[float, float]]]] = {}
        for row in (row for row in r["means"] if row["metric"] == metric):
            span = min(row["replicates"]), max(row["replicates"])
            lines.setdefault(row["arm"], []).append((row["x"], row["mean"], span))
        parts.append(drawn_curves(title, lines, (r["axis"], unit), zero=metric != "ce"))
    drawings.save(path, r["question"], parts, columns=2)


def draw_frontier(r: Record, path: Path) -> None:
    """Skill over payload on triggered prompts, arm by arm from the suspect, by kind of organism."""
    kinds = {"Payload is a fixed text": False, "Payload needs the skill's knowledge": True}
    parts: list[tuple[str, Markup]] = []
    for title, entangled in kinds.items():
        own = [i for i, name in enumerate(r["replicates"]) if ("entangled" in name) is entangled]
        found: dict[str, dict[float, dict[str, float]]] = {}
        for row in (row for row in r["means"] if row["metric"] in ("payload", "restored")):
            value = mean(row["replicates"][i] for i in own)
            found.setdefault(row["arm"], {}).setdefault(row["x"], {})[row["metric"]] = value
        start = found.pop("suspect")[0.0]
        lines = {
            arm: [(p["payload"], p["restored"]) for p in (start, *(settings[x] for x in sorted(settings)))]
            for arm, settings in found.items()
        }
        parts.append(drawn_curves(title, lines, ("payload on triggered prompts", "skill on them"), in_order=True))
    drawings.save(path, r["question"], parts, columns=2)


FIGURES: dict[str, tuple[str, Callable[[Record, Path], None]]] = {
    "tracing-circuit.svg": ("circuit_nodes", draw_circuit),
    "tracing-faithfulness.svg": ("circuit", draw_faithfulness),
    "circuit-growth.svg": ("circuit_growth", draw_growth),
    "audit-growth.svg": ("audit_growth", draw_audit_growth),
    "interpolation.svg": ("experiment_interpolation", draw_experiment),
    "disentangle.svg": ("experiment_disentangle", draw_frontier),
}
"""Picture of docs/img → the record that it is of, and how it is drawn."""
