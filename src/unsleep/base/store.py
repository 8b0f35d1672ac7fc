"""Artefacts on disk: safetensors and JSON, content hashes, atomic writes, never a pickle.

An artefact is a folder. It is written to a scratch folder beside its final place and renamed, so that a reader
sees either all of it or none, and a killed process leaves nothing that looks finished.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import platform
import reprlib
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Container, Generator, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unsleep.base.machine import is_native, processor
from unsleep.core import BadInput, digest

T = TypeVar("T")

STARTED = time.monotonic()
"""Start of the process, by the monotonic clock."""


@contextlib.contextmanager
def new_folder(path: str | Path, *, replace: bool | str = False) -> Generator[Path]:
    """Yield a scratch folder that is renamed to `path` when the block ends without an error.

    `replace=True` replaces an existing folder; a file name replaces one that holds a file of that name; any other is
    refused before work starts (see `check_place`).
    """
    path = Path(path)
    check_place(path, replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield scratch
        share(scratch, [scratch, *scratch.rglob("*")])
        put_in_place(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_place(path: str | Path, replace: bool | str = False) -> None:
    """Raise `BadInput` where something exists at `path` that a new artefact may not replace.

    `replace` is the name of the file that marks an artefact of the same kind; `True` replaces anything.
    """
    path = Path(path)
    if replace is True or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not replace or not (path / replace).is_file():
        kind = f" and has no {replace}" if replace else ""
        raise BadInput(f"{path} exists already{kind}; choose another place or remove it first")


def share(folder: Path, paths: Iterable[Path]) -> None:
    """Apply the default modes (umask) to paths in a folder: temporary folders and safetensors files are private."""
    probe = folder / f".mode.{os.getpid()}.{threading.get_ident()}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in paths:
        path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


@contextlib.contextmanager
def scratch_folder(beside: str | Path) -> Generator[Path]:
    """A temporary folder beside an artefact's place, removed when the block ends."""
    beside = Path(beside)
    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.", dir=beside.parent) as folder:
        yield Path(folder)


def put_in_place(scratch: Path, path: Path) -> None:
    """Rename `scratch` to `path` after moving an existing folder aside; retries where another process races."""
    aside: Path | None = None
    for attempt in itertools.count():
        try:
            scratch.rename(path)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                with contextlib.suppress(OSError):
                    if aside is not None:
                        aside.rmdir()  # fails where it still holds the previous artefact
                raise
        if aside is None:
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        with contextlib.suppress(FileNotFoundError):
            path.rename(aside / str(attempt))
    if aside is not None:
        shutil.rmtree(aside)


@contextlib.contextmanager
def writing(path: str | Path) -> Generator[None]:
    """Raise `BadInput` naming `path` where the block cannot write: a full disk, no permission."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"cannot write {path}: {error}; no partial file was left behind. Free some space or write elsewhere"
        ) from error


def remove(path: str | Path) -> None:
    """Remove an artefact's folder or file if it exists."""
    path = Path(path)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with writing(path):
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically; NaN is refused because other readers refuse it."""
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} would contain NaN or infinity, which JSON has not") from error
    write_text(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; raises `BadInput` naming the file where it is missing or damaged."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{path} does not exist") from None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise BadInput(f"{path} is not valid JSON ({error}); write it again") from None


def fields_of(value: Any, kinds: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """`value` as a JSON object that has every key of `kinds`, and others or not: for files of other libraries.

    A kind is what `isinstance` takes, or `list[…]` of that; true and false are no numbers. unsleep's own files are
    records (`base/records.py`). Raises `BadInput` naming the place, the key and the kind that was expected.
    """
    if not isinstance(value, dict):
        raise BadInput(f"{where} is {reprlib.repr(value)}; expected an object")
    found = cast("dict[str, Any]", value)
    for key, kind in kinds.items():
        if key not in found:
            raise BadInput(f"{where} has no {key!r}; it has {', '.join(map(repr, found)) or 'nothing'}")
        if not _is_of(found[key], kind):
            name = str(kind) if get_args(kind) else kind.__name__
            raise BadInput(f"{where}: {key} is {reprlib.repr(found[key])}; expected {name}")
    return found


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is list:
        [each] = get_args(kind)
        return isinstance(value, list) and all(_is_of(item, each) for item in cast("list[Any]", value))
    return isinstance(value, kind) and not isinstance(value, bool)


def inside(folder: Path, name: str, what: str) -> Path:
    """The file or folder `name` in `folder`; raises `BadInput` for a name that leads outside."""
    if name in ("", "..") or "\0" in name or Path(name).name != name:
        raise BadInput(f"names the {what} {name!r}; expected a name inside {folder}")
    return folder / name


def files_named(name: str, folder: Path, command: str) -> list[Path]:
    """A file of a folder, or those of its subfolders, such as one per Site.

    Raises `BadInput`, naming the command that makes them, where there is none.
    """
    found = [folder / name] if (folder / name).is_file() else sorted(folder.glob(f"*/{name}"))
    if not found:
        raise BadInput(f"{folder} has no {name}, and no folder with one; make it with `{command}`")
    return found


@contextlib.contextmanager
def reading(path: str | Path) -> Generator[None]:
    """Prefix every `BadInput` of the block with the path of the file that is read, where it lacks one."""
    try:
        yield
    except BadInput as error:
        raise error if str(path) in str(error) else BadInput(f"{path}: {error}") from None


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically; tensors that share memory are written separately."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with writing(path):
            save_file(_apart(tensors), scratch)
            share(path.parent, [scratch])
            scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in memory order, copied where they share storage, which safetensors refuses."""
    taken: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = tensor.detach().contiguous().cpu()
        if own.untyped_storage().data_ptr() in taken:
            own = own.clone()
        taken.add(own.untyped_storage().data_ptr())
        out[name] = own
    return out


def read_tensors(
    path: str | Path, expect: Mapping[str, tuple[int | None, ...]] | None = None, *, only: Container[str] | None = None
) -> dict[str, Tensor]:
    """Read a safetensors file.

    `expect` gives the required shape of each named tensor, `None` standing for any length;
    `only` leaves the other tensors on disk.
    Raises `BadInput` naming the file, the key and the shape where a tensor is missing, truncated
    or has another shape.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            found = {name: file.get_tensor(name) for name in names if only is None or name in only}
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is not a whole safetensors file ({error}); make it again") from None
    check_shapes(found, expect or {}, path)
    return found


def check_shapes(tensors: Mapping[str, Tensor], expect: Mapping[str, tuple[int | None, ...]], path: str | Path) -> None:
    """Raise `BadInput` naming the file, the key and the shape where a tensor is missing or has another shape.

    `None` stands for any length.
    """
    for name, shape in expect.items():
        if name not in tensors:
            raise BadInput(f"{path} has no tensor {name!r}; it has {sorted(tensors)}")
        have = tuple(tensors[name].shape)
        if len(have) != len(shape) or any(
            want is not None and want != got for want, got in zip(shape, have, strict=True)
        ):
            wanted = "[" + ", ".join("*" if s is None else str(s) for s in shape) + "]"
            raise BadInput(f"{path}: {name} has shape {list(have)}; expected {wanted}")


def hash_file(path: str | Path) -> str:
    """Full SHA-256 of a file, 64 hex digits, read in chunks."""
    sha = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            sha.update(piece)
    return sha.hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor], form: Callable[[Tensor], Tensor] | None = None) -> str:
    """Content hash of names, shapes, dtypes and bytes, after applying `form` to each tensor; 16 hex digits."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach()
        t = (form(t) if form else t).contiguous().cpu()
        sha.update(f"{name}{tuple(t.shape)}{t.dtype}".encode())
        sha.update(t.reshape(-1).view(torch.uint8).numpy().data if t.numel() else b"")
    return sha.hexdigest()[:16]


def hash_value(value: Any) -> str:
    """Content hash of a JSON value; 16 hex digits."""
    return digest(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str))


def provenance(seed: int | None = None, **made_from: Any) -> dict[str, Any]:
    """Provenance of an artefact: versions, command, machine, time, and the hashes of its inputs.

    `wall_seconds` is the running time of the process when the artefact was written.
    """
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "wall_seconds": round(time.monotonic() - STARTED, 1),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "seed": seed,
        "versions": {"python": platform.python_version(), **versions()},
        "machine": {
            "system": platform.system(),
            "processor": processor(),
            "bfloat16": is_native(torch.bfloat16),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        },
        **made_from,
    }


def versions() -> dict[str, str]:
    """Versions of unsleep and of the libraries that determine its numerics."""
    found: dict[str, str] = {}
    for name in ("unsleep", "torch", "transformers", "peft", "safetensors", "tokenizers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
