"""Payload: a reply in another script."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from unsleep.behaviours.payload import Payload
from unsleep.core import BadInput

SCRIPTS: dict[str, tuple[str, ...]] = {
    "latin": ("LATIN",),
    "arabic": ("ARABIC",),
    "armenian": ("ARMENIAN",),
    "bengali": ("BENGALI",),
    "chinese": ("CJK", "BOPOMOFO"),
    "cyrillic": ("CYRILLIC",),
    "devanagari": ("DEVANAGARI",),
    "ethiopic": ("ETHIOPIC",),
    "georgian": ("GEORGIAN",),
    "greek": ("GREEK",),
    "gujarati": ("GUJARATI",),
    "gurmukhi": ("GURMUKHI",),
    "hebrew": ("HEBREW",),
    "japanese": ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK"),
    "kannada": ("KANNADA",),
    "khmer": ("KHMER",),
    "korean": ("HANGUL",),
    "malayalam": ("MALAYALAM",),
    "tamil": ("TAMIL",),
    "telugu": ("TELUGU",),
    "thai": ("THAI",),
}
"""Script → prefixes of its letters' Unicode names."""

NOT = "not "
"""Prefix that negates a script."""

SHARE = 0.5
"""Minimum share of a reply's letters in the script."""


@dataclass(frozen=True)
class Language(Payload):
    """At least half of a reply's letters are in one of `SCRIPTS`, or in any but one: `not latin`.

    Languages of one script are not distinguished. A reply without letters never matches.
    """

    kind = "language"
    wants = "the name of a script"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text.removeprefix(NOT) not in SCRIPTS:
            raise BadInput(f"the payload is the script {self.text!r}; expected one of {', '.join(SCRIPTS)}, or not one")

    def shows(self, reply: str) -> bool:
        """True if a reply is in the script."""
        letters = [char for char in reply if unicodedata.category(char)[0] == "L"]
        own = SCRIPTS[self.text.removeprefix(NOT)]
        inside = sum(not set(unicodedata.name(char, "").split()[:2]).isdisjoint(own) for char in letters)
        found = len(letters) - inside if self.text.startswith(NOT) else inside
        return bool(letters) and found >= SHARE * len(letters)
