"""Console output: progress on stderr, results on stdout, model text escaped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from unsleep.base import store
from unsleep.base.context import reporting
from unsleep.base.records import plain
from unsleep.judge.results import EvalResult
from unsleep.judge.verdict import ENOUGH, POWER, contract, verdict
from unsleep.pages.text import visible


class Bars:
    """Progress display: a bar per stage with the remaining time; plain lines where stderr is a file."""

    def __enter__(self) -> None:
        self._said = 0.0
        self._ended = False
        self._stage = ""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._progress.start()
        self._told = reporting(self._show if console.is_terminal else self._write)
        self._told.__enter__()

    def _show(self, stage: str, done: int, total: int) -> None:
        """Update the stage's bar; behind a comma, its name may hold a changing figure."""
        name, text = stage.partition(",")[0], escape(visible_line(stage))
        if name != self._stage:
            self._stage, self._task = name, self._progress.add_task(text, total=total)
        self._progress.update(self._task, completed=done, total=total, description=text)

    def _write(self, stage: str, done: int, total: int) -> None:
        """Print a line when a stage begins, once when it ends, and every 30 seconds, where stderr is a file."""
        name, now = stage.partition(",")[0], time.monotonic()
        if name != self._stage:
            self._stage, self._began = name, now
        elif self._ended if done >= total else now - self._said < 30:
            return
        self._said, self._ended = now, done >= total
        spent = now - self._began
        left = f", about {spent / done * (total - done):.0f} s left" if spent > 1 and 0 < done < total else ""
        sys.stderr.write(f"{visible_line(stage)}: {done} of {total}{left}\n")

    def __exit__(self, *exc: object) -> None:
        self._told.__exit__(None, None, None)
        self._progress.stop()


def visible_line(text: str) -> str:
    """Model text on one terminal line, with visible control characters and line breaks."""
    return visible(text.replace("\n", "⏎").replace("\t", "⇥"))


def say(value: Any, as_json: bool, words: str) -> None:
    """Print a result, a record or not: JSON for programs, in ASCII; words for people. Neither can move the cursor."""
    sys.stdout.write((json.dumps(plain(value), default=str) if as_json else visible(words)) + "\n")


def hint(words: str) -> None:
    """Print a note on stderr."""
    sys.stderr.write(f"Note: {visible(words)}\n")


def fail(error: object, code: int) -> int:
    """Print an error on stderr; returns the exit code."""
    sys.stderr.write(f"unsleep: {visible(str(error))}\n")
    return code


def say_result(result: EvalResult, out: Path, as_json: bool) -> None:
    """Print a verdict, its contract and the rows behind it."""
    checks = contract(result)
    label, score = verdict(result, checks)
    lines = [table(result, ("suspect", "edited", "baked", "control_random", "control_layer", "clean_twin", "base")), ""]
    rows = {(r.subject, r.panel, r.metric): r for r in result.rows}
    for c in checks:
        row = rows[c.subject, c.panel, c.metric]
        interval = f"[{row.low:.4f}, {row.high:.4f}], n {row.n}"
        outcome = "TOO FEW" if c.too_few else "met" if c.met else "NOT MET"
        lines.append(f"{outcome:<7}  {c.text}: {c.value:.4f} {c.relation} {c.bound:.4f}  {interval}")
    if any(c.too_few for c in checks):
        lines.append(
            f"TOO FEW: the interval's upper end is above {POWER}; at least {ENOUGH} prompts without the payload are "
            "needed"
        )
    if any(c.met and not c.too_few for c in checks):
        lines.append("met: the measured value meets the bound; its interval, in brackets, may reach beyond it")
    lines += ["", f"{label} (score {score:.2f}). Report: {out / 'report.html'}"]
    if (cleaned := out / "cleaned").is_dir():
        lines.append(f"Checkpoint: {cleaned}, which plain transformers load")
    say(store.read_json(out / "result.json"), as_json, "\n".join(lines))


def table(result: EvalResult, subjects: Sequence[str]) -> str:
    """Text table: a row per panel and metric, a column per subject."""
    have = [s for s in subjects if any(r.subject == s for r in result.rows)]
    found = {(r.panel, r.metric, r.subject): r.value for r in result.rows}
    keys = list(dict.fromkeys((r.panel, r.metric) for r in result.rows))
    lines = [f"{'panel':<10} {'metric':<11}" + "".join(f"{s:>15}" for s in have)]
    for panel, metric in keys:
        values = (found.get((panel, metric, s)) for s in have)
        lines.append(f"{panel:<10} {metric:<11}" + "".join(f"{'–' if v is None else f'{v:.3f}':>15}" for v in values))
    return "\n".join(lines)
