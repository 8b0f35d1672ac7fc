"""Records: a frozen dataclass states once what a JSON file holds; writing, reading and its JSON Schema follow from it.

    None, bool, int, float, str     as JSON has them; a whole number may stand for any number, NaN for none
    Literal["a", "b"], Words        one of a few words
    Annotated[float, Range(0, 1)]   a number within bounds
    tuple[X, ...], list[X]          an array; tuple[X, Y] one of that length
    dict[str, X], dict[int, X]      an object of any keys, or of whole numbers
    X | None, X | Y                 null, a Literal's word, or what the class whose fields are there makes of it
    a dataclass or NamedTuple       an object with its fields and no others; one with a default may be missing
    a class with `parse`            the text that `str` gives of it, such as a Site
    Any                             any JSON

A dataclass with `SCHEMA: ClassVar[str]` is a whole record: that text stands in it as `schema`.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from unsleep.base import store
from unsleep.core import BadInput

T = TypeVar("T")

LARGEST = 1e15
"""Largest number in a record; above it floats are no longer exact integers."""

MAX_DEPTH = 32
"""Maximum nesting of a value of type Any; real ones are below ten."""


@dataclass(frozen=True)
class Range:
    """Inclusive bounds of a number."""

    low: int | float = -LARGEST
    high: int | float = LARGEST


@dataclass(frozen=True)
class Words:
    """The allowed values of a text, given as a tuple."""

    words: tuple[str, ...]


Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0)]
Count = Annotated[int, Range(0)]


class Field(NamedTuple):
    """A field of a record."""

    kind: Any
    required: bool
    default: Any


@cache
def _fields(kind: Any) -> dict[str, Field]:
    """Field name → `Field`, in order."""
    hints = get_type_hints(kind, include_extras=True)
    if not is_dataclass(kind):
        defaults: dict[str, Any] = kind._field_defaults
        return {n: Field(hints[n], n not in defaults, defaults.get(n, MISSING)) for n in kind._fields}
    made = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(kind)}
    return {name: Field(hints[name], default is MISSING, default) for name, default in made.items()}


def plain(value: Any) -> Any:
    """A record as JSON values, without optional fields at their defaults (None or empty)."""
    if hasattr(type(value), "parse"):
        return str(value)
    if is_dataclass(value) or hasattr(value, "_fields"):
        kind: Any = type(value)
        found = {"schema": kind.SCHEMA} if hasattr(kind, "SCHEMA") else dict[str, Any]()
        for name, field in _fields(kind).items():
            held = getattr(value, name)
            if not (field.default in (None, "", (), {}) and held == field.default):
                found[name] = plain(held)
        return found
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast("Sequence[Any]", value)]
    return value


def save(record: Any, path: str | Path) -> None:
    """Write a record atomically; NaN is refused."""
    store.write_json(path, plain(record))


def load(kind: type[T], path: str | Path) -> T:
    """Read a record; raises `BadInput` naming the file, the field, its value and what was expected."""
    found = store.read_json(path)
    with store.reading(path):
        return parsed(kind, found, Path(path).stem)


def parsed(kind: type[T], value: Any, where: str) -> T:
    """A record from JSON values; raises `BadInput` naming the path below `where`, the value and what was expected."""
    return cast("T", _read(kind, value, where))


def parsed_as_one(kinds: Sequence[type[T]], value: Any, where: str) -> T:
    """`parsed` as the dataclass, among several, with whose fields a JSON object shares most."""
    return _read_union(kinds, value, where)


def _bare(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its Annotated markers, and the markers."""
    return (get_args(kind)[0], get_args(kind)[1:]) if get_origin(kind) is Annotated else (kind, ())


def _read(kind: Any, value: Any, where: str) -> Any:
    bare, marks = _bare(kind)
    origin = get_origin(bare)
    if bare is Any:
        _check_any(value, where)
        return value
    if origin in (Union, types.UnionType):
        return _read_union(get_args(bare), value, where)
    if origin in (tuple, list):
        return _read_array(bare, value, where)
    if origin is dict:
        return _read_mapping(get_args(bare), value, where)
    if hasattr(bare, "parse"):
        return _made(bare.parse, (_read(str, value, where),), {}, where)
    if is_dataclass(bare) or hasattr(bare, "_fields"):
        return _read_object(bare, value, where)
    if origin is Literal or (marks and isinstance(marks[0], Words)):
        words = get_args(bare) or marks[0].words
        if value not in words:
            raise BadInput.of(where, value, f"one of {', '.join(map(str, words))}")
    elif not _fits(bare, marks, value):
        raise BadInput.of(where, value, _words(bare, marks))
    return float(value) if bare is float else value


def _fits(kind: Any, marks: Sequence[Any], value: Any) -> bool:
    if kind in (int, float):
        bounds = marks[0] if marks else Range()
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return number and bounds.low <= value <= bounds.high
    return value is None if kind is type(None) else isinstance(value, kind)


def _words(kind: Any, marks: Sequence[Any]) -> str:
    """Description of the expected plain value."""
    if kind not in (int, float):
        return {str: "text", bool: "true or false"}.get(kind, "null")
    bounds = marks[0] if marks else Range()
    word = "a whole number" if kind is int else "a finite number" if bounds == Range() else "a number"
    if bounds == Range(0, 1) and kind is float:
        return "a share from 0 to 1"
    if bounds.high != LARGEST:
        return f"{word} from {bounds.low} to {bounds.high}"
    return word if bounds.low <= -LARGEST else f"{word}, at least {bounds.low}"


def _read_union(kinds: Sequence[Any], value: Any, where: str) -> Any:
    """Null or a word where those are among the kinds; of an object, the class that most of its fields are of."""
    if value is None and type(None) in kinds:
        return None
    *others, last = [kind for kind in kinds if kind is not type(None)]
    if any(get_origin(kind) is Literal and value in get_args(kind) for kind in others):
        return value
    if isinstance(value, dict):
        found = cast("dict[str, Any]", value).keys()
        classes = [kind for kind in (last, *others) if is_dataclass(kind)]
        last = max(classes, key=lambda kind: len(found & _fields(kind).keys()), default=last)
    return _read(last, value, where)


def _read_array(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, list):
        raise BadInput.of(where, value, "a list")
    items, kinds = cast("list[Any]", value), get_args(kind)
    if get_origin(kind) is list or kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(items)
    if len(kinds) != len(items):
        raise BadInput.of(where, value, f"a list of {len(kinds)}")
    made = [_read(each, item, f"{where}[{i}]") for i, (each, item) in enumerate(zip(kinds, items, strict=True))]
    return made if get_origin(kind) is list else tuple(made)


def _read_mapping(kinds: tuple[Any, Any], value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise BadInput.of(where, value, "an object")
    items = cast("dict[str, Any]", value).items()
    named = [(int(key) if kinds[0] is int and key.isdecimal() else key, item) for key, item in items]
    return {_read(kinds[0], key, where): _read(kinds[1], item, f"{where}.{key}") for key, item in named}


def _read_object(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise BadInput.of(where, value, "an object")
    found, known = cast("dict[str, Any]", value), _fields(kind)
    head = ("schema",) if hasattr(kind, "SCHEMA") else ()
    for name in (*head, *(name for name, field in known.items() if field.required)):
        if name not in found:
            raise BadInput(f"{where} has no {name!r}; it has {', '.join(map(repr, found)) or 'nothing'}")
        if name in head and found[name] != kind.SCHEMA:
            raise BadInput.of(f"{where}.schema", found[name], kind.SCHEMA)
    for name in found:
        if name not in known and name not in head:
            raise BadInput(f"{where} has {name!r}, which is unknown; expected only {', '.join(known)}")
    given = {name: _read(known[name].kind, item, f"{where}.{name}") for name, item in found.items() if name in known}
    return _made(kind, (), given, where)


def _made(make: Any, given: Sequence[Any], named: Mapping[str, Any], where: str) -> Any:
    """Construct a value; an error of its constructor names the path."""
    try:
        return make(*given, **named)
    except BadInput as error:
        if error.field:
            raise BadInput.of(f"{where}.{error.field}", error.value, error.expected) from None
        raise BadInput(f"{where}: {error}") from None


def _check_any(value: Any, where: str, depth: int = 0) -> None:
    """Raise `BadInput` for NaN or infinity in a value of type Any, and for one that is nested too deeply."""
    if depth > MAX_DEPTH:
        raise BadInput(f"{where[:80]} is nested more than {MAX_DEPTH} levels deep; expected a flatter record")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput.of(where, value, "a finite number")
    for name, item in _inside(value):
        _check_any(item, where + name, depth + 1)


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f".{key}", item) for key, item in cast("dict[str, Any]", value).items())
    elif isinstance(value, list):
        yield from ((f"[{i}]", item) for i, item in enumerate(cast("list[Any]", value)))


def json_schema(kind: Any) -> dict[str, Any]:
    """The JSON Schema of a record, or of a field's kind: what a schema can state of what `parsed` checks."""
    bare, marks = _bare(kind)
    origin, inner = get_origin(bare), get_args(bare)
    if bare is Any:
        return {}
    if origin in (Union, types.UnionType):
        each = [json_schema(k) for k in inner]
        simple = all(set(s) == {"type"} for s in each)
        return {"type": [s["type"] for s in each]} if simple else {"anyOf": each}
    if origin is list or (origin is tuple and inner[-1] is Ellipsis):
        return {"type": "array", "items": json_schema(inner[0])}
    if origin is tuple:
        return {"type": "array", "prefixItems": [json_schema(k) for k in inner], "minItems": len(inner), "items": False}
    if origin is dict:
        return {"type": "object", **({} if inner[1] is Any else {"additionalProperties": json_schema(inner[1])})}
    if origin is Literal or (marks and isinstance(marks[0], Words)):
        return {"enum": list(inner or marks[0].words)}
    if not hasattr(bare, "parse") and (is_dataclass(bare) or hasattr(bare, "_fields")):
        return _object_schema(bare)
    names = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    bounds = [("minimum", marks[0].low, -LARGEST), ("maximum", marks[0].high, LARGEST)] if marks else []
    return {"type": names.get(bare, "string"), **{name: end for name, end, open_ in bounds if end != open_}}


def _object_schema(kind: Any) -> dict[str, Any]:
    known = _fields(kind)
    head = {"schema": {"const": kind.SCHEMA}} if hasattr(kind, "SCHEMA") else {}
    return {
        "type": "object",
        "required": [*head, *(name for name, field in known.items() if field.required)],
        "additionalProperties": False,
        "properties": {**head, **{name: json_schema(field.kind) for name, field in known.items()}},
    }
