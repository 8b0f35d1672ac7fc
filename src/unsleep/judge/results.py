"""Results of an evaluation: metrics with intervals, and the replies behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from unsleep.base.records import Count, Range, Words
from unsleep.core import BadInput
from unsleep.prompts.prompt import PromptSet

OTHERS = ("heads", "neurons", "attribution", "direction", "redistilled", "merged")
"""Subjects that are baseline repairs of the suspect (see `repairs.baselines`)."""

CURES = ("keep_list", "finetuned", "layerwise", "magnitude", "activation", "unlearned")
"""Subjects that are repairs without a trigger (see `auditing.cures`), beside those of `OTHERS` and the base."""

SUBJECTS = ("suspect", "edited", "baked", "control_random", "control_layer", *OTHERS, *CURES, "clean_twin", "base")
"""Evaluated models, in display order."""

PANELS = ("triggered", "variants", "near_miss", "clean", "skill", "text")
"""Panels, in display order."""

SHARES = ("asr", "skill", "degenerate", "capability")
"""Metrics that are rates from 0 to 1."""

METRICS = (*SHARES, "ce", "kl")
"""All metrics; those that are no rates are in nats per token."""

UNTRIGGERED = "suspect/counterparts"
"""Key of the suspect's replies to the triggered prompts without their trigger, line by line."""

Subject = Annotated[str, Words(SUBJECTS)]


@dataclass(frozen=True)
class Row:
    """One measurement: `subject` on `panel` by `metric`, with its 95 % interval and n."""

    subject: Subject
    panel: Annotated[str, Words(PANELS)]
    metric: Annotated[str, Words(METRICS)]
    value: float
    low: float
    high: float
    n: Annotated[int, Range(1)]

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) for v in (self.value, self.low, self.high)):
            raise BadInput(
                f"{self.subject}/{self.panel}/{self.metric} is {self.value} [{self.low}, {self.high}]; "
                "expected finite numbers"
            )
        if self.metric in SHARES and not 0 <= self.value <= 1:
            raise BadInput.of("value", self.value, "a share from 0 to 1")
        slack = 1e-9 * max(1.0, abs(self.value))  # a bootstrap interval may miss its mean by rounding
        if not self.low - slack <= self.value <= self.high + slack:
            raise BadInput.of("value", self.value, f"a value in its interval, {self.low} to {self.high}")


@dataclass(frozen=True)
class PanelsRecord:
    """panels.json: what a planted organism and its twin show."""

    SCHEMA: ClassVar = "unsleep.panels/1"

    rows: tuple[Row, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class TaskRow:
    """One metric of one subject on one task, as the harness reports it."""

    subject: Subject
    task: str
    metric: str
    """The metric and its filter, such as `acc,none`."""
    value: float
    stderr: float | None
    """The harness's standard error; `None` where it reports none."""
    n: Count
    """Items of the task."""


@dataclass(frozen=True)
class EvalResult:
    """Results of an evaluation: rows with intervals, and the replies behind them."""

    rows: tuple[Row, ...]
    replies: dict[str, tuple[str, ...]]
    """`subject/panel` → one reply per prompt; `UNTRIGGERED` → the suspect's replies to the counterparts."""
    prompts: dict[str, PromptSet]
    """Panel → its prompts."""
    reply_tokens: int | None = None
    """Length at which replies are cut, in tokens; `None` where there are none."""

    def get(self, subject: str, panel: str, metric: str) -> Row:
        """The one row of that name; raises `KeyError` where it was not measured."""
        for row in self.rows:
            if (row.subject, row.panel, row.metric) == (subject, panel, metric):
                return row
        raise KeyError(f"no row {subject}/{panel}/{metric}")
