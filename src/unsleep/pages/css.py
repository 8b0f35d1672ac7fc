"""The light theme of the pages' style sheets, resolved for one drawing: what a browser does, for paint alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import NamedTuple
from xml.etree.ElementTree import Element

from unsleep.core import BadInput

INHERITED = {
    "color": "#000",
    "fill": "#000",
    "stroke": "none",
    "stroke-width": "1",
    "stroke-dasharray": "none",
    "stroke-linecap": "butt",
    "stroke-linejoin": "miter",
    "fill-opacity": "1",
    "stroke-opacity": "1",
    "font-size": "16px",
    "font-weight": "400",
    "text-anchor": "start",
}
"""Properties of paint that children take over, with their initial values."""

OWN = {"opacity": "1"}
"""Properties that they do not."""

PAPER = {"--page": "#ffffff", "--card": "#ffffff"}
"""Variables whose value in print is another."""

VARIABLE = re.compile(r"var\((--[\w-]+)\)")

Style = Mapping[str, str]
Colour = tuple[float, float, float]
"""Red, green and blue, from 0 to 1."""


class Compound(NamedTuple):
    """A tag, or none, and classes that an element must have."""

    tag: str
    classes: frozenset[str]

    def fits(self, element: Element) -> bool:
        """True if an element has both."""
        return self.tag in ("", element.tag) and self.classes <= set((element.get("class") or "").split())


@dataclass(frozen=True)
class Rule:
    """Declarations for elements under a chain of ancestors."""

    chain: tuple[Compound, ...]
    values: Mapping[str, str]

    @property
    def weight(self) -> tuple[int, int]:
        """Specificity: classes, then tags."""
        return sum(len(c.classes) for c in self.chain), sum(c.tag != "" for c in self.chain)

    def fits(self, path: Sequence[Element]) -> bool:
        """True for the last element of a path from the root."""
        *above, last = self.chain
        if not last.fits(path[-1]):
            return False
        rest = iter(reversed(path[:-1]))
        return all(any(c.fits(element) for element in rest) for c in reversed(above))


@dataclass(frozen=True)
class Sheet:
    """Rules and variables."""

    rules: tuple[Rule, ...]
    variables: Mapping[str, str]

    def style(self, path: Sequence[Element], parent: Style) -> dict[str, str]:
        """Computed paint of the last element of a path, under its parent's."""
        element = path[-1]
        known = INHERITED | OWN
        own = {name: value for name in known if (value := element.get(name)) is not None}
        for rule in self.rules:  # weakest first
            if rule.fits(path):
                own |= {name: self.resolved(value) for name, value in rule.values.items()}
        kept = {name: parent.get(name, first) for name, first in INHERITED.items()}
        return {**kept, **OWN, **{name: value for name, value in own.items() if value != "inherit"}}

    def resolved(self, value: str) -> str:
        """A value without variables, in print."""
        found, known = value, {**self.variables, **PAPER}
        while (match := VARIABLE.search(found)) is not None:
            if match[1] not in known:
                raise BadInput(f"style {value!r} uses {match[1]}, which no style sheet defines")
            found = found.replace(match[0], known[match[1]])
        return found


def parsed(source: str) -> Sheet:
    """The rules of a style sheet that concern paint, without media queries, states and attributes."""
    bare = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    bare = re.sub(r"@[^{}]+\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", bare)
    rules: list[Rule] = []
    variables: dict[str, str] = {}
    for heads, body in re.findall(r"([^{}]+)\{([^{}]*)\}", bare):
        pairs = [part.split(":", 1) for part in body.split(";") if ":" in part]
        values = {name.strip(): value.strip() for name, value in pairs}
        if heads.strip() == ":root":
            variables |= {name: value for name, value in values.items() if name.startswith("--")}
            continue
        paint = {name: value for name, value in values.items() if name in INHERITED or name in OWN}
        for head in heads.split(",") if paint else ():
            if re.fullmatch(r"[\w\s.-]+", head):
                rules.append(Rule(tuple(map(_compound, head.split())), paint))
    return Sheet(tuple(sorted(rules, key=lambda rule: rule.weight)), variables)


def _compound(text: str) -> Compound:
    tag, *classes = text.split(".")
    return Compound(tag, frozenset(classes))


@cache
def sheet() -> Sheet:
    """Every style sheet of the pages as one; the common one comes first."""
    found = sorted(
        (item for item in files("unsleep.pages").iterdir() if item.name.endswith(".css")),
        key=lambda item: (item.name != "page.css", item.name),
    )
    return parsed("\n".join(item.read_text(encoding="utf-8") for item in found))


def colour(value: str, current: str = "#000") -> Colour | None:
    """A colour of the light theme; `None` for no paint. `current` is the value of `color`."""
    value = value.strip()
    if value in ("none", "transparent"):
        return None
    if value == "currentColor":
        return colour(current)
    if value.startswith("#"):
        digits = value[1:] if len(value) > 4 else "".join(2 * digit for digit in value[1:])
        red, green, blue = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
        return red, green, blue
    name, inside = value.partition("(")[::2]
    parts = _arguments(inside.removesuffix(")"))
    if name == "light-dark":
        return colour(parts[0], current)
    if name == "color-mix" and parts[0] == "in oklab":
        return _mixed(parts[1], parts[2], current)
    raise BadInput(f"colour {value!r} of a style sheet is unknown; expected #rrggbb, light-dark() or color-mix()")


def _arguments(text: str) -> list[str]:
    """Arguments of a CSS function, which may be functions themselves."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def _mixed(one: str, other: str, current: str) -> Colour | None:
    """Two colours mixed in Oklab; either may carry its share in percent."""
    shares = [re.fullmatch(r"(.*\S)\s+([\d.]+)%", part, re.DOTALL) for part in (one, other)]
    share = float(shares[0][2]) / 100 if shares[0] else 1 - float(shares[1][2]) / 100 if shares[1] else 0.5
    first, second = (
        colour(found[1] if found else part, current) for found, part in zip(shares, (one, other), strict=True)
    )
    if first is None or second is None:
        return first or second
    mixed = [share * a + (1 - share) * b for a, b in zip(_oklab(first), _oklab(second), strict=True)]
    return _from_oklab(*mixed)


def _oklab(rgb: Colour) -> tuple[float, float, float]:
    """Oklab of a colour in sRGB (Ottosson 2020, "A perceptual color space for image processing")."""
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb)
    long = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)
    middle = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    short = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return (
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    )


def _from_oklab(light: float, a: float, b: float) -> Colour:
    long = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (light - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    red, green, blue = (12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055 for x in linear)
    return min(max(red, 0.0), 1.0), min(max(green, 0.0), 1.0), min(max(blue, 0.0), 1.0)
