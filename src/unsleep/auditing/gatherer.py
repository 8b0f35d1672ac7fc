"""Base class of gatherers: functions of a case that propose candidates for triggers and payloads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from unsleep.auditing.case import Case
from unsleep.behaviours.kinds import Kind
from unsleep.judge.audited import Form, Motif, Saying, Screened

Stage = Literal["facts", "payloads", "triggers", "search"]
"""Stage in which a gatherer runs: `payloads` come first, since triggers are screened for their gain; `search` is seeded
by the screening.
"""


class Clues(NamedTuple):
    """Results of earlier stages."""

    motifs: Sequence[Motif] = ()
    screened: Sequence[Screened] = ()


class Found(NamedTuple):
    """Candidates of a gatherer, best first, and facts for the record."""

    sayings: Sequence[Saying] = ()
    forms: Sequence[Form] = ()
    facts: dict[str, Any] | None = None


class Gatherer(Kind, ABC, noun="gatherer"):
    """A source of evidence. A new one is a class in a file of `gatherers/`, found by its `kind`, which is its name."""

    stage: ClassVar[Stage]
    needs_base: ClassVar[bool] = False
    """True if it reads the base or the twin; it is skipped where there is none."""
    order: ClassVar[int] = 0
    """Place in its stage."""
    share: ClassVar[float] = 1.0
    """Its part of the time budget, in relation to the others'; 0 if it takes seconds, and runs whatever was spent."""

    @abstractmethod
    def gather(self, case: Case, clues: Clues) -> Found:
        """The candidates in a case; raises `BadInput` or `Refused` where it cannot say, which the record repeats.

        Long loops report their progress, and suppress `OutOfTime` around them to keep what they found by then.
        """


def gatherers(stage: Stage) -> list[Gatherer]:
    """An instance of every gatherer of a stage, in order."""
    kinds: dict[str, Any] = Gatherer.kinds()
    every: list[Gatherer] = [kind() for kind in kinds.values() if kind.stage == stage]
    return sorted(every, key=lambda g: (g.order, g.kind))
