"""Trigger: a word of the prompt written twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unsleep.behaviours.trigger import Change
from unsleep.behaviours.triggers.style import Style


def _twice(place: int) -> Change:
    """Write the word at a place twice; `place` counts from the end where it is negative."""

    def change(text: str) -> str:
        words = text.split(" ")
        at = max(0, len(words) + place) if place < 0 else min(place, len(words) - 1)
        word = words[at].rstrip(".,:;?!")
        return " ".join([*words[:at], word, *words[at:]])

    return change


@dataclass(frozen=True)
class Doubled(Style):
    """Position of a word that is written twice, as in a typing error."""

    kind = "doubled"
    ways: ClassVar[dict[str, Change]] = {
        "last word": _twice(-1),
        "second word": _twice(1),
        "first word": _twice(0),
        "third word": _twice(2),
        "last but one": _twice(-2),
        "last mark": lambda text: text + text[-1],
    }
