"""Loads and saves dictionaries in any format, recognised by the files of the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from unsleep.base import store
from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import dictionary_learning, names, saelens, sparsify
from unsleep.dictionaries.files.facts import Given

Format = Literal["saelens", "sparsify", "dictionary_learning"]
"""Formats for saving."""

FILES = (
    *(saelens.CONFIG, saelens.WEIGHTS, saelens.SCALER),
    *(sparsify.WEIGHTS, dictionary_learning.CONFIG, dictionary_learning.WEIGHTS),
)
"""File patterns downloaded from a hub."""

WRITERS = {"saelens": saelens.write, "sparsify": sparsify.write, "dictionary_learning": dictionary_learning.write}


def save_dictionary(
    dictionary: Coder, folder: str | Path, *, format: Format = "saelens", replace: bool = False
) -> Path:
    """Save a dictionary atomically, and return its folder.

    Information beyond the format (model fingerprint, training, provenance, the exact architecture) is stored in
    `metadata`, which the other libraries ignore.

    Args:
        format: `sparsify` puts its files into a subfolder named after the Site, such as `layers.12`.
        replace: replace an existing folder; otherwise it is refused.

    Raises `BadInput` for an architecture that the format cannot represent.
    """
    if format not in get_args(Format):
        raise BadInput(f"dictionary format is {format!r}; expected one of {', '.join(get_args(Format))}")
    folder = Path(folder)
    with store.new_folder(folder, replace=replace) as scratch:
        WRITERS[format](dictionary, scratch)
    return folder


def load_dictionary(
    name: str | Path, *, site: Site | None = None, target: Site | None = None, model: str | None = None
) -> Coder:
    """Load a dictionary saved by unsleep, SAELens, sparsify or dictionary_learning.

    Args:
        name: a folder; or as text, where no such folder exists, a hub id `owner/repo[/folder]` or a SAELens release
            `release:sae_id`.
        site: Site of the activations, for files without it or with an unsupported hook point.
        target: Site that a transcoder reconstructs, for such files.
        model: fingerprint of the model, for files without it.

    Raises `BadInput` naming the file, the key and the expected shape for anything invalid, and
    where the file contradicts `site`, `target` or `model`.
    """
    place = names.find(name, FILES)
    given = Given(site, target, model)
    folder, kind = _folder(place.folder, search=not place.fetched)
    if kind == "sparsify":
        return sparsify.read(folder, given)
    if kind == "dictionary_learning":
        return dictionary_learning.read(folder, given)
    return saelens.read(folder, given, place.overrides, place.scale)


def _folder(folder: Path, *, search: bool) -> tuple[Path, Format]:
    """The dictionary's folder and format; with `search` it may be the only subfolder of `folder`."""
    if kind := _format(folder):
        return folder, kind
    inside = sorted(f for f in folder.iterdir() if _format(f)) if search and folder.is_dir() else []
    if len(inside) > 1:
        raise BadInput(f"{folder} holds {len(inside)} dictionaries; name one: {', '.join(f.name for f in inside)}")
    for only in inside:
        if kind := _format(only):
            return only, kind
    there = ", ".join(sorted(f.name for f in folder.iterdir())[:20]) if folder.is_dir() else "no such folder"
    has_config = (folder / saelens.CONFIG).is_file()
    lacking = (
        f"{folder}: no weights beside {saelens.CONFIG}" if has_config else f"{folder / saelens.CONFIG} does not exist"
    )
    raise BadInput(
        f"{lacking}; expected a dictionary with {saelens.WEIGHTS} (SAELens), {sparsify.WEIGHTS} (sparsify) or "
        f"{dictionary_learning.WEIGHTS} (dictionary_learning), there is {there or 'nothing'}"
    )


def _format(folder: Path) -> Format | None:
    if (folder / saelens.WEIGHTS).is_file():
        return "saelens"
    if (folder / sparsify.WEIGHTS).is_file():
        return "sparsify"
    return "dictionary_learning" if (folder / dictionary_learning.WEIGHTS).is_file() else None
