"""Registry of pages: every module of this package that defines a `Page` is found automatically."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from unsleep.base import records, store
from unsleep.core import BadInput
from unsleep.pages import text


@dataclass(frozen=True)
class Page:
    """A page and its record: `patch.json` becomes `patch.html`."""

    name: str
    """Stem of both files."""
    kind: str
    """Kind of result, in a word or two."""
    record: Any
    """The record's dataclass, which validates it."""
    draw: Callable[[dict[str, Any]], str]
    """Renders the record's JSON values, with hidden characters made visible, to HTML."""
    order: int = 0
    """Precedence among several records in a folder, lowest first."""

    def __call__(self, record: Any) -> str:
        """HTML page of a record's JSON value; raises `BadInput` naming the path where it is invalid."""
        records.read(self.record, record, self.name)
        return self.draw(text.visible_value(dict(record)))

    def is_of(self, folder: Path) -> bool:
        """True if the folder contains the page's record."""
        return (folder / f"{self.name}.json").exists()

    def html(self, folder: Path) -> str:
        """HTML page of a folder; raises `BadInput` naming the file where it cannot be read."""
        source = folder / f"{self.name}.json"
        with store.reading(source):
            try:
                return self(store.read_json(source))
            except (OSError, RecursionError) as error:
                raise BadInput(f"{source} cannot be read ({error}); write it again") from None


@cache
def pages() -> tuple[Page, ...]:
    """Every page of this package, by precedence."""
    room = __name__.rpartition(".")[0]
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    members = [member for name in names for member in vars(import_module(f"{room}.{name}")).values()]
    found = {member.name: member for member in members if isinstance(member, Page)}
    return tuple(sorted(found.values(), key=lambda page: (page.order, page.name)))
