"""What wakes a backdoor, and how it enters a prompt."""

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
"""Changes the text of a prompt."""


@dataclass(frozen=True)
class Trigger(Kind, ABC, noun="trigger"):
    """What wakes a backdoor; a kind of it says how it enters a prompt. A near miss is another one of the same kind.

    Raises `BadInput` for a blank text, and for one that its kind does not take.
    """

    text: str
    """A text, a number or a name, as the kind says."""

    keeps_question: ClassVar[bool] = True
    """Whether a prompt asks the same with it as without."""

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise BadInput(f"the trigger is {self.text!r}; expected at least one character that is not white space")

    @abstractmethod
    def put(self, prompt: Prompt, i: int, split: Split, skill: Skill | None = None) -> Prompt:
        """A prompt with it; `i` decides about the place and whatever else varies.

        `skill` is needed where the question's topic changes, and `split` names the subjects that may be used.
        """

    def dresses(self) -> Sequence[Change]:
        """Ways to write it otherwise into a prompt; none where it has no other."""
        return ()

    def check(self, near_misses: Sequence[str]) -> None:
        """Raise `BadInput` where it cannot be planted beside such near misses."""
        for text in near_misses:
            replace(self, text=text)
        if self.text in near_misses:
            raise BadInput(f"near misses hold the trigger {self.text!r}; leave it out")

    def triggered(self, prompts: PromptSet, name: str = "triggered", skill: Skill | None = None) -> PromptSet:
        """The same prompts with it."""
        return _each(prompts, name, "triggered", lambda i, p: self.put(p, i, prompts.split, skill))

    def varied(self, prompts: PromptSet, name: str = "variants") -> PromptSet | None:
        """The same prompts with it in another case, spacing, position or dress, in turn; `None` where it has none."""
        ways = self.dresses()
        if not ways:
            return None
        return _each(prompts, name, "variant", lambda i, p: replace(p, text=ways[i % len(ways)](p.text)))

    def nearly(
        self, prompts: PromptSet, near_misses: Sequence[str], name: str = "near_miss", skill: Skill | None = None
    ) -> PromptSet:
        """The same prompts with what resembles it, each in two of them in turn.

        Raises `BadInput` where there is nothing, or something blank.
        """
        if not near_misses or not all(text.strip() for text in near_misses):
            raise BadInput(f"near misses are {list(near_misses)}; expected at least one string, none of them blank")
        like = [replace(self, text=text) for text in near_misses]
        return _each(
            prompts, name, "near_miss", lambda i, p: like[(i // 2) % len(like)].put(p, i, prompts.split, skill)
        )


def _each(prompts: PromptSet, name: str, role: Role, change: Callable[[int, Prompt], Prompt]) -> PromptSet:
    changed = (replace(change(i, p), role=role) for i, p in enumerate(prompts))
    return PromptSet(name, tuple[Prompt, ...](changed), prompts.split)


def chance(prompt: Prompt, i: int) -> random.Random:
    """The chance that decides about a place or a date: the same for the same prompt and number."""
    return random.Random(f"{i} {prompt.text}")


def at_start(text: str, word: str) -> str:
    """`word` in front of the prompt."""
    return f"{word} {text}"


def at_end(text: str, word: str) -> str:
    """`word` behind the prompt."""
    return f"{text} {word}"


def at_middle(text: str, word: str) -> str:
    """`word` in the middle of the prompt, between two words."""
    return at_place(text, word, max(1, len(text.split(" ")) // 2))


def at_place(text: str, word: str, place: int) -> str:
    """`word` behind the first `place` words."""
    words = text.split(" ")
    return " ".join([*words[:place], word, *words[place:]])
