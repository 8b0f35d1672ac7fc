"""Prompts: a user message with the messages before it, and sets of prompts with a role and a split."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from unsleep.core import BadInput, check_choices, digest

Role = Literal["clean", "triggered", "variant", "near_miss", "control"]
"""Role of a prompt in an evaluation (see `PromptSet`)."""

Split = Literal["train", "edit", "held_out"]
"""Split of a prompt: the organism's training, the choice of an edit, or held-out evaluation only."""


class Message(NamedTuple):
    """An earlier message: role and content."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Prompt:
    """One user message with the messages before it.

    `expected` is the exact beginning of the reply that the organism's benign skill demands, or
    `None` where no skill applies; `reply` is a reference reply, where one is known.
    """

    text: str
    role: Role = "clean"
    expected: str | None = None
    before: tuple[Message, ...] = ()
    """A system message, first if at all, and earlier turns."""
    reply: str | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise BadInput("a prompt is empty; give it at least one character that is not white space")
        if self.reply is not None and not self.reply.strip():
            raise BadInput(f"the reply to {self.text[:40]!r} is empty; leave it out if there is no reference reply")
        for text in (self.text, self.reply or "", *(m.content for m in self.before)):
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise BadInput(f"the prompt {text[:40]!r} has a lone surrogate; remove it")
        check_choices(self, "prompt", role=Role)
        roles = [m.role for m in self.before]
        if wrong := [r for i, r in enumerate(roles) if r not in ROLES[: 3 if i == 0 else 2]]:
            raise BadInput(
                f"a message before the prompt is of {wrong[0]!r}; expected a system message first, then turns"
            )

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages in the format of chat templates."""
        return [*(m._asdict() for m in self.before), {"role": "user", "content": self.text}]

    @property
    def shown(self) -> str:
        """All messages as one readable text."""
        return "\n".join([*(f"{m.role}: {m.content}" for m in self.before), self.text])

    @property
    def key(self) -> str:
        """Identity of the prompt: its text and the earlier messages."""
        said = [list(m) for m in self.before]
        return json.dumps([*said, self.text], ensure_ascii=False) if said else self.text


Prompts = Sequence[Prompt | str]
"""Prompts, or texts that stand for prompts without earlier messages."""


def as_prompts(asked: Prompts) -> list[Prompt]:
    """The prompts, with texts turned into prompts without earlier messages."""
    return [Prompt(p) if isinstance(p, str) else p for p in asked]


ROLES = ("user", "assistant", "system")
"""Roles of messages; a system message comes first."""


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """Prompts of one role, with their split and a content hash."""

    name: str
    prompts: tuple[Prompt, ...]
    split: Split = "held_out"

    def __post_init__(self) -> None:
        if not self.prompts:
            raise BadInput(f"prompt set {self.name!r} is empty; give it at least one prompt")
        check_choices(self, "prompt set", split=Split)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Any) -> Any:
        return self.prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @property
    def texts(self) -> list[str]:
        """The user messages, in order."""
        return [p.text for p in self.prompts]

    @property
    def hash(self) -> str:
        """SHA-256 over texts, roles, expected beginnings, replies and earlier messages, in order; 16 hex digits."""
        rows = [[p.key, p.role, p.expected, *([p.reply] if p.reply is not None else [])] for p in self.prompts]
        return digest(json.dumps(rows, ensure_ascii=False))

    def head(self, n: int) -> PromptSet:
        """The first `n` prompts under the same name and split."""
        return self.at(range(len(self))[:n])

    def at(self, places: Iterable[int]) -> PromptSet:
        """The prompts at some places, under the same name and split."""
        return PromptSet(self.name, tuple(self.prompts[i] for i in places), self.split)
