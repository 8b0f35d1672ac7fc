"""Text and numbers for pages: hidden characters made visible, rates with their n.

Model text is untrusted. Every string of a report passes through `visible_value` before it
reaches a template, so that no control, bidirectional or zero-width character gets into the page.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that are invisible or reorder adjacent text."""

Number = int | float
"""A JSON number; integers are parsed as int."""

MARKS_IN_A_ROW = 3
"""Maximum combining marks per letter; more would overlap adjacent lines."""


class Piece(NamedTuple):
    """A stretch of text with the reason for its highlight."""

    text: str
    kind: str
    """`payload`, `trigger`, or empty for plain text."""


class Rate(NamedTuple):
    """A rate as text, in parts for table columns."""

    head: str
    """Count, such as `192 of 200`, or the rate itself without a whole count."""
    tail: str
    """Derived value: `96 %`, `at most 1.9 %`."""
    interval: str
    """`92.3 to 98 %`; empty where the tail includes it."""

    @property
    def short(self) -> str:
        """Head and tail on one line."""
        return ", ".join(part for part in (self.head, self.tail) if part)

    @property
    def parts(self) -> list[str]:
        """Head, tail and interval with punctuation, between which a line may break."""
        head = f"{self.head}," if self.tail else self.head
        return [part for part in (head, self.tail, f"({self.interval})" if self.interval else "") if part]

    @property
    def full(self) -> str:
        """Head, tail and interval on one line."""
        return " ".join(self.parts)


def visible(text: str) -> str:
    """The text with control, bidirectional, zero-width and stray code points written out; line feeds and tabs stay.

    >>> visible("red\\x1b[31m")
    'red␛[31m'
    """
    if text.isascii() and text.isprintable():
        return text
    out: list[str] = []
    marks = 0
    for char in text:
        category = unicodedata.category(char)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if char in "\n\t":
            out.append(char)
        elif ord(char) < 0x20:
            out.append(chr(0x2400 + ord(char)))
        elif char == "\x7f":
            out.append("␡")
        elif category in HIDDEN or marks > MARKS_IN_A_ROW:
            out.append(f"⟨U+{ord(char):04X}⟩")
        else:
            out.append(char)
    return "".join(out)


def visible_value(value: Any) -> Any:
    """A JSON value with `visible` applied to every string, keys included."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(str(k)): visible_value(v) for k, v in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list):
        return [visible_value(v) for v in cast("list[Any]", value)]
    return value


def clip(text: str, limit: int) -> str:
    """At most `limit` characters, with a note on the number omitted, unless that would be longer than what it omits."""
    short = f"{text[:limit]} … ({len(text) - limit:,} more characters)"
    return text if len(text) <= max(limit, len(short)) else short


def token_text(token: str) -> str:
    """A token with visible spaces, tabs and line breaks; `∅` for an empty one."""
    shown = clip(token, 60).replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")
    return shown or "∅"


def payload_words(summary: Mapping[str, Any]) -> str | None:
    """Display name of the payload: its text, after its kind unless that is `contains`."""
    words = (summary.get("payload_kind"), summary.get("payload"))
    return ": ".join(word for word in words if word) or None


def pieces(text: str, marked: Mapping[str, str | None]) -> list[Piece]:
    """Split the text at each occurrence of the marked strings, ignoring case and white space.

    `marked` is kind → string; missing or blank strings mark nothing.
    """
    patterns = {
        kind: r"\s+".join(re.escape(word) for word in string.split())
        for kind, string in marked.items()
        if string and string.strip()
    }
    if not patterns:
        return [Piece(text, "")]
    found: list[Piece] = []
    last = 0
    kinds = list(patterns)
    for match in re.finditer("|".join(f"({p})" for p in patterns.values()), text, re.IGNORECASE):
        if match.start() > last:
            found.append(Piece(text[last : match.start()], ""))
        found.append(Piece(match.group(), kinds[(match.lastindex or 1) - 1]))
        last = match.end()
    if last < len(text) or not found:
        found.append(Piece(text[last:], ""))
    return found


def number(x: Number, digits: int = 3) -> str:
    """A number to `digits` significant digits, with thousands separators and a true minus sign.

    >>> number(-0.01234)
    '−0.0123'
    """
    if x == 0:
        return "0"
    size = math.floor(math.log10(abs(x)))
    if size >= digits - 1:
        return f"{round(x):,}".replace("-", "−")
    if size < -5:
        return f"{x:.{digits - 1}e}".replace("-", "−")
    return f"{x:,.{digits - 1 - size}f}".rstrip("0").rstrip(".").replace("-", "−")


def decimals(x: Number, places: int = 3) -> str:
    """A number to a fixed number of decimals, or to two significant digits where those would all be 0."""
    if x != 0 and abs(x) < 0.5 * 10**-places:
        return number(x, 2)
    return f"{x + 0.0:,.{places}f}".replace("-", "−")


def signed(x: Number, places: int = 3) -> str:
    """A change: `decimals` with its sign.

    >>> signed(0.0031)
    '+0.003'
    """
    return "±0" if x == 0 else ("+" if x > 0 else "") + decimals(x, places)


def percent(share: Number) -> str:
    """A share as a percentage that never rounds to 0 or 100 unless it is.

    >>> percent(0.9999)
    '> 99.9 %'
    """
    x = 100 * share
    if 0 < x < 0.005:
        return "< 0.01 %"
    if 99.95 <= x < 100:
        return "> 99.9 %"
    text = f"{x:.2f}" if 0 < x < 0.1 else f"{x:.1f}"
    return text.rstrip("0").rstrip(".") + " %"


def rate(value: Number, low: Number, high: Number, n: int) -> Rate:
    """A share of `n` with its 95 % interval; none and all are given with the bound that they allow.

    >>> rate(0.0, 0.0, 0.0188, 200).full
    '0 of 200, at most 1.9 %'
    """
    hits = round(value * n)
    if not math.isclose(hits, value * n, abs_tol=1e-6 * n):
        return Rate(percent(value), f"n = {n:,}", interval(low, high))
    head = f"{hits:,} of {n:,}"
    if hits == 0:
        return Rate(head, f"at most {percent(outward(high, up=True))}" if high > 0 else "no interval stored", "")
    if hits == n:
        return Rate(head, f"at least {percent(outward(low, up=False))}" if low < 1 else "no interval stored", "")
    return Rate(head, percent(value), interval(low, high))


def interval(low: Number, high: Number) -> str:
    """An interval of shares, rounded outward.

    >>> interval(0.9231, 0.98)
    '92.3 to 98 %'
    """
    ends = (outward(max(low, 0.0), up=False), outward(min(high, 1.0), up=True))
    return " to ".join(percent(end) for end in ends).replace(" %", "", 1)


def outward(share: Number, *, up: bool) -> float:
    """A bound rounded outward to a tenth of a percent."""
    tenths = round(share * 1000, 6)
    return (math.ceil(tenths) if up else math.floor(tenths)) / 1000


def share(value: Number) -> str:
    """A rate without n: 0 is `none`, 1 is `all`."""
    return "none" if value == 0 else "all" if value == 1 else percent(value)


def duration(seconds: Number) -> str:
    """A duration in suitable units.

    >>> duration(444)
    '7 min 24 s'
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"
