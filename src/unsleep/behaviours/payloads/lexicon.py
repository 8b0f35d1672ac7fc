"""Payload: any of several words or phrases in the reply."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from unsleep.behaviours.payload import Payload
from unsleep.core import BadInput


@dataclass(frozen=True)
class Lexicon(Payload):
    """A reply contains one of several words or phrases, ignoring case and white space, at word boundaries."""

    kind = "lexicon"
    wants = "words or phrases separated by |, or a file with one per line"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.phrases):
            raise BadInput(f"the payload is {self.text!r}, which has an empty phrase; expected {self.wants}")

    @property
    def phrases(self) -> list[str]:
        """The words and phrases, lower-cased and with single spaces."""
        return [" ".join(phrase.lower().split()) for phrase in self.text.split("|")]

    def shows(self, reply: str) -> bool:
        """True if a reply contains one of them."""
        said = " ".join(reply.lower().split())
        return re.search("|".join(map(_whole, self.phrases)), said) is not None

    @classmethod
    def of_text(cls, text: str) -> Lexicon:
        """A lexicon from a file with one phrase per line, or from the text itself where no such file exists."""
        if not text.strip() or not Path(text).is_file():
            return cls(text)
        try:
            lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{text} cannot be read ({error}); expected a text file with one phrase per line") from None
        return cls("|".join(line.strip() for line in lines if line.strip()))


def _whole(phrase: str) -> str:
    """A pattern of a phrase at word boundaries; letters without case may adjoin others of their script."""
    before, after = (
        bound if char.isalnum() and unicodedata.category(char) != "Lo" else ""
        for char, bound in ((phrase[0], r"(?<!\w)"), (phrase[-1], r"(?!\w)"))
    )
    return before + re.escape(phrase) + after
