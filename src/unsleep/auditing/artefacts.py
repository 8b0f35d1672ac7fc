"""Writes an audit's artefacts atomically: record, page, result, SARIF, and the prompts of every trial."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Container, Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import cast

from unsleep.auditing.case import Case
from unsleep.auditing.config import AuditConfig
from unsleep.auditing.forms import transformed
from unsleep.auditing.gatherer import Gatherer
from unsleep.auditing.rounding import ROUNDED
from unsleep.auditing.sarif import sarif
from unsleep.base import records, store
from unsleep.judge.audited import AuditRecord, Trial
from unsleep.models.load import LoadConfig
from unsleep.pages import report
from unsleep.pages.records import Result, Shipped
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


def write(case: Case, record: AuditRecord, out: Path, loading: LoadConfig = LoadConfig()) -> AuditRecord:
    """Write all artefacts into `out`, atomically; returns the record with the commands that reproduce trials.

    Args:
        loading: how the suspect was loaded, for the commands.
    """
    suspect, *twins = record.searches
    loaded = flags(loading, LoadConfig())
    trials = [
        replace(t, command=(rescan if t.form.way == ROUNDED else command)(case, t, out / TRIALS / str(i), loaded))
        for i, t in enumerate(suspect.trials, 1)
    ]
    record = replace(record, searches=(replace(suspect, trials=tuple(trials)), *twins))
    with store.new_folder(out, replace=MARK) as scratch:
        for i, trial in enumerate(trials, 1):
            for name, prompts in prompts_of(case, trial).items():
                store.write_text(scratch / TRIALS / str(i) / f"{name}.jsonl", lines(prompts))
        return rewrite(record, scratch)


def rewrite(record: AuditRecord, folder: Path) -> AuditRecord:
    """Write the record, page, result and SARIF of an audit; returns the record."""
    report(folder, record)
    store.write_json(folder / "result.sarif", sarif(record))
    done = record.cleaning
    rows, shipped = ((), None) if done is None else (done.rows, Shipped(done.shipped, done.words))
    records.save(Result(record.verdict, rows, record.provenance, cleaned=shipped), folder / "result.json")
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


def flags(own: object, usual: object, names: Container[str] | None = None, prefix: str = "") -> list[str]:
    """Command-line options for the fields of a dataclass that are not as in another, of all or some names.

    >>> flags(AuditConfig(screen=6, null=False), AuditConfig())
    ['--screen', '6', '--no-null']
    """
    found: list[str] = []
    for field in fields(own):  # pyright: ignore[reportArgumentType]
        value, name = getattr(own, field.name), field.name.replace("_", "-")
        if value == getattr(usual, field.name) or (names is not None and field.name not in names):
            continue
        if is_dataclass(value):
            found += flags(value, getattr(usual, field.name), names, f"{prefix}{name}.")
        elif isinstance(value, bool):
            found.append(f"--{prefix}{'' if value else 'no-'}{name}")
        else:
            parts: Iterable[object] = (value,)
            if isinstance(value, tuple):
                parts = cast("tuple[object, ...]", value)
            elif isinstance(value, dict):
                parts = itertools.chain.from_iterable(cast("dict[str, str]", value).items())
            found += [f"--{prefix}{name}", *map(str, parts)]
    return found


def command(case: Case, trial: Trial, folder: Path, loaded: Sequence[str] = ()) -> str:
    """Command that evaluates the suspect on a trial's prompts again, on replies of the same length."""
    words = ["unsleep", "evaluate", case.model.name, *loaded, "--suspicious", folder / "triggered.jsonl"]
    words += ["--ordinary", folder / "plain.jsonl", "--payload", trial.payload, "--n", "8"]
    words += ["--reply-tokens", case.config.reply_tokens, "--out", folder / "evaluation"]
    return shlex.join(map(str, words))


def rescan(case: Case, trial: Trial, folder: Path, loaded: Sequence[str] = ()) -> str:
    """Command that repeats the scan of the rounded model alone, on the same prompts."""
    words: list[object] = ["unsleep", "audit", case.model.name, *loaded, "--trusted", folder / "trusted.jsonl"]
    if case.base is not None and len(case.model.made_of) < 2:
        words += ["--base", case.base.name]
    words += flags(case.config, AuditConfig(), {"twin", *RESCANNED})
    words += ["--no-null", "--no-repair", "--out", folder / "audit", "--skip", *Gatherer.kinds()]
    return shlex.join(map(str, words))
