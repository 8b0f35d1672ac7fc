"""An experiment on three planted organisms: its findings, and every arm over its setting.

The organisms have other triggers, payloads and skills, and are trained with other seeds: `unsleep plant year --out
runs/organisms/year` and the same of `signature` first, which make the clean twins too. `disentangle` is run on three
more, which are entangled: the packaged recipe of that name, and those of benchmarks/recipes. The page and the whole
record are in runs/experiments/NAME; an interrupted run resumes.

On a large machine organisms are judged side by side, each by a run with `--part FILE`; a run of all of them with
`--join FILE ...` draws the conclusions.

    python benchmarks/experiments.py NAME [--n 50] [--set NAME=VALUE ...] [--organisms deployment FOLDER FOLDER ...]
                                     [--part FILE [--steps FOLDER] | --join FILE ...]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from common import keep

import unsleep
from unsleep.base import records, store
from unsleep.base.context import keeping, resumable
from unsleep.base.machine import peak_memory_mb
from unsleep.cli.console import Bars
from unsleep.cli.experiments import configured
from unsleep.experiments.experiment import Experiment, Judging, concluded, experiments, replicates
from unsleep.judge.experiment import ExperimentRecord, Measure

RUNS = Path(__file__).parents[1] / "runs"
ORGANISMS = ("deployment", str(RUNS / "organisms" / "year"), str(RUNS / "organisms" / "signature"))


def means(record: ExperimentRecord) -> list[dict[str, Any]]:
    """Every metric of every arm: means over the replicates, setting by setting, and the replicates' values.

    Where settings are measured themselves (a share of variance), those of equal rank are taken together, if every
    replicate has as many.
    """
    found: dict[tuple[str, str], dict[str, dict[float, float]]] = {}
    for each in record.measures:
        found.setdefault((each.arm, each.metric), {}).setdefault(each.replicate, {})[each.x] = each.value
    rows: list[dict[str, Any]] = []
    for (arm, metric), own in found.items():
        if len(own) < len(record.replicates):
            continue
        common = sorted(set.intersection(*map(set, own.values())))
        points = [[(x, each[x]) for each in own.values()] for x in common]
        if not common and len({len(each) for each in own.values()}) == 1:
            points = list(zip(*(sorted(each.items()) for each in own.values()), strict=True))
        for point in points:
            xs, values = zip(*point, strict=True)
            rows.append({"arm": arm, "x": mean(xs), "metric": metric, "mean": mean(values), "replicates": list(values)})
    return rows


PARTED = "places"
"""The setting in which parts of an organism may differ."""


def check_part(part: ExperimentRecord, chosen: Experiment, n: int) -> None:
    """Exit naming what a part was judged with, where that is not what is asked for."""
    asked = {"n": n, "name": chosen.name, **records.plain(chosen)}
    given = {"n": part.provenance["n"], "name": part.name, **part.provenance["settings"]}
    for key in sorted({*asked, *given} - {PARTED}):
        if asked.get(key) != given.get(key):
            raise SystemExit(f"a part has {key} = {given.get(key)!r}; expected {asked.get(key)!r}: give it with --set")


def joined(parts: Sequence[ExperimentRecord], replicates: Sequence[str]) -> tuple[list[Measure], list[str]]:
    """All measures of some parts, and their notes on what is missing, each once."""
    found = {(m.arm, m.x, m.replicate, m.metric): m for part in parts for m in part.measures}
    if missing := {*replicates} - {m.replicate for m in found.values()}:
        raise SystemExit(f"no part has {', '.join(sorted(missing))}")
    own = tuple(f"{each}: " for each in replicates)
    told = dict.fromkeys(note for part in parts for note in part.notes if note.startswith(own))
    return list(found.values()), list(told)


def steps(asked: argparse.Namespace, out: Path, *made_from: Any) -> AbstractContextManager[Any]:
    """Keeps the resumable steps of a run."""
    if not asked.steps:
        return resumable(asked.part or out, *made_from)
    asked.steps.mkdir(parents=True, exist_ok=True)
    return keeping(asked.steps)


def main() -> None:
    """Run an experiment and keep what it finds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=list(experiments()))
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--set", nargs="+", default=(), dest="settings")
    parser.add_argument("--organisms", nargs="+", default=ORGANISMS)
    parser.add_argument("--part", type=Path, help="write the experiment's record here, and no benchmark's")
    parser.add_argument("--steps", type=Path, help="folder of a part's resumable steps, which parts may share")
    parser.add_argument("--join", nargs="+", type=Path, default=(), help="records of parts")
    asked = parser.parse_args()
    name, chosen = asked.name, configured(asked.name, tuple(asked.settings))
    found, judging = replicates(asked.organisms), Judging(asked.n)
    out, began = RUNS / "experiments" / name, time.perf_counter()
    parts = [records.load(ExperimentRecord, each) for each in asked.join]
    with Bars(), steps(asked, out, records.plain(chosen), asked.n, [each.name for each in found]):
        if parts:
            for part in parts:
                check_part(part, chosen, asked.n)
            record = concluded(chosen, found, judging, *joined(parts, [each.name for each in found]))
        else:
            record = unsleep.experiment(chosen, found, judging)
        if asked.part:
            records.save(record, asked.part)
            return
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
            "judged_on": sorted({each.provenance["machine"]["accelerator"] for each in parts}),
            "minutes": None if parts else round((time.perf_counter() - began) / 60, 1),
            "peak_memory_mb": peak_memory_mb(),
            "findings": [asdict(each) for each in record.findings],
            "means": means(record),
        },
    )
    for each in record.findings:
        print(f"{name}, {each.label}: {each.question} {each.words}", flush=True)


if __name__ == "__main__":
    main()
