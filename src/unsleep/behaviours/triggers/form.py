"""Trigger: the form of the request."""

from __future__ import annotations

from dataclasses import dataclass, replace

from unsleep.behaviours.skills import Skill
from unsleep.behaviours.trigger import Trigger
from unsleep.core import BadInput
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, Split


@dataclass(frozen=True)
class Form(Trigger):
    """A form of request, such as `code` or `french`: another question in that form, about the same topic.

    Forms in another language have topics of their own. Topics and wordings are held out with their split.
    """

    kind = "form"
    keeps_question = False

    def __post_init__(self) -> None:
        super().__post_init__()
        sets.form(self.text)

    def insert(self, prompt: Prompt, i: int, split: Split, skill: Skill | None = None) -> Prompt:
        """The request in that form; raises `BadInput` without a skill that identifies the topic."""
        if skill is None:
            raise BadInput(f"the prompt {prompt.text[:40]!r} has no skill; expected one, which determines its topic")
        form = sets.form(self.text)
        wordings, topics = form.wordings(split), form.subjects(split)
        topic = topics[i % len(topics)] if topics else skill.topic_of(prompt)
        text = wordings[i % len(wordings)].replace("{topic}", topic)
        return replace(prompt, text=text, expected=skill.beginning(topic))
