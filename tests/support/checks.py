"""The type checks that only tests have."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import jaxtyping


@contextlib.contextmanager
def as_in_use() -> Generator[None]:
    """Without the type checks that only tests have: unsleep's own validation speaks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
