"""Files of a merge on disk: reads and writes at any offset, resumed writes, and hashes of what was read."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from unsleep.core import BadInput
from unsleep.mixing import merge_disk
from unsleep.mixing.merge_disk import BLOCK, FileHashes, InFile, OutFile, buffer_for

DATA = random.Random(0).randbytes(5 * BLOCK + 123)


@pytest.fixture(params=[True, False], ids=["direct", "through the page cache"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(merge_disk, "DIRECT", 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").write_bytes(DATA)
    return tmp_path / "data"


@pytest.mark.parametrize(("start", "size"), [(0, 1), (7, 2 * BLOCK), (BLOCK, BLOCK), (5 * BLOCK, 123), (0, len(DATA))])
def test_any_part_of_a_file_is_read(path: Path, start: int, size: int):
    buffer = buffer_for(size)
    file = InFile(path)
    place = file.read(start, size, buffer)
    file.close()
    assert buffer[place : place + size] == DATA[start : start + size]


def test_a_file_that_ends_early_is_named(path: Path):
    file = InFile(path)
    with pytest.raises(BadInput, match="data ends early"):
        file.read(len(DATA) - 10, 11, buffer_for(11))
    file.close()


@pytest.mark.parametrize("start", [0, 100, BLOCK, 3 * BLOCK + 9])
def test_a_write_goes_on_where_it_ended(path: Path, start: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(merge_disk, "HELD", 2 * BLOCK)
    with OutFile(path, start) as file:
        for at in range(start, len(DATA), 1000):
            file.put(DATA[at : min(at + 1000, len(DATA))])
            if at % 3000 < 1000:
                file.flush()
                file.sync()
        file.finish()
        file.flush()
    assert path.read_bytes() == DATA


def test_what_was_flushed_is_in_the_file(path: Path):
    with OutFile(path, 0) as file:
        file.put(DATA[:5000])
        file.flush()
        assert path.read_bytes()[:5000] == DATA[:5000]


@pytest.mark.parametrize("order", ["in order", "with gaps", "backwards", "twice"])
def test_a_hash_is_that_of_the_whole_file(path: Path, order: str):
    parts = [(at, DATA[at : at + 999]) for at in range(0, len(DATA), 999)]
    fed = {"in order": parts, "with gaps": parts[1::3], "backwards": parts[::-1], "twice": [*parts[:3], *parts]}[order]
    hashes = FileHashes([path])
    for at, data in fed:
        hashes.feed(path, at, memoryview(data))
    hashes.feed(path.with_name("another"), 0, memoryview(b"x"))
    assert hashes.finished() == {path: hashlib.sha256(DATA).hexdigest()}
