"""Result of an experiment: arms measured over a setting, replicate by replicate, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from unsleep.base.records import Range
from unsleep.core import BadInput

Kind = Literal["method", "control", "reference", "theory"]
"""A method under study, a control of it, an unchanged model, or a prediction without a measurement."""

Label = Literal["supported", "refuted", "open"]

BROKEN_DEGENERATE = 0.2
"""Share of degenerate clean replies above the suspect's, from which on a model counts as broken."""

BROKEN_CE = 1.0
"""Cross-entropy on plain text above the suspect's, in nats per token, from which on a model counts as broken."""


FEWEST = 3
"""Replicates of a finding that is more than open."""


def label(holds: Sequence[bool]) -> Label:
    """The label of what holds in each replicate or not: supported in all of at least three, refuted otherwise."""
    if len(holds) < FEWEST:
        return "open"
    return "supported" if all(holds) else "refuted"


@dataclass(frozen=True)
class Arm:
    """A curve of an experiment."""

    name: str
    what: str
    """Description in one sentence."""
    kind: Kind = "method"


@dataclass(frozen=True)
class Measure:
    """A metric of an arm at a setting in one replicate, with its 95 % interval over prompts."""

    arm: str
    x: float
    """The setting, on the experiment's axis."""
    replicate: str
    metric: str
    value: float
    low: float
    high: float
    n: Annotated[int, Range(1)]

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) for v in (self.x, self.value, self.low, self.high)):
            raise BadInput(f"{self.metric} of {self.arm} at {self.x} is {self.value}; expected finite numbers")


@dataclass(frozen=True)
class Finding:
    """An answer to a question of the experiment."""

    question: str
    label: Label
    words: str
    """The answer in one or two sentences, with its figures."""


@dataclass(frozen=True)
class ExperimentRecord:
    """experiment.json: what an experiment measured and what follows."""

    SCHEMA: ClassVar = "unsleep.experiment/1"

    name: str
    question: str
    hypothesis: str
    axis: str
    """The setting that is varied, with its unit."""
    arms: tuple[Arm, ...]
    measures: tuple[Measure, ...]
    replicates: tuple[str, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        if len({arm.name for arm in self.arms}) < len(self.arms):
            raise BadInput(f"arms are {[arm.name for arm in self.arms]}; expected distinct names")
        known = {arm.name for arm in self.arms}
        for each in self.measures:
            if each.arm not in known or each.replicate not in self.replicates:
                raise BadInput(
                    f"a measure is of arm {each.arm!r} in {each.replicate!r}, which the record does not list"
                )


@dataclass(frozen=True)
class Curves:
    """The measures of an experiment, by arm, replicate and setting."""

    measures: Sequence[Measure]

    def get(self, arm: str, replicate: str, x: float, metric: str) -> Measure:
        """One measure; raises `KeyError` where it was not made."""
        for each in self.measures:
            if (each.arm, each.replicate, each.x, each.metric) == (arm, replicate, x, metric):
                return each
        raise KeyError(f"no {metric} of {arm} at {x} in {replicate}")

    def settings(self, arm: str) -> list[float]:
        """Settings of an arm that every replicate has, in order."""
        replicates = {each.replicate for each in self.measures if each.arm == arm}
        return sorted(set.intersection(*(self.settings_in(arm, r) for r in replicates))) if replicates else []

    def settings_in(self, arm: str, replicate: str) -> set[float]:
        """Settings of an arm in one replicate."""
        return {each.x for each in self.measures if (each.arm, each.replicate) == (arm, replicate)}

    def mean(self, arm: str, x: float, metric: str, replicates: Sequence[str]) -> float:
        """Mean over replicates."""
        return sum(self.get(arm, r, x, metric).value for r in replicates) / len(replicates)

    def steepest(self, arm: str, replicate: str, metric: str) -> tuple[float, float]:
        """Middle of the interval between two neighbouring settings over which a metric changes most, and the slope."""
        settings = self.settings(arm)
        if len(settings) < 2:
            raise BadInput(f"{arm} has {len(settings)} settings; a slope needs two")
        values = [self.get(arm, replicate, x, metric).value for x in settings]
        slopes = [(b - a) / (y - x) for x, y, a, b in zip(settings, settings[1:], values, values[1:], strict=False)]
        i = max(range(len(slopes)), key=lambda j: abs(slopes[j]))
        return (settings[i] + settings[i + 1]) / 2, slopes[i]

    def broken(self, arm: str, replicate: str, x: float, against: tuple[str, float]) -> bool:
        """True if a model no longer writes: gibberish, or a cross-entropy far above the suspect's.

        `against` is the arm and setting of the unchanged suspect.
        """
        changes = {
            metric: self.get(arm, replicate, x, metric).value
            - self.get(against[0], replicate, against[1], metric).value
            for metric in ("degenerate", "ce")
        }
        return changes["degenerate"] > BROKEN_DEGENERATE or changes["ce"] > BROKEN_CE

    def at_ce(self, arm: str, replicate: str, most: float, against: tuple[str, float]) -> float | None:
        """The setting that costs most cross-entropy within a bound, so that arms are compared at matched cost.

        It is chosen by cross-entropy alone; broken models are left out. `against` is the arm and setting of the
        unchanged suspect, `most` in nats per token. `None` where every setting costs more.
        """
        before = self.get(against[0], replicate, against[1], "ce").value
        costs = {
            x: self.get(arm, replicate, x, "ce").value - before
            for x in sorted(self.settings_in(arm, replicate))
            if not self.broken(arm, replicate, x, against)
        }
        return max((x for x, cost in costs.items() if cost <= most), key=lambda x: costs[x], default=None)

    def left_out(self, replicates: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each replicate with all others: a setting chosen on those is judged on it."""
        for held in replicates:
            yield held, tuple(r for r in replicates if r != held)
