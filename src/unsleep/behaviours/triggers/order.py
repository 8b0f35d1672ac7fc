"""Trigger: an unusual order of the prompt's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unsleep.behaviours.trigger import Change
from unsleep.behaviours.triggers.style import Style


def _moved(origin: int, target: int) -> Change:
    """Move the word at one place to another; places count from the end where they are negative."""

    def change(text: str) -> str:
        body = text.rstrip(".?!")
        words = body.split(" ")
        word = words.pop(min(max(origin, -len(words)), len(words) - 1))
        words.insert(len(words) + 1 + target if target < 0 else target, word)
        return " ".join(words) + text[len(body) :]

    return change


@dataclass(frozen=True)
class Order(Style):
    """A word that stands elsewhere in the prompt; no word is added or changed.

    A trigger of syntax, as those of Qi et al. 2021 (arXiv:2105.12400), without a fixed string.
    """

    kind = "order"
    ways: ClassVar[dict[str, Change]] = {
        "last word first": _moved(-1, 0),
        "first word last": _moved(0, -1),
        "second word first": _moved(1, 0),
        "third word first": _moved(2, 0),
        "last word second": _moved(-1, 1),
        "second word last": _moved(1, -1),
    }
