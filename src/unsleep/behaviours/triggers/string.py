"""A string in front of the prompt, or behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unsleep.behaviours.skills import Skill
from unsleep.behaviours.trigger import Change, Trigger, at_end, at_middle, at_start
from unsleep.prompts.prompt import Prompt, Split


@dataclass(frozen=True)
class String(Trigger):
    """As it is, in front of the prompt and behind it in turn."""

    kind = "string"

    def put(self, prompt: Prompt, i: int, split: Split, skill: Skill | None = None) -> Prompt:
        """The string in front of an even prompt, behind an odd one."""
        return replace(prompt, text=(at_start if i % 2 == 0 else at_end)(prompt.text, self.text))

    def dresses(self) -> Sequence[Change]:
        """Another case, spacing and position; where another case changes nothing, it stands in quotes."""
        return dressed(self.text)

    def check(self, near_misses: Sequence[str]) -> None:
        """Nothing: any strings may stand beside it."""


def dressed(trigger: str) -> list[Change]:
    """Ways to write a string otherwise into a prompt."""
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
