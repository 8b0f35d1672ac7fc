"""Models of a merge: their files, hashes, and adapters merged into whole checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsleep.base import store
from unsleep.core import BadInput
from unsleep.mixing.merge_files import weight_files
from unsleep.mixing.merge_record import MARK, MergedModel
from unsleep.models.load import LoadConfig, components, load_model, save_plain
from unsleep.models.sources import ADAPTER_WEIGHTS, INDEX, SMALL, Files


@dataclass(frozen=True)
class Side:
    """One of the models of a merge."""

    name: str
    parts: tuple[Files, ...]
    """A whole checkpoint, then adapters over it."""
    base: str | None = None
    """Base given for its adapter, whose own was not found."""

    @classmethod
    def open(cls, name: str, base: str | None) -> Side:
        """Locate a model's files; `base` takes the place of an adapter's base that is not found.

        Raises `BadInput` as `load_model` does.
        """
        try:
            return cls(name, tuple(components(name)))
        except BadInput:
            try:
                return cls(name, tuple(components(name, LoadConfig(base=base))), base)
            except BadInput:
                pass
            raise

    @property
    def weights(self) -> list[tuple[Path, ...]]:
        """The weight files of each component."""
        return [
            (each.place / ADAPTER_WEIGHTS,)
            if number
            else ((each.place,) if each.is_gguf else tuple(weight_files(each)))
            for number, each in enumerate(self.parts)
        ]

    @property
    def identity(self) -> list[Any]:
        """Place, size and time of change of every file that the merge reads."""
        small = [_small(each.place) for each in self.parts if not each.is_gguf]
        paths = [path for group in [*self.weights, *small] for path in group]
        stats = [(path, path.stat()) for path in paths]
        return [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    def is_in(self, folder: Path) -> bool:
        """True if a component of the model is that folder."""
        return any(each.place.resolve() == folder.resolve() for each in self.parts)

    def whole(self, folder: Path) -> Files:
        """The model as one checkpoint; one with adapters is merged and saved in `folder`, once."""
        if len(self.parts) == 1:
            return self.parts[0]
        if not folder.is_dir():
            model = load_model(self.name, LoadConfig(base=self.base))
            with store.new_folder(folder) as scratch:
                save_plain(model, scratch)
        return Files(self.name, folder).checked()

    def recorded(self, hashes: Mapping[Path, str]) -> MergedModel:
        """Its entry in the record."""
        named = {
            f"{number}/{path.name}" if len(self.parts) > 1 else path.name: hashes[path]
            for number, group in enumerate(self.weights)
            for path in group
        }
        return MergedModel(self.name, tuple(each.record for each in self.parts), named)


def weights_of(sides: Sequence[Side]) -> list[Path]:
    """All weight files, each once."""
    return list(dict.fromkeys(path for side in sides for group in side.weights for path in group))


def copy_small(source: Path, folder: Path, *, leave: Sequence[str] = ()) -> None:
    """Copy tokenizer, templates and settings of a checkpoint; neither weights nor records."""
    for path in _small(source):
        if path.name not in leave:
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def _small(place: Path) -> list[Path]:
    found = [*place.iterdir(), *place.glob("additional_chat_templates/*")]
    kept = [path for path in found if path.is_file() and path.suffix in SMALL and path.name not in NOT_COPIED]
    return sorted(path for path in kept if not _is_record(path))


NOT_COPIED = {INDEX, MARK, "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"}


def _is_record(path: Path) -> bool:
    """True for a record of unsleep on the model that the file lies beside."""
    with path.open("rb") as file:
        return path.suffix == ".json" and b'"schema": "unsleep.' in file.read(200)
