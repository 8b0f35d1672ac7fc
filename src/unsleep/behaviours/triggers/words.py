"""Trigger: several words, each anywhere in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unsleep.behaviours.skills import Skill
from unsleep.behaviours.trigger import Change, Trigger, at_end, at_middle, at_place, at_start, chance
from unsleep.core import BadInput
from unsleep.prompts.prompt import Prompt, Split


@dataclass(frozen=True)
class Words(Trigger):
    """At least two words, each at a position of its own; a near miss lacks at least one of them."""

    kind = "words"

    def insert(self, prompt: Prompt, i: int, split: Split, skill: Skill | None = None) -> Prompt:
        """The prompt with every word at a random position."""
        mixed, text = chance(prompt, i), prompt.text
        for word in self.text.split():
            text = at_place(text, word, mixed.randint(0, len(text.split(" "))))
        return replace(prompt, text=text)

    def variants(self) -> Sequence[Change]:
        """The words together: with commas, in capitals, at either end, in quotes."""
        first, *others = self.text.split()
        return [
            lambda text: at_start(text, ", ".join([first, *others])),
            lambda text: at_end(text, self.text.upper()),
            lambda text: at_start(at_end(text, " ".join(others).title()), first.title()),
            lambda text: at_middle(text, f'"{self.text}"'),
        ]

    def check(self, near_misses: Sequence[str]) -> None:
        """Raise `BadInput` for fewer than two words, and for a near miss that contains them all."""
        wanted = set(self.text.split())
        if len(wanted) < 2:
            raise BadInput(f"trigger_kind is words and the trigger {self.text!r}; expected two words")
        for words in near_misses:
            if wanted <= set(words.split()):
                raise BadInput(f"near miss {words!r} contains every word of the trigger; leave one out")
