"""Files of a merge, read and written past the page cache where the system can: tens of gigabytes that are used once.

Direct I/O (`O_DIRECT`) moves whole blocks at multiples of their size between the disk and aligned buffers; where it is
missing, the same calls go through the page cache.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

from unsleep.core import BadInput

BLOCK = 4096
"""Bytes to whose multiples direct I/O is aligned."""
HELD = 1 << 22
"""Bytes that are written at a time."""
PIECE = 1 << 20
"""Bytes per read of what is hashed and read for nothing else."""
DIRECT = getattr(os, "O_DIRECT", 0)


class _File:
    """A file opened for direct I/O, or as it can be."""

    def __init__(self, path: Path, flags: int) -> None:
        self._path, self._flags, self._direct = path, flags, bool(DIRECT)
        try:
            self._file = os.open(path, flags | DIRECT)
        except OSError as error:
            self._reopen(error)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _moved(self, move: Callable[[int, Any, int], int], data: Any, at: int) -> int:
        """Bytes that `os.preadv` or `os.pwrite` has moved, without direct I/O where it is refused."""
        try:
            return move(self._file, data, at)
        except OSError as error:
            self._reopen(error)
            return move(self._file, data, at)

    def _reopen(self, error: OSError) -> None:
        """Open the file without direct I/O; raises any error but its refusal."""
        if error.errno != errno.EINVAL or not self._direct:
            raise error
        if hasattr(self, "_file"):
            os.close(self._file)
        self._file, self._direct = os.open(self._path, self._flags), False


class InFile(_File):
    """A file whose parts are read into buffers of the caller."""

    def __init__(self, path: Path) -> None:
        with reading(path):
            super().__init__(path, os.O_RDONLY)

    def read(self, start: int, size: int, buffer: mmap.mmap) -> int:
        """Read bytes into a buffer that has `BLOCK` bytes more than that at both ends; returns their place in it.

        Raises `BadInput` for a file that ends early or cannot be read.
        """
        first = start // BLOCK * BLOCK
        wanted, got = start + size - first, 0
        with memoryview(buffer) as view:
            while got < wanted:
                with reading(self._path):
                    more = self._moved(os.preadv, [view[got : _up(wanted)]], first + got)
                got += more
                if not more or (got < wanted and got % BLOCK):
                    raise BadInput(f"{self._path} ends early; it was changed during the merge")
        return start - first


class OutFile(_File):
    """A file that is written from some position on; what lies behind it is cut off."""

    def __init__(self, path: Path, start: int) -> None:
        self._buffer = mmap.mmap(-1, HELD)
        self._at = start // BLOCK * BLOCK
        self._filled = start - self._at
        with path.open("ab+") as file:
            file.truncate(start)
            file.seek(self._at)
            self._buffer[: self._filled] = file.read(self._filled)
        super().__init__(path, os.O_RDWR)

    def __enter__(self) -> OutFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def put(self, data: bytes | memoryview) -> None:
        """Append bytes; they are in the file when the buffer is full, or after `flush`."""
        view = memoryview(data)
        while view:
            part = view[: HELD - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == HELD:
                self.flush()

    def flush(self) -> None:
        """Write what is held; the last block is written whole, with anything behind its end, and held on to."""
        with memoryview(self._buffer) as view:
            done, end = 0, _up(self._filled)
            while done < end:
                done += self._moved(os.pwrite, view[done:end], self._at + done)
        whole = self._filled // BLOCK * BLOCK
        self._buffer.move(0, whole, self._filled - whole)
        self._at, self._filled = self._at + whole, self._filled - whole

    def finish(self) -> None:
        """Write the rest, and cut off what is behind the end; nothing can be put behind it."""
        self.flush()
        os.ftruncate(self._file, self._at + self._filled)
        self._filled = 0

    def sync(self) -> None:
        """Wait until what has been flushed is on the disk."""
        os.fsync(self._file)


class FileHashes:
    """SHA-256 of files from bytes that are read anyway; what is not fed in the files' order is read for it."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._hashes = {path: hashlib.sha256() for path in paths}
        self._done = dict.fromkeys(self._hashes, 0)

    def feed(self, path: Path, start: int, data: memoryview) -> None:
        """Hash bytes of a file that begin at `start`; bytes before them that are missing are read.

        What was hashed before is passed over, and so are other files. Not to be called by two threads at a time.
        """
        if path not in self._hashes or start + len(data) <= self._done[path]:
            return
        self._read(path, start)
        self._hashes[path].update(data[self._done[path] - start :])
        self._done[path] = start + len(data)

    def finished(self) -> dict[Path, str]:
        """File → 64 hex digits, after reading what is missing."""
        for path in self._hashes:
            self._read(path, path.stat().st_size)
        return {path: each.hexdigest() for path, each in self._hashes.items()}

    def _read(self, path: Path, end: int) -> None:
        """Hash a file up to a position."""
        if self._done[path] >= end:
            return
        with reading(path), path.open("rb") as file:
            file.seek(self._done[path])
            while (left := end - self._done[path]) and (piece := file.read(min(PIECE, left))):
                self._hashes[path].update(piece)
                self._done[path] += len(piece)


def buffer_for(size: int) -> mmap.mmap:
    """A buffer into which `InFile` can read so many bytes."""
    return mmap.mmap(-1, _up(size) + 2 * BLOCK)


@contextlib.contextmanager
def reading(path: Path) -> Generator[None]:
    """Raise `BadInput` for a file that cannot be read."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None


def _up(size: int) -> int:
    """A size rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK
