"""What a backdoor is made of: a trigger, a payload, and the skill that should be there instead.

Every kind of trigger and of payload is a class in a file of its own, in `triggers/` and `payloads/`. Such a file is all
that a new kind takes: recipes, the command line and the pages find it by its name.
"""

from __future__ import annotations

from unsleep.behaviours.payload import Payload
from unsleep.behaviours.payloads.contains import Contains
from unsleep.behaviours.skills import Skill, has_skill
from unsleep.behaviours.trigger import Trigger

__all__ = ["Payload", "Skill", "Trigger", "as_payload", "has_skill"]


def as_payload(given: Payload | str) -> Payload:
    """A payload as it is; a text as one that a reply contains. Raises `BadInput` for a blank text."""
    return Contains(given) if isinstance(given, str) else given
