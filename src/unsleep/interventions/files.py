"""Interventions on disk: a self-contained folder with the dictionaries and tensors that they need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unsleep.base import records, store
from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import load_dictionary, save_dictionary
from unsleep.interventions.features import Edit
from unsleep.interventions.intervention import Intervention
from unsleep.interventions.passes import TokenRule
from unsleep.interventions.steering import Operator, Steering
from unsleep.interventions.subspaces import Projection

MARK = "edit.json"
"""File that marks an edit's folder."""


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
        parts = [_written(each, scratch, number) for number, each in enumerate(edits)]
        card = {"schema": "unsleep.edit/1", "edits": parts, "chosen_on": sorted(chosen_on)}
        store.write_json(scratch / MARK, {**card, "provenance": provenance or {}})
    return folder


def _written(each: Intervention, scratch: Path, number: int) -> dict[str, Any]:
    """Write an intervention's tensors; returns its entry."""
    match each:
        case Edit():
            dictionary = each.dictionary.to(torch.bfloat16)
            if not isinstance(dictionary, Coder):
                raise BadInput(f"edit at {each.site}: its dictionary cannot be written")
            save_dictionary(dictionary, scratch / str(each.site))
            names = {"error": each.error, "dictionary": str(each.site)}
            return {"site": str(each.site), "removed": list(each.removed), **names}
        case Projection():
            name = f"{each.site}.safetensors"
            store.write_tensors(scratch / name, {key: tensor.float() for key, tensor in each.tensors.items()})
            sinks = None if math.isinf(each.sink_norm) else each.sink_norm
            return {"site": str(each.site), "subspace": name, "model": each.model, "sink_norm": sinks}
        case Steering():
            name = f"steering-{number}.safetensors"
            store.write_tensors(scratch / name, {str(site): vector.float() for site, vector in each.vectors.items()})
            how = (each.model, each.operator, each.coefficient, each.tokens, each.layers, each.keep_norm)
            return records.plain(SteeringEntry(name, *how))
        case _:
            raise BadInput(f"a {type(each).__name__.lower()} cannot be saved; expected edits, projections or steering")


def load_edit(folder: str | Path) -> tuple[list[Intervention], frozenset[str]]:
    """Read the result of `save_edit`, and the digests of the prompts that it was chosen on.

    Raises `BadInput` naming what is invalid.
    """
    folder = Path(folder)
    path = folder / MARK
    card = store.read_record(path, "unsleep.edit/1", {"edits": list, "chosen_on": list[str]})
    edits = [_read(folder, entry, f"{path}: edits[{i}]") for i, entry in enumerate(card["edits"])]
    return edits, frozenset(card["chosen_on"])


def _read(folder: Path, entry: Any, where: str) -> Intervention:
    if isinstance(entry, dict) and "subspace" in entry:
        part = store.fields_of(entry, {"site": str, "subspace": str, "model": str}, where)
        with store.reading(folder / MARK):
            return _load_projection(folder, part)
    if isinstance(entry, dict) and "vectors" in entry:
        with store.reading(folder / MARK):
            return _load_steering(folder, records.read(SteeringEntry, entry, where))
    kinds = {"site": str, "removed": list[int], "error": str, "dictionary": str}
    part = store.fields_of(entry, kinds, where)
    with store.reading(folder / MARK):
        dictionary = load_dictionary(store.inside(folder, part["dictionary"], "dictionary"))
        return Edit(Site.parse(part["site"]), dictionary, tuple(part["removed"]), part["error"])


def _load_steering(folder: Path, part: SteeringEntry) -> Steering:
    vectors = store.read_tensors(store.inside(folder, part.vectors, "vectors"))
    named = {Site.parse(site): vector for site, vector in vectors.items()}
    how = (part.operator, part.coefficient, part.tokens, part.layers, part.keep_norm, part.model)
    return Steering(named, *how)


def _load_projection(folder: Path, part: dict[str, Any]) -> Projection:
    tensors = store.read_tensors(store.inside(folder, part["subspace"], "subspace"), {"basis": (None, None)})
    sinks = part.get("sink_norm")
    if sinks is not None and (isinstance(sinks, bool) or not isinstance(sinks, int | float)):
        raise BadInput(f"edit at {part['site']}: sink_norm is {sinks!r}; expected a number or null")
    return Projection(
        Site.parse(part["site"]),
        tensors["basis"],
        tensors.get("center"),
        part["model"],
        tensors.get("reads"),
        math.inf if sinks is None else float(sinks),
    )
