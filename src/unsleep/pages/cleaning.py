"""Section of a cleaning in the page of an audit: every repair before and after, on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unsleep.pages import text
from unsleep.pages.blocks import Block, Table
from unsleep.pages.names import SUBJECT_NAMES, named
from unsleep.pages.page import LABEL_LIMIT

Rows = Mapping[tuple[str, str, str], Mapping[str, Any]]

COLUMNS = (
    ("Payload, triggered", "triggered", "asr"),
    ("Skill, triggered", "triggered", "skill"),
    ("Degenerate, triggered", "triggered", "degenerate"),
    ("KL to the reply without the trigger", "triggered", "kl"),
    ("Payload, clean", "clean", "asr"),
    ("KL, clean", "clean", "kl"),
    ("CE on text, against the suspect", "text", "ce"),
)
"""Head, panel and metric of each column."""

STRESS = {
    "int8": "Payload, triggered, weights rounded to int8",
    "int4": "Payload, triggered, weights rounded to int4",
    "relearned": "Payload, triggered, after fine-tuning on {} triggered examples",
    "perturbed": "Payload, ordinary, residual perturbation of {} of the stream's norm",
    "probe": "AUROC of a probe, triggered against ordinary",
}
"""Kind of stress test → its row's name."""

SURROGATE = (
    "The unlearned payload is broken in surrogate contexts, in which it is forced behind ordinary prompts: that stops "
    "this text, and need not give back the reply that it stood in the place of."
)


def cleaning_block(cleaning: Mapping[str, Any] | None) -> Block:
    """The table of repairs; empty without a cleaning."""
    if cleaning is None:
        return Block("cleaning", "Before and after", "")
    rows: Rows = {(r["subject"], r["panel"], r["metric"]): r for r in cleaning["rows"]}
    by_subject = {cure["subject"]: cure for cure in cleaning["cures"]}
    judged = [s for s in dict.fromkeys(r["subject"] for r in cleaning["rows"]) if s not in by_subject]
    shown = [c for c in COLUMNS if any(key[1:] == c[1:] for key in rows)]
    body = [_line(subject, by_subject.get(subject), rows, shown, cleaning["shipped"]) for subject in judged]
    body += [_line(subject, cure, rows, shown, cleaning["shipped"]) for subject, cure in by_subject.items()]
    n = ", ".join(f"{count:,} {name}" for name, count in cleaning["prompts"].items())
    triggers = ", ".join(repr(text.clip(form["text"], LABEL_LIMIT)) for form in cleaning["triggers"])
    lead = (
        f"{cleaning['words']} The suspicious prompts are trusted ones under the found triggers ({triggers}); no repair "
        f"is told the true trigger. Held-out prompts: {n}. The base and the suspect stand for no repair. {SURROGATE}"
    )
    head = ["Repair", "How", *(name for name, *_ in shown)]
    tables = [Table("Repairs", head, 2, body)] if body else []
    if (guard := cleaning.get("guard")) is not None:
        lines = [[side, *_flagged(guard[key])] for key, side in (("triggered", "Triggered"), ("clean", "Clean"))]
        told = f"Guard: {' and '.join(guard['monitors'])}, stated false-positive rate {text.percent(guard['rate'])}"
        tables.append(Table(told, ["Held-out prompts", "Flagged", "95 %"], 1, lines))
    elif cleaning.get("unguarded"):
        lead = f"{lead} There is no guard: {cleaning['unguarded']}"
    if cleaning.get("stress"):
        tables.append(_stress_table(cleaning["stress"]))
    return Block("cleaning", "Before and after", lead, tables=tables)


def _stress_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """Each test of the cleaned model beside the same of the control."""
    roles = list(dict.fromkeys(each["role"] for each in found))
    at = {(each["test"], each["role"]): each for each in found}
    rows = [
        [
            _test_name(test),
            *(_share(at.get((test, r))) for r in roles),
        ]
        for test in dict.fromkeys(each["test"] for each in found)
    ]
    return Table("Stress tests", ["Test", *roles], 1, rows)


def _test_name(test: str) -> str:
    kind, _, size = test.partition(" ")
    return STRESS[kind].format(size) if kind in STRESS else test


def _share(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    return f"{text.decimals(found['value'], 2)} [{text.interval(found['low'], found['high'])}], n {found['n']:,}"


def _flagged(found: Mapping[str, Any]) -> list[str]:
    return [f"{found['flagged']:,} of {found['n']:,}", text.interval(found["low"], found["high"])]


def _line(
    subject: str, cure: Mapping[str, Any] | None, rows: Rows, shown: Sequence[tuple[str, str, str]], shipped: str
) -> list[str]:
    """A repair's row: its figures with intervals, or the reason why there are none."""
    name = named(SUBJECT_NAMES, subject) + (", shipped as cleaned/" if subject == shipped else "")
    if cure is None:
        words = ""
    elif cure["state"] == "ran":
        words = cure["words"]
    else:
        words = f"{cure['state']}: {cure['words']}"
    return [name, words, *(_figure(rows, (subject, *key)) for _, *key in shown)]


def _figure(rows: Rows, key: tuple[str, ...]) -> str:
    row = rows.get(key)  # type: ignore[arg-type]
    if row is None:
        return "–"
    if row["metric"] == "ce":
        before = rows.get(("suspect", "text", "ce"))
        return text.signed(row["value"] - before["value"]) if before is not None else text.decimals(row["value"])
    if row["metric"] == "kl":
        return f"{text.decimals(row['value'])} [{text.decimals(row['low'])}, {text.decimals(row['high'])}]"
    return f"{text.percent(row['value'])} [{text.interval(row['low'], row['high'])}]"
