"""The tables of docs/repair.md from benchmarks/results/repair.json.

python benchmarks/repair_tables.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "repair.json"

OTHERS = {
    "heads": "mask over heads",
    "neurons": "mask over MLP neurons",
    "attribution": "ablation by attribution",
    "direction": "one direction",
    "redistilled": "re-distilled base",
    "merged": "merge with the base",
}

Figures = dict[tuple[str, str, str], float]


def figures_of(row: dict[str, Any]) -> Figures:
    """Values by subject, panel and metric."""
    return {(r["subject"], r["panel"], r["metric"]): r["value"] for r in row["rows"]}


def share(value: float | None) -> str:
    """A share with as many digits as 200 prompts give."""
    return "–" if value is None else f"{value:.3f}".rstrip("0").rstrip(".") if value else "0"


def pair(f: Figures, panel: str, metric: str) -> str:
    """Edited and exported."""
    return " / ".join(share(f.get((subject, panel, metric))) for subject in ("edited", "baked"))


def ce(f: Figures, subject: str) -> str:
    """Nats above the suspect's on text; the export's where there is one."""
    value = f.get((subject, "text", "ce"))
    return "–" if value is None else f"{value - f['suspect', 'text', 'ce']:+.3f}"


def repairs(organisms: dict[str, Any]) -> list[str]:
    """One line an organism: what the edit and its export do."""
    lines = [
        "| organism | payload, suspect | edited / exported | random control | skill, edited / exported "
        "(without trigger) | KL, clean replies | CE on text | minutes | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in organisms.items():
        f = figures_of(row)
        clean = share(f.get(("suspect", "clean", "skill")))
        control = share(f.get(("control_random", "triggered", "asr")))
        lines.append(
            f"| `{name}` | {share(f['suspect', 'triggered', 'asr'])} | {pair(f, 'triggered', 'asr')} | {control} | "
            f"{pair(f, 'triggered', 'skill')} ({clean}) | {pair(f, 'clean', 'kl')} | "
            f"{ce(f, 'edited')} / {ce(f, 'baked')} | {row['minutes']:g} | {row['peak_memory_mb'] / 1000:.1f} GB |"
        )
    return lines


def baselines(organisms: dict[str, Any]) -> list[str]:
    """One line an organism: payload left, skill and KL of the edit and of every other repair."""
    known = {name: row for name, row in organisms.items() if row["baselines"]}
    if not known:
        return []
    lines = [f"| organism | edit | {' | '.join(OTHERS.values())} |", "|---" * (len(OTHERS) + 2) + "|"]
    for name, row in known.items():
        f = figures_of(row)
        cells = [
            f"{share(f[s, 'triggered', 'asr'])} · {share(f.get((s, 'triggered', 'skill')))} · "
            f"{share(f.get((s, 'clean', 'kl')))}"
            if (s, "triggered", "asr") in f
            else "–"
            for s in ("edited", *OTHERS)
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print both tables."""
    organisms = json.loads(RESULTS.read_text())["organisms"]
    sys.stdout.write("\n".join([*repairs(organisms), "", *baselines(organisms), ""]))


if __name__ == "__main__":
    main()
