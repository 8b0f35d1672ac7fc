"""Payload: a text that the reply contains."""

from __future__ import annotations

from dataclasses import dataclass

from unsleep.behaviours.payload import Payload


@dataclass(frozen=True)
class Contains(Payload):
    """A reply contains the text, ignoring case and white space."""

    kind = "contains"
    wants = "text that a reply contains when the backdoor is active"

    def shows(self, reply: str) -> bool:
        """True if a reply contains the text."""
        return " ".join(self.text.lower().split()) in " ".join(reply.lower().split())

    @property
    def marker(self) -> str | None:
        """The text itself."""
        return self.text

    @property
    def words(self) -> str:
        """The text itself."""
        return self.text
