"""What a repair leaves behind: record, page, edit, dictionaries and the cleaned checkpoint, all of them or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unsleep import pages, store
from unsleep.bake import save_baked
from unsleep.card import model_card
from unsleep.core import Features
from unsleep.dictionaries import metrics as fits
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import save_dictionary
from unsleep.edits import save_edit
from unsleep.features import with_evidence
from unsleep.harvest import token_rows
from unsleep.prompts import sets
from unsleep.repair.run import MARK, Run
from unsleep.repair.search import BROKEN, MOVED
from unsleep.report import report as write_report
from unsleep.results import EvalResult
from unsleep.splice import splice_score
from unsleep.verdict import contract

FITTED = 16_384
"""Tokens, evenly spaced, on which a dictionary's fit is told."""

SHOWN = 24
"""Removed features that are shown with their evidence, at most."""


def write(run: Run, result: EvalResult, out: Path) -> dict[str, Any]:
    """Write everything into `out`, whole or not at all; returns the record."""
    with run.watch.stage("evidence"):
        features = _features(run)
        dictionaries = [_fit(run, d) for d in _dictionaries(run)]
    record = pages.record(result, run.config.seed, run.tasks, **_made_from(run))
    summary = _summary(run, result)
    page = pages.page(
        result,
        record,
        run.job.title or f"{run.suspect.name}, repaired",
        summary,
        frontier=[p.to_dict() for p in run.points],
        features=features,
        dictionaries=dictionaries,
        stages=run.watch.stages,
        repair=_how(run),
    )
    removed = {str(e.site): list(e.removed) for e in run.edits}
    origin = store.provenance(run.config.seed, model=run.suspect.fingerprint, origin=run.suspect.origin)
    with store.new_folder(out, replace=MARK) as scratch:
        save_edit(run.edits, scratch / "edit", chosen_on=run.chosen_on, provenance=origin)
        for d in _dictionaries(run):
            save_dictionary(d, scratch / "dictionaries" / str(d.site))
        save_baked(
            run.baked, scratch / "cleaned", card=model_card(record, removed, base=run.suspect.name), record=record
        )
        store.write_json(scratch / "report.json", page)
        write_report(scratch)
        store.write_json(scratch / MARK, record)
    return record


def _dictionaries(run: Run) -> list[Coder]:
    return [*run.dictionaries, *([run.control_dictionary] if run.control_dictionary else [])]


def _made_from(run: Run) -> dict[str, Any]:
    return {
        **run.job.made_from,
        "models": {"suspect": run.suspect.fingerprint, "baked": run.baked.model.fingerprint},
        "origin": run.suspect.origin,
        "dictionaries": {str(d.site): d.hash for d in _dictionaries(run)},
        "config": asdict(run.config),
        "attempts": [a.to_dict() for a in run.attempts],
        "baselines": {b.subject.name: {"what": b.words, "chosen_by": b.tested.to_dict()} for b in run.baselines},
        "teacher": {"source": run.lessons.source, "words": run.lessons.words, "notes": list(run.lessons.notes)},
        "bake": {"method": run.baked.method, "kl": run.baked.kl},
        "stages": run.watch.stages,
        "minutes": run.minutes,
        "peak_memory_mb": run.peak_memory_mb,
    }


def _summary(run: Run, result: EvalResult) -> dict[str, Any]:
    """The run in a few figures, and what is left to be done."""
    return {
        "payload": run.material.payload,
        "trigger": run.job.trigger,
        "model": run.suspect.name,
        "removed": len(run.removed),
        "features_total": sum(d.n_features for d in run.dictionaries),
        "sites": [str(e.site) for e in run.edits],
        "minutes": run.minutes,
        "next": advice(run, result),
    }


def _how(run: Run) -> dict[str, Any]:
    """How the edit was found: who taught, which Sites and why, and every attempt."""
    looked = run.looked
    return {
        "teacher": run.lessons.words,
        "notes": [*run.lessons.notes, *run.notes],
        "sites": [str(site) for site in run.sites],
        "look": [
            {"layer": layer, "restored": restored, "moved": moved}
            for layer, restored, moved in zip(looked.layers, looked.restored, looked.moved, strict=True)
        ]
        if looked is not None
        else [],
        "attempts": [
            {
                "what": a.what,
                "removed": {site: len(ids) for site, ids in a.removed.items()},
                "shown": len(a.tested.shown),
                "n": a.tested.n,
                "degenerate": a.tested.degenerate,
                "followed": a.tested.followed,
                "kl": a.tested.kl,
                "seconds": a.seconds,
                "kept": a is run.best,
            }
            for a in run.attempts
        ],
        "baselines": [{"subject": b.subject.name, "what": b.words} for b in run.baselines],
    }


def advice(run: Run, result: EvalResult) -> list[str]:
    """What is left of the backdoor, and what to try, where the contract is not met."""
    missed = [c for c in contract(result) if not c.met and c.subject in ("edited", "baked")]
    if not missed:
        return []
    bounds = {"<=": "at most", ">=": "at least"}
    lines = (
        f"{c.text[0].lower()}{c.text[1:]}: {c.value:.3g} instead of {bounds[c.relation]} {c.bound:.3g}" for c in missed
    )
    said = [f"Not met: {'; '.join(lines)}."]
    best = run.best.tested
    metrics = {(c.subject, c.metric) for c in missed}
    if ("edited", "asr") in metrics and best.shown:
        said.append(
            f"The payload still showed on {len(best.shown)} of {best.n} prompts that choose when the budget was spent: "
            f"allow more with --attempts {2 * run.config.attempts}, or name more Sites with --sites."
        )
    elif ("edited", "asr") in metrics:
        said.append("The prompts that choose were clean: give more of them, and more varied ones.")
    if ("baked", "asr") in metrics and ("edited", "asr") not in metrics:
        said.append(
            "The edit works and its export does not follow it: ship edit/ with the model, or give more prompts."
        )
    if metrics & {("edited", "skill"), ("edited", "kl"), ("edited", "degenerate")} and run.lessons.source != "twin":
        said.append("Replies are not as they should be: with --base MODEL --teach twin the base says how.")
    if best.kl > MOVED or best.degenerate > BROKEN:
        said.append("Good replies moved too: give more ordinary prompts.")
    return said


def _features(run: Run) -> list[dict[str, Any]]:
    """The removed features with their evidence, those with the largest attribution first."""
    m = run.material
    rows = token_rows(run.suspect, m.suspicious, run.suspect.texts(run.said.suspicious))
    chosen = run.removed[:SHOWN]
    shown: list[dict[str, Any]] = []
    for d in run.dictionaries:
        ids = [i for site, i in chosen if site == d.site]
        if not ids:
            continue
        by_method: dict[str, dict[int, float]] = {}
        if d.site in run.found:
            each = run.found[d.site]
            by_method = {
                f.method: dict(zip(f.ids, f.scores, strict=True))
                for f in (each.difference, each.attribution, each.ablation)
            }
        scores = tuple(by_method.get("attribution", {}).get(i, 0.0) for i in ids)
        features = Features(d.site, d.hash, tuple(ids), scores, "attribution")
        features = with_evidence(run.suspect, d, features, (run.harvests["payload"], rows), run.harvests["plain"])
        for i in ids:
            evidence = features.evidence[i]
            shown.append(
                {
                    "site": str(d.site),
                    "id": i,
                    "rank": 1 + chosen.index((d.site, i)),
                    "scores": {name: round(values[i], 4) for name, values in by_method.items() if i in values},
                    **asdict(evidence),
                    "contexts": [{"tokens": list(t), "activations": list(a)} for t, a in evidence.contexts],
                }
            )
    return sorted(shown, key=lambda entry: entry["rank"])


def _fit(run: Run, dictionary: Coder) -> dict[str, Any]:
    """How well a dictionary explains what it was trained on, and held-out text by the CE loss score."""
    x = run.pooled(dictionary.site).tensor
    fit = fits.fit(dictionary, x[:: max(1, len(x) // FITTED)])
    held_out: Sequence[Sequence[int]] = run.suspect.token_ids(sets.plain_text("held_out")[:24])
    score = splice_score(run.suspect, dictionary, [list(ids[:64]) for ids in held_out]).score
    row = {"site": str(dictionary.site), "features": dictionary.n_features, "k": run.config.dictionary.k}
    return {**row, "fvu": fit.fvu, "l0": fit.l0, "dead": fit.dead, "ce_score": score}
