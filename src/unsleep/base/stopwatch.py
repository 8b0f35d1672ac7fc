"""Wall-clock time and peak memory by stage, kept in a file, so that resumed work counts all of its runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unsleep.base import records
from unsleep.base.machine import peak_memory_mb


@dataclass(frozen=True)
class Stage:
    """Duration of a stage, and the peak memory of the process at its end."""

    name: str
    seconds: float
    peak_memory_mb: float | None = None


@dataclass(frozen=True)
class Stages:
    """stages.json, beside work that can be resumed."""

    stages: tuple[Stage, ...]


@dataclass
class Stopwatch:
    """Wall-clock time of each stage, and peak memory of the process at its end."""

    stages: list[Stage] = field(default_factory=list[Stage])
    before: Sequence[Stage] = ()
    """The stages of earlier, interrupted runs of the same work."""
    keep: Callable[[Stages], None] | None = None
    """Called with all stages, of this run and earlier ones, whenever a stage ends or is interrupted."""

    @classmethod
    def kept_in(cls, path: Path) -> Stopwatch:
        """A stopwatch whose stages are kept in a file; one of interrupted work goes on from there."""
        before = records.load(Stages, path).stages if path.is_file() else ()
        return cls(before=before, keep=lambda stages: records.save(stages, path))

    @contextlib.contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Measure one stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            earlier = [s for s in self.before if s.name == name]
            seconds = time.perf_counter() - start + sum(s.seconds for s in earlier)
            peak = max(peak_memory_mb(), *(s.peak_memory_mb or 0.0 for s in [*earlier, *self.stages]), 0.0)
            self.stages.append(Stage(name, round(seconds, 2), peak))
            if self.keep is not None:
                done = {s.name for s in self.stages}
                self.keep(Stages((*self.stages, *(s for s in self.before if s.name not in done))))

    @property
    def minutes(self) -> float:
        """Total duration of all stages, in minutes."""
        return round(sum(s.seconds for s in self.stages) / 60, 1)

    @property
    def peak_memory_mb(self) -> float:
        """Peak resident memory over all stages, in MB."""
        return max((s.peak_memory_mb or 0.0 for s in self.stages), default=0.0)
