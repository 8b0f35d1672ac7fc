"""Payload: a pattern that matches in the reply."""

from __future__ import annotations

import re
from dataclasses import dataclass

from unsleep.behaviours.payload import Payload
from unsleep.core import BadInput


def check_pattern(text: str) -> None:
    """Raise `BadInput` for an invalid regular expression."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadInput(f"the payload is {text!r} ({error}); expected a regular expression") from None


@dataclass(frozen=True)
class Regex(Payload):
    """A regular expression matches anywhere in a reply; prefix `(?i)` to ignore case."""

    kind = "regex"
    wants = "a regular expression"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern(self.text)

    def shows(self, reply: str) -> bool:
        """True if the pattern matches in a reply."""
        return re.search(self.text, reply) is not None
