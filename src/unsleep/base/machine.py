"""Properties of this machine: processor, native dtypes, memory; wall-clock and memory measurement of stages."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from functools import cache
from pathlib import Path

import torch

from unsleep.core import BadInput

NATIVE = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}
"""Half-precision dtype → CPU flags (x86 and Arm) of native matrix multiplication in it."""

SHARE = 0.6
"""Share of memory that weights may take in float32 where half precision is emulated."""


def processor() -> str:
    """The processor's name as the operating system reports it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@cache
def is_native(dtype: torch.dtype) -> bool:
    """True if the processor multiplies natively in a dtype; otherwise half precision is emulated."""
    features = {*_cpuinfo("flags").split(), *_cpuinfo("Features").split()}
    return dtype not in NATIVE or bool(NATIVE[dtype] & features)


def device_of(name: str) -> torch.device:
    """A torch device by name; `auto` is CUDA where available. Raises `BadInput` for an unusable device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails for an absent accelerator and for `meta`
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(
            f"device {name!r} cannot be used ({str(error).splitlines()[0]}); expected such as cpu or cuda:0"
        ) from None
    return device


def compute_dtype(dtype: torch.dtype, device: torch.device | str = "cpu", weights: int = 0) -> torch.dtype:
    """The dtype in which computing with values stored in `dtype` is fastest.

    float32 where the processor would emulate it: bfloat16 takes 5 to 25 times as long there. `weights` (a count of
    parameters) keep their dtype where float32 would not fit into memory.
    """
    fits = 4 * weights <= SHARE * memory()
    return torch.float32 if torch.device(device).type == "cpu" and fits and not is_native(dtype) else dtype


def memory() -> float:
    """Physical memory in bytes; infinite where the system does not report it."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return float("inf")


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024), 1)


def _cpuinfo(key: str) -> str:
    """The first value of a key in /proc/cpuinfo."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""
