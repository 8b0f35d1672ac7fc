"""The index of a folder of runs links to every page below it, and trusts none of them."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import unquote

import pytest

from support.pages import SAMPLE, Page
from unsleep.core import BadInput
from unsleep.pages import report
from unsleep.pages.registry import pages

HOSTILE = "<script>alert(1)</script>"


def run_in(folder: Path, **change: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({**SAMPLE, **change}), encoding="utf-8")
    return report(folder)


def test_it_links_to_every_page_with_title_kind_date_and_verdict(tmp_path: Path):
    run_in(tmp_path / "runs" / "one", title="First run")
    run_in(tmp_path / "runs" / "a b#c" / "two", title=HOSTILE)
    run_in(tmp_path / "runs" / ".two.scratch", title="not finished")
    run_in(tmp_path / "runs" / "bare").unlink()
    page = report(tmp_path / "runs")
    assert page == tmp_path / "runs" / "index.html"
    html = page.read_text(encoding="utf-8")
    parsed = Page(html)
    links = [dict(a)["href"] for tag, a in parsed.elements if tag == "a" and not str(dict(a)["href"]).startswith("#")]
    assert sorted(unquote(str(link)) for link in links) == ["a b#c/two/report.html", "one/report.html"]
    assert all((tmp_path / "runs" / unquote(str(link))).is_file() for link in links)
    assert "First run" in html
    assert "Report" in html
    assert SAMPLE["result"]["verdict"]["label"] in html
    assert SAMPLE["provenance"]["created"][:10] in html
    assert HOSTILE not in html
    assert "not finished" not in html


def test_a_run_whose_record_is_damaged_still_has_its_link(tmp_path: Path):
    run_in(tmp_path / "one")
    (tmp_path / "one" / "report.json").write_text("{")
    assert 'href="one/report.html"' in report(tmp_path).read_text(encoding="utf-8")


def test_a_folder_with_a_record_of_its_own_has_its_page_and_one_without_runs_none(tmp_path: Path):
    run_in(tmp_path / "runs")
    run_in(tmp_path / "runs" / "inner")
    assert report(tmp_path / "runs").name == "report.html"
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"contains no record to render; expected one of report\.json"):
        report(tmp_path / "empty")


def test_every_page_is_found_once_the_report_first_and_the_index_last():
    names = [page.name for page in pages()]
    assert names[0] == "report"
    assert names[-1] == "index"
    assert {*names[1:-1]} >= {"dictionaries", "diff", "directions", "patch", "reading", "subspaces"}
