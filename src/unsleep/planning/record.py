"""Record of a plan, plan.json: memory of every task and shape of a batch, and its fit, time and cost on every GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from unsleep.base.records import Count, Positive
from unsleep.planning.config import PlanConfig, Task
from unsleep.planning.gpus import Gpu

Verdict = Literal["fits", "close", "no"]

MARGIN = 0.1
"""Share of a GPU's memory within which a plan does not say whether a task fits."""


@dataclass(frozen=True)
class Memory:
    """Memory of a task in bytes. The parts are not all alive at once, so that their sum is above the peak."""

    weights: Count
    """All weights held, trained or not."""
    gradients: Count
    optimizer: Count
    """State of the optimizer, with master weights."""
    activations: Count
    """Kept by the blocks for the backward pass; of a harvest, the activations at its Sites."""
    logits: Count
    """Most that logits and loss take."""
    cache: Count
    """Keys and values of an audit's rows at the end of their replies."""
    peak: Count
    phase: str
    """Phase of the step with the peak."""


@dataclass(frozen=True)
class Fit:
    """A task on a GPU."""

    verdict: Verdict
    """`close` within a tenth of the GPU's memory, in either direction."""
    margin: float
    """Share of the GPU's memory that is left; negative where it is too small."""
    gpus: Count
    """GPUs that would hold it if it could be divided evenly among them."""
    hours: Positive
    """GPU-hours for all tokens of the plan."""
    cost: Positive | None = None
    """Their price, in the currency of the price per hour."""


@dataclass(frozen=True)
class Cell:
    """A task with one shape of a batch."""

    task: Task
    memory: Memory
    teraflops: Positive
    """Floating-point operations per step, in units of 10¹²."""
    fits: dict[str, Fit]
    """GPU → fit."""
    length: Count | None = None
    """Tokens per row; `None` for a dictionary."""
    batch: Count | None = None
    """Rows per step; of a dictionary, tokens."""
    checkpointed: bool | None = None
    """True if blocks are checkpointed; `None` where there is no backward pass through them."""


@dataclass(frozen=True)
class PlannedModel:
    """The model that is planned for."""

    name: str
    commit: str | None
    kind: str
    """Model type of its config."""
    parameters: Count
    blocks: Count
    width: Count
    vocabulary: Count
    dtype: str


@dataclass(frozen=True)
class PlanRecord:
    """plan.json."""

    SCHEMA: ClassVar = "unsleep.plan/1"

    model: PlannedModel
    gpus: dict[str, Gpu]
    prices: dict[str, Positive]
    """GPU → price per hour."""
    settings: PlanConfig
    cells: tuple[Cell, ...]
    provenance: dict[str, Any]

    def cell(
        self, task: Task, length: int | None = None, batch: int | None = None, checkpointed: bool | None = None
    ) -> Cell:
        """The first cell of a task with the given shape; raises `KeyError` where there is none."""
        wanted = {"length": length, "batch": batch, "checkpointed": checkpointed}
        for cell in self.cells:
            if cell.task == task and all(v is None or getattr(cell, k) == v for k, v in wanted.items()):
                return cell
        raise KeyError(f"{task} with {wanted}")
