"""The files of an explorer folder that may be served: found once, by name, with their content security policies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from unsleep.base import records, store
from unsleep.core import BadInput, Site
from unsleep.explorer.records import BAKED, MANIFEST, PAGE, Manifest, script
from unsleep.locate.circuits.record import CircuitRecord
from unsleep.pages.page import csp_hash

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
"""Suffix → media type of the files that are served."""

SCRIPT = re.compile(r"\s*window\.unsleep\.load\(\s*(\"(?:[^\"\\]|\\.)*\")\s*,(.*)\)\s*;?\s*", re.DOTALL)
"""A data file: a name and a JSON value."""

INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1\s*>", re.DOTALL | re.IGNORECASE)

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy of the page."""


@dataclass(frozen=True)
class File:
    """A file that is served."""

    path: Path
    kind: str
    """Media type."""
    policy: str = POLICY
    body: bytes | None = None
    """Served instead of its content."""


class Shown(NamedTuple):
    """A dictionary whose features the page shows."""

    key: str
    site: Site
    hash: str


@dataclass(frozen=True)
class Explorer:
    """An explorer folder as it was found."""

    folder: Path
    files: dict[str, File]
    """Name in the address → file."""
    dictionaries: tuple[Shown, ...]
    circuits: tuple[CircuitRecord, ...]


def explorer(folder: Path, *, live: bool) -> Explorer:
    """Find the files of an explorer folder; the served manifest says whether there is a live model.

    Raises `BadInput` for a folder without the page, a damaged data file that is read here, and a link that leads out
    of the folder.
    """
    if not (folder / PAGE).is_file() or not (folder / MANIFEST).is_file():
        raise BadInput(f"{folder} has no {PAGE} and {MANIFEST}; expected a folder made by unsleep explore")
    manifest = _value(folder / MANIFEST, "manifest")
    expected = {"schema": str, "dictionaries": list, "circuits": list}
    store.fields_of(manifest, expected, folder / MANIFEST)
    if manifest["schema"] != Manifest.SCHEMA:
        raise BadInput.of("schema", manifest["schema"], Manifest.SCHEMA, str(folder / MANIFEST))
    files = dict(_files(folder))
    own = script("manifest", {**manifest, "live": live}).encode()
    files[MANIFEST] = File(folder / MANIFEST, KINDS[".js"], body=own)
    return Explorer(
        folder, files, tuple(_dictionaries(folder, manifest)), tuple(_circuits(folder, manifest)) if live else ()
    )


def _files(folder: Path) -> Iterator[tuple[str, File]]:
    inside = folder.resolve()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.suffix not in KINDS or parts[0] == BAKED or any(p.startswith(".") for p in parts) or not path.is_file():
            continue
        if not path.resolve().is_relative_to(inside):
            raise BadInput(f"{path} leads out of {folder}; copy the file, or remove the link")
        name = "/".join(parts)
        is_report = path.suffix == ".html" and name != PAGE
        yield name, File(path, KINDS[path.suffix], _policy_of_report(path) if is_report else POLICY)


def _policy_of_report(path: Path) -> str:
    """Policy of a self-contained page: its own inline blocks, no connections, and no origin, so that no cookie is sent.

    Its inline blocks are known by their hashes.
    """
    found: dict[str, list[str]] = {"script": [], "style": []}
    text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    for kind, block in INLINE.findall(text):
        found[kind.lower()].append(f"'{csp_hash(block)}'")
    sources = "; ".join(f"{kind}-src {' '.join(hashes)}" for kind, hashes in found.items() if hashes)
    closed = "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return "; ".join(filter(None, ("sandbox allow-scripts; default-src 'none'", sources, closed)))


def _value(path: Path, name: str) -> Any:
    """The value that a data file loads under a name."""
    try:
        found = SCRIPT.fullmatch(path.read_text(encoding="utf-8"))
        if found is None or json.loads(found[1]) != name:
            raise BadInput(f"{path} does not load {name!r}; make the folder again with unsleep explore")
        return json.loads(found[2])
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path} cannot be read ({error}); make the folder again with unsleep explore") from None


def _dictionaries(folder: Path, manifest: dict[str, Any]) -> Iterator[Shown]:
    for row in manifest["dictionaries"]:
        store.fields_of(row, {"key": str, "site": str, "hash": str}, f"{folder / MANIFEST}: a dictionary")
        yield Shown(row["key"], Site.parse(row["site"]), row["hash"])


def _circuits(folder: Path, manifest: dict[str, Any]) -> Iterator[CircuitRecord]:
    for row in manifest["circuits"]:
        store.fields_of(row, {"key": str}, f"{folder / MANIFEST}: a circuit")
        path = folder / "data" / "circuits" / f"{store.inside(folder, row['key'], 'circuit').name}.js"
        with store.reading(path):
            yield records.parsed(CircuitRecord, _value(path, f"circuits/{row['key']}"), "circuit")
