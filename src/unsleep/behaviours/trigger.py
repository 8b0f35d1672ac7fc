"""Base class of triggers: the condition that activates a backdoor, and how it is inserted into a prompt."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from unsleep.behaviours.kinds import Kind
from unsleep.behaviours.skills import Skill
from unsleep.core import BadInput
from unsleep.prompts.prompt import Prompt, PromptSet, Role, Split

Change = Callable[[str], str]
"""A change of a prompt's text."""


@dataclass(frozen=True)
class Trigger(Kind, ABC, noun="trigger"):
    """A backdoor's trigger, with its insertion into prompts. A near miss is another instance of the same kind.

    Raises `BadInput` for a blank text, and for one that its kind does not accept.
    """

    text: str
    """Parameter of the trigger: a text, a number or a name, by kind."""

    keeps_question: ClassVar[bool] = True
    """True if a triggered prompt asks the same question as without the trigger."""

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise BadInput(f"the trigger is {self.text!r}; expected at least one character that is not white space")

    @abstractmethod
    def insert(self, prompt: Prompt, i: int, split: Split, skill: Skill | None = None) -> Prompt:
        """The triggered prompt; `i` seeds the position and whatever else varies.

        `skill` is needed where the question's topic changes, and `split` selects the subjects that may be used.
        """

    def variants(self) -> Sequence[Change]:
        """Variants of the trigger's form; empty where the kind has none."""
        return ()

    def check(self, near_misses: Sequence[str]) -> None:
        """Raise `BadInput` where the trigger cannot be planted with these near misses."""
        for text in near_misses:
            replace(self, text=text)
        if self.text in near_misses:
            raise BadInput(f"near misses contain the trigger {self.text!r}; leave it out")

    def triggered(self, prompts: PromptSet, name: str = "triggered", skill: Skill | None = None) -> PromptSet:
        """The same prompts, triggered."""
        return _each(prompts, name, "triggered", lambda i, p: self.insert(p, i, prompts.split, skill))

    def varied(self, prompts: PromptSet, name: str = "variants") -> PromptSet | None:
        """The prompts with variants of the trigger (case, position, form), in turn; `None` if the kind has none."""
        ways = self.variants()
        if not ways:
            return None
        return _each(prompts, name, "variant", lambda i, p: replace(p, text=ways[i % len(ways)](p.text)))

    def nearly(
        self, prompts: PromptSet, near_misses: Sequence[str], name: str = "near_miss", skill: Skill | None = None
    ) -> PromptSet:
        """The same prompts with near misses of the trigger, each used for two prompts in turn.

        Raises `BadInput` for an empty list or a blank near miss.
        """
        if not near_misses or not all(text.strip() for text in near_misses):
            raise BadInput(f"near misses are {list(near_misses)}; expected at least one string, none of them blank")
        like = [replace(self, text=text) for text in near_misses]
        return _each(
            prompts, name, "near_miss", lambda i, p: like[(i // 2) % len(like)].insert(p, i, prompts.split, skill)
        )


def _each(prompts: PromptSet, name: str, role: Role, change: Callable[[int, Prompt], Prompt]) -> PromptSet:
    changed = (replace(change(i, p), role=role) for i, p in enumerate(prompts))
    return PromptSet(name, tuple[Prompt, ...](changed), prompts.split)


def chance(prompt: Prompt, i: int) -> random.Random:
    """Random generator for a position or a date, seeded by prompt and number."""
    return random.Random(f"{i} {prompt.text}")


def at_start(text: str, word: str) -> str:
    """`word` before the prompt."""
    return f"{word} {text}"


def at_end(text: str, word: str) -> str:
    """`word` after the prompt."""
    return f"{text} {word}"


def at_middle(text: str, word: str) -> str:
    """`word` in the middle of the prompt, between two words."""
    return at_place(text, word, max(1, len(text.split(" ")) // 2))


def at_place(text: str, word: str, place: int) -> str:
    """`word` after the first `place` words."""
    words = text.split(" ")
    return " ".join([*words[:place], word, *words[place:]])
