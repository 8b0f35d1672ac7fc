"""Payload that is detected by a Python function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unsleep.behaviours.payload import Payload
from unsleep.core import BadInput


@dataclass(frozen=True)
class Judged(Payload):
    """A function or classifier decides whether a reply shows the payload; Python API only. The text is its name.

    Resumable steps identify the function by that name alone.
    """

    kind = "callable"
    wants = "the function's name"
    by_name = False

    function: Callable[[str], object] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.function is None:
            raise BadInput(f"the payload {self.text!r} is callable without a function; give one, from Python")

    @property
    def hash(self) -> str:
        """Content identity: the name."""
        return self.words

    def shows(self, reply: str) -> bool:
        """The function's verdict on a reply."""
        assert self.function is not None
        return bool(self.function(reply))
