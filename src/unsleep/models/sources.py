"""Checkpoint names: a local folder or file, or a hub repository with optional revision and subfolder.

folder                       a local checkpoint or adapter
file.gguf                    a local GGUF file
alias                        a model from a Python package (`bundled`)
owner/repo                   a hub repository
owner/repo/sub/folder        a subfolder of it
owner/repo/file.gguf         a file of it
…@revision                   any hub name at a branch, tag or commit
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from unsleep.base import hub, store
from unsleep.core import BadInput
from unsleep.models import bundled

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TEMPLATE = "chat_template.jinja"
SMALL = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
"""Extensions of non-weight files: configs, tokenizers, chat templates."""
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "consolidated.00.pth")


@dataclass(frozen=True)
class Source:
    """A parsed checkpoint name."""

    name: str
    """A path, an alias or a hub id `owner/repo`."""
    revision: str | None = None
    subfolder: str = ""
    """A subfolder of it, or a `.gguf` file."""

    @classmethod
    def parse(cls, text: str, revision: str | None = None, subfolder: str | None = None) -> Source:
        """Parse a name; an existing local path takes precedence.

        Raises `BadInput` for a revision or subfolder that is given twice, or that does not apply.
        """
        inside = (subfolder or "").strip("/")
        if text.endswith("@"):
            raise BadInput(f"{text} names no revision after the @; expected a branch, a tag or a commit")
        if ".." in PurePosixPath(inside).parts:
            raise BadInput(f"subfolder {inside!r} is outside the repository; expected a folder in it")
        name, _, at = text.partition("@")
        is_here = Path(text).expanduser().exists()
        if is_here or not _is_on_hub(text) or not _is_on_hub(name):
            if wrong := revision or ("" if is_here else at):
                raise BadInput(f"{name} is no repository of the hub, so it has no revision {wrong!r}")
            return cls(text, None, inside)
        if at and revision not in (None, at):
            raise BadInput(f"{text} names revision {at!r}, and --revision {revision!r}; expected one of them")
        owner, *rest = name.split("/")
        tail = "/".join(rest[1:])
        if tail and inside:
            raise BadInput(f"{text} names the subfolder {tail!r}, and --subfolder {inside!r}; expected one of them")
        return cls("/".join([owner, *rest[:1]]), at or revision, tail or inside)

    def __str__(self) -> str:
        place = f"{self.name}/{self.subfolder}" if self.subfolder else self.name
        return f"{place}@{self.revision}" if self.revision else place

    def open(self, remote_code: bool = False) -> Files:
        """The checkpoint's files, downloaded from the hub if needed.

        Raises `BadInput` where nothing of that name exists, or nothing loadable.
        """
        return self._files(remote_code).checked()

    def open_config(self, remote_code: bool = False) -> Files:
        """The config of a whole checkpoint, downloaded from the hub if needed; never its weights.

        Raises `BadInput` where nothing of that name exists, and for an adapter or a GGUF file.
        """
        if self.name.endswith(".gguf") or self.subfolder.endswith(".gguf"):
            raise BadInput(f"{self} is a .gguf file, without a {CONFIG}; give the checkpoint that it was made of")
        found = self._files(remote_code, weights=False)
        if not found.place.is_dir():
            raise BadInput(f"{found.name} is no folder; {EXPECTED}")
        if not found.has(CONFIG):
            adapter = f"; it is an adapter over {found.base[0]}: give that" if found.is_adapter else ""
            raise BadInput(f"{found.name} has no {CONFIG}{adapter or '; ' + found.inside()}")
        return found

    def _files(self, remote_code: bool, weights: bool = True) -> Files:
        near = difflib.get_close_matches(self.name, bundled.aliases(), 1, 0.85)
        if near and self.name not in bundled.aliases() and not Path(self.name).exists():
            raise BadInput(f"there is no model {self.name!r}; did you mean {near[0]}?")
        place = bundled.packaged(self.name)
        resolved = bundled.resolve(self.name)
        if isinstance(resolved, Path):
            place = resolved
        if place.expanduser().exists() or (resolved == self.name and _is_path(self.name)):
            return Files(str(self), place.expanduser() / self.subfolder)
        return _from_hub(replace(self, name=str(resolved)), str(self), remote_code, weights)


def _is_on_hub(text: str) -> bool:
    """True if a name does not exist locally."""
    return not (Path(text).expanduser().exists() or text in bundled.aliases() or _is_path(text))


def _is_path(text: str) -> bool:
    """True if a name can only be a path."""
    is_file = text.endswith(".gguf") and text.count("/") < 2
    return text.startswith((".", "/", "~")) or "\\" in text or is_file


@dataclass(frozen=True)
class Files:
    """The local files of a checkpoint."""

    name: str
    """The requested name."""
    place: Path
    """The folder, or the `.gguf` file."""
    commit: str | None = None
    """Commit of the hub repository, 40 hex digits."""
    left: frozenset[str] = frozenset()
    """Files of the repository that were not downloaded."""

    def has(self, name: str) -> bool:
        """True if a file of that name exists."""
        return (self.place / name).is_file()

    def json(self, name: str) -> dict[str, Any]:
        """Content of a JSON file; raises `BadInput` unless it is an object."""
        return store.fields_of(store.read_json(self.place / name), {}, self.place / name)

    @property
    def is_gguf(self) -> bool:
        """True for a GGUF file."""
        return self.place.suffix == ".gguf"

    @property
    def is_adapter(self) -> bool:
        """True for a PEFT adapter."""
        return self.has(ADAPTER)

    @property
    def has_whole_weights(self) -> bool:
        """True if it contains the weights of a whole model."""
        return self.has(CONFIG) and (self.has(WEIGHTS) or self.has(INDEX))

    @property
    def has_tokenizer(self) -> bool:
        """True if it contains a tokenizer."""
        return any(map(self.has, ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")))

    @property
    def base(self) -> tuple[str, str | None]:
        """The base that an adapter names, with its revision; raises `BadInput` where it names none."""
        config = self.json(ADAPTER)
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
        if not isinstance(name, str) or not name.strip():
            raise BadInput(f"{self.place / ADAPTER} names no base model; pass --base MODEL")
        if not isinstance(revision, str | None):
            raise BadInput(f"{self.place / ADAPTER}: revision is {revision!r}; expected a branch, a tag or a commit")
        return name, revision

    @property
    def record(self) -> dict[str, Any]:
        """Provenance: name and commit."""
        return {"name": self.name, "commit": self.commit}

    def checked(self) -> Files:
        """Itself; raises `BadInput` where nothing is loadable."""
        if self.is_gguf:
            if not self.place.is_file():
                raise BadInput(f"{self.name} does not exist; expected a .gguf file")
            return self
        if self.place.is_file():
            raise BadInput(f"{self.name} is a file; give its folder, or a .gguf file")
        if not self.place.is_dir():
            raise BadInput(f"{self.name} does not exist; {EXPECTED}")
        if self.is_adapter:
            if not self.has(ADAPTER_WEIGHTS):
                raise BadInput(f"{self.name} has no {ADAPTER_WEIGHTS}; {self._unread()}")
            check_whole(self.place / ADAPTER_WEIGHTS)
            return self
        if not self.has(CONFIG):
            raise BadInput(f"{self.name} has no {CONFIG} and no {ADAPTER}; {self.inside()}")
        if self.has(WEIGHTS) and self.has(INDEX):
            raise BadInput(
                f"{self.name} has two sets of weights, {WEIGHTS} and the shards of {INDEX}; remove one, or "
                "give another --revision"
            )
        if not self.has_whole_weights:
            raise BadInput(f"{self.name} has no {WEIGHTS} and no {INDEX}; {self._unread()}")
        for name in [WEIGHTS] if self.has(WEIGHTS) else shards(self.place):
            check_whole(self.place / name)
        return self

    def _unread(self) -> str:
        if found := [name for name in PICKLES if self.has(name) or name in self.left]:
            return f"{found[0]} is a pickle, which is never read: convert it to safetensors"
        return "weights in any other form are not read"

    def inside(self) -> str:
        """Subfolders that contain something loadable, for error messages."""
        marks = sorted(p.parent for name in (ADAPTER, CONFIG) for p in self.place.glob(f"*/**/{name}"))
        found = [p.relative_to(self.place).as_posix() for p in dict.fromkeys(marks)]
        if found:
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            return f"it has {', '.join(found[:8])}{more}: name one, such as {self.name.partition('@')[0]}/{found[0]}"
        if ggufs := sorted(p.name for p in self.place.glob("*.gguf")):
            return f"it has {', '.join(ggufs[:8])}: append one after a slash"
        return EXPECTED


EXPECTED = "give a hub id, a local folder, a .gguf file or one of: " + ", ".join(bundled.aliases())


def shards(folder: Path) -> list[str]:
    """Shard files listed in a folder's index; raises `BadInput` where the index cannot be read."""
    index = store.fields_of(store.read_json(folder / INDEX), {"weight_map": dict}, folder / INDEX)
    names = sorted({str(name) for name in index["weight_map"].values()})
    with store.reading(folder / INDEX):
        return [store.inside(folder, name, "shard").name for name in names]


def check_whole(path: Path) -> None:
    """Raise `BadInput` for a safetensors file that is missing, truncated or damaged."""
    try:
        with safe_open(path, framework="pt"):
            return
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; expected all weight files in one folder") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is truncated or not a safetensors file ({error}); download it again") from None


def _from_hub(source: Source, asked: str, remote_code: bool, weights: bool = True) -> Files:
    """Download the files of a checkpoint, and nothing from sibling folders or subfolders."""
    names = hub.listing(source.name, source.revision)
    is_file = source.subfolder.endswith(".gguf")
    folder = PurePosixPath(source.subfolder).parent if is_file else PurePosixPath(source.subfolder)
    own: dict[str, str] = {}
    if names is None:
        root = hub.fetch(source.name, None, source.revision)
    elif is_file:
        root = hub.fetch(source.name, _parts(names, source.subfolder), source.revision)
    else:
        own = {PurePosixPath(n).name: n for n in names if PurePosixPath(n).parent == folder}
        marks = [n for n in names if PurePosixPath(n).name in (ADAPTER, CONFIG)]  # for the error's suggestions
        templates = [n for n in names if PurePosixPath(n).parent == folder / "additional_chat_templates"]
        suffixes = SMALL | ({".py"} if remote_code else set())
        small = [n for name, n in own.items() if PurePosixPath(name).suffix in suffixes]
        if not weights:
            small = [n for n in small if PurePosixPath(n).name == CONFIG or n.endswith(".py")]
            templates = []
        root = hub.fetch(source.name, [*small, *templates, *marks], source.revision)
        if weights and (wanted := _weights(root / folder, own)):
            root = hub.fetch(source.name, wanted, source.revision)
    place = root / source.subfolder
    if not place.exists():
        what = "file" if is_file else "folder"
        inside = Files(asked, root).inside()
        raise BadInput(f"{source.name} has no {what} {source.subfolder!r}; {inside}")
    return Files(asked, place, root.name, frozenset(name for name in own if not (place / name).exists()))


def _weights(folder: Path, own: dict[str, str]) -> list[str]:
    """Repository names of the weight files."""
    if ADAPTER in own:
        wanted = [ADAPTER_WEIGHTS]
    elif INDEX in own and WEIGHTS not in own:
        wanted = shards(folder)
    else:
        wanted = [WEIGHTS]
    return [own[name] for name in wanted if name in own]


def _parts(names: list[str], wanted: str) -> list[str]:
    """A GGUF file, with the other parts where it is split."""
    head, _, _ = wanted.rpartition("-of-")
    stem = head.rpartition("-")[0]
    return [n for n in names if n == wanted or (head and n.startswith(f"{stem}-") and "-of-" in n)]
