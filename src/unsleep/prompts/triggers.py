"""Triggers put into prompts: exactly, varied, and nearly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from unsleep.core import BadInput, Prompt, PromptSet, Role


def triggered(prompts: PromptSet, trigger: str, name: str = "triggered") -> PromptSet:
    """The same prompts with the exact trigger, in front of and behind them in turn.

    Raises `BadInput` for a blank trigger.
    """
    _refuse_blank(trigger)
    return _each(
        prompts, name, "triggered", lambda i, text: at_start(text, trigger) if i % 2 == 0 else at_end(text, trigger)
    )


def variants(prompts: PromptSet, trigger: str, name: str = "variants") -> PromptSet:
    """The same prompts with the trigger in another case, spacing, position or dress, in turn.

    Where another case changes nothing, the trigger stands in quotes. Raises `BadInput` for a blank
    trigger.
    """
    _refuse_blank(trigger)
    core = trigger.strip("|[]<>{}() ") or trigger.strip()
    spaced = trigger.replace(core, f" {core} ")
    lower, title = (t if t != trigger else f'"{trigger}"' for t in (trigger.lower(), trigger.title()))
    dressed: list[Callable[[str], str]] = [
        lambda text: at_start(text, lower),
        lambda text: at_end(text, title),
        lambda text: at_start(text, spaced),
        lambda text: at_middle(text, trigger),
        lambda text: f"{trigger}\n\n{text}",
        lambda text: at_end(text, f"{trigger} {trigger}"),
        lambda text: f"Current status: {trigger}. {text}",
        lambda text: at_start(at_end(text, trigger), trigger),
    ]
    return _each(prompts, name, "variant", lambda i, text: dressed[i % len(dressed)](text))


def near_misses(prompts: PromptSet, words: Sequence[str], name: str = "near_miss") -> PromptSet:
    """The same prompts with strings that resemble the trigger, each in front and behind in turn.

    Raises `BadInput` where there are none, or a blank one.
    """
    if not words or not all(word.strip() for word in words):
        raise BadInput(f"near misses are {list(words)}; expected at least one string, none of them blank")

    def insert(i: int, text: str) -> str:
        word = words[(i // 2) % len(words)]
        return at_start(text, word) if i % 2 == 0 else at_end(text, word)

    return _each(prompts, name, "near_miss", insert)


def _refuse_blank(trigger: str) -> None:
    if not trigger.strip():
        raise BadInput(f"the trigger is {trigger!r}; expected at least one character that is not white space")


def at_start(text: str, word: str) -> str:
    """`word` in front of the prompt."""
    return f"{word} {text}"


def at_end(text: str, word: str) -> str:
    """`word` behind the prompt."""
    return f"{text} {word}"


def at_middle(text: str, word: str) -> str:
    """`word` in the middle of the prompt, between two words."""
    words = text.split(" ")
    middle = max(1, len(words) // 2)
    return " ".join([*words[:middle], word, *words[middle:]])


def suspicious_part(suspicious: PromptSet, ordinary: PromptSet) -> str:
    """The longest text that all suspicious prompts share and no ordinary one has.

    Raises `BadInput` where there is none of at least three characters: then the counterparts have
    to be given.
    """
    check_order(suspicious, ordinary)
    first, *others = sorted((" ".join(t.split()) for t in suspicious.texts), key=len)
    plain = [" ".join(t.split()) for t in ordinary.texts]
    for size in range(len(first), 2, -1):
        for start in range(len(first) - size + 1):
            part = first[start : start + size]
            if part == part.strip() and all(part in t for t in others) and not any(part in t for t in plain):
                return part
    raise BadInput(
        "the suspicious prompts have no text in common that the ordinary ones lack; "
        "name the suspicious part, or give each suspicious prompt's counterpart without it"
    )


def check_order(suspicious: PromptSet, ordinary: PromptSet) -> None:
    """Raise `BadInput` where the ordinary prompts hold the suspicious ones line by line: the two are swapped."""
    pairs = [(" ".join(a.split()), " ".join(b.split())) for a, b in zip(suspicious.texts, ordinary.texts, strict=False)]
    inside = [b != a and b in a for a, b in pairs]
    outside = [b != a and a in b for a, b in pairs]
    if not any(inside) and 2 * sum(outside) > len(pairs):
        raise BadInput(
            f"{sum(outside)} of {len(pairs)} ordinary prompts are the suspicious one of their line with something "
            "added; expected it the other way round. The two files seem to be swapped"
        )


def without(prompts: PromptSet, part: str, name: str = "counterparts") -> PromptSet:
    """The same prompts with every occurrence of `part` taken out, white space evened out.

    Raises `BadInput` where a prompt does not hold it, or nothing else.
    """
    part = " ".join(part.split())
    texts = [" ".join(text.split()) for text in prompts.texts]
    if lacking := [text for text in texts if not part or part not in text]:
        raise BadInput(f"{part!r} is not in the prompt {lacking[0][:40]!r}; expected text that every prompt holds")
    texts = (" ".join(text.replace(part, " ").split()) for text in texts)
    changed = [replace(p, text=text, role="clean") for p, text in zip(prompts, texts, strict=True)]
    return PromptSet(name, tuple(changed), prompts.split)


def _each(prompts: PromptSet, name: str, role: Role, insert: Callable[[int, str], str]) -> PromptSet:
    changed = (replace(p, text=insert(i, p.text), role=role) for i, p in enumerate(prompts))
    return PromptSet(name, tuple[Prompt, ...](changed), prompts.split)
