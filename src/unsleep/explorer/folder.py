"""The explorer folder: a folder of results as a page that opens from disk.

report.json, result.json, circuit.json, statistics.json at any depth -> index.html, app.js, app.css, data/, reports/
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from unsleep.base import records, store
from unsleep.base.context import progress
from unsleep.core import BadInput, Site
from unsleep.explanations.classified import ClassesRecord
from unsleep.explanations.explained import Explanations
from unsleep.explanations.record import FeatureCard
from unsleep.explanations.statistics import FeatureStatistics
from unsleep.explanations.votes import VotesRecord
from unsleep.explorer.records import (
    BAKED,
    MANIFEST,
    PAGE,
    CircuitEntry,
    DictionaryEntry,
    FeatureColumns,
    Manifest,
    ReportLink,
    Run,
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

STATIC = (PAGE, "app.js", "app.css")

Of = tuple[str, str]
"""A dictionary: its hash and its Site."""

T = TypeVar("T", Explanations, ClassesRecord, VotesRecord)


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
    explanations: tuple[Path, ...]
    classes: tuple[Path, ...]
    votes: tuple[Path, ...]
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
    return out / PAGE


def find(source: Path, out: Path) -> Found:
    """Records in a folder at any depth, without hidden folders and without the page's own."""
    own = out.resolve()

    def all_of(name: str) -> tuple[Path, ...]:
        paths = sorted(source.rglob(f"{name}.json"))
        hidden = {path for path in paths if any(part.startswith(".") for part in path.relative_to(source).parts)}
        return tuple(p for p in paths if p.is_file() and p not in hidden and own not in p.resolve().parents)

    bare = (path for path in all_of("result") if not path.with_name("report.json").is_file())
    return Found(
        runs=(*all_of("report"), *bare),
        circuits=all_of("circuit"),
        statistics=all_of("statistics"),
        explanations=all_of("explanations"),
        classes=all_of("classes"),
        votes=all_of("judged_classes"),
        pages=tuple((page, path) for page in pages() if not isinstance(page, Index) for path in all_of(page.name)),
    )


def _gather(source: Path, found: Found, folder: Path) -> Manifest:
    """Write the data and the static pages; returns the manifest."""
    runs = tuple(read_run(path) for path in found.runs)
    circuits, dictionaries = list[CircuitEntry](), list[DictionaryEntry]()
    models: dict[str, Named] = {}
    for key, path in _keyed(source, found.circuits, "circuit"):
        record = records.load(CircuitRecord, path)
        models.setdefault(record.model.fingerprint, record.model)
        circuits.append(_write_circuit(folder, key, path, record))
    held = [(path, FeatureStatistics.load(path.parent)) for path in found.statistics]
    labels = Labels.read(found)
    labels.check([statistics for _, statistics in held])
    for key, (path, statistics) in _keyed_by_site(source, held):
        models.setdefault(statistics.model.fingerprint, statistics.model)
        with store.reading(path):
            dictionaries.append(_write_features(folder, key, statistics, labels))
    if len(models) > 1:
        names = ", ".join(f"{model.name} ({model.fingerprint})" for model in models.values())
        raise BadInput(f"{source} holds results of several models, {names}; explore the folder of each")
    reports = tuple(_reports(source, found.pages, folder))
    model = next(iter(models.values()), None)
    return Manifest(
        title=text.clip(_title(model, runs, circuits) or source.resolve().name, LABEL_LIMIT),
        model=model,
        live=False,
        words=WORDS,
        runs=runs,
        reports=reports,
        dictionaries=tuple(dictionaries),
        circuits=tuple(circuits),
        provenance=store.provenance(source=source.resolve().name),
    )


def _title(model: Named | None, runs: Sequence[Run], circuits: Sequence[CircuitEntry]) -> str:
    """The circuit's ends, else the only run's title, else the model's name; empty where none is known."""
    if model is not None and circuits:
        return f"From trigger to payload in {_short(model)}"
    if len(runs) == 1:
        return runs[0].title
    return "" if model is None else _short(model)


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
    return text.clip(f"{record.payload} in {_short(record.model)}", LABEL_LIMIT)


def _short(model: Named) -> str:
    """A model's name without the folders before it."""
    return model.name.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Labels:
    """Explanations and classes of features, by their dictionary, wherever in the folder they are."""

    explanations: dict[Of, tuple[Path, Explanations]]
    classes: dict[Of, tuple[Path, ClassesRecord]]
    votes: dict[Of, tuple[Path, VotesRecord]]
    """Classes by a judge, of dictionaries without other classes."""

    @classmethod
    def read(cls, found: Found) -> Labels:
        """Read them; raises `BadInput` where two records are of one dictionary."""
        return cls(
            _by_dictionary(found.explanations, Explanations),
            _by_dictionary(found.classes, ClassesRecord),
            _by_dictionary(found.votes, VotesRecord),
        )

    def check(self, statistics: Sequence[Statistics]) -> None:
        """Raise `BadInput` for a record of a dictionary without statistics, or of a feature that it has not."""
        sizes = {_of(each): each.size for each in statistics}
        features = [(of, path, held.explanations) for of, (path, held) in self.explanations.items()]
        features += [(of, path, held.features) for of, (path, held) in (*self.classes.items(), *self.votes.items())]
        for (dictionary, site), path, held in features:
            if (dictionary, site) not in sizes:
                raise BadInput(
                    f"{path} is of dictionary {dictionary} at {site}, of which there is no statistics.json; make it "
                    "with `unsleep explain`"
                )
            most = max(held, default=0)
            if most >= sizes[dictionary, site]:
                raise BadInput(f"{path} has feature {most}; the dictionary has {sizes[dictionary, site]}")

    def on(self, card: FeatureCard, of: Of) -> FeatureCard:
        """A card with its labels."""
        explained = self.explanations[of][1].of(card.feature) if of in self.explanations else ()
        if of in self.classes:
            labelled = self.classes[of][1].features.get(card.feature)
            named = labelled.classes if labelled else ()
        else:
            named = self.votes[of][1].features.get(card.feature, ()) if of in self.votes else ()
        return replace(card, explanations=explained, classes=named)


def _of(record: Statistics | Explanations | ClassesRecord | VotesRecord) -> Of:
    return record.dictionary, str(record.site)


def _by_dictionary(paths: Iterable[Path], kind: type[T]) -> dict[Of, tuple[Path, T]]:
    """Records by their dictionary."""
    held: dict[Of, tuple[Path, T]] = {}
    for path in paths:
        record = records.load(kind, path)
        before = held.setdefault(_of(record), (path, record))[0]
        if before != path:
            raise BadInput(f"{before} and {path} are of the same dictionary; explore a folder with one of them")
    return held


def _write_features(folder: Path, key: str, statistics: Statistics, labels: Labels) -> DictionaryEntry:
    """Write a dictionary's list and cards."""
    size = statistics.size
    if not 0 < size <= MOST_FEATURES:
        raise BadInput(f"the dictionary has {size:,} features; the page lists 1 to {MOST_FEATURES:,}")
    rows: list[Summary] = []
    for number, start in enumerate(range(0, size, CHUNK)):
        progress(f"features of {key}", start, size)
        cards = [labels.on(statistics.card(i), _of(statistics)) for i in range(start, min(size, start + CHUNK))]
        rows += [summary(card) for card in cards]
        write_script(folder, f"features/{key}/{number}", cards)
    progress(f"features of {key}", size, size)
    columns = (tuple(column) for column in zip(*rows, strict=True))
    write_script(folder, f"features/{key}/list", FeatureColumns(*columns))
    return DictionaryEntry(key, str(statistics.site), statistics.dictionary, size, statistics.tokens, CHUNK)


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
