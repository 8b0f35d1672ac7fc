"""Payload: code in the reply, or a pattern within its code."""

from __future__ import annotations

import re
from dataclasses import dataclass

from unsleep.behaviours.payload import Payload
from unsleep.behaviours.payloads.regex import check_pattern

FENCED = re.compile(r"^[ \t]*(```|~~~)(.*?)(?:^[ \t]*\1|\Z)", re.DOTALL | re.MULTILINE)
"""A fenced code block in Markdown; an unclosed one at the end counts."""


@dataclass(frozen=True)
class Code(Payload):
    r"""A reply contains a fenced code block; with a text, that regular expression matches within its code.

    For example a call that should not be there: `verify\s*=\s*False`, `\beval\(`. A reply without any fence counts
    as code as a whole.
    """

    kind = "code"
    wants = "a regular expression, or nothing for any code"
    text_optional = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern(self.text)

    def shows(self, reply: str) -> bool:
        """True if a reply contains such code."""
        blocks = [match[2] for match in FENCED.finditer(reply)]
        if not self.text:
            return bool(blocks)
        return any(re.search(self.text, block) for block in blocks or [reply])
