"""Resolves a dictionary's name: a local folder, a hub repository, or a release in SAELens' list."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unsleep.base import hub, store
from unsleep.core import BadInput

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?P<folder>(?:/[\w-][^/\\]*)*)")
"""`owner/repo` or `owner/repo/folder`; no part starts with a dot."""

CONVERTED = (None, "sae_lens", "sparsify", "dictionary_learning_1")
"""Converters in SAELens' list whose files have a supported layout."""


class Place(NamedTuple):
    """Location of a dictionary's files, and settings from elsewhere."""

    folder: Path
    overrides: dict[str, Any]
    """Replacements of config entries."""
    scale: float | None
    """Constant normalisation factor of its activations, where known."""
    fetched: bool
    """True for a partial download from a hub."""


def find(name: str | Path, files: Sequence[str]) -> Place:
    """Locate the folder of a dictionary; from the hub, only `files` are downloaded.

    A `Path` is a local folder, existing or not. Raises `BadInput` for an unknown name.
    """
    path = Path(name)
    if path.exists() or isinstance(name, Path):
        return Place(path, {}, None, fetched=False)
    release, colon, sae = name.partition(":")
    if colon and "/" not in release:
        return _released(release, sae, files)
    if found := HUB_ID.fullmatch(name):
        return Place(_fetched(found["repo"], found["folder"].strip("/"), files), {}, None, fetched=True)
    raise BadInput(
        f"{name!r} is no folder that exists, no hub id (owner/repo or owner/repo/folder) and no SAELens release "
        "(release:sae_id)"
    )


def _fetched(repo: str, folder: str, files: Sequence[str]) -> Path:
    names = [f"{folder}/{file}" if folder else file for file in files]
    return hub.fetch(repo, names) / folder


def _released(release: str, sae: str, files: Sequence[str]) -> Place:
    """A dictionary in SAELens' list of pretrained SAEs, which is read without importing sae_lens."""
    spec = importlib.util.find_spec("sae_lens")
    if spec is None or spec.origin is None:
        raise BadInput(
            f"'{release}:{sae}' names a SAELens release, and their list comes with sae_lens, which is not installed; "
            "install sae-lens, or give the hub id owner/repo/folder"
        )
    import yaml

    path = Path(spec.origin).with_name("pretrained_saes.yaml")
    if not path.is_file():
        raise BadInput(f"{path} does not exist; install sae-lens 6")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 60,000 lines
    listed = store.fields_of(yaml.load(path.read_text(encoding="utf-8"), Loader=loader), {}, path)
    if release not in listed:
        raise BadInput(f"{path} has no release {release!r}; it has {len(listed)} others")
    entry = store.fields_of(listed[release], {"repo_id": str, "saes": list}, f"{path}: {release}")
    if entry.get("conversion_func") not in CONVERTED:
        raise BadInput(
            f"{release} is in a layout of its own ({entry['conversion_func']}), which is not read; load it with "
            "sae_lens and save it from there"
        )
    by_id = {str(found.get("id")): found for found in entry["saes"]}
    if sae not in by_id:
        raise BadInput(f"release {release} has no {sae!r}; it has {', '.join(list(by_id)[:8])} …")
    found = by_id[sae]
    place = _fetched(entry["repo_id"], str(found["path"]), files)
    return Place(place, entry.get("config_overrides") or {}, found.get("norm_scaling_factor"), fetched=True)
