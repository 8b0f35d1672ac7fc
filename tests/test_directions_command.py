"""`unsleep directions`: two files of prompts become figures, tensors, a page and, where asked for, an edit."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.angles import principal_angles
from support.checks import as_in_use
from support.dictionaries import dictionary
from support.pages import HOSTILE, Page
from unsleep import cli
from unsleep.activations.collect import collect
from unsleep.base import records, store
from unsleep.core import BadInput, Site
from unsleep.dictionaries.files import save_dictionary
from unsleep.interventions.files import load_edit
from unsleep.interventions.intervention import applied
from unsleep.interventions.subspaces import Projection
from unsleep.judge.evaluate import prompt_digests
from unsleep.locate.directions.erase import erasers, removed_alone, spanned
from unsleep.locate.directions.files import load_directions, write_directions
from unsleep.locate.directions.fit import METHODS
from unsleep.locate.directions.study import DAS, FEATURES, Study, StudyConfig, study
from unsleep.models.load import load_model, save_plain
from unsleep.models.model import LoadedModel
from unsleep.pages.directions import render_directions
from unsleep.prompts.prompt import Prompt, PromptSet

SMALL: dict[str, Any] = {"randoms": 20, "das_epochs": 2, "das_sites": 1, "cost_passages": 3, "cost_randoms": 2}
WORDS = ["sun", "moon", "tree", "bird", "fish", "stone", "river", "cloud", "house", "wind", "lamp", "road"]
SUSPICIOUS, ORDINARY = (
    PromptSet(name, tuple(Prompt(f"{w} and {w[::-1]}{tail}") for w in WORDS), "edit")
    for name, tail in (("suspicious", " !!|x|!!"), ("ordinary", ""))
)
NEUTRAL = PromptSet("neutral", tuple(Prompt(f"{w} {w}") for w in WORDS), "edit")
PASSAGES = [f"{w} is a word among many other words that are here" for w in WORDS]
SITES = [Site(0), Site(1), Site(2), Site(1, "mlp")]


def found_in(model: LoadedModel, **change: Any) -> Study:
    config = StudyConfig(**{**SMALL, **change.pop("config", {})})
    arguments: dict[str, Any] = {"neutral": NEUTRAL, "texts": PASSAGES, **change}
    return study(model, SUSPICIOUS, ORDINARY, arguments.pop("sites", SITES), config, **arguments)


def test_a_study_holds_every_method_at_every_site(tiny: LoadedModel):
    found = found_in(tiny, dictionaries=[dictionary(tiny)], config={"methods": (*METHODS, "das-1", "das-2")})
    at = {(f.direction.site, f.direction.space, f.direction.method) for f in found.found}
    for site in SITES:
        for method in METHODS:
            assert (site, "residual", method) in at
    assert {method for site, space, method in at if (site, space) == (Site(1), "features")} == set(METHODS)
    assert {site for site, space, _ in at if space == "features"} == {Site(1)}
    trained = {site for site, _, method in at if method == "das-2"}
    assert len(trained) == 1
    assert {f.direction.rank for f in found.found if f.direction.method == "das-2"} == {2}
    assert set(found.floors) == {*((s, "residual") for s in SITES), (Site(1), "features")}
    names = {*METHODS, *(f"{FEATURES}{m}" for m in METHODS)}
    assert set(found.carried[Site(1)]) - set(DAS) == names
    assert set(found.costs) == {"mean", "resample"}
    assert set(found.costs["mean"].increase) == set(found.stream[found.best])
    assert 1 <= found.pairs <= 4
    kept = [f for f in found.found if f.direction.method == "mean_difference" and f.direction.site == Site(2)]
    assert kept[0].figures.n == 8
    assert kept[0].figures.auroc > 0.8  # the two groups end in other bytes of context


def test_a_study_says_whether_detection_says_anything(tiny: LoadedModel):
    found = found_in(tiny, config={"pairs": 0, "cost_passages": 0})
    best = max(f.figures.auroc for f in found.found if f.direction.method != "random")
    over = {key: floor._replace(best=best) for key, floor in found.floors.items()}
    assert not dataclasses.replace(found, floors=over).beats_chance
    under = {key: floor._replace(best=best - 0.01) for key, floor in found.floors.items()}
    assert dataclasses.replace(found, floors=under).beats_chance
    record = dataclasses.replace(found, floors=over).record({})
    assert "detection is uninformative here" in render_directions(record)


def test_kept_prompts_are_not_fitted_on(tiny: LoadedModel):
    found = found_in(tiny, config={"methods": ("mean_difference",), "pairs": 0, "cost_passages": 0})
    again = PromptSet(
        "suspicious", tuple(Prompt(p.text + "?") if i % 3 == 2 else p for i, p in enumerate(SUSPICIOUS)), "edit"
    )
    config = StudyConfig(**{**SMALL, "methods": ("mean_difference",), "pairs": 0, "cost_passages": 0})
    other = study(tiny, again, ORDINARY, SITES, config)
    for a, b in zip(found.found, other.found, strict=True):
        torch.testing.assert_close(a.direction.vector, b.direction.vector, atol=1e-4, rtol=1e-3)
    assert found.carried == {}
    assert found.costs == {}
    without = found_in(tiny, neutral=None, config={"pairs": 0, "cost_passages": 0})
    assert not {f.direction.method for f in without.found} & {"positive_side", "negative_side", *DAS}


def test_all_tokens_and_replies_can_be_taken(tiny: LoadedModel):
    few = {"methods": ("mean_difference", "pca"), "pairs": 0, "cost_passages": 0}
    everything = found_in(tiny, config={**few, "position": "all"})
    assert everything.found[0].figures.n > 8
    told = found_in(tiny, config={**few, "position": "reply", "reply_tokens": 2})
    assert told.found[0].figures.n >= 8
    assert found_in(tiny, config={**few, "position": "-2"}).found[0].figures.n == 8


def test_a_projection_of_the_found_subspace_is_an_edit(tiny: LoadedModel):
    found = found_in(tiny, config={"pairs": 0, "cost_passages": 0})
    for rank in (1, 2):
        made = found.projections(rank, SITES)
        assert [(p.site, len(p.basis), p.model) for p in made] == [(s, rank, tiny.fingerprint) for s in SITES]
        for p in made:
            first = found.stream[p.site]["mean_difference"].vector
            assert float(principal_angles(first, p.basis)[0]) < 1e-3
    with applied(tiny, found.projections(1, SITES)) as network:
        assert torch.isfinite(network(torch.tensor([[5, 6, 7]])).logits).all()
    with pytest.raises(BadInput, match=r"resid\.7 was not studied; expected one of resid\.0, mlp\.1"):
        found.projections(1, [Site(7)])
    with pytest.raises(BadInput, match=r"a subspace of rank 30 was asked for at resid\.0; the methods mean_difference"):
        found.projections(30, SITES)


def test_erasers_take_suspicious_tokens_to_the_ordinary_mean_and_leave_the_ordinary_alone(tiny: LoadedModel):
    sites = [Site(1), Site(2, "mlp")]
    both = PromptSet("both", (*SUSPICIOUS, *ORDINARY), "edit")
    made = erasers(tiny, SUSPICIOUS, ORDINARY, PASSAGES, sites)
    assert [(e.site, len(e.basis), math.isinf(e.sink_norm)) for e in made] == [
        (sites[0], 1, False),
        (sites[1], 1, True),
    ]
    for e in made:
        assert e.center is not None
        before = collect(tiny, both, [e.site])[e.site].tensor
        with applied(tiny, e):
            after = collect(tiny, both, [e.site])[e.site].tensor
        gap = (before[:12].mean(0) - e.center).norm()
        torch.testing.assert_close(after[:12].mean(0), e.center, atol=2e-3 * float(gap), rtol=0)
        with applied(tiny, replace(e, reads=None)):
            upright = collect(tiny, both, [e.site])[e.site].tensor
        moved, upright_moved = ((x - before)[12:].norm(dim=1).mean() for x in (after, upright))
        assert float(moved) < float(upright_moved)
    with pytest.raises(BadInput, match="erasing needs plain passages as well"):
        erasers(tiny, SUSPICIOUS, ORDINARY, [], sites)
    with pytest.raises(BadInput, match=r"the same mean at resid\.1; there is nothing to ablate"):
        erasers(tiny, ORDINARY, ORDINARY, PASSAGES, sites)


def test_what_is_left_is_told_from_the_models_own_replies(tiny: LoadedModel):
    nothing = [Projection(s, torch.eye(32)[:1], None, tiny.fingerprint, sink_norm=1e-9) for s in (Site(0), Site(2))]
    left = removed_alone(tiny, nothing, SUSPICIOUS, ORDINARY, reply_tokens=3, batch=5)
    assert left.before > 0
    assert left.pairs == 12
    assert left.after == {s: pytest.approx(left.before, abs=1e-6) for s in (Site(0), Site(2))}
    same = removed_alone(tiny, nothing[:1], ORDINARY, ORDINARY, reply_tokens=3)
    assert same.before == pytest.approx(0, abs=1e-6)
    made = erasers(tiny, SUSPICIOUS, ORDINARY, PASSAGES, [Site(0), Site(1), Site(2)])
    found = removed_alone(tiny, made, SUSPICIOUS, ORDINARY, reply_tokens=3)
    assert found.after[found.best] == min(found.after.values()) < found.before
    for edits, suspicious in ((made, SUSPICIOUS.head(3)), ([], SUSPICIOUS)):
        with pytest.raises(BadInput, match="expected at least one edit, and pairs"):
            removed_alone(tiny, edits, suspicious, ORDINARY)


def test_rows_span_in_their_order():
    rows = torch.tensor([[2.0, 0, 0], [4.0, 0.01, 0], [1.0, 1, 0], [0, 0, 5.0]])
    torch.testing.assert_close(spanned(rows, 2), torch.eye(3)[:2])
    torch.testing.assert_close(spanned(rows, 3), torch.eye(3))
    assert len(spanned(rows[:2], 2)) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"methods": ("svm",)}, "method 'svm' is unknown; expected one of mean_difference"),
        ({"methods": ()}, "methods are (); expected at least one"),
        ({"methods": ("pca", "pca")}, "and none twice"),
        ({"position": "first"}, "position is 'first'; expected last, all, reply or a whole number"),
        ({"kept": 1}, "kept is 1; expected at least 2"),
        ({"pairs": -1}, "pairs is -1; expected at least 0"),
        ({"randoms": 0}, "randoms is 0; expected at least 1"),
        ({"reply_tokens": 0}, "reply_tokens is 0; expected at least 1"),
    ],
)
def test_settings_that_cannot_be_are_named(change: dict[str, Any], told: str):
    with as_in_use(), pytest.raises(BadInput) as error:
        StudyConfig(**change)
    assert told in str(error.value)


def test_groups_that_cannot_be_studied_are_named(tiny: LoadedModel):
    config = StudyConfig(**SMALL)
    with pytest.raises(BadInput, match="'suspicious' has 3 prompts, of which one in 3 is held out"):
        study(tiny, SUSPICIOUS.head(3), ORDINARY, SITES, config)
    with pytest.raises(BadInput, match=r"a dictionary is at resid\.1, which is not among the Sites"):
        study(tiny, SUSPICIOUS, ORDINARY, [Site(0)], config, dictionaries=[dictionary(tiny)])
    with pytest.raises(BadInput, match=r"same token in all .* With --pairs 0 nothing is patched"):
        study(tiny, ORDINARY, ORDINARY, SITES, config)
    with pytest.raises(BadInput, match=r"12 suspicious and 9 ordinary prompts; expected pairs.* With --pairs 0"):
        study(tiny, SUSPICIOUS, ORDINARY.head(9), SITES, config)
    turned = PromptSet("turned", (*ORDINARY.prompts[1:], ORDINARY.prompts[0]), "edit")
    with pytest.raises(BadInput, match=r"share more words .* such as line 1 with line 12.* With --pairs 0"):
        study(tiny, SUSPICIOUS, turned, SITES, config)
    assert not study(tiny, SUSPICIOUS, turned, SITES, StudyConfig(**{**SMALL, "pairs": 0})).carried
    with pytest.raises(BadInput, match=r"Site resid\.7 is not in the model"):
        study(tiny, SUSPICIOUS, ORDINARY, [Site(7)], StudyConfig(**{**SMALL, "pairs": 0}))


# On disk


def test_saved_directions_are_the_same(tiny: LoadedModel, tmp_path: Path):
    found = found_in(tiny, dictionaries=[dictionary(tiny)], config={"pairs": 0, "cost_passages": 0})
    mine = [f.direction for f in found.found]
    entries = write_directions(mine, tmp_path)
    record = records.plain(found.record({}, entries))
    store.write_json(tmp_path / "directions.json", record)
    again = load_directions(tmp_path)
    for a, b in zip(again, mine, strict=True):
        assert (a.site, a.method, a.space, a.model) == (b.site, b.method, b.space, b.model)
        assert torch.equal(a.vector, b.vector)
        assert torch.equal(a.center, b.center)
    with pytest.raises(BadInput, match="two directions are called"):
        write_directions([mine[0], mine[0]], tmp_path)
    for change, told in (
        ({"space": "ether"}, "space is 'ether'; expected one of residual, features"),
        ({"site": "x"}, "Site 'x' is unknown"),
        ({"name": "none"}, "has no tensor 'none/vector'"),
        ({"method": 3}, "directions[0].method is 3; expected text"),
    ):
        wrong = copy.deepcopy(record)
        wrong["directions"][0].update(change)
        store.write_json(tmp_path / "directions.json", wrong)
        with as_in_use(), pytest.raises(BadInput, match=re.escape(told)):
            load_directions(tmp_path)


# The command


@pytest.fixture
def saved(tiny: LoadedModel, tmp_path: Path) -> Path:
    save_plain(tiny, tmp_path / "model")
    return tmp_path / "model"


def test_the_command_leaves_figures_tensors_a_page_and_an_edit(
    saved: Path, text_file: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    files = [text_file(f"{g.name}.txt", "\n".join(g.texts)) for g in (SUSPICIOUS, ORDINARY, NEUTRAL)]
    loaded = load_model(saved)
    save_dictionary(dictionary(loaded), tmp_path / "dictionary")
    words = ["directions", str(saved), "--suspicious", str(files[0]), "--ordinary", str(files[1]), "--neutral"]
    words += [str(files[2]), "--dictionaries", str(tmp_path / "dictionary"), "--out", str(tmp_path / "out")]
    words += [w for k, v in SMALL.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    assert cli.run([*words, "--project", "2", "--project-sites", "resid.1", "resid.2"]) == 0
    said = capsys.readouterr().out
    for part in ("mean_difference", "features", "AUROC", "cost at", "Random directions cost", "Edit of rank 2"):
        assert part in said
    record = json.loads((tmp_path / "out" / "directions.json").read_text())
    assert {f["site"] for f in record["figures"]} == {"resid.0", "resid.1", "resid.2"}
    assert len(load_directions(tmp_path / "out")) == len(record["directions"])
    edits, chosen_on = load_edit(tmp_path / "out" / "edit")
    assert [(e.site, len(e.basis)) for e in edits if isinstance(e, Projection)] == [(Site(1), 2), (Site(2), 2)]
    assert chosen_on == prompt_digests(SUSPICIOUS, ORDINARY, NEUTRAL)
    with applied(loaded, edits):
        pass
    page = (tmp_path / "out" / "directions.html").read_text()
    Page(page)
    for part in ("AUROC by layer", "Cosine similarity of directions", "Mean ablation", "In feature space"):
        assert part in page
    quick = ["--pairs", "0", "--cost-passages", "0", "--erase", "--project-sites", "resid.1"]
    assert cli.run([*words, *quick]) == 0
    said = capsys.readouterr().out
    assert "Edit of rank 1 at resid.1" in said
    assert "KL from the model's own replies on 4 suspicious prompts, one direction ablated at resid.1: " in said
    [eraser], _ = load_edit(tmp_path / "out" / "edit")
    assert isinstance(eraser, Projection)
    assert eraser.reads is not None
    assert cli.run([*words, *quick[:5]]) == 0  # no Site is named: the best of all
    erased = json.loads((tmp_path / "out" / "directions.json").read_text())["erased"]
    assert erased["after"].keys() == {"resid.0", "resid.1", "resid.2"}
    [best], _ = load_edit(tmp_path / "out" / "edit")
    assert str(best.site) == min(erased["after"], key=erased["after"].get)
    page = (tmp_path / "out" / "directions.html").read_text()
    Page(page)
    assert 'id="erased"' in page
    assert "one direction ablated, layer 2" in page
    assert cli.run([*words, "--json", "--sites", "mlp.1"]) == 2
    assert "out/edit is an edit of an earlier run; choose another --out" in capsys.readouterr().err
    assert (tmp_path / "out" / "edit" / "edit.json").is_file()
    assert cli.run([*words, "--json", "--sites", "mlp.1", "--erase"]) == 2
    assert "which is not among the Sites" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--sites", "resid.9"], "Site resid.9 is not in the model: it has layers 0 to 2"),
        (["--sites", "middle"], "Site 'middle' is unknown"),
        (["--position", "900", "--pairs", "0"], "position 900 is not in every prompt"),
        (["--project", "31", "--pairs", "0", "--cost-passages", "0"], "a subspace of rank 31 was asked for"),
        (["--ordinary", "none.txt"], "none.txt does not exist"),
        (["--project", "1", "--erase"], "--project and --erase were both given"),
    ],
)
def test_what_the_command_cannot_do_is_named(
    saved: Path,
    text_file: Callable[[str, str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    told: str,
):
    files = [text_file(f"{g.name}.txt", "\n".join(g.texts)) for g in (SUSPICIOUS, ORDINARY)]
    words = ["directions", str(saved), "--suspicious", str(files[0]), "--ordinary", str(files[1])]
    words += ["--out", str(tmp_path / "out"), "--das-epochs", "1", "--das-sites", "1", "--randoms", "5"]
    assert cli.run([*words, *change]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.run([*words, "--methods", "svm"]) == 2  # refused before anything is loaded
    assert capsys.readouterr().err.startswith("unsleep: method 'svm' is unknown; expected one of mean_difference,")
    assert cli.run([*words, "--kept=1"]) == 2
    assert capsys.readouterr().err == "unsleep: --kept is 1; expected at least 2\n"


# The page


def record_of(tiny: LoadedModel) -> dict[str, Any]:
    found = found_in(tiny, dictionaries=[dictionary(tiny)])
    return records.plain(found.record({"seed": 0}))


def test_the_page_says_the_same_whatever_is_in_the_record_and_asks_for_nothing(tiny: LoadedModel):
    record = record_of(tiny)
    plain = Page(render_directions(record))
    hostile = copy.deepcopy(record)
    hostile["model"] = hostile["position"] = HOSTILE
    hostile["cosines"]["names"] = [HOSTILE] * len(hostile["cosines"]["names"])
    for f in hostile["figures"]:
        f["method"] = HOSTILE + f["method"]
    page = Page(render_directions(hostile))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style")]


def test_sections_without_figures_are_left_out(tiny: LoadedModel):
    record = record_of(tiny)
    record["costs"], record["patching"] = {}, {"pairs": 0, "carried": {}}
    record["cosines"] = {"names": [], "values": []}
    page = render_directions(record)
    assert 'id="detection"' in page
    for anchor in ("costs", "carried", "cosines"):
        assert f'id="{anchor}"' not in page


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": "unsleep.directions/9"}, "schema"),
        ({"best": "nowhere"}, "best"),
        ({"figures": [{}]}, "figures"),
        ({"floors": None}, "floors"),
        ({"patching": {"pairs": 1, "carried": {"x": {}}}}, "carried"),
        ({"costs": {"mean": {"loss": -1.0}}}, "loss"),
        ({"costs": {"mean": {"loss": float("nan")}}}, "costs"),
    ],
)
def test_a_record_of_another_form_is_named(tiny: LoadedModel, change: dict[str, Any], told: str):
    with pytest.raises(BadInput, match=told):
        render_directions({**record_of(tiny), **change})
