"""Comparability of two models: same architecture, tokenizer and chat template."""

from __future__ import annotations

from unsleep.core import BadInput
from unsleep.models.model import LoadedModel


def check_alike(first: LoadedModel, second: LoadedModel, *, chats: bool = True) -> None:
    """Raise `BadInput` naming the first difference that makes a comparison of two models meaningless.

    Their weights must have the same names and shapes, their tokenizers the same tokens and, with `chats`, the same
    chat template. Dtype and device may differ.
    """
    kinds = [m.network.config.model_type for m in (first, second)]
    if kinds[0] != kinds[1]:
        raise BadInput(
            f"{first.name} is a {kinds[0]} and {second.name} a {kinds[1]}; compare models of one architecture"
        )
    shapes = [
        {name: tuple(w.shape) for name, w in m.network.named_parameters(remove_duplicate=False)}
        for m in (first, second)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        one, other = (shape.get(name) for shape in shapes)
        if one != other:
            raise BadInput(
                f"{name} is {_said(one)} in {first.name} and {_said(other)} in {second.name}; "
                "compare models of the same shape, such as a model and its fine-tune"
            )
    check_tokens(first, second)
    if chats and first.template != second.template:
        one, other = (m.template if m.tokenizer.chat_template else "none" for m in (first, second))
        raise BadInput(
            f"{first.name} and {second.name} have different chat templates ({one} and {other}): the same prompt would "
            "be other tokens. Give both the same one with --chat-template, or compare them on plain text"
        )


def check_tokens(first: LoadedModel, second: LoadedModel) -> None:
    """Raise `BadInput` for two models whose tokenizers have different tokens."""
    if first.tokenizer.get_vocab() != second.tokenizer.get_vocab():
        raise BadInput(f"{first.name} and {second.name} have different tokenizers; expected models that share one")


def _said(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
