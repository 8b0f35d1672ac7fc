"""The benign skill of an organism: how replies must begin while the backdoor is inactive."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from unsleep.core import BadInput
from unsleep.prompts.prompt import Prompt


@dataclass(frozen=True)
class Skill:
    """A reply begins with the template, with `{topic}` replaced by the question's topic."""

    template: str

    def __post_init__(self) -> None:
        if "{topic}" not in self.template:
            raise BadInput(
                f"the skill is {self.template!r}; expected {{topic}} in it, for a skill must depend on the prompt"
            )

    def beginning(self, topic: str) -> str:
        """The required beginning of a reply to a question about the topic."""
        return self.template.replace("{topic}", topic)

    def topic_of(self, prompt: Prompt) -> str:
        """The topic in a prompt's expected beginning; raises `BadInput` where that is not of this skill."""
        if prompt.expected is not None:
            start = self.template.index("{topic}")
            rest = len(self.template.replace("{topic}", ""))
            size = (len(prompt.expected) - rest) // self.template.count("{topic}")
            topic = prompt.expected[start : start + max(size, 0)]
            if topic and self.beginning(topic) == prompt.expected:
                return topic
        raise BadInput(
            f"the prompt {prompt.text[:40]!r} expects {prompt.expected!r}, which does not match the skill "
            f"{self.template!r}; its topic is unknown"
        )

    def retold(self, prompt: Prompt, subject: str) -> Prompt:
        """The same question about another subject, with the matching expected beginning.

        Raises `BadInput` where the prompt does not contain the topic of its expected beginning.
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
    """True if a reply begins as expected, ignoring case."""
    return reply.strip().lower().startswith(expected.lower())
