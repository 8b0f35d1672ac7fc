"""Registry of pages: every module of this package that defines a `Page` is found automatically."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from unsleep.base import records, store
from unsleep.core import BadInput
from unsleep.pages import text
from unsleep.pages.blocks import Paper

T = TypeVar("T")


@dataclass(frozen=True)
class Page:
    """A page and its record: `patch.json` becomes `patch.html`."""

    name: str
    """Stem of both files, or of the record alone (see `stem`)."""
    kind: str
    """Kind of result, in a word or two."""
    record: Any
    """The record's dataclass, which validates it."""
    draw: Callable[[dict[str, Any]], str]
    """Renders the record's JSON values, with hidden characters made visible, to HTML."""
    order: int = 0
    """Precedence among several records in a folder, lowest first."""
    paper: Callable[[dict[str, Any]], Paper] | None = None
    """Arranges the same values for LaTeX; a page without it has none."""
    stem: str = ""
    """Stem of the HTML file where it is not `name`."""

    @property
    def file(self) -> str:
        """Name of the HTML file."""
        return f"{self.stem or self.name}.html"

    def __call__(self, record: Any) -> str:
        """The whole page of a record, or of what JSON has of it; raises `BadInput` naming a place of another form."""
        return self.draw(self._checked(record))

    def is_of(self, folder: Path) -> bool:
        """True if the folder contains the page's record."""
        return (folder / f"{self.name}.json").exists()

    def html(self, folder: Path) -> str:
        """HTML page of a folder; raises `BadInput` naming the file where it cannot be read."""
        return self.read(folder, self.draw)

    def read(self, folder: Path, use: Callable[[dict[str, Any]], T]) -> T:
        """Use of a folder's record, hidden characters made visible; raises `BadInput` naming the file."""
        source = folder / f"{self.name}.json"
        with store.reading(source):
            try:
                return use(self._checked(store.read_json(source)))
            except (OSError, RecursionError) as error:
                raise BadInput(f"{source} cannot be read ({error}); write it again") from None

    def _checked(self, record: Any) -> dict[str, Any]:
        found = records.plain(record) if isinstance(record, self.record) else record
        records.parsed(self.record, found, self.name)
        return text.visible_value(found)


@cache
def pages() -> tuple[Page, ...]:
    """Every page of this package, by precedence."""
    room = __name__.rpartition(".")[0]
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    members = [member for name in names for member in vars(import_module(f"{room}.{name}")).values()]
    found = {member.name: member for member in members if isinstance(member, Page)}
    return tuple(sorted(found.values(), key=lambda page: (page.order, page.name)))
