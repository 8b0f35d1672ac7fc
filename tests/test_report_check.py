"""What is not a report is refused by name, whoever wrote it; what is one is written whole."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from support.pages import SAMPLE, SCHEMA, Page, changed, clean, sample
from unsleep.base import records
from unsleep.core import BadInput
from unsleep.pages import report
from unsleep.pages.page import render
from unsleep.pages.records import Result


def check_result(value: Any) -> None:
    records.parsed(Result, value, "result")


def numbers(value: Any, where: str = "report") -> Iterator[tuple[str, Any, Any]]:
    """(place, container, key) of every number."""
    if isinstance(value, dict | list):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            place = f"{where}[{key}]" if isinstance(value, list) else f"{where}.{key}"
            if isinstance(item, int | float) and not isinstance(item, bool):
                yield place, value, key
            yield from numbers(item, place)


def test_a_good_result_passes_the_schema_and_the_check() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(SAMPLE["result"], SCHEMA)
    check_result(SAMPLE["result"])


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("schema", "unsleep.result/2", "result.schema"),
        ("verdict", "removed", "result.verdict"),
        ("verdict.label", "all is well", "result.verdict.label"),
        ("verdict.score", 1.5, "result.verdict.score"),
        ("verdict.score", True, "result.verdict.score"),
        ("verdict.extra", 1, "result.verdict"),
        ("rows", {}, "result.rows"),
        ("rows.3", None, "result.rows[3]"),
        ("rows.3.subject", "someone", "result.rows[3].subject"),
        ("rows.3.panel", "elsewhere", "result.rows[3].panel"),
        ("rows.3.metric", "luck", "result.rows[3].metric"),
        ("rows.3.value", "1", "result.rows[3].value"),
        ("rows.0.value", 1.01, "result.rows[0].value"),
        ("rows.3.n", 0, "result.rows[3].n"),
        ("rows.3.n", 10.5, "result.rows[3].n"),
        ("rows.3.low", None, "result.rows[3].low"),
        ("rows.3.note", "x", "result.rows[3]"),
        ("provenance", [], "result.provenance"),
        ("extra", 1, "result has 'extra'"),
    ],
)
def test_a_bad_result_is_refused_by_the_schema_and_by_the_check_which_names_the_place(
    path: str, value: Any, named: str
) -> None:
    bad = changed(f"result.{path}", value)["result"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, SCHEMA)
    with pytest.raises(BadInput, match=re.escape(named)):
        check_result(bad)


@pytest.mark.parametrize("key", ["schema", "verdict", "rows", "provenance"])
def test_a_result_without_one_of_its_parts_is_refused(key: str) -> None:
    bad = {k: v for k, v in SAMPLE["result"].items() if k != key}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, SCHEMA)
    with pytest.raises(BadInput, match=f"no '{key}'"):
        check_result(bad)


@pytest.mark.parametrize("end", ["low", "high"])
def test_an_interval_that_does_not_hold_its_value_is_refused(end: str) -> None:
    row = next(i for i, r in enumerate(SAMPLE["result"]["rows"]) if 0.2 < r["value"] < 0.8)
    bad = changed(f"result.rows.{row}.{end}", 1.0 if end == "low" else 0.0)["result"]
    jsonschema.validate(bad, SCHEMA)
    with pytest.raises(BadInput, match=rf"rows\[{row}\].*interval"):
        check_result(bad)


def test_a_mean_may_miss_its_bootstrap_interval_by_a_rounding_error() -> None:
    good = changed("result.rows.0.low", SAMPLE["result"]["rows"][0]["value"] + 1e-12)["result"]
    check_result(good)


def test_a_figure_measured_twice_is_refused() -> None:
    bad = sample()["result"]
    bad["rows"].append(bad["rows"][0])
    with pytest.raises(BadInput, match="second time"):
        check_result(bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_number_of_a_report_may_be_nan_or_infinite(bad: float) -> None:
    for place, _, _ in list(numbers(SAMPLE))[::7]:
        damaged = sample()
        holder, key = next((h, k) for p, h, k in numbers(damaged) if p == place)
        holder[key] = bad
        with pytest.raises(BadInput, match=re.escape(place)):
            render(damaged)


def test_whole_numbers_may_stand_for_any_number() -> None:
    found = sample()
    for _, holder, key in numbers(found):
        if holder[key] == round(holder[key]):
            holder[key] = round(holder[key])
    assert Page(render(found)).shapes == clean().shapes


def test_a_report_is_written_beside_its_record(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(SAMPLE), encoding="utf-8")
    written = report(tmp_path)
    assert written == tmp_path / "report.html"
    assert written.read_text(encoding="utf-8") == render(SAMPLE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no record to render"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "report is [1]; expected an object"),
        (b"{}", "no 'schema'"),
        (json.dumps({**SAMPLE, "schema": "unsleep.report/9"}).encode(), "report.schema"),
        (json.dumps({**SAMPLE, "title": 3}).encode(), "report.title"),
        (json.dumps(changed("result.rows.2.value", math.nan)).encode(), "report.result.rows[2].value"),
        (json.dumps(changed("features.1.contexts.0.activations", [1])).encode(), "report.features[1].contexts[0]"),
        (json.dumps(changed("replies.0.replies.suspect", None)).encode(), "report.replies[0].replies.suspect"),
        (json.dumps(changed("contract.0.met", "yes")).encode(), "report.contract[0].met"),
        (json.dumps(changed("stages.0.seconds", 10**300)).encode(), "report.stages[0].seconds"),
        (b'{"title": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "report.json"),
        (
            json.dumps(SAMPLE)[:-1].encode() + b', "provenance": ' + b'{"a":' * 200 + b"1" + b"}" * 201,
            "nested more than",
        ),
    ],
)
def test_a_damaged_report_is_refused_naming_file_and_key_and_leaves_the_old_page(
    tmp_path: Path, content: bytes | None, named: str
) -> None:
    (tmp_path / "report.html").write_text("old")
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(BadInput) as error:
        report(tmp_path)
    assert named in str(error.value)
    assert str(tmp_path if content is None else tmp_path / "report.json") in str(error.value)
    assert len(str(error.value)) < 1000
    assert (tmp_path / "report.html").read_text() == "old"


def test_a_report_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(BadInput, match=r"report\.json is not|cannot be read"):
        report(tmp_path)
