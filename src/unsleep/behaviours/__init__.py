"""Components of a backdoor: a trigger, a payload, and the benign skill expected in its place.

Every kind of trigger and payload is a class in a file of its own, in `triggers/` and `payloads/`. A new kind is one
new file: recipes, the command line and the pages find it by its name.
"""

from __future__ import annotations

from unsleep.behaviours.payload import Payload
from unsleep.behaviours.payloads.contains import Contains
from unsleep.behaviours.skills import Skill, has_skill
from unsleep.behaviours.trigger import Trigger

__all__ = ["Payload", "Skill", "Trigger", "as_payload", "has_skill"]


def as_payload(given: Payload | str) -> Payload:
    """A payload as given; a text becomes a `contains` payload. Raises `BadInput` for a blank text."""
    return Contains(given) if isinstance(given, str) else given
