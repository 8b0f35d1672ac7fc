"""A merge that is killed at many points and resumed after each: run as a program, in a process of its own.

    python -m support.killing FIRST SECOND BASE PLACE POINTS

Every call that changes the disk is a point. A child process merges and kills itself (SIGKILL) at one of them, drawn at
random: before the call, or in the middle of what it writes. Then the merge is made again. One line of JSON per point.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unsleep.mixing import merge_disk, merge_stream
from unsleep.mixing.merge import merge
from unsleep.mixing.merge_config import MergeConfig

WRITES = ("write", "pwrite")
CALLS = (*WRITES, "fsync", "ftruncate", "rename", "replace", "unlink", "rmdir", "mkdir")
VARY = {"merge.json"}
"""Files with the time of the merge."""


class Counted:
    """Counts calls that change the disk, and kills the process at one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.seen, self.written = at, 0, 0
        for name in CALLS:
            setattr(os, name, self.wrapped(getattr(os, name), name))

    def wrapped(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            self.seen += 1
            if self.seen == self.at:
                if name in WRITES:
                    call(given[0], given[1][: len(given[1]) // 2], *given[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            if name in WRITES:
                self.written += len(given[1])
            return call(*given, **named)

        return counted


def hash_of(folder: Path) -> str:
    """Hash of all files' names and bytes."""
    sha = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in VARY):
        sha.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return sha.hexdigest()


def child(models: list[str], out: Path, at: int) -> tuple[int, dict[str, int]]:
    """Merge in a child process that kills itself at a call; how it ended, and what it counted."""
    reading, writing = os.pipe()
    number = os.fork()
    if not number:
        os.close(reading)
        report = os.write  # before it is counted
        counted = Counted(at)
        try:
            merge(models[0], models[1], out, MergeConfig(alpha=0.3, method="slerp", base=models[2]))
            report(writing, json.dumps({"seen": counted.seen, "written": counted.written}).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(number, 0)
    return status, json.loads(said or "{}")


def main() -> None:
    *models, place, points = sys.argv[1:]
    folder = Path(place)
    torch.set_num_threads(1)
    merge_stream.CHUNK, merge_stream.MARK = 512, 4096
    merge_disk.DIRECT = 0  # which knows no half of a block
    _, whole = child(models, folder / "whole", 0)
    wanted = hash_of(folder / "whole")
    draw = random.Random(0)
    for at in sorted(draw.sample(range(1, whole["seen"] + 1), int(points))):
        out = folder / "merged"
        killed, _ = child(models, out, at)
        begun = [path for path in (out, folder / ".merged.steps" / "model") if (path / "config.json").is_file()]
        halves = [path.name for path in begun if hash_of(path) != wanted]
        _, again = child(models, out, 0)
        left = sorted(path.name for path in folder.iterdir() if path.name not in ("whole", "merged"))
        found = {"at": at, "killed": os.WIFSIGNALED(killed), "halves": halves, "left": left}
        found |= {"same": hash_of(out) == wanted, "share": again["written"] / whole["written"]}
        sys.stdout.write(json.dumps(found) + "\n")
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
