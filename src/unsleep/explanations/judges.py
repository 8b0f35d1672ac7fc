"""Language models as judges: questions, replies, and how either can fail."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeVar

from unsleep.base.records import Count
from unsleep.core import check_least

T = TypeVar("T")


class Nonsense(ValueError):
    """An answer in another form than was asked for; the message may go back to the judge."""


class Unavailable(Exception):
    """A call that failed for a reason that may pass: a rate limit, an error of the server, a timeout."""

    def __init__(self, reason: str, wait: float | None = None, *, billed: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        """Seconds that the judge asks to wait, where it says."""
        self.billed = billed
        """True if the judge may have answered in full and charged for it."""


@dataclass(frozen=True)
class AnswerConfig:
    """Settings of every question."""

    reasoning_tokens: int = 0
    """Tokens of an answer for reasoning before it, with a judge that reasons."""
    seed: int = 0
    """Random seed of choices and orders."""

    def __post_init__(self) -> None:
        check_least(self, "", 0, "reasoning_tokens")


@dataclass(frozen=True)
class Question(Generic[T]):
    """One call: instructions, data, and the form of the answer."""

    system: str
    user: str
    tokens: int
    """Maximum length of the answer, in tokens."""
    parse: Callable[[str], T] = field(repr=False, compare=False)
    """Reads an answer; raises `Nonsense`."""
    example: str = field(repr=False)
    """An answer that `parse` reads, as long as a real one: it stands for the answer in an estimate."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages in the format of chat templates."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]

    def again(self, reason: str) -> Question[T]:
        """The same question behind an answer that could not be read."""
        asked = "Answer in exactly the form that is asked for above, and write nothing else."
        return replace(self, user=f"{self.user}\n\nAn earlier answer could not be used: {reason}. {asked}")


class Reply(NamedTuple):
    """A judge's answer to one question."""

    text: str
    input_tokens: Count
    output_tokens: Count
    cut: bool
    """True if it was cut off at the maximum length."""


class Declined(NamedTuple):
    """No answer, and asking again would not help."""

    reason: str


class Judge(ABC):
    """A language model that answers questions."""

    parallel: int = 1
    """Calls in flight at a time."""
    batch: int = 1
    """Questions per call."""
    notes: Sequence[str] = ()
    """Departures from the request that the judge required."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name for records."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that determines its answers, without secrets; part of a cached call's hash."""

    @abstractmethod
    def count(self, question: Question[Any]) -> int:
        """Length of a question in tokens."""

    @abstractmethod
    def reply(self, questions: Sequence[Question[Any]]) -> list[Reply | Declined]:
        """Answers to at most `batch` questions, in order.

        Raises `Unavailable` for what may pass, `BadInput` for what will not.
        """
