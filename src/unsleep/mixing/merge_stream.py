"""Streaming writer of a merge: tensor by tensor, chunk by chunk, through reused buffers; resumable after a kill.

A file is written under another name, data after its header, and renamed when it is complete and on the disk. Every so
many bytes the data are synced and the journal says how far: after a kill, what lies behind that is cut off and written
again. Memory is a few chunks, whatever the size of the models.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from unsleep.base import records, store
from unsleep.base.context import kept, progress
from unsleep.base.records import Count
from unsleep.core import BadInput
from unsleep.mixing.merge_disk import FileHashes, InFile, OutFile, buffer_for
from unsleep.mixing.merge_files import DTYPES, ITEMS, Stored
from unsleep.models.merging import combine

CHUNK = 1 << 20
"""Elements per chunk."""
MARK = 1 << 26
"""Bytes between two entries of the journal: few enough that writing them does not hold up what follows."""
PARTIAL = ".part"
"""Suffix of a file that is not complete."""
ALIGNMENT = 8
"""Bytes to whose multiple a safetensors header is padded."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Job:
    """One tensor of a merge."""

    name: str
    dtype: str
    """As in safetensors files."""
    shape: tuple[int, ...]
    layer: str
    """The layer's number, or `rest`."""
    sources: tuple[Stored, ...]
    """The first model's, the second's, and for spherical interpolation the base's; the first alone is copied."""
    alpha: float = 0.0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.elements * ITEMS[self.dtype]


@dataclass(frozen=True)
class Part:
    """A file of a merge: its tensors in the order of their data."""

    name: str
    jobs: tuple[Job, ...]
    listed: tuple[str, ...]
    """Names of the tensors in the order of the header."""
    metadata: Mapping[str, str] | None

    @property
    def header(self) -> bytes:
        """The safetensors header, as the safetensors library lays it out."""
        entries: dict[str, object] = {} if self.metadata is None else {"__metadata__": dict(self.metadata)}
        ends: dict[str, tuple[int, int]] = {}
        place = 0
        for job in self.jobs:
            ends[job.name] = place, place + job.size
            place += job.size
        jobs = {job.name: job for job in self.jobs}
        for name in self.listed:
            entries[name] = {
                "dtype": jobs[name].dtype,
                "shape": list(jobs[name].shape),
                "data_offsets": list(ends[name]),
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(job.size for job in self.jobs)


@dataclass(frozen=True)
class Tally:
    """Counts of elements, by their bytes."""

    elements: Count = 0
    differing: Count = 0
    """In which the two models differ."""
    changed: Count = 0
    """In which the merge differs from the first model."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.elements + other.elements, self.differing + other.differing, self.changed + other.changed)


@dataclass(frozen=True)
class Journal:
    """journal.json: how much of a merge is on the disk."""

    SCHEMA: ClassVar = "unsleep.merge-journal/1"

    part: Count = 0
    """Number of the file that is being written; those before it are complete."""
    done: Count = 0
    """Bytes of it that are on the disk."""
    tallies: dict[str, Tally] = field(default_factory=dict[str, Tally])
    """Layer → counts of what has been written."""


class _Chunk(NamedTuple):
    job: Job
    first: int
    """Its first element in the tensor."""
    pieces: tuple[Tensor, ...]


def write_parts(parts: Sequence[Part], folder: Path, journal: Path, hashes: FileHashes) -> dict[str, Tally]:
    """Write the files of a merge into a folder, or what an interrupted run left of them; the counts per layer.

    Args:
        hashes: are fed with what is read.

    Raises `BadInput` for results that are NaN or infinite, an input that ends early, and a full disk.
    """
    state = _resumed(parts, folder, journal)
    total = sum(part.size for part in parts)
    before = sum(part.size for part in parts[: state.part])
    with _Inputs(hashes) as inputs, _one_thread(), store.writing(folder):
        for number in range(state.part, len(parts)):
            state = _write_part(parts[number], folder, journal, state, inputs, (before, total))
            before += parts[number].size
    return state.tallies


def _resumed(parts: Sequence[Part], folder: Path, journal: Path) -> Journal:
    """The journal of an interrupted run; an empty one where the files do not bear it out."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(BadInput):
        found = records.load(Journal, journal)
        whole = [_size(folder / part.name) == part.size for part in parts[: found.part]]
        if all(whole) and found.part == len(parts):
            return found
        if all(whole) and found.part < len(parts):
            part = parts[found.part]
            complete = found.done == _size(folder / part.name) == part.size
            if complete or _size(folder / f"{part.name}{PARTIAL}") >= found.done:
                return found
    return Journal()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _write_part(
    part: Part, folder: Path, journal: Path, state: Journal, inputs: _Inputs, overall: tuple[int, int]
) -> Journal:
    final, partial = folder / part.name, folder / f"{part.name}{PARTIAL}"
    after = Journal(state.part + 1, 0, state.tallies)
    if state.done and final.is_file():
        records.save(after, journal)
        return after
    final.unlink(missing_ok=True)
    tallies = dict(state.tallies)
    header = part.header
    done = marked = state.done if state.done >= len(header) else 0
    with OutFile(partial, done) as file, _Marks(file, journal) as marks:
        if not done:
            file.put(header)
            done = len(header)
        for chunk in _chunks(part, done - len(header), inputs):
            merged, tally = _merged(chunk, inputs)
            file.put(_bytes(merged))
            done += merged.nbytes
            tallies[chunk.job.layer] = tallies.get(chunk.job.layer, Tally()) + tally
            progress("merge, MB", *(math.ceil(size / 10**6) for size in (overall[0] + done, overall[1])))
            if done - marked >= MARK:
                marks.add(Journal(state.part, done, dict(tallies)))
                marked = done
        file.finish()
        marks.add(Journal(state.part, done, dict(tallies)))
    partial.rename(final)
    sync_folder(folder)
    after = Journal(state.part + 1, 0, tallies)
    records.save(after, journal)
    return after


class _Marks:
    """Entries of the journal, each written by a thread once the data before it are on the disk."""

    def __init__(self, file: OutFile, journal: Path) -> None:
        self._file, self._journal = file, journal
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> _Marks:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._wait()
        finally:
            self._thread.shutdown()

    def add(self, entry: Journal) -> None:
        """Flush what has been written and begin to sync it; waits for the entry before."""
        self._wait()
        self._file.flush()
        self._pending = self._thread.submit(self._sync, entry)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _sync(self, entry: Journal) -> None:
        self._file.sync()
        records.save(entry, self._journal)


@contextlib.contextmanager
def _one_thread() -> Generator[None]:
    """Arithmetic in one thread: more would busy-wait between chunks for cores that reading and hashing need."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Inputs:
    """Open input files, and two sets of buffers that are filled in turn by a thread, and hashed by another."""

    def __init__(self, hashes: FileHashes | None = None) -> None:
        self._hashes = hashes
        self._hashing: list[list[Future[None]]] = [[], []]

    def __enter__(self) -> _Inputs:
        self._files: dict[Path, InFile] = {}
        self._buffers: dict[tuple[int, int], mmap.mmap] = {}
        self._factors: tuple[Job | None, list[float]] = None, []
        self._thread, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown()
        self._hasher.shutdown()
        for file in self._files.values():
            file.close()

    def ahead(self, wanted: Iterator[tuple[Job, int, int]]) -> Generator[_Chunk]:
        """Chunks of jobs (job, first element, count), each read while the one before is computed."""
        pending: Future[_Chunk] | None = None
        for turn, (job, first, count) in enumerate(wanted):
            coming = self._thread.submit(self._chunk, job, first, count, turn % 2)
            if pending is not None:
                yield pending.result()
            pending = coming
        if pending is not None:
            yield pending.result()

    def factors(self, job: Job) -> list[float]:
        """Coefficients of a job's task vectors; those of the last job are held."""
        if self._factors[0] is not job:
            self._factors = job, kept(arc, job)
        return self._factors[1]

    def _chunk(self, job: Job, first: int, count: int, side: int) -> _Chunk:
        for hashed in self._hashing[side]:
            hashed.result()
        chunk = _Chunk(
            job, first, tuple(self.read(source, first, count, (side, i)) for i, source in enumerate(job.sources))
        )
        self._hashing[side] = [
            self._hasher.submit(self._hash, source, first, piece)
            for source, piece in zip(job.sources, chunk.pieces, strict=True)
        ]
        return chunk

    def _hash(self, source: Stored, first: int, piece: Tensor) -> None:
        if self._hashes is not None:
            self._hashes.feed(source.path, source.start + first * piece.itemsize, _bytes(piece))

    def read(self, source: Stored, first: int, count: int, place: tuple[int, int]) -> Tensor:
        """Elements of a stored tensor, in the buffer of a place."""
        item = ITEMS[source.dtype]
        if place not in self._buffers:
            self._buffers[place] = buffer_for(CHUNK * max(ITEMS.values()))
        if source.path not in self._files:
            self._files[source.path] = InFile(source.path)
        buffer = self._buffers[place]
        offset = self._files[source.path].read(source.start + first * item, count * item, buffer)
        dtype = DTYPES.get(source.dtype, INTEGERS[item])
        return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)


def _chunks(part: Part, skip: int, inputs: _Inputs) -> Generator[_Chunk]:
    """The chunks of a file behind its first `skip` bytes of data."""

    def wanted() -> Iterator[tuple[Job, int, int]]:
        place = 0
        for job in part.jobs:
            begun = min(max(0, skip - place), job.size) // ITEMS[job.dtype]
            for first in range(begun, job.elements, CHUNK):
                yield job, first, min(CHUNK, job.elements - first)
            place += job.size

    return inputs.ahead(wanted())


def _merged(chunk: _Chunk, inputs: _Inputs) -> tuple[Tensor, Tally]:
    """The merged elements of a chunk, and their counts."""
    job, (first, *others) = chunk.job, chunk.pieces
    size = first.numel()
    if not others:
        return first, Tally(size)
    dtype = DTYPES[job.dtype]
    if len(others) == 1:
        merged = combine(first, [(job.alpha, others[0])], dtype)
    else:
        factors = [1 - job.alpha, job.alpha] if job.alpha in (0, 1) else inputs.factors(job)
        merged = combine(others[1], list(zip(factors, (first, others[0]), strict=True)), dtype)
    low, high = torch.aminmax(merged)
    if not (low.isfinite() and high.isfinite()):
        pieces = zip(job.sources, chunk.pieces, strict=True)
        wrong = [source.path.parent for source, piece in pieces if not piece.isfinite().all()]
        why = f"it is in {wrong[0]}" if wrong else f"its α of {job.alpha:g} is too far from 0 and 1"
        raise BadInput(f"{job.name} has NaN or infinite values in the merge; {why}")
    return merged, Tally(size, _unlike(first, others[0]), _unlike(first, merged))


def _unlike(one: Tensor, other: Tensor) -> int:
    """The number of elements that differ: in their bytes, or in value where dtypes differ."""
    if one.dtype == other.dtype:
        kind = INTEGERS[one.itemsize]
        return int(np.count_nonzero(one.view(kind).numpy() != other.view(kind).numpy()))  # four times torch's speed
    return int(one.double().ne(other.double()).count_nonzero())


def arc(job: Job) -> list[float]:
    """Coefficients of the two task vectors in their spherical interpolation (slerp; Shoemake 1985).

    With θ the angle between them: sin((1−α)θ) / sin θ and sin(αθ) / sin θ, or 1−α and α where one is zero or they are
    parallel, where there is no arc between them.
    """
    sums = [0.0, 0.0, 0.0]
    with _Inputs() as inputs:
        wanted = ((job, first, min(CHUNK, job.elements - first)) for first in range(0, job.elements, CHUNK))
        for _, _, (first, second, base) in inputs.ahead(wanted):
            one, other = (piece.to(torch.float64, copy=True).sub_(base) for piece in (first, second))
            for i, product in enumerate((one.dot(one), other.dot(other), one.dot(other))):
                sums[i] += float(product)
    return arc_of(sums[0], sums[1], sums[2], job.alpha)


def arc_of(first: float, second: float, both: float, alpha: float) -> list[float]:
    """The same from the squared lengths of two vectors and their scalar product."""
    lengths = math.sqrt(first) * math.sqrt(second)
    cosine = both / lengths if lengths else 1.0
    if 1 - cosine**2 <= PARALLEL:
        return [1 - alpha, alpha]
    angle = math.acos(cosine)
    return [math.sin((1 - alpha) * angle) / math.sin(angle), math.sin(alpha * angle) / math.sin(angle)]


PARALLEL = 1e-14
"""Squared sine of an angle between vectors that are parallel but for rounding."""


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(cast("Any", tensor.contiguous().view(torch.uint8).numpy()))


def sync_folder(folder: Path) -> None:
    """Sync a folder's own entries, such as a renamed file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
