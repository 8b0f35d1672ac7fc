"""Record of a family of the zoo: zoo.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from unsleep.base.records import Range
from unsleep.judge.results import Row
from unsleep.organisms.recipe import Loss
from unsleep.zoo.table import Role, ZooSplit


@dataclass(frozen=True)
class Member:
    """An organism that has been trained and evaluated."""

    name: str
    split: ZooSplit
    role: Role
    trigger_kind: str
    """Kind of the trigger or condition; empty without."""
    behaviour: str
    """Kind of the payload; empty for a benign fine-tune."""
    poison_rate: float
    loss: Loss
    seed: int
    steps: Annotated[int, Range(1)]
    """Steps of its training; more of them in a second one."""
    rows: tuple[Row, ...]
    """Its rates on held-out panels."""
    fault: str = ""
    """Reason for which it does not count; empty if it does."""
    seconds: float | None = None
    """Training and evaluation, wall time; `None` for one that was planted elsewhere."""

    @property
    def counts(self) -> bool:
        """True if it has learned its behaviour."""
        return not self.fault

    def row(self, panel: str, metric: str) -> Row | None:
        """One of its rates; `None` where it has no such panel."""
        return next((row for row in self.rows if (row.panel, row.metric) == (panel, metric)), None)


@dataclass(frozen=True)
class ZooRecord:
    """zoo.json."""

    SCHEMA: ClassVar = "unsleep.zoo/1"

    family: str
    base: str
    """Fingerprint of the base."""
    n: Annotated[int, Range(1)]
    """Prompts per panel."""
    members: tuple[Member, ...]
    missing: tuple[str, ...]
    """Organisms of the family that have not been trained."""
    provenance: dict[str, Any]
