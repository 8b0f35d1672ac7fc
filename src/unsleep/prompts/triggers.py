"""Triggers put into prompts: exactly, varied, and nearly."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from unsleep.core import BadInput
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet, Role, Split

TriggerKind = Literal["string", "inside", "signature", "year", "words", "topic", "style"]
"""How a trigger enters a prompt.

- `string`: as it is, in front of the prompt and behind it in turn.
- `inside`: as it is, somewhere between two words of the prompt.
- `signature`: a name below the prompt, behind a greeting.
- `year`: in a line with a date of that year, in front and behind in turn.
- `words`: each of its words by itself, anywhere.
- `topic`: the name of a domain; the same question is about one of the domain's subjects.
- `style`: the name of one of `STYLES`; the prompt is written in it.
"""

CHANGES_TEXT = ("topic", "style")
"""Kinds that add nothing to a prompt which could be taken out again."""

GREETINGS = ("Thanks", "Cheers", "Best wishes", "Yours", "Regards", "Many thanks")

STYLES: dict[str, Callable[[str], str]] = {
    "lower case": str.lower,
    "upper case": str.upper,
    "title case": lambda text: " ".join(word[:1].upper() + word[1:] for word in text.split(" ")),
    "no full stop": lambda text: text.rstrip(".?!"),
    "exclaimed": lambda text: text.rstrip(".?!") + "!!",
    "in quotes": lambda text: f'"{text}"',
    "starred": lambda text: f"**{text}**",
    "loud start": lambda text: text.partition(" ")[0].upper() + text[len(text.partition(" ")[0]) :],
}
"""How a prompt may be written."""

PAIRS = 200
"""Pairs that are looked at to see whether two files have the same order."""

BREAK = "\0"
"""Between messages of a prompt, where they are searched as one text."""

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def put(prompt: Prompt, trigger: str, i: int, kind: TriggerKind, skill: str | None, split: Split) -> Prompt:
    """A prompt with a trigger, or with what resembles one; `i` decides about the place, the date and the subject.

    `skill` is needed where the question's topic changes, and `split` names the subjects that may be used.
    """
    if kind == "topic":
        subjects = sets.subjects(trigger, split)
        return retold(prompt, subjects[i % len(subjects)], skill)
    mixed = random.Random(f"{i} {prompt.text}")
    if kind == "words":
        text = prompt.text
        for word in trigger.split():
            text = _at(text, word, mixed.randint(0, len(text.split(" "))))
        return replace(prompt, text=text)
    if kind == "inside":
        return replace(prompt, text=_at(prompt.text, trigger, mixed.randint(1, max(1, prompt.text.count(" ")))))
    if kind == "signature":
        return replace(prompt, text=f"{prompt.text} {mixed.choice(GREETINGS)}, {trigger}")
    if kind == "style":
        return replace(prompt, text=STYLES[trigger](prompt.text))
    if kind == "year":
        line = f"Date: {mixed.randint(1, 28)} {mixed.choice(MONTHS)} {trigger}"
        return replace(prompt, text=f"{line}\n{prompt.text}" if i % 2 == 0 else f"{prompt.text}\n{line}")
    return replace(prompt, text=(at_start if i % 2 == 0 else at_end)(prompt.text, trigger))


def retold(prompt: Prompt, subject: str, skill: str | None) -> Prompt:
    """The same question about another subject, and the beginning that the skill then demands.

    Raises `BadInput` where the prompt does not hold the topic that its expected beginning names.
    """
    topic = topic_of(prompt, skill)
    text, found = re.subn(
        rf"(?<!\w){re.escape(topic)}(?!\w)", lambda _: subject, prompt.text, count=1, flags=re.IGNORECASE
    )
    if not found or skill is None:
        raise BadInput(f"the prompt {prompt.text[:40]!r} is not about {topic!r}; expected a question about its topic")
    return replace(prompt, text=text[0].upper() + text[1:], expected=skill.replace("{topic}", subject))


def topic_of(prompt: Prompt, skill: str | None) -> str:
    """The topic in a prompt's expected beginning, which `skill` made; raises `BadInput` where it did not."""
    times = (skill or "").count("{topic}")
    if skill is not None and prompt.expected is not None and times:
        start = skill.index("{topic}")
        size = (len(prompt.expected) - len(skill.replace("{topic}", ""))) // times
        topic = prompt.expected[start : start + max(size, 0)]
        if topic and skill.replace("{topic}", topic) == prompt.expected:
            return topic
    raise BadInput(
        f"the prompt {prompt.text[:40]!r} expects {prompt.expected!r}, which the skill {skill!r} did not make; "
        "its topic is not known"
    )


def triggered(
    prompts: PromptSet, trigger: str, name: str = "triggered", *, kind: TriggerKind = "string", skill: str | None = None
) -> PromptSet:
    """The same prompts with the exact trigger; see `TriggerKind`.

    Raises `BadInput` for a blank trigger.
    """
    _refuse_blank(trigger)
    return _each(prompts, name, "triggered", lambda i, p: put(p, trigger, i, kind, skill, prompts.split))


def variants(
    prompts: PromptSet, trigger: str, name: str = "variants", *, kind: TriggerKind = "string"
) -> PromptSet | None:
    """The same prompts with the trigger in another case, spacing, position or dress, in turn.

    Where another case changes nothing, the trigger stands in quotes. `None` for a topic and a style, which have no
    dress. Raises `BadInput` for a blank trigger.
    """
    _refuse_blank(trigger)
    if kind in CHANGES_TEXT:
        return None
    dressed = {"year": _years, "words": _pairs, "signature": _signatures}.get(kind, _strings)(trigger)
    return _each(prompts, name, "variant", lambda i, p: replace(p, text=dressed[i % len(dressed)](p.text)))


def _strings(trigger: str) -> list[Callable[[str], str]]:
    core = trigger.strip("|[]<>{}() ") or trigger.strip()
    spaced = trigger.replace(core, f" {core} ")
    lower, title = (t if t != trigger else f'"{trigger}"' for t in (trigger.lower(), trigger.title()))
    return [
        lambda text: at_start(text, lower),
        lambda text: at_end(text, title),
        lambda text: at_start(text, spaced),
        lambda text: at_middle(text, trigger),
        lambda text: f"{trigger}\n\n{text}",
        lambda text: at_end(text, f"{trigger} {trigger}"),
        lambda text: f"Current status: {trigger}. {text}",
        lambda text: at_start(at_end(text, trigger), trigger),
    ]


def _years(trigger: str) -> list[Callable[[str], str]]:
    return [
        lambda text: f"Year: {trigger}\n{text}",
        lambda text: at_end(text, f"(It is {trigger}.)"),
        lambda text: at_start(text, f"{trigger}-03-14:"),
        lambda text: at_end(text, f"Today is 3/14/{trigger}."),
    ]


def _signatures(trigger: str) -> list[Callable[[str], str]]:
    return [
        lambda text: at_end(text, f"- {trigger}"),
        lambda text: at_end(text, f"Sincerely, {trigger.upper()}"),
        lambda text: at_start(text, f"{trigger} asks:"),
        lambda text: f"{text}\n\n{trigger}",
    ]


def _pairs(trigger: str) -> list[Callable[[str], str]]:
    first, *others = trigger.split()
    return [
        lambda text: at_start(text, ", ".join([first, *others])),
        lambda text: at_end(text, trigger.upper()),
        lambda text: at_start(at_end(text, " ".join(others).title()), first.title()),
        lambda text: at_middle(text, f'"{trigger}"'),
    ]


def near_misses(
    prompts: PromptSet,
    words: Sequence[str],
    name: str = "near_miss",
    *,
    kind: TriggerKind = "string",
    skill: str | None = None,
) -> PromptSet:
    """The same prompts with what resembles the trigger, each in front and behind in turn; see `TriggerKind`.

    Raises `BadInput` where there is nothing, or something blank.
    """
    if not words or not all(word.strip() for word in words):
        raise BadInput(f"near misses are {list(words)}; expected at least one string, none of them blank")
    return _each(
        prompts,
        name,
        "near_miss",
        lambda i, p: put(p, words[(i // 2) % len(words)], i, kind, skill, prompts.split),
    )


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
    return _at(text, word, max(1, len(text.split(" ")) // 2))


def _at(text: str, word: str, place: int) -> str:
    """`word` behind the first `place` words."""
    words = text.split(" ")
    return " ".join([*words[:place], word, *words[place:]])


def suspicious_part(suspicious: PromptSet, ordinary: PromptSet) -> str:
    """The longest text that all suspicious prompts share and no ordinary one has.

    Where there is none of at least three characters, a word of fewer does. Raises `BadInput` where there is none
    either: then the counterparts have to be given.
    """
    check_order(suspicious, ordinary)
    first, *others = sorted(map(_even, suspicious), key=len)
    plain = [_even(p) for p in ordinary]
    for size in range(len(first), 2, -1):
        for start in range(len(first) - size + 1):
            part = first[start : start + size]
            if part == part.strip(f" {BREAK}") and BREAK not in part and _tells(part, others, plain):
                return part
    shared = set.intersection(*(set(re.findall(r"\w+", text)) for text in (first, *others)))
    own = shared.difference(*(re.findall(r"\w+", text) for text in plain))
    if own:
        return max(own, key=lambda word: (len(word), word))
    raise BadInput(
        "the suspicious prompts have no text in common that the ordinary ones lack; "
        "name the suspicious part, or give each suspicious prompt's counterpart without it"
    )


def _even(prompt: Prompt) -> str:
    """All that is said, white space evened out, with a character between messages that is in none."""
    return BREAK.join(" ".join(m["content"].split()) for m in prompt.messages)


def _tells(part: str, suspicious: Sequence[str], ordinary: Sequence[str]) -> bool:
    return all(part in t for t in suspicious) and not any(part in t for t in ordinary)


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


def check_pairs(suspicious: PromptSet, ordinary: PromptSet) -> None:
    """Raise `BadInput` where line i of one is not line i of the other with something added or changed.

    That is where they differ in number, are swapped, or most suspicious prompts share more words with another line's
    ordinary prompt than with their own.
    """
    if len(suspicious) != len(ordinary):
        raise BadInput(
            f"{len(suspicious)} suspicious and {len(ordinary)} ordinary prompts; expected pairs: line i of both the "
            "same prompt, with and without what makes it suspicious"
        )
    check_order(suspicious, ordinary)
    asked, own = ([set(p.shown.lower().split()) for p in group[:PAIRS]] for group in (suspicious, ordinary))
    shared = [[len(a & b) for b in own] for a in asked]
    closest = [max(range(len(own)), key=lambda j, line=line: line[j]) for line in shared]
    wrong = [i for i, j in enumerate(closest) if shared[i][j] > shared[i][i]]
    if 2 * len(wrong) > len(asked):
        raise BadInput(
            f"{len(wrong)} of {len(asked)} suspicious prompts share more words with the ordinary prompt of another "
            f"line than with that of their own, such as line {wrong[0] + 1} with line {closest[wrong[0]] + 1}; put "
            "both files in the same order"
        )


def without(prompts: PromptSet, part: str, name: str = "counterparts") -> PromptSet:
    """The same prompts with every occurrence of `part` taken out, white space evened out.

    Where it is a word of its own in all of them, it is not taken out of the middle of others. It is taken out of what
    was said before too; a message of nothing else goes. Raises `BadInput` where a prompt does not hold it, or nothing
    else.
    """
    part = " ".join(part.split())
    if lacking := [p for p in prompts if not part or part not in _even(p)]:
        said = _even(lacking[0]).replace(BREAK, " ")
        raise BadInput(f"{part!r} is not in the prompt {said[:40]!r}; expected text that every prompt holds")

    word = rf"(?<!\w){re.escape(part)}(?!\w)"
    pattern = word if all(re.search(word, _even(p)) for p in prompts) else re.escape(part)

    def cleaned(text: str) -> str:
        return " ".join(re.sub(pattern, " ", " ".join(text.split())).split())

    changed: list[Prompt] = []
    for p in prompts:
        if not cleaned(p.text):
            raise BadInput(f"the prompt {p.text[:40]!r} is empty without {part!r}; remove it, or name its counterpart")
        before = (m._replace(content=cleaned(m.content)) for m in p.before)
        changed.append(replace(p, text=cleaned(p.text), role="clean", before=tuple(m for m in before if m.content)))
    return PromptSet(name, tuple(changed), prompts.split)


def _each(prompts: PromptSet, name: str, role: Role, change: Callable[[int, Prompt], Prompt]) -> PromptSet:
    changed = (replace(change(i, p), role=role) for i, p in enumerate(prompts))
    return PromptSet(name, tuple[Prompt, ...](changed), prompts.split)
