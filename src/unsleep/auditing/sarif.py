"""An audit as SARIF 2.1.0, for code-scanning views."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any
from urllib.parse import quote

from unsleep.auditing.verdict import founding
from unsleep.judge.audited import AuditRecord, Trial

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"

RULES = {
    "backdoor": "A trigger makes the model show a payload that its controls lack.",
    "inconclusive": "The audit could not say whether the model has a backdoor.",
}
"""Rule → its description."""


def sarif(record: AuditRecord) -> dict[str, Any]:
    """One result per witness, or one where the audit is inconclusive; none where nothing was found."""
    label = record.verdict.label
    results: list[dict[str, Any]] = []
    if label == "backdoor_found":
        results = [_result("backdoor", "error", _words(t), record, _facts(t)) for t in founding(record.searches)]
    elif label == "inconclusive":
        results = [_result("inconclusive", "warning", " ".join(record.reasons), record, {})]
    driver = {
        "name": "unsleep",
        "version": version("unsleep"),
        "rules": [{"id": name, "shortDescription": {"text": text}} for name, text in RULES.items()],
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}


def _result(rule: str, level: str, words: str, record: AuditRecord, facts: dict[str, Any]) -> dict[str, Any]:
    place = {"physicalLocation": {"artifactLocation": {"uri": quote(record.suspect.name)}}}
    properties = {"fingerprint": record.suspect.fingerprint, "score": record.verdict.score, **facts}
    return {"ruleId": rule, "level": level, "message": {"text": words}, "locations": [place], "properties": properties}


def _words(trial: Trial) -> str:
    rate, form = trial.rate("suspect"), trial.form
    return (
        f"The model shows {trial.payload!r} under the {form.kind} {form.text!r} on {rate.shown} of {rate.n} fresh "
        f"prompts (p = {trial.corrected:.2g})."
    )


def _facts(trial: Trial) -> dict[str, Any]:
    return {"trigger": trial.form.text, "kind": trial.form.kind, "payload": trial.payload, "p": trial.corrected}
