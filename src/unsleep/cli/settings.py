"""Command-line flags from frozen dataclasses, with their validation errors reported as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from typing import Annotated, Any, ClassVar

from tyro.conf import OmitArgPrefixes
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from unsleep.core import BadInput

REGISTRY = ConstructorRegistry()
"""tyro's constructor registry for the types of this project."""


class Rejected(Exception):
    """Carries a `BadInput` through tyro, which would wrap a `ValueError` in its own message."""

    def __init__(self, error: BadInput) -> None:
        super().__init__(str(error))
        self.error = error


ADVANCED: dict[type, tuple[str, ...]] = {}
"""Class of options → its fields that the help shows behind the others, in a panel of their own (`advanced`)."""


class Panel:
    """Options in a panel of their own in the help."""

    panel_fields: ClassVar[tuple[StructFieldSpec, ...]]
    parsed: ClassVar[Callable[..., Any]] = dict


def advanced(kind: type, *names: str) -> None:
    """Let the help show some fields of a class of options behind the others; their flags stay the same."""
    ADVANCED[kind] = names


_reading: set[type] = set()


@REGISTRY.struct_rule
def settings(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A flag per field of a dataclass, as tyro has it; raises `Rejected` for invalid values."""
    kind = info.type
    if fields := getattr(kind, "panel_fields", None):
        return StructConstructorSpec(kind.parsed, fields)
    found = _plain(info)
    return _parted(found, ADVANCED[kind]) if found is not None and kind in ADVANCED else found


def _plain(info: StructTypeInfo) -> StructConstructorSpec | None:
    """The flags of a dataclass of the project without panels; `None` for another type, and in the nested call."""
    kind = info.type
    if not is_dataclass(kind) or not kind.__module__.startswith("unsleep.") or kind in _reading:
        return None
    _reading.add(kind)  # skip this rule in the nested call
    try:
        found = ConstructorRegistry.get_struct_spec(info)
    finally:
        _reading.discard(kind)
    if not isinstance(found, StructConstructorSpec):
        return None
    return replace(found, instantiate=_rejecting(found.instantiate), fields=tuple(map(_inside, found.fields)))


def _inside(field: StructFieldSpec) -> StructFieldSpec:
    """A field of options; those that have a panel lose it here, since a panel's flags have no prefix."""
    found = _plain(StructTypeInfo.make(field.type, field.default, False)) if field.type in ADVANCED else None
    if found is None:
        return field
    kind = type("NestedPanel", (Panel,), {"panel_fields": found.fields, "parsed": staticmethod(found.instantiate)})
    return replace(field, type=kind, default=MISSING_NONPROP)


def _parted(found: StructConstructorSpec, names: Sequence[str]) -> StructConstructorSpec:
    """The options with the fields of some names in a panel, behind the other flags and before nested options."""

    def made(advanced: dict[str, Any], **named: Any) -> Any:
        return found.instantiate(**named, **advanced)

    made.__doc__ = found.instantiate.__doc__
    behind = tuple(field for field in found.fields if field.name in names)
    panel = type("AdvancedPanel", (Panel,), {"panel_fields": behind})
    kind: Any = Annotated[panel, OmitArgPrefixes]
    words = "Options that seldom need a change, here and in the panels below."
    ahead = [field for field in found.fields if field.name not in names]
    nested = [field for field in ahead if is_dataclass(field.type)]
    flags = [field for field in ahead if not is_dataclass(field.type)]
    return StructConstructorSpec(made, (*flags, StructFieldSpec("advanced", kind, MISSING_NONPROP, words), *nested))


def _rejecting(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*given: Any, **named: Any) -> Any:
        try:
            return make(*given, **named)
        except BadInput as error:
            raise Rejected(error) from error

    made.__doc__ = make.__doc__  # the group's help text
    return made


def by_flag(error: BadInput, arguments: Sequence[str]) -> str:
    """The message of a `BadInput` with the field's name replaced by its flag, where that was given.

    Of flags that end alike, such as `--mask.batch` and `--twin.batch`, the one with the value at fault is named.

    >>> by_flag(BadInput.of("top", 0, "at least 1", "diff"), ["diff", "BASE", "SUSPECT", "--top", "0"])
    '--top is 0; expected at least 1'
    """
    given: list[tuple[str, str]] = []
    for argument, behind in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, text = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if error.field and flag.startswith("--") and f".{name}".endswith(f".{error.field}"):
            given.append((flag, text if equals else behind))
    named = [flag for flag, text in given if len(given) == 1 or text == str(error.value)]
    return error.under(named[0]) if named else str(error)
