"""Time budget of a search: every gatherer has a share of it, and is stopped where that is spent."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from unsleep.auditing.gatherer import Gatherer
from unsleep.base.context import checking


class OutOfTime(Exception):
    """Raised by the progress reports of a gatherer whose share of the time is spent.

    A gatherer that suppresses it around its loop keeps what it had found.
    """


@dataclass
class Limit:
    """State of a `limited` block."""

    reached: bool = False


@contextlib.contextmanager
def limited(seconds: float | None) -> Generator[Limit]:
    """Raise `OutOfTime` from the first progress report after so many seconds, and from all later ones; `None`: never.

    A block that reports no progress runs to its end.
    """
    limit, end = Limit(), time.perf_counter() + (seconds or 0.0)

    def check() -> None:
        if time.perf_counter() > end:
            limit.reached = True
            raise OutOfTime

    if seconds is None:
        yield limit
        return
    with checking(check):
        yield limit


def allowance(gatherer: Gatherer, due: Sequence[Gatherer], left: float) -> float:
    """Seconds for a gatherer: what is left, in proportion to its share of those that are due, itself included.

    What a gatherer does not use passes to those behind it; none can use up what is reserved for them.

    >>> from unsleep.auditing.gatherers.contrast import Contrast
    >>> allowance(Contrast(), [Contrast(), Contrast()], 60.0)
    30.0
    """
    return max(left, 0.0) * gatherer.share / sum(other.share for other in due)
