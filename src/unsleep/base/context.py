"""Run context: the progress callback and the folder of resumable steps.

Both are context variables, so that long computations need not pass them along:

    with reporting(callback), resumable("runs/repaired", suspect.fingerprint):
        …  # calls progress(…) and kept(…) at any depth
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from unsleep.base.store import (
    hash_tensors,
    hash_value,
    read_json,
    read_tensors,
    remove,
    versions,
    write_json,
    write_tensors,
)
from unsleep.core import BadInput, Refused

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Progress callback: (stage, done, total)."""

_PROGRESS: ContextVar[Progress | None] = ContextVar("progress", default=None)
_STEPS: ContextVar[Path | None] = ContextVar("steps", default=None)


@contextlib.contextmanager
def reporting(callback: Progress | None) -> Generator[None]:
    """Call `callback(stage, done, total)` with the progress of all work in the block; `None` for silence."""
    token = _PROGRESS.set(callback)
    try:
        yield
    finally:
        _PROGRESS.reset(token)


@contextlib.contextmanager
def reporting_within(stage: str, done: int, total: int) -> Generator[None]:
    """Report the stages of the block as the changing figure of one stage, of which `done` parts are done."""
    outer = _PROGRESS.get()

    def told(inner: str, i: int, n: int) -> None:
        if outer is not None:
            outer(f"{stage}, {inner} {i} of {n}", done, total)

    with reporting(told):
        yield


@contextlib.contextmanager
def checking(check: Callable[[], None]) -> Generator[None]:
    """Call `check`, which may raise, before every progress report of the block."""
    outer = _PROGRESS.get()

    def told(stage: str, done: int, total: int) -> None:
        check()
        if outer is not None:
            outer(stage, done, total)

    with reporting(told):
        yield


def progress(stage: str, done: int, total: int) -> None:
    """Report the progress of a stage; behind a comma, the stage's name may hold a changing figure."""
    callback = _PROGRESS.get()
    if callback is not None:
        callback(stage, done, total)


@contextlib.contextmanager
def resumable(out: str | Path, *made_from: Any) -> Generator[Path]:
    """Keep finished steps of the work that writes `out` in a hidden folder beside it, which is yielded.

    The folder is removed when the block ends, also by a `BadInput` or `Refused`, and stays for the next run after an
    interrupt, a kill or a full disk. `made_from` identifies the inputs: steps from other inputs or library versions
    are discarded.
    """
    out = Path(out)
    folder = out.with_name(f".{out.name}.steps")
    identity = {"made_from": hash_value([identified(made_from), versions()])}
    if not folder.is_dir() or not (folder / "steps.json").is_file() or read_json(folder / "steps.json") != identity:
        remove(folder)
        folder.mkdir(parents=True)
        write_json(folder / "steps.json", identity)
    try:
        with keeping(folder):
            yield folder
    except (BadInput, Refused) as error:
        if not isinstance(error.__cause__, OSError | SafetensorError):
            remove(folder)
        raise
    remove(folder)


@contextlib.contextmanager
def keeping(folder: Path | None) -> Generator[None]:
    """Use a folder for the resumable steps of the block; `None` keeps nothing."""
    token = _STEPS.set(folder)
    try:
        yield
    finally:
        _STEPS.reset(token)


def steps_folder() -> Path | None:
    """The folder of finished steps; `None` outside of `resumable`."""
    return _STEPS.get()


def kept(make: Callable[..., T], *of: Any, made_from: Any = ()) -> T:
    """`make(*of)`, or what it gave when the same function was called with the same arguments before an interrupt.

    A step is found again by the function's name, its arguments and `made_from`: all else that determines the result,
    which is what a local function closes over and what a method reads of its object. Models, prompts, dictionaries and
    interventions count by their hashes, tensors by their content. Where that would be gigabytes, such as a teacher's
    logits, what holds them has a `hash` of what they were computed from instead (`Lesson`, `Pairs`).

    The result is a JSON value or named tensors. Raises `TypeError` for what has no identity (see `identified`).
    """
    folder = _STEPS.get()
    if folder is None:
        return make(*of)
    place = folder / hash_value([make.__module__, make.__qualname__, identified(of), identified(made_from)])
    for path, read in ((place.with_suffix(".json"), read_json), (place.with_suffix(".safetensors"), read_tensors)):
        if path.exists():
            return cast("T", read(path))
    found = make(*of)
    if isinstance(found, Mapping) and found and all(isinstance(x, Tensor) for x in found.values()):
        write_tensors(place.with_suffix(".safetensors"), cast("Mapping[str, Tensor]", found))
        return cast("T", read_tensors(place.with_suffix(".safetensors")))
    write_json(place.with_suffix(".json"), found)
    return cast("T", read_json(place.with_suffix(".json")))


def identified(value: Any) -> Any:
    """A JSON value that identifies content: hashes of models, prompts, dictionaries and tensors."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, Tensor):
        return hash_tensors({"": value})
    if hasattr(value, "fingerprint") and hasattr(value, "network"):
        ends = sorted(getattr(value, "end_ids", ()))
        return [value.fingerprint, getattr(value, "template", None), ends, str(value.network.dtype)]
    if hasattr(value, "hash"):
        return value.hash
    if isinstance(value, Mapping):
        return [[identified(k), identified(v)] for k, v in cast("Mapping[Any, Any]", value).items()]
    if isinstance(value, set | frozenset):
        return sorted(identified(x) for x in cast("set[Any]", value))
    if isinstance(value, Sequence):
        return [identified(x) for x in cast("Sequence[Any]", value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__qualname__, *(identified(getattr(value, f.name)) for f in fields(value))]
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(f"{type(value).__name__} cannot identify a resumable step")
