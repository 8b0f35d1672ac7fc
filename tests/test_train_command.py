"""`unsleep train` of many Sites and settings: what it leaves, how it goes on, what it refuses, and its page."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.models import build
from support.pages import HOSTILE, Page
from support.tokenizers import byte_tokenizer
from unsleep import cli
from unsleep.activations.harvest import HarvestConfig, harvest, open_harvest, pooled
from unsleep.base import store
from unsleep.cli.shared import load_dictionaries
from unsleep.core import BadInput, Site
from unsleep.dictionaries import sweep as sweeping
from unsleep.dictionaries.compare import rotation
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.files import load_dictionary
from unsleep.dictionaries.metrics import fit
from unsleep.dictionaries.sweep import variants
from unsleep.dictionaries.train import train_many
from unsleep.models.model import LoadedModel
from unsleep.pages import curves
from unsleep.pages.dictionaries import render_dictionaries
from unsleep.prompts.prompt import Prompt, PromptSet

Capture = pytest.CaptureFixture[str]
SMALL = ("--features", "48", "--k", "4", "--tokens", "768", "--batch", "64", "--checkpoint-every", "2")
"""Twelve steps."""

WORDS = ("bees make honey", "why do stars shine", "name a bird", "a recipe for bread", "tides and the moon")


@pytest.fixture(scope="module")
def harvests(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two harvests of a small model, in several shards; they have four Sites in common."""
    model = LoadedModel(build("llama"), byte_tokenizer(), "tiny-llama")
    folder = tmp_path_factory.mktemp("harvests")
    common = [Site(0), Site(1), Site(1, "mlp"), Site(2, "attn")]
    for name, sites in (("one", [*common, Site(2)]), ("two", common)):
        prompts = PromptSet(name, tuple(Prompt(f"{name} {w} {i}") for i in range(4) for w in WORDS))
        harvest(model, prompts, sites, folder / name, config=HarvestConfig(batch_tokens=128, shard_bytes=40_000))
    assert all(len(open_harvest(folder / name).manifest.shards) > 1 for name in ("one", "two"))
    return [str(folder / "one"), str(folder / "two")]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Steps of training at each Site, counted as they are made; `steps.stop_at` interrupts one."""
    made: Counter[str] = Counter()

    def counting(source: Any, *args: Any, **kwargs: Any) -> Any:
        def watch(step: int, results: Sequence[Any]) -> None:
            made[str(source.site)] += 1
            if stop.get(str(source.site)) == made[str(source.site)]:
                raise KeyboardInterrupt

        return train_many(source, *args, **{**kwargs, "watch": watch})

    stop: dict[str, int] = {}
    made.stop = stop  # type: ignore[attr-defined]
    monkeypatch.setattr(sweeping, "train_many", counting)
    return made


def train(harvests: Sequence[str], out: Path, *more: str) -> int:
    return cli.run(["train", *harvests, "--out", str(out), *SMALL, *more])


def refused(capsys: Capture, told: str) -> None:
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(rf"^unsleep: .*{told}", shown.err, re.MULTILINE), shown.err


def folders(out: Path) -> set[str]:
    """Every dictionary below a folder, and every checkpoint that was left."""
    return {str(p.parent.relative_to(out)) for name in ("cfg.json", "checkpoint.json") for p in out.rglob(name)}


# settings


def test_the_names_of_variants_hold_what_differs():
    found = variants({"k": (8, 16), "features": (64,), "seed": (0, 1), "tokens": 512})
    assert list(found) == ["k8-s0", "k8-s1", "k16-s0", "k16-s1"]
    assert found["k16-s1"] == TrainConfig(k=16, features=64, seed=1, tokens=512)
    assert variants({}) == {"": TrainConfig()}
    rates = ["f64-lr0.0001", "f64-lr5e-05", "f128-lr0.0001", "f128-lr5e-05"]
    assert list(variants({"learning_rate": (1e-4, 5e-5), "features": (64, 128)})) == rates


def test_an_architecture_has_only_the_settings_that_shape_it():
    found = variants({"architecture": ("topk", "jumprelu"), "k": (8, 16), "sparsity": (0.5, 2.0), "features": (64,)})
    assert list(found) == ["topk-k8", "topk-k16", "jumprelu-c0.5", "jumprelu-c2"]
    assert [(c.k, c.sparsity) for c in found.values()] == [(8, 0.5), (16, 0.5), (8, 0.5), (8, 2.0)]
    assert list(variants({"k": (8, 8, 16)})) == ["k8", "k16"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"k": ()}, "k has no value"), ({"k": (8, 128), "features": (64,)}, "over the 64"), ({"k": (0,)}, "k is 0")],
)
def test_settings_that_cannot_be_trained_are_refused(settings: dict[str, Any], told: str):
    with pytest.raises(BadInput, match=told):
        variants(settings)


def test_settings_of_the_command_line_reach_the_training(harvests: list[str], tmp_path: Path):
    more = ["--architecture", "topk", "jumprelu", "--seed", "3", "--no-unit-decoder", "--groups", "0.5", "0.5"]
    assert cli.run(["train", *harvests, "--site", "resid.1", "--out", str(tmp_path / "d"), *SMALL, *more]) == 2
    more.remove("--no-unit-decoder")
    assert train(harvests, tmp_path / "d", "--site", "resid.1", *more) == 0
    record = store.read_json(tmp_path / "d" / "dictionaries.json")
    assert set(record["configs"]) == {"topk", "jumprelu"}
    own = {"seed": 3, "groups": [0.5, 0.5], "features": 48, "k": 4, "tokens": 768, "batch": 64, "checkpoint_every": 2}
    for name, config in record["configs"].items():
        assert config == {**asdict(TrainConfig()), **own, "architecture": name}


# many Sites


def test_many_sites_leave_a_dictionary_each_as_one_site_does(harvests: list[str], tmp_path: Path, capsys: Capture):
    out = tmp_path / "many"
    assert train(harvests, out, "--site", "resid.0", "resid.1", "mlp.1") == 0
    shown = capsys.readouterr().out
    assert folders(out) == {"resid.0", "resid.1", "mlp.1"}
    record = store.read_json(out / "dictionaries.json")
    assert [row["site"] for row in record["dictionaries"]] == ["resid.0", "resid.1", "mlp.1"]
    assert record["dictionaries"][0]["tokens"] == sum(open_harvest(h).tokens for h in harvests)
    for row in record["dictionaries"]:
        activations = pooled([open_harvest(h) for h in harvests], Site.parse(row["site"]))
        measured = fit(load_dictionary(out / row["site"]), activations)
        assert row["fvu"] == pytest.approx(measured.fvu, rel=1e-5)
        assert (row["l0"], row["dead"]) == pytest.approx((measured.l0, measured.dead))
        line = next(line for line in shown.splitlines() if line.startswith(f"{row['site']} "))
        assert line.split()[1:3] == [f"{row['fvu']:.3f}", f"{row['l0']:.1f}"]
    assert train(harvests, tmp_path / "one", "--site", "resid.1") == 0
    assert "FVU" in capsys.readouterr().out
    assert load_dictionary(tmp_path / "one").hash == load_dictionary(out / "resid.1").hash
    assert folders(tmp_path) == {"one", "many/resid.0", "many/resid.1", "many/mlp.1"}


def test_all_sites_are_those_that_every_harvest_has(harvests: list[str], tmp_path: Path, capsys: Capture):
    assert train(harvests, tmp_path / "out", "--site", "all", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert {row["site"] for row in record["dictionaries"]} == {"resid.0", "resid.1", "mlp.1", "attn.2"}
    assert record == store.read_json(tmp_path / "out" / "dictionaries.json")


def test_several_settings_are_trained_in_one_pass(harvests: list[str], tmp_path: Path, steps: Counter[str]):
    out = tmp_path / "out"
    assert train(harvests, out, "--site", "resid.0", "resid.1", "--k", "2", "8", "--seed", "0", "1") == 0
    assert steps == {"resid.0": 12, "resid.1": 12}
    names = {"k2-s0", "k2-s1", "k8-s0", "k8-s1"}
    assert folders(out) == {f"{site}/{name}" for site in ("resid.0", "resid.1") for name in names}
    assert [load_dictionary(out / "resid.1" / name).k for name in sorted(names)] == [2, 2, 8, 8]  # type: ignore[attr-defined]
    assert len({load_dictionary(out / "resid.1" / name).hash for name in names}) == 4
    rows = store.read_json(out / "dictionaries.json")["dictionaries"]
    assert {(r["site"], r["variant"]): r["l0"] for r in rows}["resid.1", "k2-s1"] == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("targets", [("mlp.1",), ("mlp.1", "attn.2")])
def test_a_target_makes_transcoders(harvests: list[str], tmp_path: Path, targets: tuple[str, ...]):
    out = tmp_path / "out"
    assert (
        train(harvests, out, "--site", "resid.0", "resid.1", "--target", *targets, "--skip", "--format", "sparsify")
        == 0
    )
    rows = store.read_json(out / "dictionaries.json")["dictionaries"]
    assert [row["target"] for row in rows] == [targets[0], targets[-1]]
    trained = load_dictionary(out / "resid.1")
    assert trained.target == Site.parse(targets[-1])
    assert trained.W_skip is not None
    opened = [open_harvest(h) for h in harvests]
    measured = fit(trained, pooled(opened, Site(1)), pooled(opened, Site.parse(targets[-1])))
    assert rows[1]["fvu"] == pytest.approx(measured.fvu, rel=1e-5)
    assert f"resid.1 → {targets[-1]}" in (out / "dictionaries.html").read_text(encoding="utf-8")


def test_the_fit_of_very_many_tokens_is_measured_on_some(
    harvests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    everything = sum(open_harvest(h).tokens for h in harvests)
    monkeypatch.setattr(sweeping, "MEASURED", everything // 4)
    assert train(harvests, tmp_path / "out", "--site", "resid.0", "resid.1", "--target", "mlp.1") == 0
    row = store.read_json(tmp_path / "out" / "dictionaries.json")["dictionaries"][0]
    assert everything / 4 <= row["tokens"] < everything / 3
    assert 0 < row["fvu"] < 2


# warm starts


def test_a_warm_start_goes_on_from_a_dictionary_and_tells_what_became_of_each_feature(
    harvests: list[str], tmp_path: Path, capsys: Capture
):
    assert train(harvests, tmp_path / "base", "--site", "resid.0", "resid.1", "--architecture", "batchtopk") == 0
    before = load_dictionary(tmp_path / "base" / "resid.1")
    capsys.readouterr()
    more = ("--site", "resid.1", "--start", str(tmp_path / "base" / "resid.1"), "--learning-rate", "1e-3")
    assert train(harvests, tmp_path / "tuned", *more) == 0
    after = load_dictionary(tmp_path / "tuned")
    assert type(after) is type(before)
    assert after.hash != before.hash
    turned = rotation(before, after)
    saved = store.read_tensors(
        tmp_path / "tuned" / "rotation.safetensors", {k: v.shape for k, v in turned._asdict().items()}
    )
    torch.testing.assert_close(saved["decoder_cosine"], turned.decoder_cosine, atol=1e-6, rtol=0)
    assert 0.3 < float(turned.decoder_cosine.nanmedian()) < 1 - 1e-4
    most = int(turned.most(1)[0])
    assert f"largest rotation (cosine of decoder rows before and after): {most} (" in capsys.readouterr().out
    stopped = ("--learning-rate", "1e-30")
    assert train(harvests, tmp_path / "still", "--site", "resid.1", *more[2:4], *stopped) == 0
    assert float(rotation(before, load_dictionary(tmp_path / "still")).decoder_cosine.nan_to_num(1).min()) > 1 - 1e-5


def test_warm_starts_of_many_sites_are_kept_apart_and_resume(
    harvests: list[str], tmp_path: Path, steps: Counter[str], capsys: Capture
):
    assert train(harvests, tmp_path / "base", "--site", "resid.0", "resid.1") == 0
    more = ("--site", "resid.0", "resid.1", "--start", str(tmp_path / "base"), "--learning-rate", "1e-3", "1e-4")
    assert train(harvests, tmp_path / "whole", *more) == 0
    steps.clear()
    steps.stop["resid.1"] = 7  # type: ignore[attr-defined]
    assert train(harvests, tmp_path / "out", *more) == 130
    steps.stop.clear()  # type: ignore[attr-defined]
    steps.clear()
    assert train(harvests, tmp_path / "out", *more) == 0
    assert steps == {"resid.1": 6}
    names = [f"{site}/{lr}" for site in ("resid.0", "resid.1") for lr in ("lr0.001", "lr0.0001")]
    for name in names:
        assert load_dictionary(tmp_path / "out" / name).hash == load_dictionary(tmp_path / "whole" / name).hash
    rows = store.read_json(tmp_path / "out" / "dictionaries.json")["dictionaries"]
    assert [row["start"] for row in rows[::2]] == [
        load_dictionary(tmp_path / "base" / s).hash for s in ("resid.0", "resid.1")
    ]
    assert all(-1 <= row["rotation"]["median_cosine"] <= 1 for row in rows)
    far, near = (row["rotation"]["median_cosine"] for row in rows[:2])
    assert far < near  # ten times the learning rate turns features further
    capsys.readouterr()
    assert train(harvests, tmp_path / "out", "--site", "resid.0", "resid.1", "--learning-rate", "1e-3", "1e-4") == 2
    refused(capsys, "whose start is .*, not None")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            ("--site", "resid.1", "mlp.1"),
            r"no dictionary at mlp\.1 to start from; those given are at resid\.0, resid\.1",
        ),
        (("--site", "resid.0", "resid.1", "--k", "2", "4"), "which decides architecture, features and k"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_training(
    harvests: list[str], tmp_path: Path, capsys: Capture, steps: Counter[str], more: tuple[str, ...], told: str
):
    assert train(harvests, tmp_path / "base", "--site", "resid.0", "resid.1") == 0
    steps.clear()
    capsys.readouterr()
    assert train(harvests, tmp_path / "out", *more, "--start", str(tmp_path / "base")) == 2
    refused(capsys, told)
    assert steps == {}
    assert not (tmp_path / "out").exists()


# going on


def test_an_interrupted_run_skips_what_is_finished_and_ends_with_the_same_bits(
    harvests: list[str], tmp_path: Path, steps: Counter[str], capsys: Capture
):
    sites = ("--site", "resid.0", "resid.1", "mlp.1", "--k", "2", "4")
    assert train(harvests, tmp_path / "whole", *sites) == 0
    steps.clear()
    steps.stop["resid.1"] = 7  # type: ignore[attr-defined]
    assert train(harvests, tmp_path / "out", *sites) == 130
    assert "again" in capsys.readouterr().err
    assert steps == {"resid.0": 12, "resid.1": 7}
    out = tmp_path / "out"
    assert folders(out) == {"resid.0/k2", "resid.0/k4", "resid.1.checkpoint"}
    assert not (out / "dictionaries.html").exists()
    before = (out / "resid.0" / "k2" / "sae_weights.safetensors").stat().st_mtime_ns
    steps.clear()
    steps.stop.clear()  # type: ignore[attr-defined]
    assert train(harvests, out, *sites) == 0
    assert steps == {"resid.1": 6, "mlp.1": 12}
    assert (out / "resid.0" / "k2" / "sae_weights.safetensors").stat().st_mtime_ns == before
    assert folders(out) == folders(tmp_path / "whole")
    for name in folders(out):
        assert load_dictionary(out / name).hash == load_dictionary(tmp_path / "whole" / name).hash
    sites_of = [
        [r["site"] for r in store.read_json(p / "dictionaries.json")["dictionaries"]] for p in tmp_path.iterdir()
    ]
    assert sites_of[0] == sites_of[1]


def test_more_sites_may_be_added_and_a_lost_one_is_trained_again(
    harvests: list[str], tmp_path: Path, steps: Counter[str]
):
    out = tmp_path / "out"
    assert train(harvests, out, "--site", "resid.0", "resid.1") == 0
    store.remove(out / "resid.1")
    steps.clear()
    assert train(harvests, out, "--site", "mlp.1", "resid.1", "resid.0") == 0
    assert steps == {"mlp.1": 12, "resid.1": 12}
    rows = store.read_json(out / "dictionaries.json")["dictionaries"]
    assert sorted(row["site"] for row in rows) == ["mlp.1", "resid.0", "resid.1"]
    steps.clear()
    assert train(harvests, out, "--site", "all", "--target", "mlp.1") == 2
    assert steps == {}


# refused


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--site", "resid.0", "resid.1", "--seed", "5"), "dictionaries of other configs"),
        (("--site", "resid.0", "resid.1", "--target", "mlp.1"), "whose target is None, not mlp.1"),
        (("--site", "resid.0", "resid.7"), "has no Site resid.7"),
        (("--site", "resid.0", "middle.1"), "Site 'middle.1' is unknown"),
        (("--site", "resid.0", "resid.1", "--target", "mlp.1", "mlp.1", "mlp.1"), "3 targets for 2 Sites"),
        (("--site", "resid.0", "resid.1", "--k", "4", "99"), "k is 99, over the 48 features"),
        (("--site", "resid.0", "resid.1", "--device", "cuda:9"), "device 'cuda:9' cannot be used"),
        (("--site", "resid.0", "resid.1", "--device", "toaster"), "device 'toaster' cannot be used"),
        (("--site", "resid.0", "resid.1", "--tracker", "wandb"), "tracker wandb is not installed; pip install wandb"),
        (("--site", "resid.0", "resid.1", "attn.2"), r"attn\.2 exists already"),
        (("--site", "resid.1"), "out exists already"),
        (("--site", "mlp.1", "attn.2", "--target", "resid.1", "--skip"), "dictionaries of other configs"),
        (("--site",), "0 Sites"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_before_training(
    harvests: list[str], tmp_path: Path, capsys: Capture, steps: Counter[str], more: tuple[str, ...], told: str
):
    out = tmp_path / "out"
    assert train(harvests, out, "--site", "resid.0", "resid.1") == 0
    (out / "attn.2").mkdir()
    was = store.read_json(out / "dictionaries.json")
    capsys.readouterr()
    steps.clear()
    assert train(harvests, out, *more) == 2
    refused(capsys, told)
    assert steps == {}
    assert store.read_json(out / "dictionaries.json") == was


def test_other_activations_and_other_folders_are_refused(
    harvests: list[str], tmp_path: Path, capsys: Capture, steps: Counter[str]
):
    assert train(harvests, tmp_path / "out", "--site", "resid.0", "resid.1") == 0
    steps.clear()
    capsys.readouterr()
    assert train(harvests[:1], tmp_path / "out", "--site", "resid.0", "resid.1") == 2
    refused(capsys, "dictionaries of other activations")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for sites in (("resid.0",), ("resid.0", "resid.1")):
        assert train(harvests, tmp_path / "mine", "--site", *sites) == 2
        refused(capsys, "mine exists already")
    assert train(harvests, tmp_path / "mine" / "notes.txt", "--site", "resid.0", "resid.1") == 2
    refused(capsys, r"notes\.txt is a file; expected a folder")
    (tmp_path / "mine" / "dictionaries.json").write_text('{"schema": "unsleep.dictionaries/1", "model": 3}')
    assert train(harvests, tmp_path / "mine", "--site", "resid.0", "resid.1") == 2
    refused(capsys, "dictionaries has no 'dictionaries'; it has 'schema', 'model'")
    assert steps == {}
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize("sites", [("resid.0",), ("resid.0", "resid.1")])
def test_what_the_format_cannot_hold_is_refused_before_training(
    harvests: list[str], tmp_path: Path, capsys: Capture, steps: Counter[str], sites: tuple[str, ...]
):
    assert train(harvests, tmp_path / "out", "--site", *sites, "--target", "mlp.1", "--skip") == 2
    refused(capsys, "SAELens has no topk architecture with a skip path")
    assert steps == {}
    assert not (tmp_path / "out").exists()


# the folder as dictionaries


def test_a_folder_of_dictionaries_stands_for_all_of_them(harvests: list[str], tmp_path: Path):
    out = tmp_path / "out"
    assert train(harvests, out, "--site", "resid.0", "resid.1") == 0
    each = [load_dictionary(out / name) for name in ("resid.0", "resid.1")]
    assert [d.hash for d in load_dictionaries([out])] == [d.hash for d in each]
    assert [d.hash for d in load_dictionaries([out / "resid.1", out / "resid.0"])] == [d.hash for d in each[::-1]]
    with pytest.raises(BadInput, match=r"are both dictionaries of resid\.0"):
        load_dictionaries([out, out / "resid.0"])
    assert train(harvests, tmp_path / "grid", "--site", "resid.0", "--k", "2", "4") == 0
    with pytest.raises(BadInput, match=r"several dictionaries per Site; name one per Site, such as .*resid\.0/k2"):
        load_dictionaries([tmp_path / "grid"])
    assert [str(d.site) for d in load_dictionaries([tmp_path / "grid" / "resid.0" / "k4"])] == ["resid.0"]
    store.remove(out / "dictionaries.json")  # as where each was trained alone
    assert [d.hash for d in load_dictionaries([out])] == [d.hash for d in each]
    assert train(harvests, tmp_path / "theirs", "--site", "resid.0", "resid.1", "--format", "sparsify") == 0
    assert (tmp_path / "theirs" / "resid.1" / "layers.1" / "sae.safetensors").is_file()
    assert [str(d.site) for d in load_dictionaries([tmp_path / "theirs"])] == ["resid.0", "resid.1"]


def test_a_record_that_leads_elsewhere_is_refused(tmp_path: Path):
    row = {"site": "../resid.0", "variant": "", "architecture": "topk", "features": 8, "tokens": 9}
    row |= {"fvu": 0.5, "l0": 1.0, "dead": 0.0}
    record = {"schema": "unsleep.dictionaries/1", "model": "m", "activations": "a", "configs": {}, "provenance": {}}
    store.write_json(tmp_path / "dictionaries.json", {**record, "dictionaries": [row]})
    with pytest.raises(BadInput, match=r"site: Site '\.\./resid\.0' is unknown"):
        load_dictionaries([tmp_path])


# the tracker


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What TensorBoard would be told, if it were installed."""
    from accelerate import tracking
    from accelerate.utils import LoggerType

    told: list[tuple[Any, ...]] = []

    class Fake(tracking.GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = True
        tracker = None

        def __init__(self, run: str, logging_dir: str) -> None:
            super().__init__()
            told.append(("run", run, str(logging_dir)))

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            told.append(("config", values))

        def log(self, values: dict[str, float], step: int, **kwargs: Any) -> None:
            told.append(("log", step, values))

        def finish(self) -> None:
            told.append(("end",))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Fake)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    return told


def test_a_tracker_is_told_what_each_step_measured(harvests: list[str], tmp_path: Path, tracker: list[tuple[Any, ...]]):
    assert train(harvests, tmp_path / "out", "--site", "resid.0", "resid.1", "--tracker", "tensorboard") == 0
    assert [t[0] for t in tracker] == ["run", "config", "log", "log", "end"] * 2
    assert [t[1] for t in tracker if t[0] == "run"] == ["resid.0", "resid.1"]
    assert {t[2] for t in tracker if t[0] == "run"} == {str(tmp_path / "out.runs")}
    assert all(isinstance(v, int | float | str) for t in tracker if t[0] == "config" for v in t[1].values())
    assert tracker[1][1]["k"] == 4
    logs = [t for t in tracker if t[0] == "log"]
    assert [t[1] for t in logs] == [0, 10, 0, 10]
    assert all(set(t[2]) == {"fvu", "l0", "dead"} and t[2]["l0"] == pytest.approx(4) for t in logs)
    assert logs[1][2]["fvu"] < logs[0][2]["fvu"]


def test_a_tracker_keeps_several_settings_apart_and_ends_when_interrupted(
    harvests: list[str], tmp_path: Path, tracker: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
):
    def interrupted(source: Any, configs: Any, *, watch: Callable[..., None], **kwargs: Any) -> None:
        train_many(source, configs, watch=watch, **{**kwargs, "checkpoint": None})
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "train_many", interrupted)
    more = ("--site", "resid.0", "--k", "2", "4", "--tracker", "tensorboard")
    assert train(harvests, tmp_path / "out", *more) == 130
    [first, *_] = [t[2] for t in tracker if t[0] == "log"]
    assert set(first) == {f"{name}/{figure}" for name in ("k2", "k4") for figure in ("fvu", "l0", "dead")}
    assert first["k2/l0"] < first["k4/l0"]
    assert tracker[-1] == ("end",)


def test_a_tracker_without_accelerate_is_refused(
    harvests: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "accelerate.tracking", None)
    assert train(harvests, tmp_path / "out", "--site", "resid.0", "--tracker", "mlflow") == 2
    refused(capsys, "tracker mlflow needs accelerate, which is not installed; pip install accelerate")
    assert not (tmp_path / "out").exists()


# several processes


def test_two_processes_make_one_run(harvests: list[str], tmp_path: Path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command = [sys.executable, "-m", "unsleep", "train", *harvests, "--site", "resid.0", "resid.1", "--k", "2", "4"]
    command += ["--features", "48", "--tokens", "768", "--batch", "64", "--out", str(tmp_path / "out")]
    jobs: list[subprocess.Popen[str]] = []
    for rank in range(2):
        own = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**os.environ, **own, "OMP_NUM_THREADS": "1"}
        jobs.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [job.communicate(timeout=240) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert "resid.1" in said[0][0]
    assert said[1][0] == ""
    assert folders(tmp_path / "out") == {f"{site}/{k}" for site in ("resid.0", "resid.1") for k in ("k2", "k4")}
    assert (tmp_path / "out" / "dictionaries.html").is_file()


# the page


def record_of(sites: Sequence[str], ks: Sequence[int] = (16, 32, 64), **changes: Any) -> dict[str, Any]:
    """A record as a training leaves it; FVU rises with depth and falls with k."""
    rows = [
        {
            "site": site,
            "target": None,
            "variant": f"k{k}" if len(ks) > 1 else "",
            "architecture": "topk",
            "features": 4608,
            "k": k,
            "seed": 0,
            "fvu": (0.1 + 0.004 * i) * (32 / k) ** 0.5,
            "l0": float(k),
            "dead": 0.01,
            "dense": 0.002,
            "density": [0, 1, 4, 2],
            "tokens": 1000,
            "seconds": 2.0,
            **changes,
        }
        for i, site in enumerate(sites)
        for k in ks
    ]
    return {
        "schema": "unsleep.dictionaries/1",
        "model": "0123456789abcdef",
        "activations": "fedcba9876543210",
        "configs": {},
        "density_edges": [-6.0, -4.0, -2.0, -1.0, 0.0],
        "dictionaries": rows,
        "provenance": {"created": "2026-01-01", "command": ["unsleep", "train"]},
    }


def lines(page: str) -> dict[str, list[str]]:
    """Chart → the names of its lines."""
    drawings = re.findall(r'<svg role="img" aria-labelledby="([\w-]+)-t .*?</svg>(?=</figure>)', page, re.DOTALL)
    blocks = re.findall(r'<svg role="img".*?</svg>(?=</figure>)', page, re.DOTALL)
    names = [re.findall(r'class="curve [\w-]+"><title>([^<]*)</title>', b) for b in blocks]
    return dict(zip(drawings, names, strict=True))


def labels(page: str) -> list[list[tuple[float, str]]]:
    """For each chart, the heights and texts of its labels."""
    blocks = re.findall(r'<svg role="img".*?</svg>(?=</figure>)', page, re.DOTALL)
    found = [re.findall(r'<text x="[\d.]+" y="([\d.]+)" class="label [\w-]+">([^<]*)</text>', b) for b in blocks]
    return [[(float(y), name) for y, name in chart] for chart in found]


DEEP = ["embed.0", *(f"{point}.{layer}" for point in ("resid", "attn", "mlp") for layer in range(40))]


@pytest.mark.parametrize("sites", [["resid.8", "resid.12"], ["resid.3"], DEEP])
def test_the_pareto_front_has_a_line_and_a_label_a_site_and_no_two_labels_touch(sites: list[str]):
    page = render_dictionaries(record_of(sites))
    drawn = [name for chart, names in lines(page).items() if chart.startswith("pareto") for name in names]
    assert sorted(drawn) == sorted(sites)
    charts = labels(page)
    assert sorted(n for chart in charts for _, n in chart if "." in n) == sorted(sites)
    assert max(len(chart) for chart in charts) <= curves.MOST
    for chart in charts:
        heights = sorted(y for y, _ in chart)
        assert all(b - a >= curves.GAP - 0.02 for a, b in pairwise(heights))
        assert all(0 < y < curves.HEIGHT for y in heights)


def test_one_setting_has_no_pareto_front_and_a_line_a_point_by_layer():
    page = render_dictionaries(record_of(["resid.0", "resid.1", "mlp.0", "mlp.1"], ks=[32]))
    assert lines(page) == {"layers-all-0": ["resid", "mlp"]}
    assert 'id="pareto"' not in page
    assert lines(render_dictionaries(record_of(["resid.8", "resid.12"], ks=[32]))) == {"layers-resid-0": ["resid"]}


def test_seeds_are_averaged_by_layer():
    found = record_of(["resid.0", "resid.1"], ks=[32])
    twice = [
        {**row, "variant": f"s{s}", "seed": s, "fvu": 0.2 + 0.1 * s} for row in found["dictionaries"] for s in (0, 1)
    ]
    page = render_dictionaries({**found, "dictionaries": twice})
    assert lines(page)["layers-resid-0"] == ["resid"]
    assert page.count("resid.1: FVU 0.250, mean of 2") >= 1


def test_the_pareto_front_joins_what_is_not_beaten():
    dots = [curves.Dot(x, y, "") for x, y in [(1, 5), (2, 6), (2, 4), (3, 4), (4, 1), (1, 7)]]
    assert [(d.x, d.y) for d in curves.pareto(dots)] == [(1, 5), (2, 4), (4, 1)]


@given(st.lists(st.floats(0, 100), max_size=9))
def test_labels_keep_their_order_and_their_distance(wanted: list[float]):
    places = curves.apart(wanted, 10.0, 0.0, 100.0)
    assert len(places) == len(wanted)
    assert all(-1e-6 <= p <= 100 + 1e-6 for p in places)
    pairs = sorted(zip(wanted, places, strict=True))
    assert all(abs(a - b) >= 10 - 1e-6 for i, (_, a) in enumerate(pairs) for _, b in pairs[i + 1 :])
    assert all(a <= b for (x, a), (y, b) in pairwise(pairs) if x < y)
    if all(b - a >= 10 for a, b in pairwise(sorted(wanted))):
        assert places == pytest.approx(wanted, abs=1e-6)


def test_the_page_is_one_file_that_asks_for_nothing_and_holds_every_row():
    page = render_dictionaries(record_of(["resid.8", "mlp.9"], target="attn.9"))
    parsed = Page(page)
    assert not parsed.open
    assert parsed.anchors == {"summary", "pareto", "layers", "table", "provenance"}
    assert not re.findall(r"(?:src|href|action)=\"(?!#|data:,)", page)
    assert not re.findall(r"url\(|@import|https?://(?!www\.w3\.org)", page)
    assert not any(attribute.startswith("on") or attribute == "style" for _, a in parsed.elements for attribute in a)
    assert page.count("<tr data-row") == 6
    assert "resid.8 → attn.9" in page
    assert page.count('class="spark"') == 6


def test_hostile_text_adds_nothing_to_the_page():
    found = record_of(["resid.8", "resid.9"])
    calm = {"variant": "v", "architecture": "a"}
    nasty = dict.fromkeys(calm, HOSTILE)
    provenance = {"command": [HOSTILE], HOSTILE: HOSTILE}
    shapes: list[Counter[tuple[str, ...]]] = []
    for own, rest in ((calm, {"command": ["x"], "y": "z"}), (nasty, provenance)):
        rows = [{**row, **own} for row in found["dictionaries"]]
        page = Page(render_dictionaries({**found, "dictionaries": rows, "model": own["variant"], "provenance": rest}))
        assert not page.open
        shapes.append(page.shapes)
        assert not set("".join(page.prose)) & set("\x00\x1b\x07\u202e\u200b")
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"site": "<b>"}, r"dictionaries\.dictionaries\[0\]\.site: Site '<b>' is unknown"),
        ({"fvu": "low"}, "fvu is 'low'; expected a number, at least 0"),
        ({"l0": -1.0}, "l0 is -1.0; expected a number, at least 0"),
        ({"dead": 2}, "dead is 2; expected a share"),
        ({"density": [1, -1]}, r"density\[1\] is -1"),
        ({"target": "x"}, "target: Site 'x' is unknown"),
    ],
)
def test_a_damaged_record_is_refused_with_its_place(change: dict[str, Any], told: str):
    with pytest.raises(BadInput, match=told):
        render_dictionaries(record_of(["resid.8"], **change))


def test_odd_figures_are_drawn():
    for change in (
        {"l0": 0.0},
        {"fvu": 0.0},
        {"fvu": 1e12, "l0": 1e12},
        {"density": [], "seconds": None, "dense": None},
    ):
        page = render_dictionaries(record_of(["resid.8", "resid.9", "embed"], **change))
        assert "NaN" not in page
        assert "inf" not in re.sub(r"<style>.*</script>", "", page, flags=re.DOTALL)
    assert Page(render_dictionaries({**record_of([]), "dictionaries": []})).anchors == {"summary", "provenance"}


def test_report_draws_the_page_again(harvests: list[str], tmp_path: Path, capsys: Capture):
    out = tmp_path / "out"
    assert train(harvests, out, "--site", "resid.0", "resid.1", "--k", "2", "4") == 0
    first = (out / "dictionaries.html").read_text(encoding="utf-8")
    assert lines(first)["pareto-resid-0"] == ["resid.0", "resid.1"]
    (out / "dictionaries.html").unlink()
    capsys.readouterr()
    assert cli.run(["report", str(out)]) == 0
    assert str(out / "dictionaries.html") in capsys.readouterr().out
    assert (out / "dictionaries.html").read_text(encoding="utf-8") == first
    (out / "dictionaries.json").write_text("{", encoding="utf-8")
    assert cli.run(["report", str(out)]) == 2
    refused(capsys, r"dictionaries\.json is not valid JSON")
