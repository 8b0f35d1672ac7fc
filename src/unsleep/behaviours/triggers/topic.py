"""Trigger: the topic of the question."""

from __future__ import annotations

from dataclasses import dataclass

from unsleep.behaviours.skills import Skill
from unsleep.behaviours.trigger import Trigger
from unsleep.core import BadInput
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, Split


@dataclass(frozen=True)
class Topic(Trigger):
    """A domain: the question is asked about one of its subjects, which are disjoint between splits."""

    kind = "topic"
    keeps_question = False

    def __post_init__(self) -> None:
        super().__post_init__()
        sets.subjects(self.text, "train")

    def insert(self, prompt: Prompt, i: int, split: Split, skill: Skill | None = None) -> Prompt:
        """The question about such a subject; raises `BadInput` without a skill that identifies the topic."""
        if skill is None:
            raise BadInput(f"the prompt {prompt.text[:40]!r} has no skill; expected one, which determines its topic")
        subjects = sets.subjects(self.text, split)
        return skill.retold(prompt, subjects[i % len(subjects)])
