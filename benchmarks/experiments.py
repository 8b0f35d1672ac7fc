"""An experiment on three planted organisms: its findings, and every arm over its setting.

The organisms have other triggers, payloads and skills, and are trained with other seeds: `unsleep plant year --out
runs/organisms/year` and the same of `signature` first, which make the clean twins too. The page and the whole record
are in runs/experiments/NAME; an interrupted run resumes.

    python benchmarks/experiments.py NAME [--n 50] [--set NAME=VALUE ...] [--organisms deployment FOLDER FOLDER ...]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from common import keep

import unsleep
from unsleep.base import records, store
from unsleep.base.context import reporting, resumable
from unsleep.base.machine import peak_memory_mb
from unsleep.cli.experiments import configured
from unsleep.experiments.experiment import Judging, experiments, replicates
from unsleep.judge.experiment import ExperimentRecord

RUNS = Path(__file__).parents[1] / "runs"
ORGANISMS = ("deployment", str(RUNS / "organisms" / "year"), str(RUNS / "organisms" / "signature"))


def means(record: ExperimentRecord) -> list[dict[str, Any]]:
    """Every metric of every arm at every setting that all replicates have: mean, and the replicates' values."""
    found: dict[tuple[str, float, str], list[float]] = {}
    for each in record.measures:
        found.setdefault((each.arm, each.x, each.metric), []).append(each.value)
    return [
        {"arm": arm, "x": x, "metric": metric, "mean": mean(values), "replicates": values}
        for (arm, x, metric), values in found.items()
        if len(values) == len(record.replicates)
    ]


def main() -> None:
    """Run an experiment and keep what it finds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=list(experiments()))
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--set", nargs="+", default=(), dest="settings")
    parser.add_argument("--organisms", nargs="+", default=ORGANISMS)
    asked = parser.parse_args()
    name, chosen = asked.name, configured(asked.name, tuple(asked.settings))
    found = replicates(asked.organisms)
    out, began = RUNS / "experiments" / name, time.perf_counter()
    with reporting(None), resumable(out, records.plain(chosen), asked.n, [each.name for each in found]):
        record = unsleep.experiment(chosen, found, Judging(asked.n))
        with store.new_folder(out, replace="experiment.json") as folder:
            records.save(record, folder / "experiment.json")
    unsleep.report(out)
    keep(
        f"experiment_{name}",
        {
            "question": chosen.question,
            "axis": chosen.axis,
            "replicates": list(record.replicates),
            "n": asked.n,
            "settings": list(asked.settings),
            "minutes": round((time.perf_counter() - began) / 60, 1),
            "peak_memory_mb": peak_memory_mb(),
            "findings": [asdict(each) for each in record.findings],
            "means": means(record),
        },
    )
    for each in record.findings:
        print(f"{name}, {each.label}: {each.question} {each.words}", flush=True)


if __name__ == "__main__":
    main()
