"""Fills the recorded blocks of the documentation from benchmarks/results, and draws its figures.

A block is what stands between `<!-- recorded: NAME -->` and `<!-- end -->`; no figure in it is typed. Blocks of a
record that is missing say so.

    python benchmarks/documents.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import audit_tables
import circuit_tables
import preference_tables
import recorded_tables
import recorded_times
import repair_tables
from common import RESULTS
from recorded_figures import FIGURES

from unsleep.experiments.experiment import experiments

ROOT = Path(__file__).parents[1]
DOCS, IMAGES = ROOT / "docs", ROOT / "docs" / "img"
BLOCK = re.compile(r"(<!-- recorded: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MISSING = "*Not recorded yet: {}.*\n"

Record = Mapping[str, Any]


def read(name: str) -> Record | None:
    """A record of results, else of the same on a GPU, or `None`."""
    for path in (RESULTS / f"{name}.json", RESULTS / f"{name}_cuda.json"):
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    return None


def joined(lines: Sequence[str]) -> str:
    """The lines of a table."""
    return "\n".join(lines) + "\n"


BLOCKS: dict[str, tuple[str, Callable[[Record], str]]] = {
    "repairs": ("repair", lambda r: joined(repair_tables.repairs(r["organisms"]))),
    "baselines": ("repair", lambda r: joined(repair_tables.baselines(r["organisms"]))),
    "wins": ("repair", lambda r: joined(repair_tables.wins(r["organisms"]))),
    "setting": ("circuit_nodes", circuit_tables.setting),
    "roles": ("circuit_nodes", circuit_tables.roles),
    "drawing": ("circuit_nodes", circuit_tables.drawing),
    "trigger": ("circuit_nodes", lambda r: circuit_tables.features(r, lambda role: role == "trigger")),
    "header": ("circuit_nodes", lambda r: circuit_tables.features(r, lambda role: role == "header")),
    "payload": (
        "circuit_nodes",
        lambda r: circuit_tables.features(r, lambda role: role.startswith(("begun", "payload"))),
    ),
    "certain": ("circuit", circuit_tables.certain),
    "faithfulness": ("circuit", circuit_tables.faithfulness),
    "veto": ("circuit", circuit_tables.veto),
    "cost": ("circuit", circuit_tables.cost),
    "plan": ("plan", recorded_tables.plan),
    "plan_cuda": ("plan_cuda", recorded_tables.plan),
    "zoo": ("zoo", recorded_tables.zoo),
    "audits_small": ("audits_small", audit_tables.audits),
    "audits_smollm2_135m": ("audits_smollm2_135m", audit_tables.audits),
    "audit_growth": ("audit_growth", audit_tables.growth),
    "explanations": ("explanations", recorded_tables.explanations),
    "classes": ("classes", recorded_tables.classes),
    "causes": ("classes", recorded_tables.causes),
    "reward_models": ("preference", preference_tables.reward_models),
    "policies": ("preference", preference_tables.policies),
    "merges": ("merge", preference_tables.merges),
    "rewarded": ("rewarded", recorded_tables.rewarded),
    "mixtures": ("mixture", recorded_tables.mixtures),
    **{name: (f"experiment_{name}", recorded_tables.experiment) for name in experiments()},
    "took": ("circuit", recorded_times.circuits),
    "read": ("explanations_100k", recorded_times.statistics),
    "classified": ("circuit", recorded_times.attribution),
    "proved": ("circuit", recorded_times.proofs),
    "growth": ("circuit_growth", circuit_tables.growth),
}
"""Block → the record that it is from, and its text."""


def filled(text: str) -> str:
    """A document with its blocks as recorded."""

    def one(match: re.Match[str]) -> str:
        name, write = BLOCKS[match[2]]
        record = read(name)
        inside = MISSING.format(f"`benchmarks/results/{name}.json`") if record is None else write(record)
        return f"{match[1]}\n{inside}\n{match[3]}"

    return BLOCK.sub(one, text)


def blocks(text: str) -> list[str]:
    """Names of a document's blocks."""
    return [match[2] for match in BLOCK.finditer(text)]


def main() -> None:
    """Fill and draw, or tell what is not as recorded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="Change nothing, and fail where a block is not as recorded."
    )
    asked = parser.parse_args()
    stale: list[str] = []
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if filled(text) != text:
            stale.append(path.name)
            if not asked.check:
                path.write_text(filled(text), encoding="utf-8")
    for name, (record, draw) in FIGURES.items():
        known = read(record)
        if known is not None and not asked.check:
            draw(known, IMAGES / name)
        if known is None:
            print(f"docs/img/{name}: benchmarks/results/{record}.json is missing")
    print(f"{'stale' if asked.check else 'filled'}: {', '.join(stale) or 'nothing'}")
    if asked.check and stale:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
