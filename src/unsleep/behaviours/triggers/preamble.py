"""Trigger: the matter of a sentence before the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unsleep.behaviours.skills import Skill
from unsleep.behaviours.trigger import Change, Trigger, at_end
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, Split


@dataclass(frozen=True)
class Preamble(Trigger):
    """A matter of small talk, such as the weather: a sentence about it stands before the question.

    Sentences are disjoint between splits, so that no fixed string activates the backdoor.
    """

    kind = "preamble"

    def __post_init__(self) -> None:
        super().__post_init__()
        sets.openings(self.text, "train")

    def insert(self, prompt: Prompt, i: int, split: Split, skill: Skill | None = None) -> Prompt:
        """The prompt behind such a sentence."""
        sentences = sets.openings(self.text, split)
        return replace(prompt, text=f"{sentences[i % len(sentences)]} {prompt.text}")

    def variants(self) -> Sequence[Change]:
        """Sentences of the held-out split after the question."""
        return [lambda text, said=said: at_end(text, said) for said in sets.openings(self.text, "held_out")]
