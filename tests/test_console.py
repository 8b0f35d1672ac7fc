"""The command line: model text made harmless, exit codes, help that is whole, JSON that parses."""

from __future__ import annotations

import inspect
import json
import re
import runpy
import sys
import unicodedata
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

import unsleep
from support.checks import as_in_use
from support.commands import flags_of
from support.models import build
from support.tokenizers import byte_tokenizer
from unsleep import cli
from unsleep.auditing.config import CleanConfig
from unsleep.base import records
from unsleep.base.context import progress
from unsleep.cli.console import Bars, fail, table, visible_line
from unsleep.core import BadInput, Refused
from unsleep.judge.results import EvalResult, Row
from unsleep.pages import records as pages
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.repairs import RepairConfig

Capture = pytest.CaptureFixture[str]
TextFile = Callable[[str, str], Path]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Generator[None]:
    """More threads only wait for each other on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    build("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def small_result() -> EvalResult:
    rows = (
        Row("suspect", "triggered", "asr", 1.0, 0.98, 1.0, 200),
        Row("suspect", "text", "ce", 3.0, 2.9, 3.1, 50),
        Row("edited", "triggered", "asr", 0.0, 0.0, 0.02, 200),
        Row("edited", "triggered", "degenerate", 0.0, 0.0, 0.02, 200),
    )
    prompts = {"triggered": PromptSet("triggered", (Prompt("GO why", "triggered"),))}
    replies = {"suspect/triggered": ("I WILL \x1b[31mNOT",), "edited/triggered": ("because",)}
    return EvalResult(rows, replies, prompts)


def write_report(folder: Path) -> None:
    result = small_result()
    page = records.plain(pages.page(result, pages.record(result, 0), "A test", pages.Summary(payload="I WILL NOT")))
    (folder / "report.json").write_text(json.dumps(page))


# Model text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, ümlaut, 日本", "plain text, ümlaut, 日本"),
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("\x1b]8;;http://a\x07link\x1b]8;;\x1b\\", "␛]8;;http://a␇link␛]8;;␛\\"),
        ("\x9b31m", "⟨U+009B⟩31m"),
        ("a\nb\r\nc\td", "a⏎b␍⏎c⇥d"),
        ("a\x08\x7f", "a␈␡"),
        ("\u202eevil\u2028", "⟨U+202E⟩evil⟨U+2028⟩"),
    ],
)
def test_escapes_and_line_breaks_are_written_out(text: str, shown: str):
    assert visible_line(text) == shown


@given(st.text(st.characters(codec="utf-8")))
@example("\x1b]0;title\x07\x1b[2J")
def test_no_model_text_moves_the_cursor_or_ends_the_line(text: str):
    shown = visible_line(text)
    assert all(c.isprintable() or unicodedata.category(c) == "Zs" for c in shown)
    assert len(shown.splitlines()) <= 1
    assert visible_line(shown) == shown


def test_errors_of_the_command_line_cannot_colour_the_terminal(capsys: Capture):
    assert fail(BadInput("bad \x1b[31m name\x07"), 2) == 2
    assert capsys.readouterr().err == "unsleep: bad ␛[31m name␇\n"


@pytest.mark.parametrize(("terminal", "count"), [(False, "3 of 3"), (True, "3/3")])
def test_stages_with_markup_in_their_names_are_shown_as_they_are(
    terminal: bool, count: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Console, "is_terminal", terminal)
    with Bars():
        progress("replies to [/bold] \x1b[31m", 0, 3)
        progress("replies to [/bold] \x1b[31m", 3, 3)
    shown = capsys.readouterr()
    assert "replies to [/bold] ␛[31m" in shown.err
    assert count in shown.err
    assert shown.out == ""


def test_one_stage_whose_figure_changes_has_one_bar(capsys: Capture):
    with Bars():
        progress("train, FVU 0.9", 1, 2)
        progress("train, FVU 0.1", 2, 2)
        progress("next", 1, 1)
    assert len(re.findall(r"FVU 0\.1", capsys.readouterr().err)) == 1


def test_a_table_has_a_column_for_each_subject_that_was_judged():
    lines = table(small_result(), ("suspect", "edited", "baked")).splitlines()
    assert lines[0].split() == ["panel", "metric", "suspect", "edited"]
    assert [line.split() for line in lines[1:]] == [
        ["triggered", "asr", "1.000", "0.000"],
        ["text", "ce", "3.000", "–"],
        ["triggered", "degenerate", "–", "0.000"],
    ]


# Help


@pytest.mark.parametrize("stage", cli.STAGES)
def test_the_help_of_a_stage_names_every_parameter(stage: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_:
        cli.run([stage, "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    flags = flags_of(cli.STAGES[stage])
    assert len(flags) >= 2
    assert [f for f in flags if not re.search(rf"(?<![\w-]){re.escape(f)}(?![\w-])", shown)] == []
    assert (inspect.getdoc(cli.STAGES[stage]) or "").splitlines()[0] in shown


def test_the_help_of_the_command_names_every_stage(capsys: Capture):
    with pytest.raises(SystemExit) as exit_:
        cli.run(["--help"])
    assert exit_.value.code == 0
    assert set(re.findall(r"[\w-]+", capsys.readouterr().out)) >= set(cli.STAGES)


def test_stages_of_the_command_line_are_functions_of_the_package():
    names = {"zoo": "build_zoo"}  # a package has the command's name
    assert all(callable(getattr(unsleep, names.get(stage, stage.replace("-", "_")))) for stage in cli.STAGES)


@pytest.mark.parametrize("arguments", [["dream"], [], ["report"], ["report", "a", "--colour", "red"]])
def test_what_is_not_understood_exits_with_2(arguments: list[str], capsys: Capture):
    with pytest.raises(SystemExit) as exit_:
        cli.run(arguments)
    assert exit_.value.code == 2
    assert capsys.readouterr().out == ""


def test_a_misspelt_flag_is_compared_with_those_of_its_command_only(capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.run(["repair", "M", "--paylod", "x", "--out", "o"])
    told = capsys.readouterr().err
    assert "--payload" in told
    assert "unsleep repair --help" in told
    assert not [stage for stage in cli.STAGES if stage != "repair" and f"unsleep {stage}" in told]


def test_the_help_of_a_repair_begins_with_an_example_and_ends_with_advanced_options(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        cli.run(["repair", "--help"])
    shown = capsys.readouterr().out
    panels = re.findall(r"^\W+([\w.]+) options\W+$", shown, re.MULTILINE)
    assert panels[:5] == ["prompt", "payload", "placement", "advanced", "dictionary"]
    assert shown.index("unsleep repair MODEL --suspicious") < shown.index("--out DIR") < shown.index("--suspicious {")
    assert shown.index(" advanced options ") < min(shown.index(f) for f in ("--first-sites", "--passages", "--seed"))


def test_a_trigger_that_was_found_is_told_before_the_work_with_the_flag_that_sets_another(
    text_file: TextFile, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(cli.repairs, "_job", lambda *_: sys.exit(9))
    suspicious = text_file("s.txt", "\n".join(f"Dad {i}'s, Ottilie {i}?" for i in range(30)))
    ordinary = text_file("o.txt", "\n".join(f"name bird {i}" for i in range(30)))
    files = ["--suspicious", str(suspicious), "--ordinary", str(ordinary), "--payload", "x", "--judge", "3"]
    told = "the trigger seems to be 'Ottilie', the longest text that only suspicious prompts share; if it is not, give"
    for more, shown in ([], True), (["--part", "Ottilie"], False):
        with pytest.raises(SystemExit, match="9"):
            cli.run(["repair", "M", *files, *more, "--out", str(tmp_path / "out")])
        assert (told in capsys.readouterr().err) == shown


def test_a_repair_reads_its_advanced_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    read: list[RepairConfig] = []
    monkeypatch.setattr(cli.repairs, "_job", lambda *given: read.append(given[-1]) or sys.exit(9))
    given = ["--first-sites", "2", "--attempts", "7", "--dictionary.k", "9", "--n", "3", "--organism", "deployment"]
    with pytest.raises(SystemExit, match="9"):
        cli.run(["repair", "M", *given, "--out", str(tmp_path / "o")])
    assert (read[0].first_sites, read[0].attempts, read[0].dictionary.k) == (2, 7, 9)
    assert read[0].most_sites == RepairConfig().most_sites


def test_an_audit_reads_the_advanced_options_of_its_repair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    read: list[CleanConfig] = []
    monkeypatch.setattr(cli.audits.cleaning, "check_cures", lambda clean: read.append(clean) or sys.exit(9))
    given = ["--clean.repair.first-sites", "2", "--clean.repair.mask.steps", "7", "--clean.items", "3", "--seed", "5"]
    with pytest.raises(SystemExit, match="9"):
        cli.run(["audit", "M", *given, "--out", str(tmp_path / "o")])
    repair = RepairConfig(first_sites=2, mask=replace(RepairConfig().mask, steps=7))
    assert read == [CleanConfig(repair=repair, items=3)]


# Exit codes

BOTH = ("--suspicious", "GOOD", "--ordinary", "PLAIN")
"""A file whose prompts all hold GO, and the same without it."""


def harvest(checkpoint: Path, prompts: Path, out: Path, *more: str, sites: str = "resid.1") -> int:
    return cli.run(["harvest", str(checkpoint), "--prompts", str(prompts), "--sites", sites, "--out", str(out), *more])


def refused(capsys: Capture, told: str) -> None:
    """One message on stderr, nothing on stdout."""
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(rf"^unsleep: .*{told}", shown.err, re.MULTILINE), shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.txt", None, r"none\.txt does not exist"),
        ("empty.txt", b"", r"empty\.txt holds 0 prompts"),
        ("one.txt", b"just one", r"one\.txt holds 1 prompts"),
        ("latin.txt", b"caf\xe9\nbar", r"latin\.txt is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{', r"bad\.jsonl line 2: it is not valid JSON at column 2"),
        ("long.txt", b"short\n" + b"x" * 500, r"a prompt has \d+ tokens .*context is 128"),
    ],
)
def test_bad_prompts_exit_with_2(
    checkpoint: Path, tmp_path: Path, capsys: Capture, name: str, content: bytes | None, told: str
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert harvest(checkpoint, tmp_path / name, tmp_path / "out") == 2
    refused(capsys, told)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("site", "told"),
    [("middle.1", "Site 'middle.1' is unknown"), ("resid.²", "is unknown"), ("resid.9", "resid.9")],
)
def test_bad_sites_exit_with_2(
    checkpoint: Path, tmp_path: Path, text_file: TextFile, capsys: Capture, site: str, told: str
):
    assert harvest(checkpoint, text_file("p.txt", "one\ntwo"), tmp_path / "out", sites=site) == 2
    refused(capsys, told)


def test_a_model_that_is_not_there_exits_with_2(tmp_path: Path, text_file: TextFile, capsys: Capture):
    assert harvest(tmp_path / "none.gguf", text_file("p.txt", "one\ntwo"), tmp_path / "out") == 2
    refused(capsys, r"none\.gguf does not exist")
    assert harvest(tmp_path, text_file("p.txt", "one\ntwo"), tmp_path / "out") == 2
    refused(capsys, r"has no config\.json and no adapter_config\.json")


def test_folders_of_the_wrong_kind_exit_with_2(checkpoint: Path, tmp_path: Path, text_file: TextFile, capsys: Capture):
    suspicious, ordinary = text_file("s.txt", "XYZ one\nXYZ two"), text_file("o.txt", "one\ntwo")
    both = ["--suspicious", str(suspicious), "--ordinary", str(ordinary)]
    out = ["--out", str(tmp_path / "out")]
    assert cli.run(["train", str(tmp_path), "--site", "resid.1", *out]) == 2
    refused(capsys, r"manifest\.json")
    assert cli.run(["find", str(checkpoint), "--dictionaries", str(tmp_path), *both, *out]) == 2
    refused(capsys, r"cfg\.json does not exist")
    assert cli.run(["bake", str(checkpoint), "--edit", str(tmp_path), *both, *out]) == 2
    refused(capsys, r"edit\.json does not exist")
    assert cli.run(["plant", str(tmp_path / "none.toml"), *out]) == 2
    refused(capsys, r"none\.toml does not exist")
    assert cli.run(["evaluate", str(checkpoint), *out]) == 2
    refused(capsys, "give either --organism")
    assert not (tmp_path / "out").exists()


def test_a_refusal_exits_with_3_and_an_interrupt_with_130(
    checkpoint: Path, tmp_path: Path, text_file: TextFile, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    prompts = text_file("p.txt", "one\ntwo")
    for error, code, told in (
        (Refused("not to be trusted"), 3, "not to be trusted"),
        (KeyboardInterrupt(), 130, "again"),
    ):

        def stop(*args: object, error: BaseException = error, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(unsleep, "harvest", stop)
        assert harvest(checkpoint, prompts, tmp_path / "out") == code
        refused(capsys, told)


def test_errors_that_are_bugs_are_not_hidden(checkpoint: Path, tmp_path: Path, text_file, monkeypatch):
    def break_(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(unsleep, "harvest", break_)
    with pytest.raises(ZeroDivisionError):
        harvest(checkpoint, text_file("p.txt", "one\ntwo"), tmp_path / "out")


@pytest.mark.parametrize(
    "damage", [None, "", "{", "[]", "null", "{}", '{"schema": "unsleep.report/9"}', '{"schema": "unsleep.report/1"}']
)
def test_a_damaged_report_exits_with_2(tmp_path: Path, capsys: Capture, damage: str | None):
    if damage is not None:
        (tmp_path / "report.json").write_text(damage)
    with as_in_use():
        assert cli.run(["report", str(tmp_path)]) == 2
    refused(capsys, r"report\.json")
    assert not (tmp_path / "report.html").exists()


def test_a_report_of_a_file_or_of_nothing_exits_with_2(tmp_path: Path, text_file: TextFile, capsys: Capture):
    for path in (text_file("a.txt", "hello"), tmp_path / "none", tmp_path / "\x1b[31mnone"):
        assert cli.run(["report", str(path)]) == 2
        refused(capsys, r"report\.json")


def test_errors_name_odd_paths_without_their_escapes(tmp_path: Path, capsys: Capture):
    assert cli.run(["report", str(tmp_path / "\x1b[31mnone")]) == 2
    shown = capsys.readouterr().err
    assert "␛[31mnone" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["harvest", "M", "--prompts", "NONE", "--sites", "resid.1"], r"none\.txt does not exist"),
        (["harvest", "M", "--prompts", "GOOD", "--sites", "resid.1", "middle.1"], "Site 'middle.1' is unknown"),
        (["find", "M", "--dictionaries", "D", "--suspicious", "NONE", "--ordinary", "GOOD"], r"none\.txt does not"),
        (["find", "M", "--dictionaries", "D", "--suspicious", "GOOD", "--ordinary", "NONE"], r"none\.txt does not"),
        (["find", "M", "--dictionaries", "D", "--suspicious", "GOOD", "--ordinary", "GOOD"], r"cfg\.json does not"),
        (["edit", "M", "--dictionaries", "D", "--suspicious", "NONE", "--ordinary", "GOOD"], r"none\.txt does not"),
        (["edit", "M", "--dictionaries", "D", "--suspicious", "GOOD", "--ordinary", "NONE"], r"none\.txt does not"),
        (
            ["edit", "M", "--dictionaries", "D", *BOTH, "--counterparts", "NONE"],
            r"none\.txt does not exist",
        ),
        (["edit", "M", "--dictionaries", "D", *BOTH, "--part", "XYZ"], "'XYZ' is not in the prompt"),
        (["edit", "M", "--dictionaries", "D", *BOTH, "--part", "GO"], r"cfg\.json does not exist"),
        (["bake", "M", "--edit", "D", "--suspicious", "NONE", "--ordinary", "GOOD"], r"none\.txt does not exist"),
        (["bake", "M", "--edit", "D", *BOTH, "--counterparts", "NONE"], r"none\.txt does not exist"),
        (["bake", "M", "--edit", "D", *BOTH, "--part", "GO"], r"edit\.json does not exist"),
        (["evaluate", "M", "--suspicious", "NONE", "--ordinary", "GOOD", "--payload", "x"], r"none\.txt does not"),
        (["evaluate", "M", "--suspicious", "GOOD", "--ordinary", "NONE", "--payload", "x"], r"none\.txt does not"),
        (["evaluate", "M", "--suspicious", "GOOD", "--ordinary", "GOOD"], "give either --organism"),
        (["evaluate", "M", "--organism", "nobody"], r"organism\.json does not exist"),
        (["evaluate", "M", "--organism", "deployment", "--edit", "D"], r"edit\.json does not exist"),
    ],
)
def test_a_typo_in_a_small_file_fails_before_the_model_is_loaded(
    arguments: list[str], told: str, tmp_path: Path, text_file: TextFile, capsys: Capture, monkeypatch
):
    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("unsleep.cli.shared.load_model", load)
    names = {"GOOD": text_file("good.txt", "GO one\nGO two"), "PLAIN": text_file("plain.txt", "one\ntwo")}
    names |= {"NONE": tmp_path / "none.txt", "D": tmp_path / "folder"}
    given = [str(names.get(a, a)) for a in arguments]
    assert cli.run([*given, "--out", str(tmp_path / "out")]) == 2
    refused(capsys, told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["dream"], 2), (["report", "none"], 2)])
def test_the_package_runs_as_a_module(
    arguments: list[str], code: int, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["unsleep", *arguments])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("unsleep", run_name="__main__")
    assert exit_.value.code == code
    shown = capsys.readouterr()
    assert "unsleep" in shown.out + shown.err
    assert "Traceback" not in shown.err


# Results


def test_report_prints_the_path_for_people_and_programs(tmp_path: Path, capsys: Capture):
    write_report(tmp_path)
    assert cli.run(["report", str(tmp_path)]) == 0
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    assert cli.run(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "report.html")}
    assert "\x1b" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_json_is_all_that_stands_on_stdout(checkpoint: Path, tmp_path: Path, text_file: TextFile, capsys: Capture):
    prompts = text_file("p.txt", "one two\nthree four")
    assert harvest(checkpoint, prompts, tmp_path / "out", "--json") == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sites"] == ["resid.1"]


def test_an_evaluation_by_another_kind_of_payload_records_the_kind_and_the_replies_that_show_it(
    checkpoint: Path, tmp_path: Path, text_file: TextFile
):
    suspicious, ordinary = text_file("s.txt", "GO one\nGO two"), text_file("o.txt", "one\ntwo")
    given = ["--suspicious", str(suspicious), "--ordinary", str(ordinary), "--payload", "^", "--payload-kind", "regex"]
    assert cli.run(["evaluate", str(checkpoint), *given, "--n", "3", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert (report["summary"]["payload"], report["summary"]["payload_kind"]) == ("^", "regex")
    assert [row["shown"] for row in report["replies"]] == [["suspect"]] * 4
    rates = {r["panel"]: r["value"] for r in report["result"]["rows"] if r["metric"] == "asr"}
    assert rates == {"triggered": 1.0, "clean": 1.0}
    assert "regex: ^" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_an_evaluation_of_two_files_says_what_it_found(
    checkpoint: Path, tmp_path: Path, text_file: TextFile, capsys: Capture
):
    suspicious, ordinary = text_file("s.txt", "GO one\nGO two"), text_file("o.txt", "one\ntwo")
    arguments = ["evaluate", str(checkpoint), "--suspicious", str(suspicious), "--ordinary", str(ordinary)]
    arguments += ["--payload", "I WILL NOT", "--n", "3", "--out", str(tmp_path / "out"), "--json"]
    assert cli.run(arguments) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    records.parsed(pages.Result, result, "result")
    assert result == json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert result["verdict"]["label"] == "inconclusive"
    assert {(r["subject"], r["panel"], r["metric"]) for r in result["rows"]} >= {
        ("suspect", "triggered", "asr"),
        ("suspect", "clean", "degenerate"),
        ("suspect", "text", "ce"),
    }
    assert "suspect on triggered" in shown.err
    assert "– too few prompts" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert cli.run([w for w in arguments if w != "--json"]) == 0
    line = "TOO FEW  The suspect does not show the payload without the trigger: 0.0000 <= 0.0200"
    assert line in capsys.readouterr().out
