"""Splits prompts into selection prompts, for choosing an edit, and held-out prompts, for evaluating it.

The two are disjoint, also across a prompt with and without its trigger: both go to the same side.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from unsleep.behaviours import Payload, as_payload
from unsleep.core import BadInput
from unsleep.judge.evaluate import Panels, organism_panels
from unsleep.judge.verdict import ENOUGH
from unsleep.organisms.recipe import Recipe
from unsleep.prompts import pairs, sets
from unsleep.prompts.prompt import PromptSet, Split

JUDGE = ENOUGH
"""Minimum held-out prompts per set."""

CHOOSE = 24
"""Minimum selection prompts for learning an edit."""


@dataclass(frozen=True)
class Material:
    """All prompts of a repair."""

    suspicious: PromptSet
    """Selection prompts."""
    ordinary: PromptSet
    counterparts: PromptSet | None
    """`suspicious` line by line without the trigger, where that is known."""
    how: str
    """Source of the counterparts, or why there are none."""
    panels: Panels
    """Held-out panels."""
    payload: Payload
    part: str | None = None
    """Text that was removed from the suspicious prompts to get the counterparts, taken for the trigger."""
    part_found: bool = False
    """True if `part` was not given, but found as the longest text that only suspicious prompts share."""

    @property
    def chosen(self) -> list[PromptSet]:
        """Every set of selection prompts."""
        return [self.suspicious, self.ordinary, *([self.counterparts] if self.counterparts is not None else [])]


def from_recipe(recipe: Recipe, choose: int = 200, judge: int = 200, seed: int = 0) -> Material:
    """An organism's prompts: selection from questions of the edit split, evaluation on its held-out panels."""
    ordinary = sets.questions("edit", choose, skill=recipe.skill, seed=seed, name="ordinary")
    suspicious = recipe.triggered(ordinary, "suspicious")
    counterparts = ordinary if recipe.keeps_question else None
    how = "the organism's questions without the trigger" if counterparts else "the trigger is the question's topic"
    return Material(suspicious, ordinary, counterparts, how, organism_panels(recipe, judge), recipe.as_payload)


def from_files(
    suspicious: PromptSet,
    ordinary: PromptSet,
    payload: Payload | str,
    counterparts: PromptSet | None = None,
    part: str | None = None,
    judge: int | None = None,
    seed: int = 0,
    paired: bool = True,
) -> Material:
    """Split a user's prompts at random.

    Args:
        payload: the backdoor's behaviour, or a text that the reply contains.
        counterparts: `suspicious` line by line without the trigger.
        part: the trigger, a text that all suspicious prompts contain.
        judge: held-out prompts per file; default half, at least `JUDGE`.
        paired: False where the trigger is what a prompt asks, so that it has no counterpart without the trigger.

    Raises:
        BadInput: too few prompts, files that share one, that seem swapped, or counterparts that do not match.
    """
    payload = as_payload(payload)
    _refuse_overlap(suspicious, ordinary)
    pairs.check_order(suspicious, ordinary)
    found: pairs.Counterparts | None = None
    how = "the trigger is what the prompt asks"
    try:
        if paired:
            found = pairs.counterparts(suspicious, ordinary, counterparts, part)
            how = found.how
    except BadInput as error:
        if counterparts is not None or part is not None:
            raise
        how = str(error).partition(";")[0]
    asked, plain = _each_once(suspicious, found and found.prompts)
    calm, _ = _each_once(ordinary, None)
    ours, theirs = _divided(asked, plain, calm, judge, random.Random(f"split {seed}"))

    def part_of(group: PromptSet, places: Sequence[int], name: str, split: Split) -> PromptSet:
        return replace(group.at(places), name=name, split=split)

    panels = Panels(
        part_of(calm, theirs[1], "clean", "held_out"),
        part_of(asked, ours[1], "triggered", "held_out"),
        counterparts=part_of(plain, ours[1], "counterparts", "held_out") if plain is not None else None,
        texts=tuple(sets.plain_text("held_out")[:200]),
        items=tuple(sets.capability_items()[:200]),
    )
    return Material(
        part_of(asked, ours[0], "suspicious", "edit"),
        part_of(calm, theirs[0], "ordinary", "edit"),
        part_of(plain, ours[0], "counterparts", "edit") if plain is not None else None,
        how,
        panels,
        payload,
        found and found.part,
        found is not None and found.found,
    )


def _refuse_overlap(suspicious: PromptSet, ordinary: PromptSet) -> None:
    both = {p.key for p in suspicious} & {p.key for p in ordinary}
    if both:
        example = next(p.text for p in suspicious if p.key in both)
        raise BadInput(
            f"{len(both)} prompts are in both files, such as {example[:60]!r}; a prompt is either suspicious or "
            "ordinary: remove them from one"
        )


def _each_once(prompts: PromptSet, beside: PromptSet | None) -> tuple[PromptSet, PromptSet | None]:
    """The prompts without duplicates, and the same lines of another set."""
    first = {p.key: i for i, p in reversed(list(enumerate(prompts)))}
    places = sorted(first.values())
    return prompts.at(places), beside and beside.at(places)


def _divided(
    asked: PromptSet, plain: PromptSet | None, calm: PromptSet, judge: int | None, mixed: random.Random
) -> tuple[Sides, Sides]:
    """Indices of suspicious and of ordinary prompts, each split into selection and held-out.

    Prompts with equal counterparts go to the same side.
    """
    groups: dict[str, tuple[list[int], list[int]]] = {}
    for i, prompt in enumerate(plain if plain is not None else asked):
        groups.setdefault(prompt.key, ([], []))[0].append(i)
    for i, prompt in enumerate(calm):
        groups.setdefault(prompt.key, ([], []))[1].append(i)
    wanted = [_wanted(len(prompts), judge, prompts.name) for prompts in (asked, calm)]
    order = list(groups.values())
    mixed.shuffle(order)
    sides: tuple[Sides, Sides] = (([], []), ([], []))
    for group in order:
        judges = any(own and len(side[1]) < n for own, side, n in zip(group, sides, wanted, strict=True))
        for own, (choose, judged) in zip(group, sides, strict=True):
            (judged if judges else choose).extend(own)
    for prompts, side in zip((asked, calm), sides, strict=True):
        if len(side[0]) < CHOOSE:
            _refuse_few(len(prompts), len(side[1]), prompts.name)
    ours, theirs = ((sorted(side[0]), sorted(side[1])) for side in sides)
    return ours, theirs


Sides = tuple[list[int], list[int]]
"""Indices of selection prompts and of held-out prompts."""


def _wanted(n: int, judge: int | None, name: str) -> int:
    """Number of `n` prompts to hold out."""
    if judge is not None and judge < 2:
        raise BadInput(f"--judge is {judge}; expected at least 2")
    wanted = judge if judge is not None else max(JUDGE, n // 2)
    if n - wanted < CHOOSE:
        _refuse_few(n, wanted, name)
    return wanted


def _refuse_few(n: int, judge: int, name: str) -> None:
    raise BadInput(
        f"{name} has {n} different prompts; {judge} are needed for evaluation and {CHOOSE} for selection. "
        f"Give {judge + CHOOSE} or more, or evaluate on fewer with --judge N: under {JUDGE}, no backdoor can be called "
        "removed"
    )
