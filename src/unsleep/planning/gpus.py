"""GPUs by name: memory, bandwidth and throughput from `gpus.toml`, each with its source; prices that the user gives."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from unsleep.base import records
from unsleep.base.records import Positive
from unsleep.core import BadInput

GIB = 2**30

DEFAULT = ("T4", "A10", "A40", "A100", "H100")
"""GPUs that are planned for unless others are named."""


@dataclass(frozen=True)
class Gpu:
    """A GPU."""

    memory: Positive
    """GiB that PyTorch can allocate from."""
    bandwidth: Positive
    """Memory bandwidth, GB/s."""
    half: Positive
    """Dense 16-bit tensor throughput, TFLOPS."""
    single: Positive
    """float32 throughput, TFLOPS."""
    bfloat16: bool
    """True if the tensor cores multiply in bfloat16; otherwise `half` is that of float16."""
    datasheet: str
    """Source of bandwidth and throughput."""
    capacity: str
    """Source of `memory`."""

    @property
    def bytes(self) -> int:
        """Memory in bytes."""
        return round(self.memory * GIB)

    def flops(self, itemsize: int) -> float:
        """FLOP/s of matrix products on numbers of `itemsize` bytes."""
        return 1e12 * (self.half if itemsize <= 2 else self.single)


@cache
def known() -> dict[str, Gpu]:
    """Every GPU of the table by name, smallest first."""
    table = tomllib.loads(files("unsleep.planning").joinpath("gpus.toml").read_text(encoding="utf-8"))
    return {name: records.parsed(Gpu, row, f"gpus.toml: {name}") for name, row in table.items()}


def named(names: Sequence[str]) -> dict[str, Gpu]:
    """GPUs by name, in any case, or by one text with commas, in the given order; `BadInput` for an unknown one."""
    spelled = {name.lower(): name for name in known()}
    names = names.split(",") if isinstance(names, str) else names
    found: dict[str, Gpu] = {}
    for name in names:
        if name.lower() not in spelled:
            raise BadInput.of("gpu", name, f"one of {', '.join(known())}")
        found[spelled[name.lower()]] = known()[spelled[name.lower()]]
    if not found:
        raise BadInput.of("gpu", "", f"at least one of {', '.join(known())}")
    return found


def priced(prices: Mapping[str, float], gpus: Mapping[str, Gpu]) -> dict[str, float]:
    """Prices per hour by the GPU's name; raises `BadInput` for a GPU that is not planned for, and a negative price."""
    spelled = {name.lower(): name for name in gpus}
    for name, price in prices.items():
        if name.lower() not in spelled:
            raise BadInput.of("price", name, f"one of the GPUs that are planned for, {', '.join(gpus)} (--gpu)")
        if not 0 <= price < records.LARGEST:
            raise BadInput.of("price", price, f"an amount per hour of {name}, at least 0")
    return {spelled[name.lower()]: float(price) for name, price in prices.items()}
