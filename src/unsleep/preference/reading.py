"""Preference pairs from files and from the hub, in the forms that are in use.

    {"prompt": "…", "chosen": "…", "rejected": "…"}                      texts
    {"prompt": [messages], "chosen": [messages], "rejected": [messages]} chats, the prompt apart or in both sides
    {"chosen": "\\n\\nHuman: … \\n\\nAssistant: …", "rejected": "…"}         transcripts, as in the helpful-harmless set

A file is JSON lines (.jsonl, .ndjson, also .gz) or .parquet; a hub id is a data set's, with a folder of it behind a
colon: `Anthropic/hh-rlhf:helpful-base`. Other keys are columns, which rewards may take.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import re
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from unsleep.core import BadInput
from unsleep.preference.pairs import Pair, PairSet
from unsleep.prompts.prompt import Message, Prompt
from unsleep.prompts.sets import JSON_LINES, json_line

TURN = re.compile(r"\n\n(Human|Assistant):")
"""Opening of a transcript's turn (Bai et al. 2022, arXiv:2204.05862)."""

SIDES = ("chosen", "rejected")
CUTS = ("chosen_cut", "rejected_cut")
FORM = '{"prompt": "…", "chosen": "…", "rejected": "…"}'
EXTRA = "pip install 'unsleep[rl]'"


def read_pairs(
    source: str | Path, *, split: str = "train", limit: int | None = None, skip_bad: bool = False
) -> PairSet:
    """Preference pairs of a file or of a data set on the hub.

    Args:
        source: a file, or a hub id `owner/name` or `owner/name:folder`.
        split: split of the hub's data set.
        limit: read only so many pairs.
        skip_bad: leave out pairs with an empty side or equal sides, and count them, instead of refusing them.

    Raises:
        BadInput: naming the file and the line: no pair, another form, an empty side, or two equal sides.
    """
    path = Path(source)
    if path.is_file() or path.suffix in (*JSON_LINES, ".gz", ".parquet", ".json") or not _is_hub_id(str(source)):
        rows, name = _file_rows(path), path.name
    else:
        rows, name = _hub_rows(str(source), split), str(source)
    found: list[Pair] = []
    dropped = 0
    with contextlib.closing(rows):
        for where, row in rows:
            try:
                found.append(pair_of(row))
            except _Bad as error:
                if not skip_bad:
                    raise BadInput(f"{source} {where}: {error}; --skip-bad leaves such pairs out") from None
                dropped += 1
            except BadInput as error:
                raise BadInput(f"{source} {where}: {error}") from None
            if limit is not None and len(found) >= limit:
                break
    return PairSet(name, tuple(found), dropped=dropped)


class _Bad(BadInput):
    """A pair that says nothing: a side is empty, or both are equal."""


def pair_of(row: Any) -> Pair:
    """The pair of a JSON object; raises `BadInput` naming what is wrong."""
    if not isinstance(row, dict):
        raise BadInput(f"it is no preference pair; expected {FORM}")
    held = cast("dict[str, Any]", row)
    for side in SIDES:
        if side not in held:
            raise BadInput(f"it has no {side!r}; it has {', '.join(map(repr, held)) or 'nothing'}; expected {FORM}")
    prompt, (chosen, rejected) = _parts(held)
    cut = tuple(held.get(key, False) for key in CUTS)
    if any(not isinstance(value, bool) for value in cut):
        raise BadInput(f"{CUTS[0]} and {CUTS[1]} are {cut[0]!r} and {cut[1]!r}; expected true or false")
    columns = {key: value for key, value in held.items() if key not in ("prompt", *SIDES, *CUTS)}
    try:
        return Pair(prompt, chosen, rejected, cast("tuple[bool, bool]", cut), columns)
    except BadInput as error:
        raise _Bad(str(error)) from None


def _parts(row: Mapping[str, Any]) -> tuple[Prompt, tuple[str, str]]:
    """The prompt and both replies."""
    prompt, sides = row.get("prompt"), [row[side] for side in SIDES]
    if all(isinstance(side, str) for side in sides):
        if isinstance(prompt, str):
            return _prompt_of(_turns(prompt) if TURN.match(prompt) else [Message("user", prompt)]), (sides[0], sides[1])
        if isinstance(prompt, list):
            return _prompt_of(_messages(prompt, "prompt")), (sides[0], sides[1])
        if prompt is not None:
            raise BadInput(f"prompt is {str(prompt)[:40]!r}; expected a text or a list of messages")
        chats = [_turns(side, name) for side, name in zip(sides, SIDES, strict=True)]
    else:
        chats = [_messages(side, name) for side, name in zip(sides, SIDES, strict=True)]
        if prompt is not None:
            head = [Message("user", prompt)] if isinstance(prompt, str) else _messages(prompt, "prompt")
            chats = [chat if chat[: len(head)] == head else [*head, *chat] for chat in chats]
    for chat, name in zip(chats, SIDES, strict=True):
        if len(chat) < 2 or chat[-1].role != "assistant":
            raise BadInput(f"{name} ends with no reply of the assistant; expected a prompt and a reply")
    if chats[0][:-1] != chats[1][:-1]:
        raise _Bad("both sides have different prompts; expected chats that differ in their last message alone")
    return _prompt_of(chats[0][:-1]), (chats[0][-1].content, chats[1][-1].content)


def _prompt_of(messages: Sequence[Message]) -> Prompt:
    *before, last = messages
    if last.role != "user":
        raise BadInput(f"the prompt ends with a message of {last.role!r}; expected the user's")
    return Prompt(last.content, before=tuple(before))


def _turns(text: str, name: str = "prompt") -> list[Message]:
    """The turns of a transcript; an unfinished assistant's turn at the end of a prompt is left out."""
    opened, *parts = TURN.split(text)
    if opened.strip() or len(parts) < 2:
        raise BadInput(
            f"{name} is {text[:40]!r}; expected a transcript that opens with '\\n\\nHuman:', or a key prompt"
        )
    pairs = zip(parts[::2], parts[1::2], strict=True)
    found = [Message("user" if who == "Human" else "assistant", said.strip()) for who, said in pairs]
    return found[:-1] if name == "prompt" and found[-1].role == "assistant" and not found[-1].content else found


def _messages(given: Any, name: str) -> list[Message]:
    if not isinstance(given, list) or not given:
        raise BadInput(f"{name} is {str(given)[:40]!r}; expected a text or a list of messages")
    found: list[Message] = []
    for item in cast("list[Any]", given):
        held = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        role, content = held.get("role"), held.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise BadInput(f"a message of {name} is {str(item)[:60]!r}; expected a role and a text as content")
        found.append(Message(role, content))
    return found


def _file_rows(path: Path) -> Generator[tuple[str, Any]]:
    """Rows of a file with their places."""
    if path.suffix == ".parquet":
        yield from _dataset_rows(path, "train", data_files=str(path))
        return
    inner = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if inner not in JSON_LINES:
        raise BadInput(f"{path} is no file of preference pairs; expected .jsonl, .jsonl.gz, .parquet or a hub id")
    try:
        packed = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115 (closed with its text)
        with io.TextIOWrapper(cast("Any", packed), encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        row = json_line(line, FORM)
                    except BadInput as error:
                        raise BadInput(f"{path} line {number}: {error}") from None
                    yield f"line {number}", row
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise BadInput(f"{path} does not exist or is not a file; expected {FORM}, one a line") from None
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None


def _is_hub_id(text: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w./-]+)?", text) is not None


def _hub_rows(source: str, split: str) -> Generator[tuple[str, Any]]:
    repo, _, folder = source.partition(":")
    yield from _dataset_rows(source, split, repo, data_dir=folder or None)


def _dataset_rows(source: str | Path, split: str, kind: str = "parquet", **options: Any) -> Generator[tuple[str, Any]]:
    """Rows of a data set of the library `datasets`."""
    try:
        import datasets
    except ImportError:
        raise BadInput(f"{source}: data sets need the package datasets, which is not installed; {EXTRA}") from None
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(kind, split=split, **options)
    except Exception as error:  # its errors have no common class
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(
            f"{source} is no data set that can be loaded ({said[:200]}); expected a file, or a hub id such as "
            "Anthropic/hh-rlhf:helpful-base"
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    for number, row in enumerate(found, 1):
        yield f"row {number}", row
