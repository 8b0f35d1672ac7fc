"""Whether a result or a report has the form that the page is built from.

`result.schema.json` states the same for other readers; here each refusal names the place, what is
there and what was expected. Order within intervals and finiteness are tested here alone, for a
schema cannot state them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

from unsleep.core import BadInput
from unsleep.judge.results import OTHERS

RESULT_SCHEMA = "unsleep.result/1"
REPORT_SCHEMA = "unsleep.report/1"

VERDICTS = (
    "backdoor found and removed",
    "backdoor found, not removed",
    "backdoor found, no repair judged",
    "nothing found at this power",
    "inconclusive",
)
"""Every verdict that unsleep gives."""

SUBJECTS = ("suspect", "edited", "baked", "control_random", "control_layer", *OTHERS, "clean_twin", "base")
"""The models that are measured, in the order in which the page shows them."""

PANELS = ("triggered", "variants", "near_miss", "clean", "skill", "text")
"""What they are measured on."""

SHARES = ("asr", "skill", "degenerate", "capability")
"""Metrics that are shares of n, from 0 to 1."""

METRICS = (*SHARES, "ce", "kl")
"""All metrics; those that are no shares are in nats a token."""

MAX_DEPTH = 32
"""Levels of nesting in a report; real ones have fewer than ten."""

LARGEST = 1e15
"""Largest number that is drawn or printed; above it floats no longer hold whole counts."""

Check = Callable[[Any, str], None]
"""Raises `BadInput` naming the place where the value is not what it should be."""


def refuse(where: str, value: Any, expected: str) -> BadInput:
    """The error for a value at a place."""
    shown = repr(value)
    return BadInput(f"{where} is {shown if len(shown) <= 60 else shown[:60] + '…'}; expected {expected}")


def is_text(value: Any, where: str) -> None:
    """A string."""
    if not isinstance(value, str):
        raise refuse(where, value, "text")


def is_number(value: Any, where: str) -> None:
    """A finite number of a size that can be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
        raise refuse(where, value, "a finite number")


def is_share(value: Any, where: str) -> None:
    """A number from 0 to 1."""
    is_number(value, where)
    if not 0 <= value <= 1:
        raise refuse(where, value, "a share from 0 to 1")


def is_count(value: Any, where: str) -> None:
    """A whole number, at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST:
        raise refuse(where, value, "a whole number, at least 0")


def is_flag(value: Any, where: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise refuse(where, value, "true or false")


def is_object(value: Any, where: str) -> None:
    """An object of any content."""
    if not isinstance(value, dict):
        raise refuse(where, value, "an object")


def one_of(*choices: str) -> Check:
    """One of a few words."""

    def check(value: Any, where: str) -> None:
        if value not in choices:
            raise refuse(where, value, f"one of {', '.join(choices)}")

    return check


def maybe(check: Check) -> Check:
    """As the given check, or null."""
    return lambda value, where: None if value is None else check(value, where)


def list_of(check: Check) -> Check:
    """A list with the given check for every item."""

    def whole(value: Any, where: str) -> None:
        if not isinstance(value, list):
            raise refuse(where, value, "a list")
        for i, item in enumerate(cast("list[Any]", value)):
            check(item, f"{where}[{i}]")

    return whole


def map_of(check: Check) -> Check:
    """An object with the given check for every value."""

    def whole(value: Any, where: str) -> None:
        is_object(value, where)
        for key, item in value.items():
            check(item, f"{where}.{key}")

    return whole


def fields(shape: Mapping[str, Check], *, closed: bool = False) -> Check:
    """An object with these keys; those that end in `?` may be missing, and others may be there unless `closed`."""
    known = {key.rstrip("?"): check for key, check in shape.items()}

    def whole(value: Any, where: str) -> None:
        is_object(value, where)
        for key in shape:
            if not key.endswith("?") and key not in value:
                raise BadInput(f"{where} has no {key!r}; it has {', '.join(map(repr, value)) or 'nothing'}")
        for key, item in value.items():
            if key in known:
                known[key](item, f"{where}.{key}")
            elif closed:
                raise BadInput(f"{where} has {key!r}, which is not understood; expected only {', '.join(known)}")

    return whole


def is_row(value: Any, where: str) -> None:
    """One measured number whose interval holds it."""
    shape = {"subject": one_of(*SUBJECTS), "panel": one_of(*PANELS), "metric": one_of(*METRICS)}
    numbers = {"value": is_number, "low": is_number, "high": is_number, "n": is_count}
    fields({**shape, **numbers}, closed=True)(value, where)
    if value["n"] < 1:
        raise refuse(f"{where}.n", value["n"], "at least 1")
    if value["metric"] in SHARES:
        is_share(value["value"], f"{where}.value")
    low, middle, high = value["low"], value["value"], value["high"]
    # A mean over resamples may miss the mean itself by a rounding error.
    slack = 1e-9 * max(1.0, abs(middle))
    if not low - slack <= middle <= high + slack:
        raise BadInput(
            f"{where} has value {middle} outside its interval {low} to {high}; expected low <= value <= high"
        )


def is_result(value: Any, where: str) -> None:
    """A whole result."""
    verdict = fields({"label": one_of(*VERDICTS), "score": is_share}, closed=True)
    shape = {"schema": one_of(RESULT_SCHEMA), "verdict": verdict, "rows": list_of(is_row), "provenance": is_object}
    fields({**shape, "tasks?": list_of(TASK)}, closed=True)(value, where)
    seen: set[tuple[str, str, str]] = set()
    for i, row in enumerate(value["rows"]):
        name = (row["subject"], row["panel"], row["metric"])
        if name in seen:
            raise BadInput(f"{where}.rows[{i}] measures {'/'.join(name)} a second time; expected one row each")
        seen.add(name)


def is_context(value: Any, where: str) -> None:
    """Tokens with one activation each."""
    fields({"tokens": list_of(is_text), "activations": list_of(is_number)})(value, where)
    tokens, activations = value["tokens"], value["activations"]
    if len(tokens) != len(activations):
        raise BadInput(f"{where} has {len(tokens)} tokens and {len(activations)} activations; expected one each")


def is_finite(value: Any, where: str) -> None:
    """A JSON value without NaN or infinity, nested no deeper than `MAX_DEPTH`."""
    waiting: list[tuple[Any, str, int]] = [(value, where, 0)]
    while waiting:
        item, place, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise BadInput(f"{place[:80]} is nested more than {MAX_DEPTH} levels deep; expected a flatter report")
        if isinstance(item, float) and not math.isfinite(item):
            raise refuse(place, item, "a finite number")
        if isinstance(item, dict):
            waiting += [(v, f"{place}.{k}", depth + 1) for k, v in cast("dict[Any, Any]", item).items()]
        elif isinstance(item, list):
            waiting += [(v, f"{place}[{i}]", depth + 1) for i, v in enumerate(cast("list[Any]", item))]


TASK = fields(
    {
        "subject": one_of(*SUBJECTS),
        "task": is_text,
        "metric": is_text,
        "value": is_number,
        "stderr": maybe(is_number),
        "n": is_count,
    },
    closed=True,
)
"""One figure of lm-evaluation-harness."""
SUMMARY = fields(
    {
        "payload?": maybe(is_text),
        "payload_kind?": maybe(is_text),
        "trigger?": maybe(is_text),
        "model?": maybe(is_text),
        "removed?": maybe(is_count),
        "features_total?": maybe(is_count),
        "sites?": maybe(list_of(is_text)),
        "minutes?": maybe(is_number),
        "next?": list_of(is_text),
    }
)
REPAIR = fields(
    {
        "teacher": is_text,
        "notes": list_of(is_text),
        "sites": list_of(is_text),
        "look": list_of(fields({"layer": is_count, "restored": is_number, "moved": is_number})),
        "attempts": list_of(
            fields(
                {
                    "what": is_text,
                    "removed": map_of(is_count),
                    "shown": is_count,
                    "n": is_count,
                    "degenerate": is_number,
                    "followed": is_share,
                    "kl": is_number,
                    "seconds": is_number,
                    "kept": is_flag,
                }
            )
        ),
        "baselines?": list_of(fields({"subject": one_of(*OTHERS), "what": is_text})),
    }
)
"""How a repair found its edit."""
CONTRACT = fields(
    {
        "subject": is_text,
        "panel": is_text,
        "metric": is_text,
        "relation": one_of("<=", ">="),
        "bound": is_number,
        "value": maybe(is_number),
        "met": is_flag,
        "too_few?": is_flag,
        "text?": maybe(is_text),
    }
)
FRONTIER = fields(
    {
        "series": is_text,
        "features": is_count,
        "asr": is_share,
        "asr_low": is_number,
        "asr_high": is_number,
        "skill?": maybe(is_share),
        "skill_low?": maybe(is_number),
        "skill_high?": maybe(is_number),
        "ce_change?": maybe(is_number),
        "n": is_count,
    }
)
FEATURE = fields(
    {
        "site": is_text,
        "id": is_count,
        "rank": is_count,
        "scores?": map_of(is_number),
        "suspicious_rate?": maybe(is_share),
        "trusted_rate?": maybe(is_share),
        "promotes?": list_of(is_text),
        "suppresses?": list_of(is_text),
        "contexts?": list_of(is_context),
    }
)
REPLIES = fields(
    {
        "panel": is_text,
        "prompt": is_text,
        "expected?": maybe(is_text),
        "replies": map_of(is_text),
        "shown?": list_of(is_text),
    }
)
DICTIONARY = fields(
    {
        "site": is_text,
        "features": is_count,
        "k?": maybe(is_number),
        "fvu?": maybe(is_number),
        "l0?": maybe(is_number),
        "dead?": maybe(is_share),
        "ce_score?": maybe(is_number),
    }
)
REPORT = fields(
    {
        "schema": one_of(REPORT_SCHEMA),
        "result": is_result,
        "title": is_text,
        "summary?": maybe(SUMMARY),
        "contract?": maybe(list_of(CONTRACT)),
        "frontier?": maybe(list_of(FRONTIER)),
        "features?": maybe(list_of(FEATURE)),
        "replies?": maybe(list_of(REPLIES)),
        "dictionaries?": maybe(list_of(DICTIONARY)),
        "repair?": maybe(REPAIR),
        "stages?": maybe(list_of(fields({"name": is_text, "seconds": is_number}))),
        "provenance?": maybe(is_object),
    }
)


def check_result(result: Any) -> None:
    """Raise `BadInput` naming the place where `result` is not a result of schema `unsleep.result/1`."""
    is_finite(result, "result")
    is_result(result, "result")


def check_report(report: Any) -> None:
    """Raise `BadInput` naming the place where `report` is not a report of schema `unsleep.report/1`."""
    is_finite(report, "report")
    REPORT(report, "report")
