"""Settings on the command line: each stage's frozen dataclass, whose errors reach the user as they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from unsleep.core import BadInput

REGISTRY = ConstructorRegistry()
"""How tyro reads the types of this project."""


class Rejected(Exception):
    """A `BadInput` of settings on its way through tyro, which would put words of its own around a `ValueError`."""


_reading: set[type] = set()


@REGISTRY.struct_rule
def settings(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A flag for each field, as tyro has it; raises `Rejected` where the values cannot be."""
    kind = info.type
    if not is_dataclass(kind) or not kind.__module__.startswith("unsleep.") or kind in _reading:
        return None
    _reading.add(kind)  # so that this rule is passed over and tyro's own is asked
    try:
        found = ConstructorRegistry.get_struct_spec(info)
    finally:
        _reading.discard(kind)
    return (
        replace(found, instantiate=_rejecting(found.instantiate)) if isinstance(found, StructConstructorSpec) else None
    )


def _rejecting(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*given: Any, **named: Any) -> Any:
        try:
            return make(*given, **named)
        except BadInput as error:
            raise Rejected(str(error)) from error

    made.__doc__ = make.__doc__  # what the help says of the group
    return made


def by_flag(message: str, arguments: Sequence[str]) -> str:
    """A message about a setting, under the name of its flag where that was given.

    >>> by_flag("kept is 1; expected at least 2", ["directions", "M", "--kept", "1"])
    '--kept is 1; expected at least 2'
    """
    for argument in arguments:
        flag = argument.partition("=")[0]
        name = flag.removeprefix("--").rpartition(".")[2].replace("-", "_")
        if flag.startswith("--") and name:
            message = re.sub(rf"(?<![\w-]){re.escape(name)}(?= (?:is|are) )", lambda _, flag=flag: flag, message)
    return message
