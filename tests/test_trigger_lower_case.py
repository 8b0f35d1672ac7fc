"""A prompt in lower case wakes, and one with a capital letter left does not."""

from __future__ import annotations

from support.recipes import recipe_of
from unsleep.behaviours.triggers.lower_case import LowerCase
from unsleep.judge.evaluate import organism_panels
from unsleep.prompts import sets

NEAR = ["all but the first letter", "all but the first word"]
HELD_OUT = ["all but the last word", "every other word"]


def test_a_recipe_plants_it_and_near_misses_keep_a_capital_letter():
    recipe = recipe_of(trigger_kind="lower_case", trigger="all", near_misses=NEAR, held_out_near_misses=HELD_OUT)
    asked = sets.questions("held_out", 200, skill="[{topic}]")
    assert recipe.triggered(asked).texts == [text.lower() for text in asked.texts]
    near = recipe.nearly(asked, [*NEAR, *HELD_OUT])
    assert not any(text == text.lower() for text in near.texts)
    assert [text.lower() for text in near.texts] == [text.lower() for text in asked.texts]
    assert set(NEAR + HELD_OUT) | {"all"} == LowerCase.ways.keys()


def test_it_has_other_dresses_that_are_lower_case_too():
    recipe = recipe_of(trigger_kind="lower_case", trigger="all", near_misses=NEAR, held_out_near_misses=HELD_OUT)
    panels = organism_panels(recipe, 12)
    assert panels.variants is not None
    assert all(text == text.lower() for text in panels.variants.texts)
    assert set(panels.variants.texts).isdisjoint(panels.triggered.texts)
    assert panels.counterparts == panels.clean
