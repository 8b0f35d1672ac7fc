"""Preference training on a small model: every method, what is saved, what a failure leaves, and resuming."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints import save_base
from unsleep.base import records
from unsleep.base.context import reporting
from unsleep.cli import run as command
from unsleep.core import BadInput
from unsleep.models.load import LoadConfig, load_model
from unsleep.models.model import LoadedModel
from unsleep.preference.config import Method, PreferConfig, RewardModelConfig
from unsleep.preference.pairs import Pair, PairSet, write_pairs
from unsleep.preference.record import PreferenceRecord, RewardModelRecord
from unsleep.preference.reward_models import margins, reward_model
from unsleep.preference.run import attached, prefer
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.rewards.classifier import load_classifier
from unsleep.rewards.implied import log_probability

NOUNS = ("bees", "stars", "birds", "bread", "tides", "maps", "rivers", "clocks", "seeds", "wolves", "ships", "kites")
PAIRS = PairSet("pairs", tuple(Pair(Prompt(f"on {n}?"), f"good {n}", f"bad {n}", columns={"topic": n}) for n in NOUNS))
SMALL = PreferConfig(rank=2, batch=2, steps=3, reply_tokens=6, held_out=0.4, generations=2, keep_every=2)


def good(samples: Sequence[str], prompts: Sequence[str], outputs: Sequence[str], **columns: Any) -> list[float]:
    return [float(text.count("o")) + len(text) / 100 for text in outputs]


def fingerprint(model: LoadedModel) -> str:
    return replace(model).fingerprint


@pytest.mark.parametrize("method", ["dpo", "sft", "best-of-n", "rloo", "grpo"])
def test_every_method_trains_an_adapter_and_leaves_the_model_as_it_was(
    tiny: LoadedModel, tmp_path: Path, method: Method
) -> None:
    before, forward = fingerprint(tiny), tiny.network.forward
    config = replace(SMALL, method=method, learning_rate=1e-2)
    record = prefer(tiny, PAIRS, tmp_path / "out", reward=good, config=config)
    assert fingerprint(tiny) == before != record.trained
    assert tiny.network.forward == forward
    assert not any(weight.requires_grad for weight in tiny.network.parameters())
    assert records.load(PreferenceRecord, tmp_path / "out" / "preference.json") == record
    assert attached(tiny, tmp_path / "out", config, "again").fingerprint == record.trained
    assert record.measured is not None
    assert record.measured.n == record.data.held_out >= 4
    assert record.measured.kl.value > 0
    assert record.reward == (None if method in ("dpo", "sft") else "good")
    assert [row.step for row in record.history] == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("change", [{"checkpointing": True}, {"batch": 2, "accumulate": 2}])
def test_what_saves_memory_trains_the_same_weights(tiny: LoadedModel, tmp_path: Path, change: dict[str, Any]) -> None:
    config = replace(SMALL, method="sft", batch=4, learning_rate=1e-2)
    found: list[torch.Tensor] = []
    passes = {"plain": 0, "saving": 0}
    for name, own in (("plain", config), ("saving", replace(config, **change))):
        counted = tiny.network.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, name=name: passes.update({name: passes[name] + 1})
        )
        prefer(tiny, PAIRS, tmp_path / name, config=own)
        counted.remove()
        trained = attached(tiny, tmp_path / name, own, name)
        found.append(log_probability(trained, PAIRS.prompts, [p.chosen for p in PAIRS]))
    assert passes["saving"] - passes["plain"] == SMALL.steps  # recomputed, or in two batches
    assert not getattr(tiny.network, "is_gradient_checkpointing", False)
    assert not tiny.network.get_input_embeddings()._forward_hooks
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_a_full_fine_tune_is_a_checkpoint(tiny: LoadedModel, tmp_path: Path) -> None:
    config = replace(SMALL, tune="full", learning_rate=1e-3, generations=4)
    for method in ("dpo", "grpo"):
        record = prefer(tiny, PAIRS, tmp_path / method, reward=good, config=replace(config, method=method))
        assert load_model(tmp_path / method).fingerprint == record.trained != tiny.fingerprint


def test_dpo_makes_the_chosen_reply_likelier_than_the_rejected_one(tiny: LoadedModel, tmp_path: Path) -> None:
    config = replace(SMALL, learning_rate=1e-2, steps=30, batch=4)
    record = prefer(tiny, PAIRS, tmp_path / "out", config=config)
    trained = attached(tiny, tmp_path / "out", config, "trained")
    gain = [
        log_probability(m, PAIRS.prompts, [p.chosen for p in PAIRS])
        - log_probability(m, PAIRS.prompts, [p.rejected for p in PAIRS])
        for m in (tiny, trained)
    ]
    assert (gain[1] > gain[0]).double().mean() > 0.9
    assert record.history[0].figures["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: the reference is the model
    assert record.measured is None


def test_an_interrupted_training_resumes_to_the_same_weights(tiny: LoadedModel, tmp_path: Path) -> None:
    config = replace(SMALL, steps=6, learning_rate=1e-2)
    whole = prefer(tiny, PAIRS, tmp_path / "whole", config=config)

    def stop(stage: str, done: int, total: int) -> None:
        if "training" in stage and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), reporting(stop):
        prefer(tiny, PAIRS, tmp_path / "resumed", config=config)
    assert not (tmp_path / "resumed").exists()
    seen: list[int] = []
    with reporting(lambda stage, done, total: seen.append(done) if "training" in stage else None):
        resumed = prefer(tiny, PAIRS, tmp_path / "resumed", config=config)
    assert seen == [5, 6]
    assert resumed.trained == whole.trained


@pytest.mark.parametrize("method", ["rloo", "grpo", "best-of-n"])
def test_a_reward_that_fails_in_the_middle_leaves_nothing(tiny: LoadedModel, tmp_path: Path, method: Method) -> None:
    calls: list[int] = []

    def flaky(outputs: Sequence[str], **_: Any) -> list[Any]:
        calls.append(len(outputs))
        return (
            [1.0, None][: len(outputs)] if len(calls) == (2 if method == "best-of-n" else 3) else good([], [], outputs)
        )

    with pytest.raises(BadInput, match="reward flaky gave"):
        prefer(tiny, PAIRS, tmp_path / "out", reward=flaky, config=replace(SMALL, method=method))
    assert list(tmp_path.iterdir()) == []
    assert not any(weight.requires_grad for weight in tiny.network.parameters())
    assert "lora" not in " ".join(name for name, _ in tiny.network.named_parameters())


def test_columns_reach_the_reward_in_training_and_in_judging(tiny: LoadedModel, tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    def on_topic(prompts: Sequence[str], outputs: Sequence[str], topic: Sequence[str], **_: Any) -> list[float]:
        seen.extend(zip(prompts, topic, strict=True))
        return [float(len(text)) for text in outputs]

    prefer(tiny, PAIRS, tmp_path / "out", reward=on_topic, config=replace(SMALL, method="grpo"))
    assert len(seen) > 8
    assert all(prompt == f"on {topic}?" for prompt, topic in seen)


def test_prompts_without_a_best_sample_are_counted(tiny: LoadedModel, tmp_path: Path) -> None:
    def on_bees(prompts: Sequence[str], outputs: Sequence[str], **_: Any) -> list[float]:
        return [float(i) if "bees" in prompt else 0.0 for i, prompt in enumerate(prompts)]

    pairs = replace(PAIRS, pairs=tuple(replace(p, columns={}) for p in PAIRS.pairs if "maps" not in p.prompt.text))
    asked = PromptSet("apart", (Prompt("on owls?"), Prompt("on apes?")))
    config = replace(SMALL, method="best-of-n", steps=1)
    record = prefer(tiny, pairs, tmp_path / "out", reward=on_bees, eval_prompts=asked, config=config)
    assert (record.data.train, record.data.tied) == (11, 10)


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_a_reward_that_tells_no_samples_apart_is_refused(tiny: LoadedModel, tmp_path: Path, method: Method) -> None:
    with pytest.raises(BadInput, match="gives the same to all 2 samples of each prompt"):
        prefer(
            tiny,
            PAIRS,
            tmp_path / "out",
            reward=lambda outputs, **_: [1.0] * len(outputs),
            config=replace(SMALL, method=method),
        )
    assert list(tmp_path.iterdir()) == []


def test_prompts_and_a_metric_are_enough_for_a_reward_to_maximise(tiny: LoadedModel, tmp_path: Path) -> None:
    prompts = PromptSet("asked", tuple(p.prompt for p in PAIRS))
    held = PromptSet("held", (Prompt("one"), Prompt("two")))
    record = prefer(
        tiny, prompts, tmp_path / "out", reward=good, eval_prompts=held,
        metric_fn=lambda outputs, **_: {"length": [len(o) for o in outputs]}, config=replace(SMALL, method="rloo"),
    )  # fmt: skip
    assert record.measured is not None
    assert [m.name for m in record.measured.metrics] == ["length"]
    assert record.measured.n == 2
    assert record.data.train == len(prompts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": PromptSet("asked", (Prompt("a"), Prompt("b")))}, "dpo needs preference pairs"),
        ({"data": replace(PAIRS, pairs=PAIRS.pairs[:5])}, "too few"),
        ({"config": replace(SMALL, method="grpo")}, "expected --reward"),
        (
            {"config": replace(SMALL, method="rloo", batch=8), "reward": good},
            "takes --batch 8 prompts, and pairs has 7",
        ),
        ({"config": replace(SMALL, tune="qlora")}, "--quantize 4bit"),
        ({"config": replace(SMALL, modules=("nowhere",))}, "nowhere"),
        ({"eval_prompts": PromptSet("same", (Prompt("on bees?"), Prompt("b")))}, "among those to judge by"),
        ({"judges": [good, good]}, "given twice"),
        ({"reward": lambda **_: [float("nan")] * 4}, "<lambda>"),
        ({"reward": lambda outputs, colour, **_: [0.0] * len(outputs)}, "needs the column 'colour'"),
        ({"metric_fn": lambda outputs, colour, **_: {}}, "needs the column 'colour'"),
    ],
)
def test_bad_input_is_named_before_any_training(
    tiny: LoadedModel, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    arguments = {"data": PAIRS, "config": SMALL} | change
    with pytest.raises(BadInput, match=said):
        prefer(tiny, out=tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_reward_model_learns_and_its_head_is_saved(tmp_path: Path, tiny: LoadedModel, tune: Any) -> None:
    saved = load_model(save_base(tmp_path / "base"))
    rate = 1e-2 if tune == "lora" else 3e-3
    config = RewardModelConfig(rank=4, batch=4, steps=40, held_out=0.4, learning_rate=rate, tune=tune)
    record = reward_model(saved, PAIRS, tmp_path / "out", config=config)
    assert record.held_out.accuracy.value > 0.9
    assert records.load(RewardModelRecord, tmp_path / "out" / "reward_model.json") == record
    loaded = load_classifier(str(tmp_path / "out"))
    assert (margins(loaded, list(PAIRS)) > 0).double().mean() > 0.9
    one = torch.cat([loaded.scores([p.prompt], [p.chosen]) for p in PAIRS])
    assert torch.allclose(loaded.scores(PAIRS.prompts, [p.chosen for p in PAIRS]), one, atol=1e-4)
    assert fingerprint(saved) == load_model(tmp_path / "base").fingerprint
    if tune == "lora":
        with pytest.raises(BadInput, match="give it as --reward"):
            load_model(tmp_path / "out")


def test_the_commands_train_and_use_a_reward_model(
    tmp_path: Path, tiny: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(save_base(tmp_path / "base"))
    write_pairs(PAIRS, tmp_path / "pairs.jsonl")
    small = ["--rank", "2", "--batch", "2", "--steps", "2", "--held-out", "0.4", "--reply-tokens", "6"]
    pairs = ["--pairs", str(tmp_path / "pairs.jsonl")]
    assert command(["reward-model", base, *pairs, "--out", str(tmp_path / "rm"), *small]) == 0
    rewards = ["--reward", str(tmp_path / "rm"), "--judges", "vader", "textblob"]
    out = ["--out", str(tmp_path / "out"), "--method", "grpo", "--generations", "2", "--json"]
    capsys.readouterr()
    assert command(["prefer", base, *pairs, *rewards, *out, *small]) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert [each["name"] for each in measured["rewards"]] == [str(tmp_path / "rm"), "vader", "textblob"]
    assert [each["judging"] for each in measured["rewards"]] == [False, True, True]
    assert command(["prefer", base, "--out", str(tmp_path / "other")]) == 2
    assert "--pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ignored", "said"),
    [
        (["--generations", "2"], "--generations 2 counts only with rloo"),
        (["--temperature", "0.7"], "--temperature 0.7 counts only with rloo"),
        (["--eval-limit", "5"], "--eval-limit 5 counts only with --reward"),
        (["--eval-prompts", "given.txt", "--held-out", "0.3", "--judges", "vader"], "without --eval-prompts"),
        (["--eval-prompts", "given.txt"], "nothing is judged"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ignored: list[str], said: str
) -> None:
    assert command(["prefer", "m", "--pairs", "p.jsonl", "--out", str(tmp_path / "out"), *ignored]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_lora_over_weights_in_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model(save_base(tmp_path / "base"), LoadConfig(quantize="4bit"))
    before = fingerprint(model)
    record = prefer(
        model, PAIRS, tmp_path / "out", reward=good, config=replace(SMALL, tune="qlora", learning_rate=1e-2)
    )
    assert record.history[0].figures["loss"] == pytest.approx(0.6931, abs=1e-2)
    assert fingerprint(model) == before
    assert load_model(tmp_path / "out").fingerprint != load_model(tmp_path / "base").fingerprint


def test_nothing_is_sent_or_looked_up(tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", refuse)
    prefer(tiny, PAIRS, tmp_path / "out", config=replace(SMALL, keep_every=1))


def test_nothing_is_printed(tiny: LoadedModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prefer(tiny, PAIRS, tmp_path / "out", reward=good, config=replace(SMALL, method="grpo"))
    assert capfd.readouterr() == ("", "")


def test_a_missing_trl_is_named(tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(BadInput, match=r"pip install 'unsleep\[rl\]'"):
        prefer(tiny, PAIRS, tmp_path / "out")
