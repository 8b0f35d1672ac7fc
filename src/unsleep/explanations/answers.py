"""Reading of a judge's answers: in exactly the required form, or `Nonsense`.

Around the JSON value, only white space, one code fence and, before it, a reasoning block are allowed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from unsleep.explanations.judges import Nonsense
from unsleep.explanations.wording import LEVELS

FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)
"""A Markdown fence around the whole answer."""

LONGEST = 600
"""Maximum length of an explanation, in characters."""

UNCLEAR = "unclear"
"""Class of a feature whose explanation does not say enough."""


def only_json(text: str) -> Any:
    """The JSON value of an answer."""
    said = text.strip()
    if said.startswith("<think>") and "</think>" in said:
        said = said.partition("</think>")[2].strip()
    if fenced := FENCE.fullmatch(said):
        said = fenced[1].strip()
    try:
        return json.loads(said, parse_constant=_no_constant, object_pairs_hook=_each_once)
    except (ValueError, RecursionError):
        raise Nonsense("it was not one JSON value and nothing else") from None


def _no_constant(_: str) -> Any:
    """Refuse NaN and infinity."""
    raise Nonsense("it held NaN or infinity")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Nonsense("it named something twice")
    return found


def explanation(text: str) -> str:
    """The text of `{"explanation": "…"}`, on one line."""
    found = only_json(text)
    if not isinstance(found, dict) or list(cast("dict[str, Any]", found)) != ["explanation"]:
        raise Nonsense('it was not an object with "explanation" alone')
    said: Any = found["explanation"]
    words = " ".join(said.split()) if isinstance(said, str) else ""
    if not words:
        raise Nonsense("the explanation was empty or no text")
    if len(words) > LONGEST:
        raise Nonsense(f"the explanation was longer than {LONGEST} characters")
    return words.encode("utf-8", "replace").decode()


def decisions(n: int) -> Callable[[str], list[bool]]:
    """Reader of a list of `n` numbers, 1 or 0."""

    def read(text: str) -> list[bool]:
        found = _list(only_json(text), n)
        if any(type(item) is not int or item not in (0, 1) for item in found):
            raise Nonsense("it held something else than the numbers 1 and 0")
        return [item == 1 for item in found]

    return read


def activations(sizes: Sequence[int]) -> Callable[[str], list[list[float]]]:
    """Reader of an object of token → activation per text, as activations at all tokens; `sizes` are tokens per text."""

    def read(text: str) -> list[list[float]]:
        found = _list(only_json(text), len(sizes))
        return [_levels(item, size) for item, size in zip(found, sizes, strict=True)]

    return read


def _levels(found: Any, size: int) -> list[float]:
    if not isinstance(found, dict):
        raise Nonsense("an item of the list was not an object")
    out = [0.0] * size
    for key, level in cast("dict[str, Any]", found).items():
        if not (key.isascii() and key.isdecimal() and len(key) < 7 and int(key) < size):
            raise Nonsense("it named a token that is not in the text")
        if isinstance(level, bool) or not isinstance(level, int | float) or not 0 <= level <= LEVELS:
            raise Nonsense(f"an activation was not a number from 0 to {LEVELS}")
        out[int(key)] = float(level)
    return out


def labels(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Reader of a list of names of classes, or of `unclear` alone."""

    def read(text: str) -> tuple[str, ...]:
        found = _list(only_json(text), None)
        if not found or any(name not in (*known, UNCLEAR) for name in found):
            raise Nonsense("it was not a list of names of the classes")
        if len(set(found)) < len(found) or (UNCLEAR in found and len(found) > 1):
            raise Nonsense("it named a class twice, or unclear and another")
        return tuple(found)

    return read


def _list(found: Any, n: int | None) -> list[Any]:
    if not isinstance(found, list):
        raise Nonsense("it was not a list")
    items = cast("list[Any]", found)
    if n is not None and len(items) != n:
        raise Nonsense(f"the list had {len(items)} items instead of {n}")
    return items
