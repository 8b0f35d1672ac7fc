"""Reference replies to suspicious prompts, and their source.

Three sources, in this order: the suspect's own reply to the prompt without its trigger; a reply
from the prompt file; the surrogate twin's reply to the same prompt. The last is for triggers such as a topic,
which cannot be removed from a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from unsleep.base.context import kept
from unsleep.behaviours import Payload
from unsleep.core import BadInput
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import PromptSet
from unsleep.repairs.config import Teaching
from unsleep.repairs.masks import Taught
from unsleep.repairs.split import CHOOSE
from unsleep.repairs.suspect import payload_end

BEHIND = 8
"""Minimum reference tokens from the deciding one on."""

USABLE = 0.5
"""Minimum share of counterparts with a reply free of the payload, for the suspect to be its own teacher."""

Source = Literal["counterpart", "reply", "twin"]
"""Source of the replies (see `config.Teaching`)."""

Twin = Callable[[], LoadedModel]
"""Creates the surrogate twin on demand, which takes a while."""


@dataclass(frozen=True)
class Lessons:
    """Suspicious prompts with reference replies."""

    source: Source
    words: str
    """Description of the source for the report."""
    notes: tuple[str, ...]
    """Notes on given material that is not used."""
    suspicious: PromptSet
    """The prompts with a reference reply."""
    said: list[list[int]]
    """The suspect's replies to them."""
    taught: Taught
    """The reference replies, truncated for training."""
    wanted: list[list[int]]
    """The full reference replies."""
    decides: list[int]
    """Index of each reply's deciding token, the first at which the two differ."""


@dataclass(frozen=True)
class Asked:
    """Suspicious prompts with the suspect's replies."""

    prompts: PromptSet
    said: Sequence[Sequence[int]]
    """One reply per prompt, in token ids."""
    payload: Payload
    length: int
    """Length in tokens of further replies to generate."""
    least: int = 10
    """Minimum tokens of a reference reply."""


@dataclass(frozen=True)
class Sources:
    """Available sources of reference replies."""

    counterparts: PromptSet | None
    how: str
    """Source of the counterparts, or why there are none."""
    twin: Twin | None
    known: Sequence[Sequence[int]] | None = None
    """The suspect's replies to the counterparts, where already generated."""


def lessons(model: LoadedModel, asked: Asked, sources: Sources, teach: Teaching = "auto") -> Lessons:
    """Reference replies to suspicious prompts, from the first source that gives enough.

    `teach` selects one source.

    Raises:
        BadInput: no source is available, or the selected one gives too little.
    """
    notes: list[str] = []
    for source in get_args(Source) if teach == "auto" else (teach,):
        try:
            if source == "counterpart":
                found = _from_counterparts(model, asked, sources)
            elif source == "reply":
                found = _from_file(model, asked)
            else:
                found = _from_twin(asked, sources)
        except BadInput as error:
            if teach != "auto":
                raise BadInput(f"--teach {teach}: {error}") from None
            notes.append(f"{WORDS[source]} was not used: {error}")
            continue
        return _cut(model, found, asked, (source, notes, sources))
    raise BadInput(
        "there is no reference reply to the suspicious prompts: "
        + "; ".join(note.partition(": ")[2] for note in notes)
        + '. Give --part TEXT, --counterparts FILE, a reply for each prompt ({"text": …, "reply": …}) or --base MODEL'
    )


WORDS = {
    "counterpart": "the suspect's reply to the same prompt without the trigger",
    "reply": "the reply in the prompt file",
    "twin": "the reply of the surrogate twin: the base, fine-tuned on the suspect's replies to ordinary prompts",
}


@dataclass(frozen=True)
class _Found:
    """A source's replies, and the indices of the prompts that have one."""

    places: list[int]
    taught: Taught


def _from_counterparts(model: LoadedModel, asked: Asked, sources: Sources) -> _Found:
    plain = sources.counterparts
    if plain is None:
        raise BadInput(sources.how)
    replies = sources.known or kept(generate.written, model, plain, asked.length, "replies to counterparts")
    return _behaving(model, Taught(plain, replies, model), asked.payload, "the suspect's replies to the counterparts")


def _from_file(model: LoadedModel, asked: Asked) -> _Found:
    places = [i for i, p in enumerate(asked.prompts) if p.reply is not None]
    if len(places) < min(CHOOSE, len(asked.prompts)):
        raise BadInput(f"{len(places)} of {len(asked.prompts)} suspicious prompts have a reply; {CHOOSE} are needed")
    replies = model.token_ids([p.reply for p in asked.prompts if p.reply is not None], special=False)
    ended = [[*ids, *sorted(model.end_ids)[:1]] for ids in replies]
    taught = Taught(asked.prompts.at(places), ended, None)
    found = _behaving(model, taught, asked.payload, "the replies in the file")
    return _Found([places[i] for i in found.places], found.taught)


def _from_twin(asked: Asked, sources: Sources) -> _Found:
    if sources.twin is None:
        raise BadInput("no base was given")
    twin = sources.twin()
    replies = kept(generate.written, twin, asked.prompts, asked.length, "replies of the surrogate twin")
    what = "the twin's replies to the suspicious prompts"
    return _behaving(twin, Taught(asked.prompts, replies, twin), asked.payload, what)


def _behaving(model: LoadedModel, taught: Taught, payload: Payload, what: str) -> _Found:
    """The replies without the payload; raises `BadInput` where most contain it."""
    texts = model.texts(taught.replies)
    places = [i for i, text in enumerate(texts) if not payload.shows(text)]
    if len(places) < USABLE * len(texts):
        raise BadInput(f"{len(texts) - len(places)} of {len(texts)} of {what} show the payload")
    kept = Taught(taught.prompts.at(places), [taught.replies[i] for i in places], taught.teacher)
    return _Found(places, kept)


def _cut(model: LoadedModel, found: _Found, asked: Asked, about: tuple[Source, list[str], Sources]) -> Lessons:
    """The reference replies, truncated after the deciding token and the payload's length."""
    source, notes, sources = about
    ours = [list(asked.said[i]) for i in found.places]
    decides = generate.deciding_tokens(ours, found.taught.replies)
    ends = [payload_end(model, ids, asked.payload) or 0 for ids in ours]
    lengths = [max(asked.least, at + BEHIND, end) for at, end in zip(decides, ends, strict=True)]
    replies = [list(r[:length]) for r, length in zip(found.taught.replies, lengths, strict=True)]
    if left := len(asked.prompts) - len(found.places):
        notes = [*notes, f"{left} suspicious prompts have no reference reply without the payload and were left out"]
    words = f"{WORDS[source]} ({sources.how})" if source == "counterpart" else WORDS[source]
    whole = [list(reply) for reply in found.taught.replies]
    kept, taught = asked.prompts.at(found.places), found.taught._replace(replies=replies)
    return Lessons(source, words, tuple(notes), kept, ours, taught, whole, decides)
