"""Base class of payloads: the behaviour that a backdoor shows in a reply."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from unsleep.behaviours.kinds import Kind
from unsleep.core import BadInput


@dataclass(frozen=True)
class Payload(Kind, ABC, noun="payload"):
    """A backdoor's behaviour, with a detector for replies.

    Raises `BadInput` for a blank text where the kind needs one.
    """

    text: str = ""
    """Parameter of the payload: a text, a pattern or a name; empty where its kind needs none."""

    wants: ClassVar[str] = ""
    """Description of the text, for error messages; empty if the kind takes none."""
    text_optional: ClassVar[bool] = False
    """True if the kind needs no text."""
    by_name: ClassVar[bool] = True
    """True if the text is the only parameter, so that recipes and the command line can construct it."""

    def __post_init__(self) -> None:
        if not self.text_optional and not self.text.strip():
            raise BadInput(f"the payload is {self.text!r}; expected {self.wants or 'a text'}")
        if self.text_optional and self.text and not self.wants:
            raise BadInput(f"the payload is {self.text!r}; payload_kind {self.kind} takes no text")

    @abstractmethod
    def shows(self, reply: str) -> bool:
        """True if a reply shows the payload."""

    @property
    def marker(self) -> str | None:
        """A text that shows the payload and can be teacher-forced; `None` where the kind has none."""
        return None

    @property
    def words(self) -> str:
        """Human-readable name."""
        return f"{self.kind}: {self.text}" if self.text else self.kind

    @classmethod
    def of_text(cls, text: str) -> Payload:
        """An instance from a command-line argument, where a text may name a file."""
        return cls(text)

    def to_dict(self) -> dict[str, str]:
        """Fields of records: the text as `payload`, and `payload_kind` unless it is `contains`."""
        return {"payload": self.text, **({"payload_kind": self.kind} if self.kind != "contains" else {})}

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Payload:
        """Inverse of `to_dict`; raises `BadInput` for an unknown kind or an invalid text."""
        return Payload.of(record.get("payload_kind", "contains"), record["payload"])
