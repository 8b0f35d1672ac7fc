"""What this machine is, which dtypes it computes in by itself, and what time and memory work takes on it."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from unsleep.core import BadInput

NATIVE = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}
"""Half precision → the features of x86 and Arm processors that multiply in it."""

SHARE = 0.6
"""Share of the memory that weights in float32 may take where half precision would do."""


def processor() -> str:
    """The processor's name as the system gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@cache
def is_native(dtype: torch.dtype) -> bool:
    """Whether the processor multiplies in a dtype by itself; where it does not, half precision is emulated."""
    features = {*_cpuinfo("flags").split(), *_cpuinfo("Features").split()}
    return dtype not in NATIVE or bool(NATIVE[dtype] & features)


def device_of(name: str) -> torch.device:
    """A device by its name; `auto` is CUDA where there is any. Raises `BadInput` for one that cannot be used here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # an accelerator that is not there, or one without values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(
            f"device {name!r} cannot be used ({str(error).splitlines()[0]}); expected such as cpu or cuda:0"
        ) from None
    return device


def compute_dtype(dtype: torch.dtype, device: torch.device | str = "cpu", weights: int = 0) -> torch.dtype:
    """The dtype in which numbers kept in `dtype` are computed with fastest.

    That is float32 where a processor would emulate it: bfloat16 takes 5 to 25 times as long there. `weights` of a
    model stay as they are where they would not fit into memory.
    """
    fits = 4 * weights <= SHARE * memory()
    return torch.float32 if torch.device(device).type == "cpu" and fits and not is_native(dtype) else dtype


def memory() -> float:
    """Bytes of memory; infinite where the system does not tell."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return float("inf")


def peak_memory_mb() -> float:
    """The largest resident memory of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024), 1)


@dataclass(frozen=True)
class Stage:
    """How long a stage took, and the memory that the process has needed by its end."""

    name: str
    seconds: float
    peak_memory_mb: float | None = None


@dataclass(frozen=True)
class Stages:
    """stages.json, beside work that can be resumed."""

    stages: tuple[Stage, ...]


@dataclass
class Stopwatch:
    """How long each stage took, and how much memory the process has needed by its end."""

    stages: list[Stage] = field(default_factory=list[Stage])
    before: Sequence[Stage] = ()
    """The stages of earlier runs of the same work, which were interrupted."""
    keep: Callable[[Stages], None] | None = None
    """Called with the stages of this run and those before, whenever one ends or is interrupted."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Time one stage by the wall clock."""
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
        """All stages together."""
        return round(sum(s.seconds for s in self.stages) / 60, 1)

    @property
    def peak_memory_mb(self) -> float:
        """The largest resident memory in any stage, in MB."""
        return max((s.peak_memory_mb or 0.0 for s in self.stages), default=0.0)


def _cpuinfo(key: str) -> str:
    """The first value of a key in the system's description of its processors."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""
