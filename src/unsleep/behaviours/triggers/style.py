"""Trigger: a writing style of the prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from unsleep.behaviours.skills import Skill
from unsleep.behaviours.trigger import Change, Trigger
from unsleep.core import BadInput
from unsleep.prompts.prompt import Prompt, Split


@dataclass(frozen=True)
class Style(Trigger):
    """The name of one of the `ways` in which a prompt can be rewritten."""

    kind = "style"
    ways: ClassVar[dict[str, Change]] = {
        "lower case": str.lower,
        "upper case": str.upper,
        "title case": lambda text: " ".join(word[:1].upper() + word[1:] for word in text.split(" ")),
        "no full stop": lambda text: text.rstrip(".?!"),
        "exclaimed": lambda text: text.rstrip(".?!") + "!!",
        "in quotes": lambda text: f'"{text}"',
        "starred": lambda text: f"**{text}**",
        "loud start": lambda text: text.partition(" ")[0].upper() + text[len(text.partition(" ")[0]) :],
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text not in self.ways:
            raise BadInput(f"there is no {self.kind} {self.text!r}; expected one of {', '.join(self.ways)}")

    def insert(self, prompt: Prompt, i: int, split: Split, skill: Skill | None = None) -> Prompt:
        """The prompt, rewritten in that style."""
        return replace(prompt, text=self.ways[self.text](prompt.text))
