"""Sections of drawings and tables: what a page and its LaTeX have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup


class Table(NamedTuple):
    """A table: name, column heads, number of text columns, and cells."""

    name: str
    head: Sequence[str]
    words: int
    rows: Sequence[Sequence[str]]


class Block(NamedTuple):
    """A section."""

    anchor: str
    name: str
    lead: str
    charts: Sequence[tuple[str, Markup]] = ()
    """Captions and drawings."""
    maps: Sequence[Markup] = ()
    """Drawings with their own caption, legend and folded table."""
    tables: Sequence[Table] = ()


class Paper(NamedTuple):
    """A record for LaTeX: formatted values, each with a name that a sentence can quote, and sections."""

    title: str
    lead: str
    numbers: Mapping[str, str]
    blocks: Sequence[Block]
