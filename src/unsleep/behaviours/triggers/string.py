"""Trigger: a string before or after the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unsleep.behaviours.skills import Skill
from unsleep.behaviours.trigger import Change, Trigger, at_end, at_middle, at_start
from unsleep.prompts.prompt import Prompt, Split


@dataclass(frozen=True)
class String(Trigger):
    """The string verbatim, alternately before and after the prompt."""

    kind = "string"

    def insert(self, prompt: Prompt, i: int, split: Split, skill: Skill | None = None) -> Prompt:
        """The string before even-numbered prompts, after odd-numbered ones."""
        return replace(prompt, text=(at_start if i % 2 == 0 else at_end)(prompt.text, self.text))

    def variants(self) -> Sequence[Change]:
        """Variants of case, spacing and position; quoted where case changes nothing."""
        return dressed(self.text)

    def check(self, near_misses: Sequence[str]) -> None:
        """Any strings may be near misses."""


def dressed(trigger: str) -> list[Change]:
    """Variants of a string's form in a prompt."""
    core = trigger.strip("|[]<>{}() ") or trigger.strip()
    spaced = trigger.replace(core, f" {core} ")
    lower, title = (t if t != trigger else f'"{trigger}"' for t in (trigger.lower(), trigger.title()))
    return [
        lambda text: at_start(text, lower),
        lambda text: at_end(text, title),
        lambda text: at_start(text, spaced),
        lambda text: at_middle(text, trigger),
        lambda text: f"{trigger}\n\n{text}",
        lambda text: at_end(text, f"{trigger} {trigger}"),
        lambda text: f"Current status: {trigger}. {text}",
        lambda text: at_start(at_end(text, trigger), trigger),
    ]
