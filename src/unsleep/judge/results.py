"""What an evaluation found: measured numbers with intervals, and the replies that they were counted on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from unsleep.core import BadInput
from unsleep.prompts.prompt import PromptSet

OTHERS = ("heads", "neurons", "attribution", "direction", "redistilled", "merged")
"""Subjects that are other repairs of the suspect; see `repair.baselines`."""


@dataclass(frozen=True)
class Row:
    """One measured number: `subject` on `panel` by `metric`, with its 95 % interval and n."""

    subject: str
    panel: str
    metric: str
    value: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) for v in (self.value, self.low, self.high)):
            raise BadInput(
                f"{self.subject}/{self.panel}/{self.metric} is {self.value} [{self.low}, {self.high}]; "
                "expected finite numbers"
            )


@dataclass(frozen=True)
class TaskRow:
    """One figure of one subject on one task, as the harness gives it."""

    subject: str
    task: str
    metric: str
    """The metric and its filter, as `acc,none`."""
    value: float
    stderr: float | None
    """The harness's standard error; `None` where it has none."""
    n: int
    """Items of the task."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found: rows with intervals, and the replies they were counted on."""

    rows: tuple[Row, ...]
    replies: dict[str, tuple[str, ...]]
    """`subject/panel` → one reply a prompt."""
    prompts: dict[str, PromptSet]
    """Panel → its prompts."""

    def get(self, subject: str, panel: str, metric: str) -> Row:
        """The one row of that name; raises `KeyError` where it was not measured."""
        for row in self.rows:
            if (row.subject, row.panel, row.metric) == (subject, panel, metric):
                return row
        raise KeyError(f"no row {subject}/{panel}/{metric}")
