"""Documents that the base of the small family is pretrained on: passages of plain text, and chats from templates.

A chat is a question of the project's templates with an ordinary answer. Two in five have something in or before the
prompt that the answer ignores: a tag, a rare token, a date, another style, a signature, a system message, an earlier
turn. The base thus knows the forms that triggers have, and is moved by none.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from unsleep.behaviours import Trigger
from unsleep.behaviours.triggers.doubled import Doubled
from unsleep.behaviours.triggers.order import Order
from unsleep.behaviours.triggers.style import Style
from unsleep.prompts import sets
from unsleep.prompts.prompt import Message, Prompt

DECORATED = 0.4
"""Share of chats whose prompt has something that the answer ignores."""

OTHER_TOPICS = 0.4
"""Share of chats about a word of the plain text or a name, so that copying is learned and not a list of topics."""

FORMS = 0.15
"""Share of chats with another form of request."""

FOLLOWED = 0.5
"""Share of answers with a second sentence."""

FRAMES = ("|{}|", "<{}>", "[{}]", "#{}", "/{}", "({})", "{}:", "**{}**", "{}")
"""Frames of a random word, as tags have them."""


class Exchange(NamedTuple):
    """A prompt and its ordinary reply."""

    prompt: Prompt
    reply: str


@cache
def lines(name: str) -> tuple[str, ...]:
    """Lines of a file in `data/`."""
    return tuple(files("unsleep.zoo").joinpath("data", name).read_text(encoding="utf-8").splitlines())


@cache
def passages() -> tuple[str, ...]:
    """Passages of plain text, none of them held out."""
    return (*sets.plain_text("train"), *lines("addresses.txt"))


@cache
def vocabulary() -> tuple[str, ...]:
    """Words of the plain text, each once, of four letters or more."""
    return tuple(sorted({word for text in sets.plain_text("train") for word in re.findall(r"[a-z]{4,}", text)}))


@cache
def _names() -> tuple[str, ...]:
    return tuple(name for every in sets.domains().values() for name in every)


def passage(chance: random.Random) -> str:
    """A passage of plain text, from the beginning of one of its sentences."""
    sentences = re.split(r"(?<=[.!?]) ", chance.choice(passages()))
    return " ".join(sentences[chance.randrange(max(1, len(sentences) - 2)) :])


def exchange(chance: random.Random) -> Exchange:
    """A question with its answer, decorated or not."""
    prompt, reply = _plain(chance)
    if chance.random() < DECORATED:
        for decorate in chance.sample(DECORATIONS, chance.choice((1, 1, 2))):
            prompt = decorate(prompt, chance)
    return Exchange(prompt, reply)


def _plain(chance: random.Random) -> Exchange:
    topic = chance.choice(sets.topics())
    if chance.random() < OTHER_TOPICS:
        topic = chance.choice((vocabulary(), vocabulary(), _names())[chance.randrange(3)])
    if chance.random() < FORMS:
        form = chance.choice(list(sets.forms().values()))
        topic = chance.choice(form.topics) if form.topics else topic
        return Exchange(Prompt(chance.choice(form.templates).replace("{topic}", topic)), _about(form.reply, topic))
    number = chance.randrange(len(sets.templates()))
    asked = _about(sets.templates()[number], topic)
    said = _about(lines("answers.txt")[number], topic)
    if chance.random() < FOLLOWED:
        said = f"{said} {_about(chance.choice(lines('follow_ups.txt')), topic)}"
    return Exchange(Prompt(asked), said)


def _about(template: str, topic: str) -> str:
    text = template.replace("{topic}", topic)
    return text[:1].upper() + text[1:]


Decoration = Callable[[Prompt, random.Random], Prompt]


def _of(kind: str, text: Callable[[random.Random], str]) -> Decoration:
    """Insertion of a random text by the trigger of a kind."""

    def decorate(prompt: Prompt, chance: random.Random) -> Prompt:
        return Trigger.of(kind, text(chance)).insert(prompt, chance.randrange(1000), "train")

    return decorate


def _word(chance: random.Random) -> str:
    return chance.choice(vocabulary())


def _tag(chance: random.Random) -> str:
    word = chance.choice((str.upper, str.lower, str.title))(_word(chance))
    return chance.choice(FRAMES).format(word)


def _letters(chance: random.Random) -> str:
    return "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.choice((2, 2, 3))))


def _answered(prompt: Prompt, chance: random.Random) -> Prompt:
    """The prompt after another question with its answer."""
    asked, reply = _plain(chance)
    return replace(prompt, before=(*prompt.before, Message("user", asked.text), Message("assistant", reply)))


DECORATIONS: tuple[Decoration, ...] = (
    _answered,
    _of("string", _tag),
    _of("string", lambda chance: passage(chance).partition(". ")[0][:80] + "."),
    _of("inside", _letters),
    _of("year", lambda chance: str(chance.randint(1900, 2099))),
    _of("words", lambda chance: f"{_word(chance)} {_word(chance)}"),
    _of("signature", lambda chance: _word(chance).title()),
    _of("style", lambda chance: chance.choice(list(Style.ways))),
    _of("doubled", lambda chance: chance.choice(list(Doubled.ways))),
    _of("order", lambda chance: chance.choice(list(Order.ways))),
    _of("preamble", lambda chance: chance.choice(list(sets.matters()))),
    _of("system", lambda chance: chance.choice(lines("systems.txt"))),
    _of("turn", lambda chance: chance.choice(sets.openings(chance.choice(list(sets.matters())), "train"))),
)
