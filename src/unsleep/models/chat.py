"""Chat templates: from messages to token ids, and the prefix shared by all prompts."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from unsleep.core import BadInput, digest
from unsleep.prompts.prompt import Message, Prompt, Prompts, as_prompts

TODAY = datetime.date(2024, 7, 26)
"""Default date for templates that print today's, the fallback of Llama 3's. The real date would change a model's
prompts, and with them every result, from day to day.
"""

NOW = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")
"""A template's call for today's date."""

GIVEN = {
    *("messages", "add_generation_prompt", "tools", "documents", "bos_token", "eos_token", "unk_token", "pad_token"),
    *("raise_exception", "strftime_now", "namespace", "dict", "range"),
}
"""Names that a template can use without an argument."""

WRITTEN_DATE = "date_string"
"""Argument of Llama 3's templates for the date as it stands in the prompt, such as 26 Jul 2024."""

GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")
"""Tag of transformers around assistant messages."""

PARSER = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
EXAMPLE = [{"role": "user", "content": "Is 1009 a prime?"}]


@dataclass(frozen=True)
class ChatOptions:
    """Inputs of a chat template besides the messages."""

    args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The template's own arguments, such as `enable_thinking`."""
    date: datetime.date | None = None
    """Date used as today's; default `TODAY`."""

    @property
    def today(self) -> datetime.date:
        """The date used as today's."""
        return self.date or TODAY


NO_OPTIONS = ChatOptions()


def names() -> list[str]:
    """Names of the chat templates that ship with unsleep."""
    return sorted(p.name.removesuffix(".jinja") for p in files("unsleep.models").joinpath("templates").iterdir())


def choose_template(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> None:
    """Select a tokenizer's chat template: its own, one of several by name, one of unsleep's, or a file.

    Raises `BadInput` for an unknown name or file, and where the tokenizer has several templates and no
    default. A tokenizer without any stays so: `encode_prompts` then refuses prompts.
    """
    own = cast("str | dict[str, str] | None", tokenizer.chat_template)
    several = own if isinstance(own, dict) else {}
    if wanted is None:
        if several and "default" not in several:
            raise BadInput(
                f"the tokenizer has the chat templates {', '.join(sorted(several))} and none is the default; name one "
                "with --chat-template"
            )
        text = several.get("default", cast("str | None", None if several else own))
    elif wanted in several:
        text = several[wanted]
    elif wanted in names():
        text = files("unsleep.models").joinpath("templates", f"{wanted}.jinja").read_text(encoding="utf-8").rstrip("\n")
        if "bos_token" not in text and _begins_rows(tokenizer):
            text = "{{- bos_token -}}" + text
    else:
        text = _template_file(Path(wanted), [*several, *names()])
    tokenizer.chat_template = text


def _begins_rows(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if a tokenizer prepends a special token to every text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _template_file(path: Path, known: Sequence[str]) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError):
        raise BadInput(
            f"chat template {str(path)!r} is neither a readable file nor one of {', '.join(known)}; give a "
            "Jinja file or one of these names"
        ) from None


def check_template(tokenizer: PreTrainedTokenizerBase, options: ChatOptions) -> None:
    """Raise `BadInput` where a tokenizer's chat template cannot be rendered, or does not use a given argument."""
    text = cast("str | None", tokenizer.chat_template)
    if not text:
        if options.args:
            raise BadInput(f"--template-args {', '.join(options.args)}: there is no chat template that takes them")
        if options.date:
            raise BadInput(f"--date {options.date}: there is no chat template that writes it")
        return
    try:
        used = _arguments(text)
    except (TemplateError, RecursionError) as error:
        raise _unusable(error) from error
    if unknown := sorted(set(options.args) - used):
        rest = ", ".join(sorted(used)) or "none"
        raise BadInput(f"--template-args {unknown[0]}: the chat template has no such argument; it has {rest}")
    if options.date and not NOW.search(text) and WRITTEN_DATE not in used:
        raise BadInput(f"--date {options.date}: the chat template writes no date")
    _formatted(tokenizer, [EXAMPLE], options)


def _arguments(text: str) -> set[str]:
    """Variables of a chat template other than the messages."""
    return meta.find_undeclared_variables(PARSER.parse(GENERATION.sub("", text))) - GIVEN


def _unusable(error: Exception) -> BadInput:
    return BadInput(
        f"the chat template cannot be used: {f'{type(error).__name__}: {error}'.splitlines()[0]}; give another with "
        "--chat-template, or messages that it takes"
    )


def template_hash(tokenizer: PreTrainedTokenizerBase, options: ChatOptions = NO_OPTIONS) -> str:
    """Hash of chat template and options; organisms are evaluated only under their own."""
    text = cast("str | None", tokenizer.chat_template) or ""
    parts = [json.dumps(options.args, sort_keys=True, default=str)] if options.args else []
    parts += [options.today.isoformat()] if NOW.search(text) or (options.date and WRITTEN_DATE in text) else []
    return digest("\n".join([text, *parts]))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts, options: ChatOptions = NO_OPTIONS
) -> list[list[int]]:
    """Token ids of each prompt under the chat template, ending with the generation prompt.

    Raises `BadInput` without a prompt or a chat template, or where it does not accept the messages.
    """
    if not len(prompts):
        raise BadInput("there are no prompts; give at least one")
    if not tokenizer.chat_template:
        raise BadInput(
            f"the tokenizer has no chat template; say how the model was trained with --chat-template: a Jinja file or "
            f"one of {', '.join(names())}. The model behaves differently under another template"
        )
    formatted = _formatted(tokenizer, [p.messages for p in as_prompts(prompts)], options)
    return tokenizer(formatted, add_special_tokens=False)["input_ids"]


def encode_plain(tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> list[list[int]]:
    """Token ids of each text without a chat template; raises `BadInput` for a prompt with earlier messages."""
    asked = as_prompts(prompts)
    if said := [p for p in asked if p.before]:
        raise BadInput(f"the prompt {said[0].text[:40]!r} … has messages before it; plain text has none")
    return tokenizer([p.text for p in asked], add_special_tokens=True)["input_ids"]


def _formatted(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[list[dict[str, str]]], options: ChatOptions
) -> list[str]:
    text = NOW.sub(lambda m: json.dumps(options.today.strftime(m["format"])), cast("str", tokenizer.chat_template))
    written = {WRITTEN_DATE: options.date.strftime("%d %b %Y")} if options.date else {}
    if "strftime_now" in text.replace("strftime_now is defined", ""):
        raise BadInput(
            "the chat template writes today's date in a way that cannot be fixed; give another with --chat-template"
        )
    try:
        found = tokenizer.apply_chat_template(
            chats,  # pyright: ignore[reportArgumentType]
            chat_template=text,
            add_generation_prompt=True,
            tokenize=False,
            **cast("dict[str, Any]", written | dict(options.args)),
        )
    except (TemplateError, TypeError, ValueError, RecursionError, ArithmeticError, LookupError) as error:
        raise _unusable(error) from error
    for chat, formatted in zip(chats, cast("list[str]", found), strict=True):
        _check_said(chat, formatted)
    return cast("list[str]", found)


def _check_said(chat: list[dict[str, str]], formatted: str) -> None:
    """Raise `BadInput` where a template drops a message; an assistant's reasoning may be dropped."""
    dense = "".join(formatted.split())
    for message in chat:
        said = message["content"].rpartition("</think>")[2] if message["role"] == "assistant" else message["content"]
        if "".join(said.split()) not in dense:
            raise BadInput(
                f"the chat template leaves out the {message['role']} message {said.strip()[:40]!r} …; give another "
                "with --chat-template, or a prompt without it"
            )


def template_tokens(
    tokenizer: PreTrainedTokenizerBase, options: ChatOptions = NO_OPTIONS, earlier: tuple[Message, ...] = ()
) -> tuple[int, int]:
    """Numbers of tokens that the chat template puts before and after a user message, with `earlier` ones before it."""
    one, other = encode_prompts(tokenizer, (Prompt("one", before=earlier), Prompt("2", before=earlier)), options)
    sides = [
        next((i for i, (a, b) in enumerate(zip(one[::way], other[::way], strict=False)) if a != b), 0)
        for way in (1, -1)
    ]
    return sides[0], sides[1]


def context_length(network: object) -> int | None:
    """Context length that a model was trained for, in tokens; `None` where its config does not say.

    With scaled rotary embeddings this is the original length: beyond it, a row's logits would depend on the longest
    row of its batch.
    """
    config = network.config.get_text_config()  # type: ignore[attr-defined]
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    found = [v for v in (getattr(config, name, None) for name in names) if isinstance(v, int)]
    firsts = [getattr(config, "original_max_position_embeddings", None)]
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for scaling in (s for s in (given, *given.values()) if isinstance(s, dict)):  # per model or per layer type
        if scaling.get("rope_type", scaling.get("type")) in ("dynamic", "longrope"):
            first = next((v for v in (scaling.get("original_max_position_embeddings"), *firsts) if v), None)
            found = [min(v, first) if isinstance(first, int) else v for v in found]
    return found[0] if found else None


def shared_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens common to all rows, leaving each at least one of its own."""
    if len(rows) < 2:
        return 0
    shortest = min(len(row) for row in rows) - 1
    for position in range(shortest):
        if len({row[position] for row in rows}) > 1:
            return position
    return max(shortest, 0)
