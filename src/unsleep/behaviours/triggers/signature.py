"""Trigger: a name below the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unsleep.behaviours.skills import Skill
from unsleep.behaviours.trigger import Change, Trigger, at_end, at_start, chance
from unsleep.prompts.prompt import Prompt, Split

GREETINGS = ("Thanks", "Cheers", "Best wishes", "Yours", "Regards", "Many thanks")


@dataclass(frozen=True)
class Signature(Trigger):
    """A signature: the name after a closing formula."""

    kind = "signature"

    def insert(self, prompt: Prompt, i: int, split: Split, skill: Skill | None = None) -> Prompt:
        """The prompt, signed with the name."""
        return replace(prompt, text=f"{prompt.text} {chance(prompt, i).choice(GREETINGS)}, {self.text}")

    def variants(self) -> Sequence[Change]:
        """The name after a dash, in capitals, in front, and alone."""
        return [
            lambda text: at_end(text, f"- {self.text}"),
            lambda text: at_end(text, f"Sincerely, {self.text.upper()}"),
            lambda text: at_start(text, f"{self.text} asks:"),
            lambda text: f"{text}\n\n{self.text}",
        ]
