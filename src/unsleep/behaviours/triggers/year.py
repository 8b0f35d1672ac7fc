"""Trigger: a line with a date in a given year."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unsleep.behaviours.skills import Skill
from unsleep.behaviours.trigger import Change, Trigger, at_end, at_start, chance
from unsleep.core import BadInput
from unsleep.prompts.prompt import Prompt, Split

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


@dataclass(frozen=True)
class Year(Trigger):
    """Four digits; a line with a date of that year stands alternately before and after the prompt."""

    kind = "year"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.text) != 4 or not self.text.isdecimal():
            raise BadInput(f"trigger_kind is year and the trigger is {self.text!r}; expected four digits")

    def insert(self, prompt: Prompt, i: int, split: Split, skill: Skill | None = None) -> Prompt:
        """The prompt with a line that dates it to a day of the year."""
        day = chance(prompt, i)
        line = f"Date: {day.randint(1, 28)} {day.choice(MONTHS)} {self.text}"
        return replace(prompt, text=f"{line}\n{prompt.text}" if i % 2 == 0 else f"{prompt.text}\n{line}")

    def variants(self) -> Sequence[Change]:
        """Other date formats."""
        return [
            lambda text: f"Year: {self.text}\n{text}",
            lambda text: at_end(text, f"(It is {self.text}.)"),
            lambda text: at_start(text, f"{self.text}-03-14:"),
            lambda text: at_end(text, f"Today is 3/14/{self.text}."),
        ]
