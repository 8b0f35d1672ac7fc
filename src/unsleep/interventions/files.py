"""Interventions on disk: a self-contained folder with the dictionaries and tensors that they need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from unsleep.base import records, store
from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import load_dictionary, save_dictionary
from unsleep.interventions.features import Edit, ErrorRule
from unsleep.interventions.intervention import Intervention
from unsleep.interventions.passes import TokenRule
from unsleep.interventions.steering import Operator, Steering
from unsleep.interventions.subspaces import Projection

MARK = "edit.json"
"""File that marks an edit's folder."""


@dataclass(frozen=True)
class EditEntry:
    """Entry of edit.json for an `Edit`."""

    site: Site
    removed: tuple[int, ...]
    error: ErrorRule
    dictionary: str
    """Its folder."""


@dataclass(frozen=True)
class ProjectionEntry:
    """Entry of edit.json for a `Projection`."""

    site: Site
    subspace: str
    """The file that holds it."""
    model: str
    sink_norm: float | None


@dataclass(frozen=True)
class SteeringEntry:
    """Entry of edit.json for a `Steering`."""

    vectors: str
    """File of the vectors, by Site."""
    model: str
    operator: Operator
    coefficient: float
    tokens: TokenRule = "all"
    layers: tuple[int, int] | None = None
    keep_norm: bool = False


Entry = ProjectionEntry | SteeringEntry | EditEntry


@dataclass(frozen=True)
class EditRecord:
    """edit.json."""

    SCHEMA: ClassVar = "unsleep.edit/1"

    edits: tuple[Entry, ...]
    chosen_on: tuple[str, ...]
    provenance: dict[str, Any]


def save_edit(
    edits: Sequence[Intervention],
    folder: str | Path,
    *,
    chosen_on: Iterable[str] = (),
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Write edits, projections and steering, with the dictionaries and tensors that they need.

    `chosen_on` are digests of the prompts that the edit was chosen on: an evaluation refuses them. An earlier edit in
    the folder is replaced; raises `BadInput` where it contains something else, or for an unsupported intervention.
    """
    folder = Path(folder)
    with store.new_folder(folder, replace=MARK) as scratch:
        parts = tuple(_written(each, scratch, number) for number, each in enumerate(edits))
        records.save(EditRecord(parts, tuple(sorted(chosen_on)), provenance or {}), scratch / MARK)
    return folder


def _written(each: Intervention, scratch: Path, number: int) -> Entry:
    """Write an intervention's tensors; returns its entry."""
    match each:
        case Edit():
            dictionary = each.dictionary.to(torch.bfloat16)
            if not isinstance(dictionary, Coder):
                raise BadInput(f"edit at {each.site}: its dictionary cannot be written")
            save_dictionary(dictionary, scratch / str(each.site))
            return EditEntry(each.site, each.removed, each.error, str(each.site))
        case Projection():
            name = f"{each.site}.safetensors"
            store.write_tensors(scratch / name, {key: tensor.float() for key, tensor in each.tensors.items()})
            sinks = None if math.isinf(each.sink_norm) else each.sink_norm
            return ProjectionEntry(each.site, name, each.model, sinks)
        case Steering():
            name = f"steering-{number}.safetensors"
            store.write_tensors(scratch / name, {str(site): vector.float() for site, vector in each.vectors.items()})
            how = (each.model, each.operator, each.coefficient, each.tokens, each.layers, each.keep_norm)
            return SteeringEntry(name, *how)
        case _:
            raise BadInput(f"a {type(each).__name__.lower()} cannot be saved; expected edits, projections or steering")


def load_edit(folder: str | Path) -> tuple[list[Intervention], frozenset[str]]:
    """Read the result of `save_edit`, and the digests of the prompts that it was chosen on.

    Raises `BadInput` naming what is invalid.
    """
    folder = Path(folder)
    card = records.load(EditRecord, folder / MARK)
    with store.reading(folder / MARK):
        return [_read(folder, entry) for entry in card.edits], frozenset(card.chosen_on)


def _read(folder: Path, entry: Entry) -> Intervention:
    match entry:
        case EditEntry():
            dictionary = load_dictionary(store.inside(folder, entry.dictionary, "dictionary"))
            return Edit(entry.site, dictionary, entry.removed, entry.error)
        case ProjectionEntry():
            tensors = store.read_tensors(store.inside(folder, entry.subspace, "subspace"), {"basis": (None, None)})
            sinks = math.inf if entry.sink_norm is None else entry.sink_norm
            parts = tensors["basis"], tensors.get("center"), entry.model, tensors.get("reads"), sinks
            return Projection(entry.site, *parts)
        case SteeringEntry():
            vectors = store.read_tensors(store.inside(folder, entry.vectors, "vectors"))
            named = {Site.parse(site): vector for site, vector in vectors.items()}
            how = (entry.operator, entry.coefficient, entry.tokens, entry.layers, entry.keep_norm, entry.model)
            return Steering(named, *how)
