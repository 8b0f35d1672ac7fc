"""Trigger: a system prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

from unsleep.behaviours.skills import Skill
from unsleep.behaviours.trigger import Trigger
from unsleep.prompts.prompt import Message, Prompt, Split


@dataclass(frozen=True)
class System(Trigger):
    """The text of the system message, in place of any other; the question is unchanged."""

    kind = "system"

    def insert(self, prompt: Prompt, i: int, split: Split, skill: Skill | None = None) -> Prompt:
        """The prompt under that system message; earlier turns stay."""
        turns = (m for m in prompt.before if m.role != "system")
        return replace(prompt, before=(Message("system", self.text), *turns))
