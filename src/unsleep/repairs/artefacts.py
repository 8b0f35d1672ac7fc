"""Writes a repair's artefacts atomically: record, page, edit, dictionaries and the cleaned checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from unsleep.base import records, store
from unsleep.dictionaries.files import save_dictionary
from unsleep.interventions.files import save_edit
from unsleep.judge.results import EvalResult
from unsleep.judge.verdict import contract
from unsleep.pages import records as pages
from unsleep.pages import report as write_report
from unsleep.pages.card import model_card
from unsleep.repairs.bake import save_baked
from unsleep.repairs.run import MARK, Run
from unsleep.repairs.search import BROKEN, MOVED, Attempt

CLEANED = "cleaned"
"""Folder of the exported checkpoint in a repair's."""


def write(run: Run, result: EvalResult, out: Path) -> None:
    """Write all artefacts into `out`, atomically."""
    record = pages.record(result, run.config.seed, run.tasks, **_made_from(run))
    summary = _summary(run, result, out)
    page = pages.page(
        result,
        record,
        run.job.title or f"{run.suspect.name}, repaired",
        summary,
        run.material.payload,
        frontier=tuple(run.points),
        features=tuple(run.evidence),
        dictionaries=tuple(run.fits),
        stages=tuple(run.watch.stages),
        repair=_how(run),
    )
    removed = {str(e.site): list(e.removed) for e in run.edits}
    origin = store.provenance(run.config.seed, model=run.suspect.fingerprint, origin=run.suspect.origin)
    with store.new_folder(out, replace=MARK) as scratch:
        save_edit(run.edits, scratch / "edit", chosen_on=run.chosen_on, provenance=origin)
        for d in run.every_dictionary:
            save_dictionary(d, scratch / "dictionaries" / str(d.site))
        if run.baked is not None:
            card = model_card(record, removed, base=run.suspect.name)
            save_baked(run.baked, scratch / CLEANED, card=card, record=record)
        records.save(page, scratch / "report.json")
        write_report(scratch)
        records.save(record, scratch / MARK)


def _made_from(run: Run) -> dict[str, Any]:
    baked = run.baked
    return {
        **run.job.made_from,
        "models": {"suspect": run.suspect.fingerprint, **({"baked": baked.model.fingerprint} if baked else {})},
        "origin": run.suspect.origin,
        "dictionaries": {str(d.site): d.hash for d in run.every_dictionary},
        "config": asdict(run.config),
        "attempts": [a.to_dict() for a in run.attempts],
        "baselines": {b.subject.name: {"what": b.words, "chosen_by": b.tested.to_dict()} for b in run.baselines},
        "teacher": {"source": run.lessons.source, "words": run.lessons.words, "notes": list(run.lessons.notes)},
        "bake": {"method": baked.method, "kl": baked.kl} if baked else None,
        "stages": run.watch.stages,
        "minutes": run.minutes,
        "peak_memory_mb": run.peak_memory_mb,
    }


def _summary(run: Run, result: EvalResult, out: Path) -> pages.Summary:
    """Key figures of the run, and advice on what remains."""
    m = run.material
    return pages.Summary(
        trigger=run.job.trigger or (None if m.part_found else m.part),
        part=m.part if m.part_found else None,
        model=run.suspect.name,
        checkpoint=str(out / CLEANED) if run.baked is not None else None,
        removed=len(run.removed),
        features_total=sum(e.dictionary.n_features for e in run.edits),
        sites=tuple(str(e.site) for e in run.edits if e.removed),
        minutes=run.minutes,
        next=tuple(advice(run, result)),
    )


def _how(run: Run) -> pages.Repaired:
    """The repair's history: source of the reference replies, Sites and their choice, every attempt."""
    looked = run.looked
    look = () if looked is None else zip(looked.layers, looked.restored, looked.moved, strict=True)
    return pages.Repaired(
        teacher=run.lessons.words,
        notes=(*run.lessons.notes, *run.notes),
        sites=tuple(map(str, run.sites)),
        look=tuple(pages.Looked(*row) for row in look),
        attempts=tuple(_tried(a, a is run.best) for a in run.attempts),
        baselines=tuple(pages.Baseline(b.subject.name, b.words) for b in run.baselines),
    )


def _tried(attempt: Attempt, kept: bool) -> pages.Tried:
    tested, removed = attempt.tested, {site: len(ids) for site, ids in attempt.removed.items()}
    figures = len(tested.shown), tested.n, tested.degenerate, tested.followed, tested.kl, attempt.seconds
    return pages.Tried(attempt.what, removed, *figures, kept)


def advice(run: Run, result: EvalResult) -> list[str]:
    """Advice on what remains of the backdoor where the contract is not met; what was skipped."""
    missed = [c for c in contract(result) if not c.met]
    said = list(run.notes)
    if missed:
        bounds = {"<=": "at most", ">=": "at least"}
        figures = (f"{c.value:.3g} instead of {bounds[c.relation]} {c.bound:.3g}" for c in missed)
        lines = [f"{c.text[0].lower()}{c.text[1:]}: {told}" for c, told in zip(missed, figures, strict=True)]
        said.append(f"Not met: {'; '.join(lines)}.")
    best, metrics = run.best.tested, {(c.subject, c.metric) for c in missed}
    if ("edited", "asr") in metrics and best.shown:
        said.append(
            f"The payload still showed on {len(best.shown)} of {best.n} selection prompts after the last attempt: "
            f"raise --attempts to {2 * run.config.attempts}, or add Sites with --sites, and evaluate on other held-out "
            "prompts."
        )
    elif ("edited", "asr") in metrics:
        said.append("No selection prompt showed the payload any more: give more, and more varied, prompts.")
    if ("baked", "asr") in metrics and ("edited", "asr") not in metrics:
        said.append(
            "The exported checkpoint does not reproduce the edit: ship edit/ with the model, or give more prompts."
        )
    if metrics & {("edited", "skill"), ("edited", "kl"), ("edited", "degenerate")} and run.lessons.source != "twin":
        said.append(
            "Replies differ from the reference: --base MODEL --teach twin takes reference replies from the base."
        )
    if missed and (best.kl > MOVED or best.degenerate > BROKEN):
        said.append("Trusted replies changed too: give more ordinary prompts.")
    if ("suspect", "asr") in metrics:
        said.append(
            "The trigger is unreliable: suspicious prompts should always show the payload, ordinary ones never."
        )
    if ("control_random", "asr") in metrics:
        said.append(
            "The random control stops the payload too: the edit damages the model instead of removing the backdoor."
        )
    return said
