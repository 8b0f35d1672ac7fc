"""Writes an audit's artefacts atomically: record, page, result, SARIF, and the prompts of every trial."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from unsleep.auditing.case import Case
from unsleep.auditing.config import AuditConfig
from unsleep.auditing.forms import transformed
from unsleep.auditing.gatherer import Gatherer
from unsleep.auditing.rounding import ROUNDED
from unsleep.auditing.sarif import sarif
from unsleep.base import records, store
from unsleep.judge.audited import AuditRecord, Trial
from unsleep.pages import report
from unsleep.pages.records import Result
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt
from unsleep.repairs.twin import TwinConfig

MARK = "audit.json"
"""File that marks an audit's folder."""

TRIALS = "trials"
"""Folder with a folder of prompts per trial."""

REPAIR, CLEANED, GUARD, CLEANING = "repair", "cleaned", "guard", "cleaning"
"""Folders of the repair of what was found, of the checkpoint and of the guard; the name of the cleaning's steps."""


RESCANNED = {"learn", "confirm", "reply_tokens", "least", "alpha", *TwinConfig.__dataclass_fields__}
"""Options that a scan of the rounded model depends on."""


def write(case: Case, record: AuditRecord, out: Path) -> None:
    """Write all artefacts into `out`, atomically."""
    suspect, *twins = record.searches
    trials = [
        replace(t, command=(rescan if t.form.way == ROUNDED else command)(case, t, out / TRIALS / str(i)))
        for i, t in enumerate(suspect.trials, 1)
    ]
    record = replace(record, searches=(replace(suspect, trials=tuple(trials)), *twins))
    with store.new_folder(out, replace=MARK) as scratch:
        for i, trial in enumerate(trials, 1):
            for name, prompts in prompts_of(case, trial).items():
                store.write_text(scratch / TRIALS / str(i) / f"{name}.jsonl", lines(prompts))
        rewrite(record, scratch)


def rewrite(record: AuditRecord, folder: Path) -> AuditRecord:
    """Write the record, page, result and SARIF of an audit; returns the record."""
    report(folder, record)
    store.write_json(folder / "result.sarif", sarif(record))
    rows = record.cleaning.rows if record.cleaning is not None else ()
    records.save(Result(record.verdict, rows, record.provenance), folder / "result.json")
    return record


def prompts_of(case: Case, trial: Trial) -> dict[str, Sequence[Prompt]]:
    """The fresh prompts of a trial with its trigger, with its placebos and without either, line by line.

    Of a rounded model, whose prompts stay as they are: the trusted prompts of the search and of trials.
    """
    if trial.form.way == ROUNDED:
        return {"trusted": [*case.search, *case.confirm]}
    triggered = {transformed(trial.form, p).key: p for p in reversed(case.confirm.prompts)}
    plain, others = [p for p in case.confirm if p in triggered.values()], trial.placebos
    found: dict[str, Sequence[Prompt]] = {"plain": plain, "triggered": [transformed(trial.form, p) for p in plain]}
    if others:
        found["placebo"] = [transformed(others[i % len(others)], p) for i, p in enumerate(plain)]
    return found


def lines(prompts: Sequence[Prompt]) -> str:
    """Prompts as JSON lines."""
    return "".join(f"{sets.prompt_line(prompt)}\n" for prompt in prompts)


def command(case: Case, trial: Trial, folder: Path) -> str:
    """Command that evaluates the suspect on a trial's prompts again."""
    words = ["unsleep", "evaluate", case.model.name, "--suspicious", folder / "triggered.jsonl"]
    words += ["--ordinary", folder / "plain.jsonl", "--payload", trial.payload, "--n", "8"]
    return shlex.join(map(str, [*words, "--out", folder / "evaluation"]))


def rescan(case: Case, trial: Trial, folder: Path) -> str:
    """Command that repeats the scan of the rounded model alone, on the same prompts."""
    config, usual = case.config, AuditConfig()
    words: list[object] = ["unsleep", "audit", case.model.name, "--trusted", folder / "trusted.jsonl"]
    if case.base is not None and len(case.model.made_of) < 2:
        words += ["--base", case.base.name]
    for prefix, own, default in (("", config, usual), ("twin.", config.twin, usual.twin)):
        for name, value in vars(own).items():
            if name in RESCANNED and value != getattr(default, name):
                words += [f"--{prefix}{name.replace('_', '-')}", value]
    words += ["--no-null", "--no-repair", "--out", folder / "audit", "--skip", *Gatherer.kinds()]
    return shlex.join(map(str, words))
