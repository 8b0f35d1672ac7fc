"""Merges of two models as files: W(α) = W_A + α (W_B − W_A), and other points between and beyond them.

1. The models' files are located. Two models over one base, at least one of which is a LoRA, give an adapter
   (`merge_adapters`); any other adapter is merged into its base first.
2. Models that do not match are refused, and every tensor gets its sources and its coefficient (`merge_plan`).
3. The weights are streamed from file to file, resumably (`merge_stream`), or mergekit computes them (`merge_kit`).
4. Tokenizer, templates and settings are the first model's. The folder is put in its place when it is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

from unsleep.base import records, store
from unsleep.base.context import resumable
from unsleep.core import BadInput
from unsleep.mixing.merge_adapters import Lora, adapters_of, module_list, write_adapter
from unsleep.mixing.merge_config import BY_MERGEKIT, REST, MergeConfig, layer_list
from unsleep.mixing.merge_disk import FileHashes
from unsleep.mixing.merge_files import Checkpoint, text_layers
from unsleep.mixing.merge_kit import as_yaml, check_installed, name_in_mergekit, run_mergekit
from unsleep.mixing.merge_plan import Plan, plan
from unsleep.mixing.merge_record import CARD, MARK, YAML, LayerRow, MergeRecord, card
from unsleep.mixing.merge_sources import Side, copy_small, weights_of
from unsleep.mixing.merge_stream import Tally, sync_folder, write_parts
from unsleep.models.sources import CONFIG, INDEX

MODEL, JOURNAL = "model", "journal.json"
"""The folder that is being written and the journal, beside the result's place."""


def merge(first: str | Path, second: str | Path, out: str | Path, config: MergeConfig = MergeConfig()) -> MergeRecord:
    """Merge two models into a checkpoint, or into an adapter where both are one base with and without LoRAs.

    α = 0 and 1 give the models' own bytes; any other weight is computed in float32 or float64 and rounded once.
    Interrupted, even by a kill, the same call goes on where it ended. Names are those of `load_model`.

    Raises:
        BadInput: different architectures, configs, weights or vocabularies; quantised weights; NaN or infinite results;
            an unknown layer; mergekit missing; no room; a folder that exists and is no merge.
        Refused: an adapter cannot be merged into its base faithfully.
    """
    out = Path(out)
    store.check_place(out, MARK)
    if config.method in BY_MERGEKIT:
        check_installed(config.method)
    names = [str(first), str(second), *([config.base] if config.method != "linear" and config.base else [])]
    sides = [Side.open(name, config.base) for name in names]
    for side in sides:
        if side.is_in(out):
            raise BadInput(f"--out {out} is a part of {side.name}; choose another folder")
    identity = [side.identity for side in sides]
    with resumable(out, identity, asdict(config)) as steps:
        hashes = FileHashes(weights_of(sides))
        loras = adapters_of(sides) if config.method not in BY_MERGEKIT else None
        made = _weights(sides, config, steps, hashes) if loras is None else _adapter(loras, sides, config, steps)
        hashed = hashes.finished()
        if identity != [side.identity for side in sides]:
            raise BadInput("the files of a model changed during the merge; run it again")
        record = _record(made, sides, config, hashed)
        _finish(steps / MODEL, made, record)
        store.put_in_place(steps / MODEL, out)
        sync_folder(out.parent)
    return record


class _Made(NamedTuple):
    form: Literal["weights", "adapter", "mergekit"]
    dtype: str
    home: str | None
    """The list of modules that are the layers."""
    alphas: Mapping[str, float] = {}
    tallies: Mapping[str, Tally] = {}
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None
    """config.json, which is written last."""


def _adapter(loras: Sequence[Lora | None], sides: Sequence[Side], config: MergeConfig, steps: Path) -> _Made:
    """Write the merge of models over one base."""
    folder = steps / MODEL
    store.remove(folder)
    folder.mkdir()
    home = module_list(sides[0].parts[0]) if config.alpha_layers else None
    return _Made("adapter", write_adapter(loras, sides, config, home, folder), home)


def _weights(sides: Sequence[Side], config: MergeConfig, steps: Path, hashes: FileHashes) -> _Made:
    """Write the merge of whole checkpoints."""
    folder = steps / MODEL
    whole = [Checkpoint.open(side.whole(steps / f"whole-{number}")) for number, side in enumerate(sides)]
    first, second, *base = whole
    planned = plan(first, second, base[0] if base else None, config)
    layers = text_layers(first.config)
    dtype = str(planned.dtype).removeprefix("torch.")
    stored = (tensor.name for tensor in first.tensors.values())
    home = layer_list(stored, layers, first.name) if config.alpha_layers else None
    if config.method in BY_MERGEKIT:
        places = [str(each.files.place.resolve()) for each in whole]
        run_mergekit(as_yaml(places, config, home, dtype), folder, config)
        copy_small(first.files.place, folder, leave=(CONFIG,))
        return _Made("mergekit", dtype, home, notes=planned.notes)
    _check_room(planned, folder)
    tallies = write_parts(planned.parts, folder, steps / JOURNAL, hashes)
    if planned.shards:
        size = sum(job.size for part in planned.parts for job in part.jobs)
        store.write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(planned.shards)})
    copy_small(first.files.place, folder, leave=(CONFIG,))
    return _Made("weights", dtype, home, config.alphas(layers), tallies, planned.notes, planned.config)


def _check_room(planned: Plan, folder: Path) -> None:
    """Raise `BadInput` where the disk has no room for what is still to be written."""
    held = sum(path.stat().st_size for path in folder.glob("*")) if folder.is_dir() else 0
    needed = sum(part.size for part in planned.parts) - held
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise BadInput(
            f"the merge needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f}; make room, or give another --out"
        )


def _record(made: _Made, sides: Sequence[Side], config: MergeConfig, hashes: Mapping[Path, str]) -> MergeRecord:
    order = sorted(made.tallies, key=lambda layer: (layer == REST, len(layer), layer))
    rows = [(layer, made.alphas[layer], made.tallies[layer]) for layer in order]
    notes = [f"{side.name}: the base is {side.base}, as given" for side in sides if side.base is not None]
    return MergeRecord(
        form=made.form,
        method=config.method,
        alpha=config.alpha,
        alpha_layers=config.alpha_layers,
        density=config.density if config.method in BY_MERGEKIT else None,
        dtype=made.dtype,
        models=tuple(side.recorded(hashes) for side in sides),
        layers=tuple(LayerRow(layer, a, t.elements, t.differing, t.changed) for layer, a, t in rows),
        notes=(*notes, *made.notes),
        mergekit=as_yaml([name_in_mergekit(side.parts) for side in sides], config, made.home, made.dtype),
        provenance=store.provenance(config.seed if config.method in BY_MERGEKIT else None),
    )


def _finish(folder: Path, made: _Made, record: MergeRecord) -> None:
    """Write all other files, the config last, and sync everything; what a killed run left half written is removed."""
    for left in folder.glob(".*"):
        store.remove(left)
    records.save(record, folder / MARK)
    store.write_text(folder / CARD, card(record))
    store.write_text(folder / YAML, record.mergekit)
    if made.settings is not None:
        store.write_json(folder / CONFIG, made.settings)
    store.share(folder, [folder, *folder.rglob("*")])
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
