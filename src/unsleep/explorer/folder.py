"""The explorer folder: a folder of results as a page that opens from disk.

report.json, result.json, circuit.json, statistics.json at any depth -> index.html, app.js, app.css, data/, reports/
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from unsleep.base import records, store
from unsleep.base.context import progress
from unsleep.core import BadInput, Site
from unsleep.explanations.record import ClassScore, Explanation, FeatureCard
from unsleep.explorer.records import (
    MANIFEST,
    CircuitEntry,
    DictionaryEntry,
    FeatureColumns,
    Manifest,
    ReportLink,
    Summary,
    summary,
    write_script,
)
from unsleep.explorer.runs import WORDS, read_run
from unsleep.locate.circuits.record import CircuitRecord
from unsleep.models.model import Named
from unsleep.pages import text
from unsleep.pages.index import Index, at
from unsleep.pages.page import LABEL_LIMIT
from unsleep.pages.registry import Page, pages

CHUNK = 64
"""Cards in a data file: about a megabyte."""

MOST_FEATURES = 131_072
"""Features of a dictionary whose list the page can search while one types."""

MOST_NODES, MOST_EDGES = 5_000, 50_000
"""Size of a circuit that the page can draw without a noticeable pause."""

BAKED = "baked"
"""Folder of the checkpoints that are baked from the page."""

STATIC = ("index.html", "app.js", "app.css")


@runtime_checkable
class Statistics(Protocol):
    """Statistics of the features of one dictionary (`explanations.statistics.FeatureStatistics`)."""

    @property
    def site(self) -> Site:
        """The dictionary's Site."""
        ...

    @property
    def dictionary(self) -> str:
        """The dictionary's hash."""
        ...

    @property
    def model(self) -> Named:
        """The model."""
        ...

    @property
    def size(self) -> int:
        """Number of features."""
        ...

    @property
    def tokens(self) -> int:
        """Number of tokens seen."""
        ...

    def card(self, feature: int) -> FeatureCard:
        """A feature's card, without explanations and classes."""
        ...


@dataclass(frozen=True)
class Found:
    """Places of the records in a folder of results."""

    runs: tuple[Path, ...]
    circuits: tuple[Path, ...]
    statistics: tuple[Path, ...]
    pages: tuple[tuple[Page, Path], ...]

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to show."""
        return not (self.runs or self.circuits or self.statistics or self.pages)


def write(source: str | Path, out: str | Path) -> Path:
    """Gather the results in a folder and write the page that explores them; returns its index.html.

    Every record is validated, every static page rendered anew from its record, and the folder is complete or not there.
    An explorer folder is replaced; checkpoints that were baked from it are never removed.

    Args:
        source: Folder with report.json, result.json, circuit.json or statistics.json in it or below.
        out: Folder of the page.

    Raises:
        BadInput: the folder holds no results, a record cannot be read, a circuit is too large for the page (trace it
            with fewer `--nodes` or `--edges`), or `out` is something else than an explorer folder.
    """
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise BadInput(f"{source} is no folder; expected one with results of unsleep")
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise BadInput(f"{out} contains {source}; write the page beside or below it")
    store.check_place(out, MANIFEST)
    if (out / BAKED).exists():
        raise BadInput(
            f"{out / BAKED} holds checkpoints that were baked from the page; move them before it is replaced"
        )
    found = find(source, out)
    if found.is_empty:
        raise BadInput(
            f"{source} holds nothing to explore; expected report.json, result.json, circuit.json or statistics.json "
            "in it or below"
        )
    with store.writing(out), store.new_folder(out, replace=MANIFEST) as scratch:
        for name in STATIC:
            store.write_text(scratch / name, files("unsleep.explorer").joinpath("static", name).read_text("utf-8"))
        write_script(scratch, "manifest", _gather(source, found, scratch))
    return out / STATIC[0]


def find(source: Path, out: Path) -> Found:
    """Records in a folder at any depth, without hidden folders and without the page's own."""
    own = out.resolve()

    def all_of(name: str) -> Iterator[Path]:
        for path in sorted(source.rglob(name)):
            hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
            if path.is_file() and not hidden and own not in path.resolve().parents:
                yield path

    reports = list(all_of("report.json"))
    bare = [path for path in all_of("result.json") if not path.with_name("report.json").is_file()]
    drawn = [(page, path) for page in pages() if not isinstance(page, Index) for path in all_of(f"{page.name}.json")]
    return Found((*reports, *bare), tuple(all_of("circuit.json")), tuple(all_of("statistics.json")), tuple(drawn))


def _gather(source: Path, found: Found, folder: Path) -> Manifest:
    """Write the data and the static pages; returns the manifest."""
    runs = tuple(read_run(path) for path in found.runs)
    circuits, dictionaries = list[CircuitEntry](), list[DictionaryEntry]()
    models: dict[str, Named] = {}
    for key, path in _keyed(source, found.circuits, "circuit"):
        record = records.load(CircuitRecord, path)
        models.setdefault(record.model.fingerprint, record.model)
        circuits.append(_write_circuit(folder, key, path, record))
    held = [(path, load_statistics(path.parent)) for path in found.statistics]
    for key, (path, statistics) in _keyed_by_site(source, held):
        models.setdefault(statistics.model.fingerprint, statistics.model)
        with store.reading(path):
            dictionaries.append(_write_features(folder, key, path.parent, statistics))
    if len(models) > 1:
        names = ", ".join(f"{model.name} ({model.fingerprint})" for model in models.values())
        raise BadInput(f"{source} holds results of several models, {names}; explore the folder of each")
    reports = tuple(_reports(source, found.pages, folder))
    title = text.clip(runs[0].title if len(runs) == 1 else source.resolve().name, LABEL_LIMIT)
    return Manifest(
        title=title,
        model=next(iter(models.values()), None),
        live=False,
        words=WORDS,
        runs=runs,
        reports=reports,
        dictionaries=tuple(dictionaries),
        circuits=tuple(circuits),
        provenance=store.provenance(source=source.resolve().name),
    )


def _reports(source: Path, drawn: Sequence[tuple[Page, Path]], folder: Path) -> Iterator[ReportLink]:
    """Static pages, rendered from their records: HTML that lies beside them may be anyone's."""
    taken: set[str] = set()
    for n, (page, path) in enumerate(drawn):
        progress("static pages", n, len(drawn))
        name = _free(f"{_slug(path.parent.relative_to(source), page.name)}-{page.name}.html", taken)
        target = folder / "reports" / name
        store.write_text(target, page.html(path.parent))
        record = store.read_json(path)
        created = at(record, "provenance", "created") or at(record, "result", "provenance", "created")
        title = at(record, "title") or f"{page.kind} in {path.resolve().parent.name}"
        yield ReportLink(text.clip(title, LABEL_LIMIT), page.kind, f"reports/{name}", created[:10])
    progress("static pages", len(drawn), len(drawn))


def _write_circuit(folder: Path, key: str, path: Path, record: CircuitRecord) -> CircuitEntry:
    """Write a circuit's data; raises `BadInput` where it is too large for the page."""
    for what, size, most in (("nodes", len(record.nodes), MOST_NODES), ("edges", len(record.edges), MOST_EDGES)):
        if size > most:
            raise BadInput(f"{path} has {size:,} {what}; the page draws at most {most:,}. Trace it with fewer --{what}")
    for i, edge in enumerate(record.edges):
        if max(edge.source, edge.target or 0) >= len(record.nodes):
            raise BadInput(f"{path}: edges[{i}] joins nodes {edge.source} and {edge.target} of {len(record.nodes)}")
    write_script(folder, f"circuits/{key}", record)
    return CircuitEntry(key, _circuit_title(record), len(record.nodes), len(record.edges))


def _circuit_title(record: CircuitRecord) -> str:
    return text.clip(f"{record.payload} in {record.model.name.rstrip('/').rpartition('/')[2]}", LABEL_LIMIT)


def load_statistics(folder: Path) -> Statistics:
    """Statistics of a dictionary's features."""
    return import_module("unsleep.explanations.statistics").FeatureStatistics.load(folder)


def _write_features(folder: Path, key: str, place: Path, statistics: Statistics) -> DictionaryEntry:
    """Write a dictionary's list and cards."""
    size = statistics.size
    if size > MOST_FEATURES:
        raise BadInput(f"the dictionary has {size:,} features; the page lists at most {MOST_FEATURES:,}")
    explanations, classes = read_explanations(place, statistics), read_classes(place, statistics)
    rows: list[Summary] = []
    for number, start in enumerate(range(0, size, CHUNK)):
        progress(f"features of {key}", start, size)
        cards = [
            replace(statistics.card(i), explanations=explanations.get(i, ()), classes=classes.get(i, ()))
            for i in range(start, min(size, start + CHUNK))
        ]
        rows += [summary(card) for card in cards]
        write_script(folder, f"features/{key}/{number}", cards)
    progress(f"features of {key}", size, size)
    columns = FeatureColumns(*(tuple(column) for column in zip(*rows, strict=True))) if rows else None
    if columns is None:
        raise BadInput("the dictionary has no features")
    write_script(folder, f"features/{key}/list", columns)
    return DictionaryEntry(key, str(statistics.site), statistics.dictionary, size, statistics.tokens, CHUNK)


@dataclass(frozen=True)
class Explained:
    """Feature → its explanations."""

    features: dict[int, tuple[Explanation, ...]]


@dataclass(frozen=True)
class Classified:
    """Feature → its classes."""

    features: dict[int, tuple[ClassScore, ...]]


def read_explanations(folder: Path, statistics: Statistics) -> dict[int, tuple[Explanation, ...]]:
    """Feature → its explanations in explanations.json; empty without the file."""
    found = _beside(folder, "explanations", statistics)
    with store.reading(folder / "explanations.json"):
        return records.parsed(Explained, {"features": found}, "explanations").features


def read_classes(folder: Path, statistics: Statistics) -> dict[int, tuple[ClassScore, ...]]:
    """Feature → its classes in classes.json, without their evidence; empty without the file."""
    found = _beside(folder, "classes", statistics)
    path = folder / "classes.json"
    rows = {i: store.fields_of(row, {"classes": list}, f"{path}: feature {i}") for i, row in found.items()}
    with store.reading(path):
        kept = {"features": {i: row["classes"] for i, row in rows.items()}}
        return records.parsed(Classified, kept, "classes").features


def _beside(folder: Path, name: str, statistics: Statistics) -> dict[str, Any]:
    """`features` of a record beside the statistics; raises `BadInput` where it is of another dictionary."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return {}
    found = store.fields_of(store.read_json(path), {"schema": str, "dictionary": str, "features": dict}, path)
    if found["schema"] != f"unsleep.{name}/1":
        raise BadInput.of("schema", found["schema"], f"unsleep.{name}/1", str(path))
    if found["dictionary"] != statistics.dictionary:
        raise BadInput(f"{path} is of dictionary {found['dictionary']}, the statistics of {statistics.dictionary}")
    features = cast("dict[str, Any]", found["features"])
    for i in features:
        if not (i.isdecimal() and len(i) < 10 and int(i) < statistics.size):
            raise BadInput(f"{path} has feature {i[:40]}; the dictionary has {statistics.size}")
    return features


def _keyed(source: Path, paths: Iterable[Path], otherwise: str) -> Iterator[tuple[str, Path]]:
    """Places with their keys, which name data files."""
    taken: set[str] = set()
    for path in paths:
        yield _free(_slug(path.parent.relative_to(source), otherwise), taken), path


def _keyed_by_site(
    source: Path, held: Sequence[tuple[Path, Statistics]]
) -> Iterator[tuple[str, tuple[Path, Statistics]]]:
    """Statistics with their keys: the Site where no other is of it, or the folder."""
    sites = [str(statistics.site) for _, statistics in held]
    taken: set[str] = set()
    for site, (path, statistics) in zip(sites, held, strict=True):
        alone = sites.count(site) == 1
        yield _free(site if alone else _slug(path.parent.relative_to(source), site), taken), (path, statistics)


def _slug(place: Path, otherwise: str) -> str:
    """A path in a name of ASCII letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", place.as_posix()).strip("-.")[:80] or otherwise


def _free(name: str, taken: set[str]) -> str:
    """The name, numbered where it is taken."""
    stem, dot, end = name.rpartition(".html")
    base, tail = (stem, dot + end) if dot else (name, "")
    found = name
    n = 2
    while found.lower() in taken:
        found = f"{base}-{n}{tail}"
        n += 1
    taken.add(found.lower())
    return found
