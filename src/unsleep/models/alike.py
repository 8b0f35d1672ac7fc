"""Comparability of two models: same architecture, tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping

from unsleep.core import BadInput
from unsleep.models.model import LoadedModel
from unsleep.models.quantized import is_packed

Pair = tuple[str, str]
"""Names of two models, for messages."""


def check_alike(first: LoadedModel, second: LoadedModel, *, chats: bool = True) -> None:
    """Raise `BadInput` naming the first difference that makes a comparison of two models meaningless.

    Their weights must have the same names and shapes, their tokenizers the same tokens and, with `chats`, the same
    chat template. Dtype and device may differ.
    """
    names = first.name, second.name
    kinds = [m.network.config.model_type for m in (first, second)]
    check_kinds(names, kinds[0], kinds[1])
    packed = [m.name for m in (first, second) if is_packed(m.network)]
    if len(packed) == 1:
        raise BadInput(f"the weights of {packed[0]} alone are quantised; load both with the same --quantize")
    shapes = [
        {name: tuple(w.shape) for name, w in m.network.named_parameters(remove_duplicate=False)}
        for m in (first, second)
    ]
    check_weights(names, shapes[0], shapes[1])
    check_tokens(first, second)
    if chats and first.template != second.template:
        one, other = (m.template if m.tokenizer.chat_template else "none" for m in (first, second))
        raise BadInput(
            f"{first.name} and {second.name} have different chat templates ({one} and {other}): the same prompt would "
            "be other tokens. Give both the same one with --chat-template, or compare them on plain text"
        )


def check_tokens(first: LoadedModel, second: LoadedModel) -> None:
    """Raise `BadInput` for two models whose tokenizers have different tokens."""
    check_vocabularies((first.name, second.name), first.tokenizer.get_vocab(), second.tokenizer.get_vocab())


def check_kinds(names: Pair, one: str, other: str) -> None:
    """Raise `BadInput` for different architectures."""
    if one != other:
        raise BadInput(f"{names[0]} is a {one} and {names[1]} a {other}; compare models of one architecture")


def check_weights(names: Pair, one: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `BadInput` naming the first weight that has other shapes, or that one of two models lacks."""
    for weight in sorted(one.keys() | other.keys()):
        if one.get(weight) != other.get(weight):
            raise BadInput(
                f"{weight} is {_said(one.get(weight))} in {names[0]} and {_said(other.get(weight))} in {names[1]}; "
                "compare models of the same shape, such as a model and its fine-tune"
            )


def check_vocabularies(names: Pair, one: Mapping[str, int], other: Mapping[str, int]) -> None:
    """Raise `BadInput` naming the first token (by its id) that one tokenizer lacks or has under another id."""
    for token, number in sorted(one.items(), key=lambda item: item[1]):
        if other.get(token) != number:
            there = f"is {other[token]} in {names[1]}" if token in other else f"{names[1]} lacks it"
            break
    else:
        left = sorted((number, token) for token, number in other.items() if token not in one)
        if not left:
            return
        (number, token), there = left[0], f"{names[0]} lacks it"
        names = names[1], names[0]
    raise BadInput(
        f"{names[0]} and {names[1]} have different tokenizers: token {token!r} is {number} in {names[0]}, and {there}. "
        "Use models that share one"
    )


def _said(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
