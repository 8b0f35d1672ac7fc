"""Limits of calls to a judge, checked before each call, and what was spent."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import NamedTuple

from unsleep.core import BadInput, check_least


class OverLimit(Exception):
    """A call that would exceed a limit."""


class Size(NamedTuple):
    """Size of some calls."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def plus(self, other: Size, sign: int = 1) -> Size:
        """The sum, or the difference with `sign` −1."""
        return Size(*(a + sign * b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Limits:
    """Prices, caps and tries of calls to a judge."""

    price_input: float | None = None
    """Price of a million tokens of questions, in any currency."""
    price_output: float | None = None
    """Price of a million tokens of answers."""
    max_cost: float | None = None
    """Stop before the call that could exceed this cost."""
    max_calls: int | None = None
    """Stop before exceeding this number of calls."""
    tries: int = 5
    """Tries per call, where the endpoint is busy, fails or times out."""
    wait: float = 1.0
    """Seconds before the second try, doubled before each further one; a Retry-After of the endpoint comes first."""

    def __post_init__(self) -> None:
        check_least(self, "", 0, "price_input", "price_output", "max_cost", "max_calls", "wait")
        check_least(self, "", 1, "tries")
        if (self.price_input is None) != (self.price_output is None):
            raise BadInput("one price is given; expected both, --price-input and --price-output, or neither")
        if self.max_cost is not None and self.price_input is None:
            raise BadInput(f"--max-cost {self.max_cost:g} has no prices; pass --price-input and --price-output")

    def cost(self, size: Size) -> float | None:
        """Cost of calls; `None` without prices."""
        if self.price_input is None or self.price_output is None:
            return None
        return (size.input_tokens * self.price_input + size.output_tokens * self.price_output) / 1e6


@dataclass
class Budget:
    """Calls made and in flight, under limits; safe for threads."""

    limits: Limits
    spent: Size = Size()
    held: Size = Size()
    """Upper bound of the calls in flight."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def hold(self, size: Size) -> None:
        """Set calls aside before they are made; raises `OverLimit` where they could exceed a limit."""
        with self._lock:
            total = self.spent.plus(self.held).plus(size)
            cost, most = self.limits.cost(total), self.limits.max_cost
            if most is not None and cost is not None and cost > most:
                raise OverLimit(f"the next call could cost more than --max-cost {most:g} in all")
            if self.limits.max_calls is not None and total.calls > self.limits.max_calls:
                raise OverLimit(f"--max-calls {self.limits.max_calls} is reached")
            self.held = self.held.plus(size)

    def settle(self, held: Size, used: Size) -> None:
        """Replace calls that were set aside by what they used."""
        with self._lock:
            self.held, self.spent = self.held.plus(held, -1), self.spent.plus(used)
