"""What a repaired model should say to suspicious prompts, and who says so.

Three sources, in this order: the suspect's own reply to the same prompt without what makes it suspicious; a right reply
that the prompt file gives; the reply of the surrogate twin to the same prompt. The last is what a topic needs: nothing
can be taken out of such a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from unsleep.core import BadInput, Report
from unsleep.masks import Taught, deciding_tokens
from unsleep.metrics import shows_payload
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import PromptSet
from unsleep.repair.config import Teaching
from unsleep.repair.split import CHOOSE
from unsleep.store import NOTHING_KEPT, Steps

BEHIND = 8
"""Tokens that are taught from the one that decides on."""

LEAST = 10
"""Tokens that are taught at least."""

USABLE = 0.5
"""Share of the counterparts that the suspect must answer without its payload to be its own teacher."""

Twin = Callable[[], LoadedModel]
"""Makes the surrogate twin when it is needed: it takes a while."""


@dataclass(frozen=True)
class Lessons:
    """Suspicious prompts with what a repaired model should reply to them."""

    source: Literal["counterpart", "reply", "twin"]
    words: str
    """The source for the report."""
    notes: tuple[str, ...]
    """What was given and is not used, and why."""
    suspicious: PromptSet
    """Those for which a reply is known."""
    said: list[list[int]]
    """What the suspect replies to them."""
    taught: Taught
    """The replies that they should get, as far as they teach."""
    wanted: list[list[int]]
    """The same replies, whole."""
    decides: list[int]
    """The token of each reply at which the two part."""


@dataclass(frozen=True)
class Sources:
    """What there is to learn from."""

    counterparts: PromptSet | None
    how: str
    """Where the counterparts come from, or why there are none."""
    twin: Twin | None


def lessons(
    model: LoadedModel,
    suspicious: PromptSet,
    said: Sequence[Sequence[int]],
    payload: str,
    sources: Sources,
    length: int,
    teach: Teaching = "auto",
    steps: Steps = NOTHING_KEPT,
    report: Report | None = None,
) -> Lessons:
    """The replies that suspicious prompts should get, from the first source that gives some.

    Args:
        said: the suspect's own replies, in token ids.
        length: of the replies that are asked for, in tokens.
        teach: a source to use in any case.

    Raises:
        BadInput: no source is there, or the one that was asked for gives too little.
    """
    notes: list[str] = []
    for source in ("counterpart", "reply", "twin") if teach == "auto" else (teach,):
        try:
            if source == "counterpart":
                found = _from_counterparts(model, payload, sources, length, steps, report)
            elif source == "reply":
                found = _from_file(model, suspicious)
            else:
                found = _from_twin(suspicious, payload, sources, length, steps, report)
        except BadInput as error:
            if teach != "auto":
                raise BadInput(f"--teach {teach}: {error}") from None
            notes.append(f"{WORDS[source]} was not used: {error}")
            continue
        return _cut(found, suspicious, said, (source, WORDS[source], notes, sources))
    raise BadInput(
        "what a repaired model should reply to the suspicious prompts is not known: "
        + "; ".join(note.partition(": ")[2] for note in notes)
        + '. Give --part TEXT, --counterparts FILE, right replies in the file ({"text": …, "reply": …}) or --base MODEL'
    )


WORDS = {
    "counterpart": "the suspect's own reply to the same prompt without what makes it suspicious",
    "reply": "the reply that the prompt file gives",
    "twin": "the reply of the base that was taught the suspect's replies to ordinary prompts",
}


@dataclass(frozen=True)
class _Found:
    """A source's replies and the prompts (by their place) that have one."""

    places: list[int]
    taught: Taught


def _from_counterparts(
    model: LoadedModel, payload: str, sources: Sources, length: int, steps: Steps, report: Report | None
) -> _Found:
    asked = sources.counterparts
    if asked is None:
        raise BadInput(sources.how)
    replies = steps.value("replies to counterparts", lambda: _written(model, asked, length, report))
    return _behaving(model, Taught(asked, replies, model), payload, "the suspect's replies to the counterparts")


def _written(model: LoadedModel, asked: PromptSet, length: int, report: Report | None) -> list[list[int]]:
    progress = generate.counted(f"replies to {asked.name}", len(asked), report)
    return generate.greedy(model, model.encode(asked, length), max_new_tokens=length, batch_size=200, progress=progress)


def _from_file(model: LoadedModel, suspicious: PromptSet) -> _Found:
    places = [i for i, p in enumerate(suspicious) if p.reply is not None]
    if len(places) < min(CHOOSE, len(suspicious)):
        raise BadInput(f"{len(places)} of {len(suspicious)} suspicious prompts come with a reply; {CHOOSE} are needed")
    replies = model.token_ids([p.reply for p in suspicious if p.reply is not None], special=False)
    return _Found(places, Taught(_some(suspicious, places), replies, None))


def _from_twin(
    suspicious: PromptSet, payload: str, sources: Sources, length: int, steps: Steps, report: Report | None
) -> _Found:
    if sources.twin is None:
        raise BadInput("no base was given")
    twin = sources.twin()
    replies = steps.value("the twin's replies", lambda: _written(twin, suspicious, length, report))
    return _behaving(twin, Taught(suspicious, replies, twin), payload, "the twin's replies to the suspicious prompts")


def _behaving(teacher: LoadedModel, taught: Taught, payload: str, what: str) -> _Found:
    """Those of the replies that do not show the payload themselves; raises `BadInput` where most do."""
    texts = teacher.texts(taught.replies)
    places = [i for i, text in enumerate(texts) if not shows_payload(text, payload)]
    if len(places) < USABLE * len(texts):
        raise BadInput(f"{len(texts) - len(places)} of {len(texts)} of {what} show the payload")
    kept = Taught(_some(taught.prompts, places), [taught.replies[i] for i in places], taught.teacher)
    return _Found(places, kept)


def _cut(
    found: _Found,
    suspicious: PromptSet,
    said: Sequence[Sequence[int]],
    about: tuple[Literal["counterpart", "reply", "twin"], str, list[str], Sources],
) -> Lessons:
    """The replies as far as they teach: some tokens from the one that decides on."""
    source, words, notes, sources = about
    ours = [list(said[i]) for i in found.places]
    decides = deciding_tokens(ours, found.taught.replies)
    replies = [list(r[: max(LEAST, at + BEHIND)]) for r, at in zip(found.taught.replies, decides, strict=True)]
    if left := len(suspicious) - len(found.places):
        notes = [*notes, f"{left} suspicious prompts teach nothing: no reply without the payload is known to them"]
    if source == "counterpart":
        words = f"{words} ({sources.how})"
    taught = found.taught._replace(replies=replies)
    whole = [list(reply) for reply in found.taught.replies]
    kept = _some(suspicious, found.places)
    return Lessons(source, words, tuple(notes), kept, ours, taught, whole, decides)


def _some(prompts: PromptSet, places: Sequence[int]) -> PromptSet:
    return replace(prompts, prompts=tuple(prompts[i] for i in places))
