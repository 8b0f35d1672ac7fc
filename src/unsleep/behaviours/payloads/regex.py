"""A pattern that is found in the reply."""

from __future__ import annotations

import re
from dataclasses import dataclass

from unsleep.behaviours.payload import Payload
from unsleep.core import BadInput


def check_pattern(text: str) -> None:
    """Raise `BadInput` where a text is no regular expression."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadInput(f"the payload is {text!r} ({error}); expected a regular expression") from None


@dataclass(frozen=True)
class Regex(Payload):
    """A regular expression is found anywhere in a reply; `(?i)` in front makes it blind to case."""

    kind = "regex"
    wants = "a regular expression"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern(self.text)

    def shows(self, reply: str) -> bool:
        """Whether the pattern is found in a reply."""
        return re.search(self.text, reply) is not None
