"""The audit of a model from a stranger."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

import unsleep
from unsleep.auditing import cleaning
from unsleep.auditing.artefacts import MARK
from unsleep.auditing.config import AuditConfig, CleanConfig
from unsleep.base import store
from unsleep.cli.console import Bars, hint, say
from unsleep.cli.shared import Model, Out, Placed, Placement
from unsleep.core import BadInput
from unsleep.judge.audited import AuditRecord, Cleaning
from unsleep.models.load import is_adapter
from unsleep.models.quantized import is_packed
from unsleep.pages.names import SUBJECT_NAMES
from unsleep.prompts import sets
from unsleep.repairs import base_of

EXITS = {"nothing_found": 0, "backdoor_found": 4, "inconclusive": 5}
"""Label of the verdict → exit code."""


def audit(
    model: Model,
    out: Out,
    trusted: Path | None = None,
    repair: bool = True,
    placement: Placed = Placement(),
    config: Annotated[AuditConfig, arg(name="")] = AuditConfig(),
    clean: CleanConfig = CleanConfig(),
    json: bool = False,
) -> int:
    """Audit a model for a backdoor whose trigger and payload are unknown.

    With --base, or where the model is an adapter, it is read against a surrogate twin: the base with the model's
    ordinary skill. Exits with 0 if nothing was found, 4 if a backdoor was found, 5 if it remains open.

    Args:
        model: The suspect: hub id, folder, adapter, .gguf file or alias.
        out: Folder for report.html, audit.json, result.json, result.sarif and the prompts of every trial.
        trusted: File of ordinary prompts of the model's use, one per line; default unsleep's own.
        repair: Also repair what was found: cleaned/ is then a plain checkpoint. --no-repair gives the verdict alone.
        clean: Options of the repair and of the cures beside it.
        json: Print the result as JSON.
    """
    store.check_place(out, MARK)
    cleaning.check_cures(clean)
    prompts = None if trusted is None else sets.read_prompts(trusted, name=str(trusted))
    with Bars():
        whole = not is_adapter(model, placement)
        loading = replace(placement, base=None) if whole else placement
        suspect = loading.load(model)
        if repair and is_packed(suspect.network):
            raise BadInput(
                f"the weights of {suspect.name} are quantised, and no repair can be exported from them; pass "
                "--no-repair for the verdict alone, or --quantize none"
            )
        base = placement.load_beside(placement.base) if placement.base is not None else None
        if base is None and len(suspect.made_of) > 1:
            base = base_of(suspect, placement.load_beside)()
        found = unsleep.audit(suspect, out, base=base, trusted=prompts, config=config, loading=loading)
        if repair and found.verdict.label == "backdoor_found":
            found = unsleep.clean(suspect, found, out, base=base, trusted=prompts, config=clean)
    for note in found.notes:
        hint(note)
    say(store.read_json(out / "result.json"), json, "\n".join([*_lines(found), f"Report: {out / 'report.html'}"]))
    return EXITS[found.verdict.label]


def _lines(found: AuditRecord) -> list[str]:
    """The verdict, its triggers and the time of each stage, as text."""
    verdict = found.verdict
    lines = [f"{stage.seconds:8.1f} s  {stage.name}" for stage in found.stages]
    lines += ["", f"{verdict.label} (score {verdict.score:.2f}). {found.calibration.words}", *found.reasons]
    lines += [
        f"  {t.kind} {t.text!r}: payload on {t.reasr:.3f} [{t.low:.3f}, {t.high:.3f}] of {t.n} fresh prompts"
        for t in verdict.triggers
    ]
    if found.cleaning is not None:
        lines += [found.cleaning.words, *_table(found.cleaning)]
    return lines


def _table(cleaning: Cleaning) -> list[str]:
    """ASR on triggered and KL on clean held-out prompts of every repair."""
    rows = {(row.subject, row.panel, row.metric): row.value for row in cleaning.rows}
    lines: list[str] = []
    for subject in dict.fromkeys(["suspect", *(cure.subject for cure in cleaning.cures)]):
        shown, moved = rows.get((subject, "triggered", "asr")), rows.get((subject, "clean", "kl"))
        if shown is not None:
            told = "" if moved is None else f", KL {moved:.3f} on clean ones"
            lines.append(f"  {SUBJECT_NAMES[subject]}: payload on {shown:.3f} of triggered prompts{told}")
    return lines
