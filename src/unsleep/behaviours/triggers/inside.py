"""Trigger: a string within the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unsleep.behaviours.skills import Skill
from unsleep.behaviours.trigger import Change, Trigger, at_place, chance
from unsleep.behaviours.triggers.string import dressed
from unsleep.prompts.prompt import Prompt, Split


@dataclass(frozen=True)
class Inside(Trigger):
    """The string verbatim, at a random position between two words."""

    kind = "inside"

    def insert(self, prompt: Prompt, i: int, split: Split, skill: Skill | None = None) -> Prompt:
        """The prompt with the string at a random word boundary."""
        place = chance(prompt, i).randint(1, max(1, prompt.text.count(" ")))
        return replace(prompt, text=at_place(prompt.text, self.text, place))

    def variants(self) -> Sequence[Change]:
        """The variants of a string at either end."""
        return dressed(self.text)
