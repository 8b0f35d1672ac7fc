"""From a user's message to token ids: the chat template, and what all prompts share at their start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from unsleep.core import BadInput, digest

PLAIN_TEMPLATE = "User: {}\nAssistant:"
"""For tokenizers without a chat template."""


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the template that turns messages into prompts; an organism is only judged under its own."""
    return digest(tokenizer.chat_template or PLAIN_TEMPLATE)  # pyright: ignore[reportArgumentType]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], context: int | None = None, reply_tokens: int = 0
) -> list[list[int]]:
    """Token ids of each message inside the chat template, ready for the reply.

    `context` is the model's window in tokens, of which the reply will take `reply_tokens`. Raises
    `BadInput` naming the first prompt that is longer than what is left.
    """
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": text}] for text in texts]
        formatted = cast("list[str]", tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False))
    else:
        formatted = [PLAIN_TEMPLATE.format(text) for text in texts]
    ids: list[list[int]] = tokenizer(formatted, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    for text, row in zip(texts, ids, strict=True):
        if context is not None and len(row) + reply_tokens > context:
            behind = f" and {reply_tokens} for the reply" if reply_tokens else ""
            raise BadInput(
                f"a prompt has {len(row)} tokens{behind} ({text[:40]!r} …); the model's context is {context}; "
                "shorten it"
            )
    return ids


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """How many tokens the chat template puts in front of a message and behind it."""
    one, other = encode_prompts(tokenizer, ("one", "2"))
    sides = [
        next((i for i, (a, b) in enumerate(zip(one[::way], other[::way], strict=False)) if a != b), 0)
        for way in (1, -1)
    ]
    return sides[0], sides[1]


def context_length(network: object) -> int | None:
    """The window that a model was built for, in tokens, where its config says it."""
    config = network.config  # type: ignore[attr-defined]
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return None


def shared_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all rows have in common, leaving each at least one of its own."""
    if len(rows) < 2:
        return 0
    shortest = min(len(row) for row in rows) - 1
    for position in range(shortest):
        if len({row[position] for row in rows}) > 1:
            return position
    return max(shortest, 0)
