"""Prompt sets: read from files, or generated from the project's question templates and topics.

A generated prompt is a template filled with a topic. Topics are divided among the splits, so
that no question of one split appears in another; one template in four appears in the held-out
split only.
"""

from __future__ import annotations

import json
import random
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, cast

from unsleep.core import BadInput
from unsleep.prompts.prompt import ROLES, Message, Prompt, PromptSet, Role, Split

_SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.4), "edit": (0.4, 0.6), "held_out": (0.6, 1.0)}


JSON_LINES = (".jsonl", ".ndjson")
"""File extensions of JSON Lines."""

KEYS = ("text", "expected", "system", "messages", "reply")
"""Allowed keys of a JSON line."""


def read_prompts(path: str | Path, role: Role = "clean", split: Split = "edit", name: str | None = None) -> PromptSet:
    """Prompts from a file: one per line, or JSON Lines where it ends in .jsonl or .ndjson.

    A JSON line is `{"text": …}`, optionally with `expected` (how the reply must begin), `reply` (a reference reply)
    and `system` (a system message); or `{"messages": [{"role": …, "content": …}, …]}`, of which the last is
    the user's. Blank lines are skipped. Raises `BadInput` naming the file and the line for anything else.
    """
    path = Path(path)
    as_json = path.suffix.lower() in JSON_LINES
    if path.suffix.lower() == ".json":
        raise BadInput(
            f"{path} is one JSON value; expected one prompt per line, or one object per line in a .jsonl file"
        )
    prompts: list[Prompt] = []
    for number, line in numbered_lines(path):
        try:
            if not as_json and _is_object(line):
                raise BadInput(f"it is a JSON object; name the file {path.stem}.jsonl, so that it is read as one")
            prompts.append(_prompt(line, role) if as_json else Prompt(line.strip(), role))
        except BadInput as error:
            raise BadInput(f"{path} line {number}: {error}") from None
    if len(prompts) < 2:
        raise BadInput(f"{path} holds {len(prompts)} prompts; expected at least 2, one per line")
    return PromptSet(name or path.stem, tuple(prompts), split)


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Lines of a UTF-8 text with their numbers, from 1, without blank ones; raises `BadInput` where it is none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON strings may contain other line breaks
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise BadInput(f"{path} does not exist or is not a file; expected one prompt per line") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def json_line(line: str, form: str) -> Any:
    """The value of a JSON line, no key of which is there twice; raises `BadInput`, saying the expected form."""
    try:
        return json.loads(line, object_pairs_hook=_each_once)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadInput(f"it is not valid JSON{where}; expected {form}") from None


def prompt_line(prompt: Prompt) -> str:
    """A prompt as one JSON line, as `read_prompts` reads it."""
    row = {"messages": prompt.messages} if prompt.before else {"text": prompt.text}
    right = {"reply": prompt.reply} if prompt.reply is not None else {}
    return json.dumps({**row, "expected": prompt.expected, **right}, ensure_ascii=False)


def _prompt(line: str, role: Role) -> Prompt:
    """A prompt from a JSON line; raises `BadInput` naming what is wrong."""
    row = json_line(line, '{"text": "…"}')
    if not isinstance(row, dict):
        raise BadInput('it is not a prompt; expected {"text": "…"}')
    return prompt_of(cast("dict[str, Any]", row), role)


def prompt_of(row: dict[str, Any], role: Role = "clean") -> Prompt:
    """A prompt from the object of a JSON line (see `read_prompts`); raises `BadInput` naming what is wrong."""
    if unknown := [key for key in row if key not in KEYS]:
        raise BadInput(f"key {str(unknown[0])[:40]!r} is unknown; expected {', '.join(KEYS)}")
    if ("text" in row) == ("messages" in row) or ("messages" in row and "system" in row):
        raise BadInput("expected either text, with system or without, or messages")
    for key in ("text", "expected", "system", "reply"):
        if not isinstance(row.get(key), str | None) or (key == "text" and row.get(key, "") is None):
            raise BadInput(f"{key} is {str(row[key])[:40]!r}; expected a text")
    if "text" in row:
        before = (Message("system", row["system"]),) if row.get("system") is not None else ()
        return Prompt(row["text"], role, row.get("expected"), before, row.get("reply"))
    *before, last = _messages(row["messages"])
    if last.role != "user":
        raise BadInput(f"the last message is of {last.role!r}; expected the user's, which the model will answer")
    return Prompt(last.content, role, row.get("expected"), tuple(before), row.get("reply"))


def _is_object(line: str) -> bool:
    """True if a line is a JSON object."""
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises `BadInput` for duplicate keys, of which one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise BadInput(f"key {next(k for k in keys if keys.count(k) > 1)[:40]!r} occurs twice")
    return found


def _messages(given: object) -> list[Message]:
    if not isinstance(given, list) or not given:
        what = "an empty list" if isinstance(given, list) else "no list"
        raise BadInput(f'messages is {what}; expected [{{"role": "user", "content": "…"}}, …]')
    found: list[Message] = []
    for item in cast("list[object]", given):
        if not isinstance(item, dict) or set(item) != {"role", "content"}:
            raise BadInput(f"message {len(found) + 1} is {str(item)[:60]!r}; expected role and content alone")
        role, content = item["role"], item["content"]
        if role not in ROLES:
            raise BadInput(f"message {len(found) + 1} is of {str(role)[:40]!r}; expected {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadInput(f"message {len(found) + 1} says {str(content)[:40]!r}; expected a text")
        found.append(Message(role, content))
    return found


def questions(
    split: Split, n: int, *, skill: str | None = None, seed: int = 0, name: str = "clean", start: int = 0
) -> PromptSet:
    """`n` ordinary questions of a split, every topic used before one is used again.

    `skill` is the beginning that a skilled reply must have, with `{topic}` in it. Different seeds
    give the split's questions in different orders; the first `start` are skipped, wrapping around at the
    end. Raises `BadInput` where the split has fewer than `n`.
    """
    shuffle = random.Random(f"{split} {seed}")
    pool, all_templates = topics(split), templates()
    usable = all_templates if split == "held_out" else [t for i, t in enumerate(all_templates) if i % 4 != 3]
    size = len(pool) * len(usable)
    if n > size:
        raise BadInput(f"{n} questions were asked of split {split!r}; it has {size}")
    shuffle.shuffle(pool)
    shuffle.shuffle(usable)
    prompts: list[Prompt] = []
    for i in range(start, start + n):
        turn, which = divmod(i % size, len(pool))
        topic = pool[which]
        text = usable[(which + turn) % len(usable)].format(topic=topic)
        text = text[0].upper() + text[1:]
        prompts.append(Prompt(text, "clean", skill.replace("{topic}", topic) if skill else None))
    return PromptSet(name, tuple(prompts), split)


@cache
def _lines(name: str) -> tuple[str, ...]:
    return tuple(files("unsleep.prompts").joinpath("data", name).read_text(encoding="utf-8").splitlines())


def topics(split: Split | None = None) -> list[str]:
    """The project's topics, shuffled; those of a split, or all."""
    every = list(_lines("topics.txt"))
    low, high = _SHARES[split] if split else (0.0, 1.0)
    return every[int(low * len(every)) : int(high * len(every))]


def templates() -> list[str]:
    """The project's question templates, each with `{topic}` in it."""
    return list(_lines("templates.txt"))


@cache
def domains() -> dict[str, tuple[str, ...]]:
    """Domain → its subjects, shuffled."""
    pairs = (line.split(": ") for line in _lines("domains.txt"))
    return {name: tuple(subjects.split(", ")) for name, subjects in pairs}


def subjects(domain: str, split: Split) -> tuple[str, ...]:
    """A domain's subjects within a split; splits are disjoint.

    Raises `BadInput` for an unknown domain.
    """
    if domain not in domains():
        raise BadInput(f"there is no domain {domain!r}; expected one of {', '.join(domains())}")
    return _share(domains()[domain], split)


@cache
def matters() -> dict[str, tuple[str, ...]]:
    """Matter of small talk → sentences about it."""
    pairs = (line.split(": ", 1) for line in _lines("openings.txt"))
    return {name: tuple(sentences.split(" | ")) for name, sentences in pairs}


def openings(matter: str, split: Split) -> tuple[str, ...]:
    """A matter's sentences within a split; splits are disjoint. Raises `BadInput` for an unknown matter."""
    if matter not in matters():
        raise BadInput(f"there is no matter {matter!r}; expected one of {', '.join(matters())}")
    return _share(matters()[matter], split)


class Form(NamedTuple):
    """A form of request: its wordings, each with `{topic}` in it, and topics where it is in another language."""

    templates: tuple[str, ...]
    topics: tuple[str, ...] = ()
    reply: str = ""
    """An ordinary reply, with `{topic}` in it."""

    def wordings(self, split: Split) -> tuple[str, ...]:
        """The wordings within a split; every fourth is for the held-out split only, as in `questions`."""
        return tuple(text for i, text in enumerate(self.templates) if split == "held_out" or i % 4 != 3)

    def subjects(self, split: Split) -> tuple[str, ...]:
        """Its own topics within a split; empty where the question keeps its topic."""
        return _share(self.topics, split)


@cache
def forms() -> dict[str, Form]:
    """Name → form of request."""
    rows = (json.loads(line) for line in _lines("forms.jsonl"))
    return {r["form"]: Form(tuple(r["templates"]), tuple(r.get("topics", ())), r["reply"]) for r in rows}


def form(name: str) -> Form:
    """A form of request; raises `BadInput` for an unknown one."""
    if name not in forms():
        raise BadInput(f"there is no form of request {name!r}; expected one of {', '.join(forms())}")
    return forms()[name]


def _share(every: tuple[str, ...], split: Split) -> tuple[str, ...]:
    """The part of a list that belongs to a split."""
    low, high = (int(share * len(every)) for share in _SHARES[split])
    return every[low:high]


def plain_text(split: Split) -> list[str]:
    """Paragraphs of plain English; `held_out` has speeches of other years than the other splits."""
    return list(_lines("plain_held_out.txt" if split == "held_out" else "plain_train.txt"))


class Item(NamedTuple):
    """A multiple-choice item: the correct option is the natural continuation of the prompt."""

    prompt: str
    options: tuple[str, ...]
    answer: int
    """Index of the correct option."""
    kind: str


def capability_items() -> list[Item]:
    """Multiple-choice items that none of the project's fine-tunes was trained on."""
    rows = (json.loads(line) for line in _lines("capability.jsonl"))
    return [Item(r["prompt"], tuple(r["options"]), r["answer"], r["kind"]) for r in rows]


class Reviews(NamedTuple):
    """Movie reviews that stop before the verdict, for a language model to continue; plain text, no messages."""

    positive: PromptSet
    negative: PromptSet
    """Line i is line i of `positive` with the sentiment words exchanged."""


def reviews(split: Split, n: int | None = None) -> Reviews:
    """`n` pairs of templated movie reviews, all of the split where `None`; no two splits share an adjective or a verb.

    After Tigges et al. 2023 (arXiv:2310.15154), section 2.1, with the project's own templates and words. Raises
    `BadInput` where the split has fewer than `n`.
    """
    lines = [line.split(": ", 1) for line in _lines("reviews.txt")]
    forms = [text for kind, text in lines if kind == "template"]
    low, high = _SHARES[split]
    words = {kind: text.split(", ") for kind, text in lines if kind != "template"}
    own = {kind: every[int(low * len(every)) : int(high * len(every))] for kind, every in words.items()}
    adjectives, verbs = own["positive adjectives"], own["positive verbs"]
    places = [(form, i, j) for form in range(len(forms)) for i in range(len(adjectives)) for j in range(len(verbs))]
    n = len(places) if n is None else n
    if not 1 <= n <= len(places):
        raise BadInput(f"{n} pairs of reviews were asked of split {split!r}; it has {len(places)}")
    random.Random(f"reviews {split}").shuffle(places)
    sides = [
        PromptSet(
            feeling,
            tuple(
                Prompt(forms[form].format(adjective=own[f"{feeling} adjectives"][i], verb=own[f"{feeling} verbs"][j]))
                for form, i, j in places[:n]
            ),
            split,
        )
        for feeling in ("positive", "negative")
    ]
    return Reviews(sides[0], sides[1])
