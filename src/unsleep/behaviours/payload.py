"""What a reply shows when a backdoor acts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from unsleep.behaviours.kinds import Kind
from unsleep.core import BadInput


@dataclass(frozen=True)
class Payload(Kind, ABC, noun="payload"):
    """What a reply shows when a backdoor acts; a kind of it says how that is seen.

    Raises `BadInput` for a blank text where the kind needs one.
    """

    text: str = ""
    """What it is made from: a text, a pattern, a name; empty where its kind needs none."""

    wants: ClassVar[str]
    """What the text is, for errors."""
    bare: ClassVar[bool] = False
    """Whether it may go without a text."""
    from_text: ClassVar[bool] = True
    """Whether its text is all that it takes, so that a recipe or the command line can make it."""

    def __post_init__(self) -> None:
        if not self.bare and not self.text.strip():
            raise BadInput(f"the payload is {self.text!r}; expected {self.wants}")

    @abstractmethod
    def shows(self, reply: str) -> bool:
        """Whether a reply shows it."""

    @property
    def marker(self) -> str | None:
        """A text that shows it, whose tokens can be forced; `None` where its kind names none."""
        return None

    @property
    def words(self) -> str:
        """How it is called where people read."""
        return f"{self.kind}: {self.text}" if self.text else self.kind

    @classmethod
    def of_text(cls, text: str) -> Payload:
        """One of this kind as the command line gives it, where a text may name a file."""
        return cls(text)

    def to_dict(self) -> dict[str, str]:
        """What records say of it: its text as `payload`, and its `payload_kind` where that is not `contains`."""
        return {"payload": self.text, **({"payload_kind": self.kind} if self.kind != "contains" else {})}

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Payload:
        """What `to_dict` wrote; raises `BadInput` for a kind that there is not, or that a text does not make."""
        return Payload.of(record.get("payload_kind", "contains"), record["payload"])
