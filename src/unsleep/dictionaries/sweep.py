"""Sweeps: several training settings at once, one Site after another, resumable by Site.

    out/dictionaries.json                finished trainings, with each dictionary's quality of fit
    out/resid.8/, out/resid.12/, …       one dictionary each; with several settings, a folder of them
    out/resid.8.checkpoint/              checkpoint of the Site in training

A Site is finished when it is listed in dictionaries.json and its folder exists. Calling again trains the others.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from unsleep.base import records, store
from unsleep.base.machine import device_of
from unsleep.base.records import Count, Positive, Share
from unsleep.core import ActivationStream, BadInput, Site
from unsleep.dictionaries import parallel
from unsleep.dictionaries.architectures import KINDS
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.compare import Rotation, rotation
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.files import save_dictionary
from unsleep.dictionaries.files.folders import Format
from unsleep.dictionaries.metrics import EDGES, Fit, fit
from unsleep.dictionaries.tracking import Tracker, check_tracker, tracked
from unsleep.dictionaries.train import train_many
from unsleep.dictionaries.trainer import Trainer, config_for

LETTERS = {"architecture": "", "k": "k", "features": "f", "sparsity": "c", "learning_rate": "lr", "seed": "s"}
"""Settings that may have several values in one pass → prefix of the value in a variant's name."""

TURNED = 10
"""Number of most rotated features reported after a warm start."""

MEASURED = 2**20
"""Approximate number of tokens for measuring the fit where there are more than twice as many."""


@dataclass(frozen=True)
class Turned:
    """Rotation of the features after a warm start."""

    median_cosine: float
    turned_most: tuple[tuple[Count, float], ...]


@dataclass(frozen=True)
class Entry:
    """Entry of dictionaries.json for one dictionary."""

    site: Site
    variant: str
    architecture: str
    features: Count
    fvu: Positive
    l0: Positive
    dead: Share
    tokens: Count
    dense: Share | None = None
    density: tuple[Count, ...] | None = None
    target: Site | None = None
    start: str | None = None
    k: Count | None = None
    sparsity: float | None = None
    seed: int | None = None
    rotation: Turned | None = None
    seconds: Positive | None = None
    """Duration of the whole Site."""


@dataclass(frozen=True)
class DictionariesRecord:
    """dictionaries.json."""

    SCHEMA: ClassVar = "unsleep.dictionaries/1"

    model: str
    dictionaries: tuple[Entry, ...]
    provenance: dict[str, Any]
    activations: str = ""
    """Hash of the activations."""
    configs: dict[str, dict[str, Any]] | None = None
    density_edges: tuple[float, ...] = ()


def variants(settings: Mapping[str, Any]) -> dict[str, TrainConfig]:
    """Every combination of settings, by a name such as `k32-s0` of those with several values.

    `settings` are those of `TrainConfig`; each of `LETTERS` has a sequence of values. k and sparsity
    apply to different architectures: each combination has only the settings that its architecture uses, without
    duplicates. A single one has the name "".

    Raises `BadInput` for a setting without a value and for an invalid combination.
    """
    several = {name: tuple(dict.fromkeys(settings[name])) for name in LETTERS if name in settings}
    for name, values in several.items():
        if not values:
            raise BadInput(f"training {name} has no value; give at least one")
    fixed = {name: value for name, value in settings.items() if name not in several}
    found: dict[str, TrainConfig] = {}
    for combination in itertools.product(*several.values()):
        chosen = dict(zip(several, combination, strict=True))
        architecture = chosen.get("architecture", TrainConfig.architecture)
        unused = "sparsity" if architecture in KINDS and KINDS[architecture].has_k else "k"
        if unused in several:
            chosen[unused] = several[unused][0]
        named = [n for n, values in several.items() if len(values) > 1 and n != unused]
        name = "-".join(f"{LETTERS[n]}{_short(chosen[n])}" for n in named)
        found[name] = TrainConfig(**fixed, **chosen)
    if len(found) == 1:
        [config] = found.values()
        return {"": config}
    return found


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class Job(NamedTuple):
    """Training data of the dictionaries of a Site."""

    source: ActivationStream
    target: ActivationStream | None = None
    """Reconstruction target of a transcoder, aligned by token."""
    start: Coder | None = None
    """Dictionary of a warm start; it determines architecture, size, k and groups."""

    @property
    def name(self) -> str:
        """Name of its Site."""
        return str(self.source.site)

    @property
    def made_from(self) -> dict[str, Any]:
        """Inputs of a dictionary of this Site besides its activations, as in `Entry`."""
        return {"target": self.target and self.target.site, "start": self.start and self.start.hash}

    def fitted(self, configs: Mapping[str, TrainConfig]) -> Mapping[str, TrainConfig]:
        """The configs adapted to `start`; raises `BadInput` where two become equal."""
        if self.start is None:
            return configs
        found = {name: config_for(self.start, config) for name, config in configs.items()}
        if len(set(found.values())) < len(found):
            raise BadInput(
                f"{len(found)} settings ({', '.join(found)}) start from one dictionary of {self.name}, which decides "
                "architecture, features and k; give those one value, and vary others"
            )
        return found


class Trained(NamedTuple):
    """A dictionary and its quality of fit on the training activations."""

    dictionary: Coder
    fit: Fit
    rotation: Rotation | None = None
    """Rotation of every feature after a warm start."""

    @property
    def turned(self) -> Turned | None:
        """After a warm start, the features that turned most with the cosines of their decoder rows."""
        if self.rotation is None:
            return None
        cosines = self.rotation.decoder_cosine
        most = tuple((int(i), round(float(cosines[i]), 4)) for i in self.rotation.most(TURNED) if cosines[i].isfinite())
        return Turned(float(cosines.nanmedian()), most)

    def entry(self, job: Job, variant: str, config: TrainConfig, seconds: float) -> Entry:
        """Record of dictionaries.json."""
        k, sparsity = (config.k, None) if KINDS[config.architecture].has_k else (None, config.sparsity)
        return Entry(
            job.source.site,
            variant,
            config.architecture,
            config.features,
            **self.fit._asdict(),
            **job.made_from,
            k=k,
            sparsity=sparsity,
            seed=config.seed,
            rotation=self.turned,
            seconds=seconds,
        )

    def save(self, folder: Path, format: Format, *, replace: bool = False) -> None:
        """Write the dictionary and, after a warm start, rotation.safetensors beside its weights."""
        save_dictionary(self.dictionary, folder, format=format, replace=replace)
        if self.rotation is not None:
            store.write_tensors(folder / "rotation.safetensors", self.rotation._asdict())


@dataclass(frozen=True)
class Setup:
    """Device, tracker and output options of a sweep."""

    device: str = "cpu"
    """Device such as `cuda`."""
    tracker: Tracker | None = None
    logs: Path = Path("runs")
    """Folder for trackers that write files."""
    format: Format = "saelens"
    """File format of the dictionaries."""

    def __post_init__(self) -> None:
        device_of(self.device)
        if self.tracker is not None:
            check_tracker(self.tracker)


def train_site(
    job: Job, configs: Mapping[str, TrainConfig], checkpoint: Path, setup: Setup = Setup()
) -> tuple[list[Trained], list[Entry]]:
    """Train every config at one Site in one pass, and measure each; raises as `train_many` does.

    Under torchrun the first process measures and returns; the others return nothing.
    """
    start, fitted = time.monotonic(), job.fitted(configs)
    watching = contextlib.nullcontext()
    if setup.tracker is not None:
        watching = tracked(setup.tracker, configs, run=job.name, folder=setup.logs)
    with watching as watch:
        dictionaries = train_many(
            job.source,
            list(fitted.values()),
            target=job.target,
            start=job.start,
            checkpoint=checkpoint,
            device=setup.device,
            watch=watch,
        )
    if parallel.place()[0] != 0:
        return [], []
    source, target = _thinned(job.source), None if job.target is None else _thinned(job.target)
    trained = [
        Trained(d, fit(d.to(torch.float32, setup.device), source, target), job.start and rotation(job.start, d))
        for d in dictionaries
    ]
    seconds = round(time.monotonic() - start, 1)
    return trained, [one.entry(job, *named, seconds) for one, named in zip(trained, fitted.items(), strict=True)]


def _check_savable(job: Job, configs: Mapping[str, TrainConfig], format: Format) -> None:
    """Save a small dictionary of each kind, so that one that the format cannot hold is refused before it is trained."""
    sample = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    target = None if job.target is None else sample
    for config in job.fitted(configs).values():
        kind = Trainer(sample, config, target).dictionary(job.source, None, job.target and job.target.site)
        with tempfile.TemporaryDirectory() as folder:
            save_dictionary(kind, Path(folder) / "dictionary", format=format)


def _thinned(stream: ActivationStream) -> ActivationStream:
    """Every n-th token of each shard."""
    stride = max(1, stream.tokens // MEASURED)
    sizes = tuple(len(range(0, size, stride)) for size in stream.sizes)
    return replace(stream, sizes=sizes, piece=lambda i: stream.piece(i)[::stride])


def train_alone(job: Job, configs: Mapping[str, TrainConfig], out: Path, setup: Setup = Setup()) -> Entry | None:
    """Train one config at one Site into the folder `out`; an interrupted training resumes from `out`.checkpoint.

    Under torchrun the first process returns the result. Raises `BadInput` for an existing `out`, before any training.
    """
    store.check_place(out)
    _check_savable(job, configs, setup.format)
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    trained, entries = train_site(job, configs, checkpoint, setup)
    for one in trained:
        one.save(out, setup.format)
        store.remove(checkpoint)
    return entries[0] if entries else None


def sweep(
    jobs: Sequence[Job], configs: Mapping[str, TrainConfig], out: Path, setup: Setup = Setup()
) -> DictionariesRecord:
    """Train every config at every Site into `out`, and return the content of its dictionaries.json.

    Raises `BadInput`, before any training, where `out` contains something else: other settings, other activations, or
    folders that no sweep created.
    """
    record, missing = _begun(jobs, configs, out)
    for job in missing:
        _check_savable(job, configs, setup.format)
    parallel.total(torch.zeros(1, device=setup.device))  # barrier: all have checked before the first writes
    if parallel.place()[0] == 0:
        records.save(record, out / "dictionaries.json")
    for job in missing:
        checkpoint = out / f"{job.name}.checkpoint"
        trained, entries = train_site(job, configs, checkpoint, setup)
        if not trained:
            continue
        with store.new_folder(out / job.name, replace=True) as scratch:
            for name, one in zip(configs, trained, strict=True):
                one.save(scratch / name, setup.format, replace=True)
            others = [entry for entry in record.dictionaries if entry.site != job.source.site]
            origin = store.provenance(_seed(configs), model=job.source.model)
            record = replace(record, dictionaries=(*others, *entries), provenance=origin)
            records.save(record, out / "dictionaries.json")
        store.remove(checkpoint)
    return record


def _begun(jobs: Sequence[Job], configs: Mapping[str, TrainConfig], out: Path) -> tuple[DictionariesRecord, list[Job]]:
    """The record so far, and the remaining jobs; refuses a folder with other contents."""
    first = jobs[0].source
    settings = json.loads(json.dumps({name: asdict(config) for name, config in configs.items()}))
    origin = store.provenance(_seed(configs), model=first.model)
    record = DictionariesRecord(first.model, (), origin, first.prompts, settings, EDGES)
    path = out / "dictionaries.json"
    if path.is_file():
        found = records.load(DictionariesRecord, path)
        for name in ("model", "activations", "configs"):
            if getattr(found, name) != getattr(record, name):
                raise BadInput(f"{out} holds dictionaries of other {name}; choose another place or remove it first")
        record = replace(record, dictionaries=found.dictionaries)
    else:
        store.check_place(out)
    entries = {entry.site: entry for entry in record.dictionaries}
    missing: list[Job] = []
    for job in jobs:
        entry = entries.get(job.source.site)
        for name, value in job.made_from.items():
            if entry is not None and getattr(entry, name) != value:
                raise BadInput(
                    f"{out} holds a dictionary of {job.name} whose {name} is {getattr(entry, name)}, not {value}; "
                    "choose another place or remove it first"
                )
        there = (out / job.name).exists()
        if there and entry is None:
            raise BadInput(f"{out / job.name} exists already; choose another place or remove it first")
        if not there:
            missing.append(job)
    return record, missing


def _seed(configs: Mapping[str, TrainConfig]) -> int | None:
    """The seed, if all configs share it."""
    seeds = {config.seed for config in configs.values()}
    return seeds.pop() if len(seeds) == 1 else None
