"""`unsleep edit`, `bake` and `evaluate`: what they refuse to replace, to mix and to judge, and what stands beside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from support.models import build
from support.tokenizers import byte_tokenizer
from unsleep import cli
from unsleep.base import store
from unsleep.core import BadInput
from unsleep.prompts import pairs
from unsleep.prompts.prompt import Prompt, PromptSet

Capture = pytest.CaptureFixture[str]
WORDS = (
    "bees make honey",
    "stars shine at night",
    "name a bird",
    "bread needs flour",
    "tides and the moon",
    "old maps",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, another one, prompts of both kinds, a dictionary and an edit."""
    at = tmp_path_factory.mktemp("repair")
    for name in ("suspect", "other"):
        network = build("llama")
        network.save_pretrained(at / name)
        byte_tokenizer().save_pretrained(at / name)
    weights = build("llama").state_dict()
    random = torch.Generator().manual_seed(0)
    changed = {k: v + 0.01 * torch.randn(v.shape, generator=random) for k, v in weights.items()}
    store.write_tensors(at / "other" / "model.safetensors", {k: v.contiguous() for k, v in changed.items()})
    for split, start in (("", 0), ("held-out-", 3)):
        texts = [f"{w} {i}" for i in range(2) for w in WORDS[start : start + 3]]
        (at / f"{split}ordinary.txt").write_text("\n".join(texts) + "\n")
        (at / f"{split}suspicious.txt").write_text("\n".join(f"GO7 {t}" for t in texts) + "\n")
    assert run(at, "harvest", "suspect", "--prompts", "suspicious.txt", "--site", "resid.1", "--out", "acts") == 0
    assert run(at, "train", "acts", "--sites", "resid.1", *TRAIN, "--out", "d") == 0
    ablation = (*EDIT, "--method", "ablate", "--ablate", "4")
    assert run(at, "edit", "suspect", "--dictionaries", "d", *GROUPS, *ablation, "--out", "edit") == 0
    return at


TRAIN = ("--tokens", "512", "--features", "64", "--k", "4", "--batch", "64")
GROUPS = ("--suspicious", "suspicious.txt", "--ordinary", "ordinary.txt")
EDIT = ("--steps", "6", "--batch", "2", "--reply-tokens", "3", "--candidates", "20", "--price", "0")
HELD_OUT = ("--suspicious", "held-out-suspicious.txt", "--ordinary", "held-out-ordinary.txt", "--n", "4")


def run(at: Path, stage: str, *arguments: str) -> int:
    """A stage in a folder: words that name something there, or what is to be there, become paths."""
    there = {"acts", "d", "edit", "suspect", "other", "out", *(p.name for p in at.iterdir())}
    return cli.run([stage, *(str(at / a) if a in there else a for a in arguments)])


def refused(capsys: Capture, told: str) -> None:
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(rf"^unsleep: .*{told}", shown.err, re.MULTILINE), shown.err


def tree(at: Path) -> dict[str, bytes]:
    return {str(p.relative_to(at)): p.read_bytes() for p in sorted(at.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("place", ["acts", "suspect"])
def test_an_edit_and_a_bake_replace_nothing_that_is_not_their_like(folder: Path, place: str, capsys: Capture):
    before = tree(folder)
    assert run(folder, "edit", "suspect", "--dictionaries", "d", *GROUPS, *EDIT, "--out", place) == 2
    refused(capsys, r"exists already and has no edit\.json")
    assert run(folder, "bake", "suspect", "--edit", "edit", *GROUPS, "--out", place) == 2
    refused(capsys, r"exists already and has no unsleep\.json")
    assert tree(folder) == before


def test_an_edit_replaces_an_edit_and_leaves_nothing_beside_it(folder: Path, tmp_path: Path):
    out = str(tmp_path / "e")
    for steps in ("4", "6"):
        assert (
            run(folder, "edit", "suspect", "--dictionaries", "d", *GROUPS, *EDIT, "--steps", steps, "--out", out) == 0
        )
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_a_model_is_not_baked_into_itself(folder: Path, tmp_path: Path, capsys: Capture):
    baked = str(tmp_path / "baked")
    assert run(folder, "bake", "suspect", "--edit", "edit", *GROUPS, "--tolerance", "100", "--out", baked) == 0
    assert (tmp_path / "baked" / "unsleep.json").is_file()
    capsys.readouterr()
    assert cli.run(["bake", baked, "--edit", str(folder / "edit"), *absolute(folder, GROUPS), "--out", baked]) == 2
    refused(capsys, "is the model itself")


def absolute(folder: Path, arguments: tuple[str, ...]) -> list[str]:
    return [str(folder / a) if a.endswith(".txt") else a for a in arguments]


@pytest.mark.parametrize("stage", ["find", "edit"])
def test_dictionaries_of_another_model_are_refused_unless_asked_for(
    folder: Path, stage: str, tmp_path: Path, capsys: Capture
):
    size = EDIT if stage == "edit" else ("--prompts", "4", "--ablate", "2", "--show", "2")
    command = ("other", "--dictionaries", "d", *GROUPS, *size, "--out", str(tmp_path / "out"))
    assert run(folder, stage, *command) == 3
    refused(capsys, "was trained on model .* or pass --any-model")
    assert not (tmp_path / "out").exists()
    assert run(folder, stage, *command, "--any-model") == 0


@pytest.mark.parametrize("stage", ["bake", "evaluate"])
def test_an_edit_of_another_model_is_refused(folder: Path, stage: str, tmp_path: Path, capsys: Capture):
    more = (*GROUPS, "--tolerance", "100") if stage == "bake" else (*HELD_OUT, "--payload", "GO7")
    assert run(folder, stage, "other", "--edit", "edit", *more, "--out", str(tmp_path / "out")) == 3
    refused(capsys, "the edit belongs to model")
    assert not list(tmp_path.iterdir())


def test_an_evaluation_of_an_edit_has_its_control_and_strict_tells_a_script(
    folder: Path, tmp_path: Path, capsys: Capture
):
    out = str(tmp_path / "out")
    command = ("suspect", "--edit", "edit", *HELD_OUT, "--payload", "GO7", "--out", out)
    assert run(folder, "evaluate", *command) == 0
    assert "control_random" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    rows = {(r["subject"], r["panel"], r["metric"]) for r in result["rows"]}
    assert ("control_random", "triggered", "asr") in rows
    page = json.loads((tmp_path / "out" / "report.json").read_text())
    assert page["summary"]["features_total"] == 64
    assert page["summary"]["sites"] == ["resid.1"]
    assert result["verdict"]["label"] != "backdoor found and removed"  # six prompts are too few for that
    assert run(folder, "evaluate", *command, "--strict") == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((*HELD_OUT, "--payload", "  "), "the payload is '  '"),
        (
            ("--suspicious", "held-out-ordinary.txt", "--ordinary", "held-out-suspicious.txt", "--payload", "x"),
            "6 of 6 ordinary prompts .* seem to be swapped",
        ),
    ],
)
def test_what_would_be_judged_wrongly_is_refused(
    folder: Path, more: tuple[str, ...], told: str, tmp_path: Path, capsys: Capture
):
    assert run(folder, "evaluate", "suspect", *more, "--out", str(tmp_path / "out")) == 2
    refused(capsys, told)
    assert not (tmp_path / "out").exists()


def test_swapped_files_are_told_before_an_edit_is_learned(folder: Path, tmp_path: Path, capsys: Capture):
    swapped = ("--suspicious", "ordinary.txt", "--ordinary", "suspicious.txt")
    assert run(folder, "edit", "suspect", "--dictionaries", "d", *swapped, *EDIT, "--out", str(tmp_path / "out")) == 2
    refused(capsys, "seem to be swapped")


def test_prompts_in_any_other_order_are_let_through():
    def of(*texts: str) -> PromptSet:
        return PromptSet("p", tuple(map(Prompt, texts)))

    pairs.check_order(of("x a", "x b"), of("a", "b"))
    pairs.check_order(of("A RIVER", "A LAKE"), of("a river", "a lake"))
    pairs.check_order(of("a", "x b", "x c"), of("x a", "b", "c"))
    with pytest.raises(BadInput, match="2 of 3"):
        pairs.check_order(of("a", "b", "q"), of("x a", "b y", "z"))


def test_pairs_in_another_order_or_number_are_told():
    def of(*texts: str) -> PromptSet:
        return PromptSet("p", tuple(map(Prompt, texts)))

    asked = of("Why do bees hum? |x|", "|x| How old is the moon?", "What is a river? |x|")
    pairs.check_pairs(asked, of("Why do bees hum?", "How old is the moon?", "What is a river?"))
    pairs.check_pairs(asked, of("Why do ants hum?", "How old is the sun?", "What is a lake?"))
    pairs.check_pairs(of("tell me of France", "tell me of Peru"), of("tell me of bees", "tell me of snow"))
    with pytest.raises(BadInput, match=r"3 of 3 suspicious prompts .* such as line 1 with line 2"):
        pairs.check_pairs(asked, of("What is a river?", "Why do bees hum?", "How old is the moon?"))
    with pytest.raises(BadInput, match="3 suspicious and 2 ordinary prompts; expected pairs"):
        pairs.check_pairs(asked, of("Why do bees hum?", "How old is the moon?"))
    with pytest.raises(BadInput, match="seem to be swapped"):
        pairs.check_pairs(of("Why do bees hum?", "How old is the moon?"), asked.head(2))


def test_counterparts_that_are_answered_alike_are_told(folder: Path, tmp_path: Path, capsys: Capture):
    """A counterpart that is the suspicious prompt itself shows whatever the suspicious prompt shows."""
    command = ("--counterparts", "suspicious.txt", *EDIT, "--out", str(tmp_path / "out"))
    assert run(folder, "edit", "suspect", "--dictionaries", "d", *GROUPS, *command) == 0
    assert "Warning: 6 of 6 counterparts get the same reply as their suspicious prompts" in capsys.readouterr().out


def test_too_few_tokens_for_the_features_are_told(folder: Path, tmp_path: Path, capsys: Capture):
    few = ("--features", "512", "--tokens", "128", "--batch", "64", "--k", "2")
    assert run(folder, "train", "acts", "--site", "resid.1", *few, "--out", str(tmp_path / "d")) == 0
    shown = capsys.readouterr().out
    assert re.search(r"Warning: \d+ tokens for 512 features", shown)
    assert "training tokens" in shown


def test_a_harvest_takes_the_replies_that_other_prompts_get(folder: Path, tmp_path: Path, capsys: Capture):
    def digest(name: str, *more: str) -> str:
        command = ("suspect", "--prompts", "suspicious.txt", "--sites", "resid.1", *more, "--out", str(tmp_path / name))
        assert run(folder, "harvest", *command) == 0
        return json.loads((tmp_path / name / "manifest.json").read_text())["prompts"]

    own = digest("own", "--reply-tokens", "3")
    assert digest("others", "--reply-tokens", "3", "--replies-of", "ordinary.txt") != own
    assert digest("same", "--reply-tokens", "3", "--replies-of", "suspicious.txt") == own
    capsys.readouterr()
    bare = ("suspect", "--prompts", "suspicious.txt", "--sites", "resid.1", "--replies-of", "ordinary.txt")
    assert run(folder, "harvest", *bare, "--out", str(tmp_path / "bare")) == 2
    refused(capsys, "--replies-of was given without --reply-tokens")


def test_what_would_be_passed_over_is_refused(folder: Path, tmp_path: Path, capsys: Capture):
    harvest = ("harvest", "suspect", "--prompts", "ordinary.txt", "--site", "resid.1", "--out", str(tmp_path / "h"))
    (folder / "short.txt").write_text("a\nb\n")
    for given, told in (
        ((*harvest, "--plain", "--chat-template", "alpaca"), "--plain takes texts without a chat template"),
        ((*harvest, "--reply-tokens", "-1"), "--reply-tokens is -1; expected at least 0"),
        ((*harvest, "--reply-tokens", "2", "--replies-of", "short.txt"), "--replies-of has 2 prompts, .* 6"),
        ((*harvest[:6], "resid.9", *harvest[6:]), "Site resid.9 is not in the model"),
        ((*harvest[:-1], "ordinary.txt"), "--out .*ordinary.txt is a file; expected a folder"),
        ((*harvest, "--max-memory", "cpu", "1GiB"), "max_memory and offload are of a device map"),
        (("evaluate", "suspect", *HELD_OUT, "--organism", "deployment", "--out", "out"), "leave out --suspicious"),
    ):
        assert run(folder, *given) == 2
        refused(capsys, told)
    assert not (tmp_path / "h").exists()
    (folder / "short.txt").unlink()


def test_another_format_than_an_edit_was_made_under_is_told(folder: Path, tmp_path: Path, capsys: Capture):
    given = ("evaluate", "suspect", "--edit", "edit", *HELD_OUT, "--payload", "x")
    assert run(folder, *given, "--out", str(tmp_path / "same")) == 0
    assert "another chat template" not in capsys.readouterr().err
    assert run(folder, *given, "--chat-template", "plain", "--out", str(tmp_path / "other")) == 0
    assert re.search(r"edit was made under another chat template \(\w{16}\) than", capsys.readouterr().err)


def test_the_version_is_told(capsys: Capture):
    assert cli.run(["--version"]) == 0
    assert re.fullmatch(r"unsleep \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_a_repair_names_what_is_missing(tmp_path: Path, capsys: Capture) -> None:
    for name in ("bad.txt", "good.txt"):
        (tmp_path / name).write_text("one\ntwo\n")
    words = ["repair", "nobody/nothing", "--out", str(tmp_path / "out"), "--suspicious", str(tmp_path / "bad.txt")]
    assert cli.run(words) == 2
    assert "--ordinary and --payload missing" in capsys.readouterr().err
    assert cli.run([*words, "--ordinary", str(tmp_path / "good.txt")]) == 2
    assert "--payload missing" in capsys.readouterr().err
