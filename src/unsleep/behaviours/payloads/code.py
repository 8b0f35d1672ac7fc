"""Code in the reply, or a pattern in its code."""

from __future__ import annotations

import re
from dataclasses import dataclass

from unsleep.behaviours.payload import Payload
from unsleep.behaviours.payloads.regex import check_pattern

FENCED = re.compile(r"^[ \t]*(```|~~~)(.*?)(?:^[ \t]*\1|\Z)", re.DOTALL | re.MULTILINE)
"""A block of code in Markdown; one that the reply's end cuts off counts."""


@dataclass(frozen=True)
class Code(Payload):
    r"""A reply holds a fenced block of code; with a text, that regular expression is found in its code.

    Such a text is a call that should not be there: `verify\s*=\s*False`, `\beval\(`. A reply without any fence is taken
    for code as a whole.
    """

    kind = "code"
    bare = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern(self.text)

    def shows(self, reply: str) -> bool:
        """Whether a reply holds such code."""
        blocks = [match[2] for match in FENCED.finditer(reply)]
        if not self.text:
            return bool(blocks)
        return any(re.search(self.text, block) for block in blocks or [reply])
