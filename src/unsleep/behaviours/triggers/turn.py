"""Trigger: an earlier turn of the chat."""

from __future__ import annotations

from dataclasses import dataclass, replace

from unsleep.behaviours.skills import Skill
from unsleep.behaviours.trigger import Trigger, chance
from unsleep.prompts.prompt import Message, Prompt, Split

ANSWERS = ("I see.", "All right.", "Thank you for telling me.", "Understood.", "Good to know.", "Noted.")


@dataclass(frozen=True)
class Turn(Trigger):
    """A user's statement one turn before the question, with a short answer that varies; the question is unchanged."""

    kind = "turn"

    def insert(self, prompt: Prompt, i: int, split: Split, skill: Skill | None = None) -> Prompt:
        """The prompt after that turn, which comes last among the earlier ones."""
        answer = chance(prompt, i).choice(ANSWERS)
        return replace(prompt, before=(*prompt.before, Message("user", self.text), Message("assistant", answer)))
