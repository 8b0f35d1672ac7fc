"""Heat map with tooltips, and the same values as a table.

Shades are steps of one hue that also differ in lightness, so that they are distinguishable without colour; a
diverging scale has two hues, blue above and orange below. Cells show their value where there is room.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from unsleep.core import BadInput
from unsleep.pages import svg, text
from unsleep.pages.svg import el

STEPS = 10
"""Shades per hue, from light to dark."""

WIDTH = 900
"""Width of the SVG, in its own units."""

ROW = 24
"""Row height."""

LETTER = 6.3
"""Approximate width of a label's letter."""

LABEL_LIMIT = 32
"""Maximum characters of a label."""

ROOMY = 34.0
"""Minimum width of a cell that shows its value."""


def heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    name: str,
    unit: str = "",
    ends: tuple[float, float] | None = None,
    middle: float | None = None,
    notes: Sequence[Sequence[str]] | None = None,
) -> Markup:
    """A heat map with its legend and, folded beneath it, its table.

    Args:
        rows: labels from top to bottom.
        columns: labels from left to right.
        values: one list per row; `None` where nothing was measured.
        title: description, also for screen readers.
        name: unique on the page.
        unit: suffix of every value.
        ends: range of the scale; default from the smallest to the largest value. Pass that of a rate, (0, 1), or small
            differences look large. Values beyond are clipped.
        notes: text after each value in tooltip and table, such as its interval.
        middle: centre of a diverging scale, which is then symmetric around it.

    Raises `BadInput` where `values` does not match `rows` and `columns`, or all are missing.
    """
    if len(values) != len(rows) or any(len(line) != len(columns) for line in values):
        raise BadInput(
            f"heat map {name!r} has {len(values)} lines of {sorted({len(line) for line in values})} values; "
            f"expected {len(rows)} of {len(columns)}"
        )
    known = [v for line in values for v in line if v is not None]
    if not known:
        raise BadInput(f"heat map {name!r} has no values; expected at least one")
    low, high = ends or (min(known), max(known))
    if middle is not None:
        reach = max(abs(low - middle), abs(high - middle))
        low, high = middle - reach, middle + reach
    rows, columns = ([text.clip(label, LABEL_LIMIT) for label in labels] for labels in (rows, columns))
    diverging = middle is not None
    notes = notes or [[""] * len(columns) for _ in rows]
    drawing = _drawing(rows, columns, values, _words(values, notes, unit), (low, high), (title, name, unit), diverging)
    table = _table(rows, columns, _words(values, notes, ""), title, unit)
    folded = el("details", el("summary", "The numbers as a table"), table, class_="numbers")
    return el("figure", el("figcaption", el("b", title)), drawing, _legend(low, high, unit, diverging), folded)


def _drawing(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    words: Sequence[Sequence[str | None]],
    ends: tuple[float, float],
    said: tuple[str, str, str],
    diverging: bool,
) -> Markup:
    title, name, unit = said
    left = 14 + LETTER * max(len(label) for label in rows)
    cell = min((WIDTH - left) / len(columns), 80.0)
    turned = LETTER * max(len(label) for label in columns) > cell - 4
    every = 1 if turned or cell >= 14 else 2
    top = 14 + (LETTER * 0.75 * max(len(label) for label in columns) if turned else 10)
    counts = ends[1] > 1 and all(value == round(value) for line in values for value in line if value is not None)
    parts: list[Markup] = []
    for j, label in enumerate(columns):
        x = left + (j + 0.5) * cell
        if turned and (cell >= 10 or j % 2 == 0):
            spin = f"rotate(-48 {x:.1f} {top - 6:.1f})"
            parts.append(el("text", label, x=x, y=top - 6, transform=spin))
        elif not turned and j % every == 0:
            parts.append(el("text", label, x=x, y=top - 6, text_anchor="middle"))
    for i, label in enumerate(rows):
        y = top + i * ROW
        parts.append(el("text", label, x=left - 8, y=y + ROW / 2 + 4, text_anchor="end"))
        for j, value in enumerate(values[i]):
            shown = words[i][j] or "not measured"
            box = {"x": left + j * cell, "y": float(y), "width": cell - 1, "height": float(ROW - 1)}
            shade, deep = _shade(value, *ends, diverging)
            inner: list[Markup] = [el("title", f"{label}, {columns[j]}: {shown}")]
            inner.append(el("rect", **box, class_=shade))
            if value is not None and cell >= ROOMY:
                at = left + (j + 0.5) * cell - 0.5
                ink = "on-deep" if deep else "on-faint"
                inner.append(
                    el("text", _short(value, counts), x=at, y=y + ROW / 2 + 3.5, text_anchor="middle", class_=ink)
                )
            parts.append(el("g", *inner, class_="cell"))
    right = left + cell * len(columns) + (40 if turned else 0)
    size = round(max(right, 240))
    box = f"0 0 {size} {top + len(rows) * ROW + 2:.0f}"
    about = f"{len(rows)} by {len(columns)} figures from {_number(ends[0], unit)} to {_number(ends[1], unit)}"
    return svg.figure(title, about, name, *parts, viewBox=box, width=size, class_="heat")


def _words(
    values: Sequence[Sequence[float | None]], notes: Sequence[Sequence[str]], unit: str
) -> list[list[str | None]]:
    """Each value with unit and note; `None` where nothing was measured."""
    return [
        [None if value is None else f"{_number(value, unit)} {note}".strip() for value, note in zip(*pair, strict=True)]
        for pair in zip(values, notes, strict=True)
    ]


def _shade(value: float | None, low: float, high: float, diverging: bool) -> tuple[str, bool]:
    """Colour class of a cell, and whether its shade is dark."""
    if value is None:
        return "heat-none", False
    at = min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5
    if diverging:
        step = round(abs(2 * at - 1) * STEPS)
        return f"heat-{'up' if at >= 0.5 else 'down'}-{step}", step > STEPS * 0.6
    step = round(at * STEPS)
    return f"heat-up-{step}", step > STEPS * 0.6


def _legend(low: float, high: float, unit: str, diverging: bool) -> Markup:
    """The shades with the values at both ends."""
    shades = [f"heat-up-{i}" for i in range(STEPS + 1)]
    if diverging:
        shades = [f"heat-down-{i}" for i in range(STEPS, 0, -1)] + shades
    bars = [el("rect", x=i * 10, y=0, width=10, height=10, class_=shade) for i, shade in enumerate(shades)]
    size = 10 * len(shades)
    scale = el("svg", *bars, viewBox=f"0 0 {size} 10", width=size, height=10, class_="scale", aria_hidden="true")
    return el("p", _number(low, unit), " ", scale, " ", _number(high, unit), class_="heat-legend")


def _table(
    rows: Sequence[str], columns: Sequence[str], words: Sequence[Sequence[str | None]], title: str, unit: str
) -> Markup:
    head = el("tr", el("th", unit, scope="col"), *(el("th", c, scope="col", class_="num") for c in columns))
    lines = [
        el(
            "tr",
            el("th", label, scope="row"),
            *(el("td", "–" if said is None else said, class_="num") for said in line),
        )
        for label, line in zip(rows, words, strict=True)
    ]
    table = el("table", el("thead", head), el("tbody", *lines), class_="grid")
    return el("div", table, class_="scroll", tabindex="0", role="region", aria_label=title)


def _number(value: float, unit: str) -> str:
    return f"{text.number(value)} {unit}".strip()


def _short(value: float, is_count: bool) -> str:
    return text.number(value) if is_count or abs(value) >= 10 else text.decimals(round(value, 2), 2)
