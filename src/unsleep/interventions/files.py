"""Interventions on disk: a self-contained folder with the dictionaries and tensors that they need."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from unsleep.base import records, store
from unsleep.interventions.intervention import Entry, Intervention, as_interventions

MARK = "edit.json"
"""File that marks an edit's folder."""


@dataclass(frozen=True)
class EditRecord:
    """edit.json."""

    SCHEMA: ClassVar = "unsleep.edit/1"

    edits: tuple[Any, ...]
    """One `Entry` each."""
    chosen_on: tuple[str, ...]
    provenance: dict[str, Any]


def save_edit(
    edits: Intervention | Sequence[Intervention],
    folder: str | Path,
    *,
    chosen_on: Iterable[str] = (),
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Write one intervention or several, with the dictionaries and tensors that they need.

    `chosen_on` are digests of the prompts that the edit was chosen on: an evaluation refuses them. An earlier edit in
    the folder is replaced; raises `BadInput` where it contains something else, or for a kind without an `Entry`.
    """
    folder = Path(folder)
    with store.new_folder(folder, replace=MARK) as scratch:
        entries = [each.saved(scratch, number) for number, each in enumerate(as_interventions(edits))]
        parts = tuple(records.plain(entry) for entry in entries)
        records.save(EditRecord(parts, tuple(sorted(chosen_on)), provenance or {}), scratch / MARK)
    return folder


def load_edit(folder: str | Path) -> tuple[list[Intervention], frozenset[str]]:
    """Read the result of `save_edit`, and the digests of the prompts that it was chosen on.

    Raises `BadInput` naming what is invalid.
    """
    folder = Path(folder)
    card = records.load(EditRecord, folder / MARK)
    with store.reading(folder / MARK):
        entries = [records.parsed_as_one(_entries(), entry, f"edit: edits[{i}]") for i, entry in enumerate(card.edits)]
        return [entry.load(folder) for entry in entries], frozenset(card.chosen_on)


@cache
def _entries() -> tuple[type[Entry], ...]:
    """The kinds of entries, in the files of this room."""
    room = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(import_module(room).__path__):
        import_module(f"{room}.{module.name}")
    return tuple(sorted(Entry.__subclasses__(), key=lambda kind: kind.__name__, reverse=True))
