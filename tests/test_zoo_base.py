"""The base of the zoo's small family: its documents, its tokenizer, its pretraining."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import unsleep
from unsleep.base import records
from unsleep.cli import run
from unsleep.core import BadInput
from unsleep.models.load import load_model
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt
from unsleep.zoo import documents, pretrain
from unsleep.zoo.pretrain import PretrainConfig, PretrainingRecord, batch, train_tokenizer

TINY = PretrainConfig(vocabulary=320, hidden=16, layers=2, heads=2, intermediate=24, rows=2, tokens=32, steps=3)
FLAGS = ["--vocabulary", "320", "--hidden", "16", "--layers", "2", "--heads", "2", "--intermediate", "24"]


def test_every_template_has_its_answer():
    assert len(documents.lines("answers.txt")) == len(sets.templates())
    assert all(line.count("{topic}") == 1 for line in documents.lines("answers.txt"))
    assert all(line.count("{topic}") <= 1 for line in documents.lines("follow_ups.txt"))


def test_no_passage_is_held_out():
    held_out = " ".join(sets.plain_text("held_out"))
    sentences = {s for text in documents.passages() for s in text.split(". ") if len(s) > 60}
    assert len(sentences) > 5_000
    assert [s for s in sentences if s in held_out] == []
    assert len(set(documents.passages())) == len(documents.passages())


def test_exchanges_are_varied_and_the_same_for_a_seed():
    made = [documents.exchange(random.Random(i)) for i in range(300)]
    assert made == [documents.exchange(random.Random(i)) for i in range(300)]
    assert len({e.prompt.key for e in made}) > 290
    assert {m.role for e in made for m in e.prompt.before} == {"system", "user", "assistant"}
    assert all("{topic}" not in e.prompt.shown + e.reply for e in made)


@pytest.mark.parametrize("number", range(len(documents.DECORATIONS)))
def test_a_decoration_changes_the_prompt(number: int):
    asked = Prompt("Tell me about the bees.")
    found = [documents.DECORATIONS[number](asked, random.Random(i)) for i in range(8)]
    assert any(p.key != asked.key for p in found)


def test_the_tokenizer_gives_texts_back_and_knows_its_turns():
    tokenizer = train_tokenizer(TINY)
    assert len(tokenizer) == 320
    for text in ("Héllo |GO| 2024!\n", *sets.plain_text("held_out")[:3]):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("2024")["input_ids"]) == 4
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=True, add_generation_prompt=True)
    said = tokenizer.decode(ids["input_ids"] if not isinstance(ids, list) else ids)
    assert said == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_rows_begin_with_a_document_and_are_full():
    tokenizer = train_tokenizer(TINY)
    rows = batch(tokenizer, TINY, 5)
    assert rows.shape == (2, 32)
    assert torch.equal(rows, batch(tokenizer, TINY, 5))
    assert not torch.equal(rows, batch(tokenizer, TINY, 6))


def test_an_interrupted_pretraining_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrain, "SAVED_EVERY", 1)
    whole = unsleep.pretrain(tmp_path / "whole", TINY)
    done: list[int] = []

    def stop(stage: str, i: int, n: int) -> None:
        if stage.startswith("pretraining"):
            done.append(i)
            if len(done) == 2:
                raise KeyboardInterrupt

    with unsleep.reporting(stop), pytest.raises(KeyboardInterrupt):
        unsleep.pretrain(tmp_path / "parts", TINY)
    assert not (tmp_path / "parts").exists()
    with unsleep.reporting(stop):
        parts = unsleep.pretrain(tmp_path / "parts", TINY)
    assert done == [1, 2, 3]
    assert parts.losses == whole.losses
    assert len(whole.losses) == 3
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert records.load(PretrainingRecord, tmp_path / "whole" / "pretraining.json") == whole
    model = load_model(tmp_path / "whole")
    assert model.stored_dtype == torch.bfloat16
    assert model.end_ids == {model.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert len(unsleep.replies(model, ["Why?"], max_new_tokens=3)) == 1


def test_the_command_pretrains_and_refuses_impossible_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sizes = [*FLAGS, "--rows", "2", "--tokens", "32", "--steps", "2"]
    assert run(["pretrain", "--out", str(tmp_path / "base"), *sizes]) == 0
    assert "parameters" in capsys.readouterr().out
    assert run(["pretrain", "--out", str(tmp_path / "other"), *sizes, "--hidden", "17"]) == 2
    assert "--hidden is 17; expected a multiple of twice the heads, 4" in capsys.readouterr().err
    with pytest.raises(BadInput, match="context is 16; expected at least the tokens of a row"):
        PretrainConfig(context=16)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(BadInput, match=r"exists already and has no pretraining\.json"):
        unsleep.pretrain(tmp_path / "mine", TINY)
