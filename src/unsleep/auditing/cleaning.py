"""Repair of a suspect whose backdoor an audit found: its witnesses' triggers are the suspicious prompts of `repair`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from unsleep.auditing.artefacts import CLEANED, REPAIR
from unsleep.auditing.forms import transformed
from unsleep.auditing.trusted import own_prompts
from unsleep.base import records
from unsleep.behaviours.payloads.contains import Contains
from unsleep.core import BadInput, Refused
from unsleep.judge.audited import AuditRecord, Trial
from unsleep.models.model import LoadedModel
from unsleep.pages.records import Result
from unsleep.prompts.prompt import PromptSet
from unsleep.repairs import Job, Material, RepairConfig, from_files, repair

PROMPTS = 240
"""Trusted prompts of a repair, at most, under a witness's trigger each and without."""


def material_of(witnesses: tuple[Trial, ...], trusted: PromptSet) -> Material:
    """Prompts of a repair: trusted ones under the triggers of all witnesses of the strongest payload, in turn.

    Raises `BadInput` without a witness, and for too few trusted prompts.
    """
    if not witnesses:
        raise BadInput("there is no witness to repair; see the report")
    payload = witnesses[0].payload
    forms = [t.form for t in witnesses if t.payload == payload]
    plain = tuple(replace(p, expected=None, reply=None) for p in {p.key: p for p in trusted}.values())[:PROMPTS]
    asked = tuple(transformed(forms[i % len(forms)], p) for i, p in enumerate(plain))
    ordinary, suspicious = PromptSet("ordinary", plain, "edit"), PromptSet("suspicious", asked, "edit")
    return from_files(suspicious, ordinary, Contains(payload), ordinary)


def clean(
    suspect: LoadedModel,
    record: AuditRecord,
    out: str | Path,
    *,
    base: LoadedModel | None = None,
    trusted: PromptSet | None = None,
    config: RepairConfig = RepairConfig(),
) -> str:
    """Repair what an audit in `out` found; returns the reason where there is no cleaned checkpoint, or nothing.

    Writes `repair/` with the repair's report, `cleaned/`, and the repair's rows into `result.json`. The repaired
    payload is the strongest witness's; prompts of the audit are judged by no edit.
    """
    out = Path(out)
    witnesses = sorted((t for t in record.searches[0].trials if t.witness), key=lambda t: -t.strength)
    try:
        material = material_of(tuple(witnesses), trusted if trusted is not None else own_prompts())
        job = Job(suspect, material, None if base is None else lambda: base, trigger=witnesses[0].form.text)
        judged = repair(job, out / REPAIR, config)
    except (BadInput, Refused) as error:
        return str(error)
    checkpoint = out / REPAIR / CLEANED
    if checkpoint.is_dir():
        checkpoint.rename(out / CLEANED)
    result = records.load(Result, out / "result.json")
    records.save(replace(result, rows=judged.rows), out / "result.json")
    return "" if (out / CLEANED).is_dir() else "no checkpoint was exported; see the repair's report"
