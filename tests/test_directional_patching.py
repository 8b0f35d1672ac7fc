"""Directional patching and what ablation costs: the laws hold, and batches equal one prompt at a time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from support.checks import as_in_use
from unsleep.activations.collect import collect
from unsleep.base.context import reporting
from unsleep.core import BadInput, Site
from unsleep.locate.directions import cost, das, patching
from unsleep.locate.directions.fit import Direction, Labelled, fit
from unsleep.models.model import LoadedModel
from unsleep.models.sites import all_sites
from unsleep.models.streams import capture, transformed
from unsleep.prompts.prompt import Prompt, PromptSet

CLEAN = ("hello there you", "a cat", "why do the stars shine", "name a bird", "b c")
CORRUPTED = ("good morning", "a hat or two", "how do fish sleep at all", "tell a joke", "q")
SITES = [Site(0, "embed"), Site(0), Site(1), Site(2), Site(1, "attn"), Site(2, "mlp")]


def prompts(texts: tuple[str, ...]) -> PromptSet:
    return PromptSet("p", tuple(Prompt(t) for t in texts), "edit")


def answers(n: int = 5) -> tuple[list[int], list[int]]:
    return [10 + i for i in range(n)], [40 + 2 * i for i in range(n)]


def sites_of(model: LoadedModel) -> list[Site]:
    """Those of the Sites that the family has."""
    return [site for site in SITES if site in [Site(0, "embed"), *all_sites(model.network)]]


def prepared(model: LoadedModel, **change: Any) -> patching.Pairs:
    arguments = {"answers": answers(), "batch": 2, **change}
    return patching.prepare(model, prompts(CLEAN), prompts(CORRUPTED), sites_of(model), **arguments)


def directed(site: Site, rows: torch.Tensor, model: str = "m") -> Direction:
    return Direction(rows, site, "x", model, "residual", torch.zeros(rows.shape[1]))


BASIS = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(3))).Q.T


def one_by_one(model: LoadedModel, site: Site, basis: torch.Tensor | None, column: int = -1) -> list[float]:
    """Logit differences by whole forward passes without cache, padding or batches."""
    clean, corrupted = (model.encode(prompts(t)) for t in (CLEAN, CORRUPTED))
    found: list[float] = []
    for a, b, good, bad in zip(clean, corrupted, *answers(), strict=True):
        with capture(model.network, [site]) as held:
            model.network(input_ids=torch.tensor([a]), use_cache=False)
        donor = held[site][0, column]

        def patch(x: torch.Tensor, donor: torch.Tensor = donor) -> torch.Tensor:
            new = x.clone()
            change = donor - x[0, column]
            new[0, column] += change if basis is None else basis.T @ (basis @ change)
            return new

        with transformed(model.network, {site: patch}):
            logits = model.network(input_ids=torch.tensor([b]), use_cache=False).logits[0, -1]
        found.append(float(logits[good] - logits[bad]))
    return found


def sorted_back(pairs: patching.Pairs) -> list[int]:
    """The pairs' places in the order in which they were run: by the corrupted prompts' length."""
    lengths = [len(row) for row in pairs.model.encode(prompts(CORRUPTED))]
    return sorted(range(len(lengths)), key=lambda i: lengths[i])


@pytest.mark.parametrize("column", [-1, -3])
def test_a_patch_equals_whole_forward_passes_one_by_one(any_family: LoadedModel, column: int):
    pairs = prepared(any_family, position="last" if column == -1 else column)
    for site, basis in itertools.product(pairs.sites, (BASIS, None)):
        found = patching.patched(pairs, site, basis)
        expected = one_by_one(any_family, site, basis, column)
        torch.testing.assert_close(found, torch.tensor([expected[i] for i in sorted_back(pairs)]), atol=2e-3, rtol=1e-3)


def test_a_prompt_patched_with_itself_stays_bit_for_bit(any_family: LoadedModel):
    clean, corrupted = prompts((*CORRUPTED, "x")), prompts((*CORRUPTED, "y"))  # all the same but one
    pairs = patching.prepare(any_family, clean, corrupted, sites_of(any_family), answers=answers(6), batch=6)
    [batch] = pairs.batches
    same = batch.answers[:, 0] != answers(6)[0][5]
    assert int(same.sum()) == 5
    routed = any("expert" in name for name, _ in any_family.network.named_modules())
    for site, basis in itertools.product(pairs.sites, (BASIS, None)):
        found = patching.patched(pairs, site, basis)[same]
        if routed:  # an expert's tokens are multiplied together, and as many as there are
            torch.testing.assert_close(found, batch.corrupted[same], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(found, batch.corrupted[same])


def test_patching_the_whole_last_residual_gives_the_clean_answer(any_family: LoadedModel):
    pairs = prepared(any_family)
    found = patching.patched(pairs, Site(2), None)
    torch.testing.assert_close(found, torch.cat([b.clean for b in pairs.batches]), atol=1e-3, rtol=1e-3)
    assert pairs.recovered(found) == pytest.approx(1.0, abs=1e-3)
    assert pairs.recovered(torch.cat([b.corrupted for b in pairs.batches])) == pytest.approx(0.0, abs=1e-9)


def test_a_full_basis_is_the_whole_stream_and_complements_add_up_at_the_end(tiny: LoadedModel):
    pairs = prepared(tiny)
    whole = patching.patched(pairs, Site(1), None)
    torch.testing.assert_close(patching.patched(pairs, Site(1), torch.eye(32)), whole, atol=1e-4, rtol=1e-4)
    turned = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    torch.testing.assert_close(patching.patched(pairs, Site(1), turned), whole, atol=1e-4, rtol=1e-4)
    part = patching.patched(pairs, Site(1), turned[:7])
    assert not torch.allclose(part, whole, atol=1e-3)


def test_patching_all_tokens_takes_over_the_whole_prompt(tiny: LoadedModel):
    clean, corrupted = ("hello", "a cat", "birds"), ("world", "a hat", "bells")
    pairs = patching.prepare(tiny, prompts(clean), prompts(corrupted), [Site(0)], answers=answers(3), position="all")
    found = patching.patched(pairs, Site(0), None)
    torch.testing.assert_close(found, torch.cat([b.clean for b in pairs.batches]), atol=1e-4, rtol=1e-4)


def test_a_sweep_gives_a_share_for_every_direction_and_site(tiny: LoadedModel):
    pairs = prepared(tiny)
    directions = {s: {"one": directed(s, BASIS[:1]), "two": directed(s, BASIS)} for s in (Site(0), Site(2))}
    seen: list[tuple[int, int]] = []
    with reporting(lambda _, done, total: seen.append((done, total))):
        found = patching.sweep(pairs, directions)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for site, named in directions.items():
        for name, d in named.items():
            assert found[site][name] == pairs.recovered(patching.patched(pairs, site, d.vector))


def test_the_models_own_next_tokens_are_the_answers_and_equal_ones_are_left_out(tiny: LoadedModel):
    pairs = patching.prepare(tiny, prompts((*CLEAN, "same")), prompts((*CORRUPTED, "same")), [Site(1)])
    rows = [tiny.encode(prompts(t)) for t in ((*CLEAN, "same"), (*CORRUPTED, "same"))]
    firsts = [[int(tiny.network(torch.tensor([r])).logits[0, -1].argmax()) for r in side] for side in rows]
    differ = {(a, b) for a, b in zip(*firsts, strict=True) if a != b}
    assert {tuple(a) for b in pairs.batches for a in b.answers.tolist()} == differ
    assert len(pairs) == sum(a != b for a, b in zip(*firsts, strict=True))
    with pytest.raises(BadInput, match="the same token in all 5 pairs; there is no difference to carry"):
        patching.prepare(tiny, prompts(CLEAN), prompts(CLEAN), [Site(1)])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"clean": prompts(CLEAN[:3])}, "3 clean and 5 corrupted prompts at 6 Sites"),
        ({"sites": []}, "at 0 Sites; expected pairs, and at least one Site"),
        ({"sites": [Site(7)]}, "Site resid.7 is not in the model: it has layers 0 to 2"),
        ({"answers": ([1, 2], [3, 4])}, "2 answers for 5 prompts; expected one each"),
        ({"answers": ([1, 2, 3, 4, 999], [5] * 5)}, "answer token 999 is not in the vocabulary; expected 0 to 255"),
        ({"answers": ([1, 2, 3, 4, -1], [5] * 5)}, "answer token -1 is not in the vocabulary"),
        ({"position": "all"}, "to patch all tokens, pairs must be of equal length"),
        ({"position": 3}, "position 3 cannot be patched; expected -1 (the last token) to -"),
        ({"position": -999}, "position -999 cannot be patched"),
    ],
)
def test_pairs_that_cannot_be_patched_are_named(tiny: LoadedModel, change: dict[str, Any], told: str):
    given = {"clean": prompts(CLEAN), "corrupted": prompts(CORRUPTED), "sites": SITES, "answers": answers(), **change}
    ordered = [given.pop(name) for name in ("clean", "corrupted", "sites")]
    with as_in_use(), pytest.raises(BadInput) as error:
        patching.prepare(tiny, *ordered, **given)
    assert told in str(error.value)


def test_patches_that_do_not_fit_are_named(tiny: LoadedModel):
    pairs = prepared(tiny)
    with as_in_use(), pytest.raises(BadInput, match=r"Site attn\.0 was not prepared"):
        patching.patched(pairs, Site(0, "attn"), BASIS)
    with as_in_use(), pytest.raises(BadInput, match=r"a basis of width 9 at resid\.1; the model's is 32"):
        patching.patched(pairs, Site(1), torch.eye(9))
    features = Direction(BASIS[:1], Site(1), "x", "m", "features", torch.zeros(32))
    with pytest.raises(BadInput, match="is in feature space; decode it first"):
        patching.sweep(pairs, {Site(1): {"f": features}})
    labelled = Labelled(torch.randn(4, 32), torch.tensor([True, False, True, False]))
    with pytest.raises(BadInput, match="5 pairs with different answers for a subspace of rank 6; expected"):
        das.das(pairs, Site(1), labelled, das.DasConfig(rank=6))


def test_das_on_a_model_carries_more_than_it_started_with(tiny: LoadedModel):
    pairs = prepared(tiny, answers=([10] * 5, [40] * 5))
    both = PromptSet("p", (*prompts(CLEAN), *prompts(CORRUPTED)), "edit")
    x = collect(tiny, both, [Site(1)])[Site(1)].tensor
    labelled = Labelled(x, torch.arange(10) < 5)
    start = fit(labelled, "random", site=Site(1), model="m").vector
    found = das.das(pairs, Site(1), labelled, das.DasConfig(epochs=40, learning_rate=1e-2), start=start)
    assert found.rank == 1
    assert found.model == tiny.fingerprint

    def moved(basis: torch.Tensor) -> float:
        return float(patching.patched(pairs, Site(1), basis).mean())

    assert moved(found.vector) > moved(start) + 0.1


# What ablation costs


TEXTS = tuple(f"{i} quick brown foxes jump over {9 - i} lazy dogs" for i in range(6))


def test_mean_ablation_costs_what_a_forward_pass_with_it_costs(tiny: LoadedModel):
    direction = directed(Site(1), BASIS)
    found = cost.ablation_cost(tiny, {"d": direction}, TEXTS, randoms=3, tokens=16)
    ids = torch.tensor([row[:16] for row in tiny.token_ids(TEXTS)])
    held: list[torch.Tensor] = []

    def loss(logits: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits[:, 7:-1].flatten(0, 1), ids[:, 8:].flatten()))

    with transformed(tiny.network, {Site(1): lambda x: held.append(x) or x}):
        whole = loss(tiny.network(ids).logits)
    mean = held[0].flatten(0, 1).mean(0)
    with transformed(tiny.network, {Site(1): lambda x: x - ((x - mean) @ BASIS.T) @ BASIS}):
        ablated = loss(tiny.network(ids).logits)
    assert found.loss == pytest.approx(whole, abs=1e-4)
    assert found.increase["d"] == pytest.approx(ablated - whole, abs=1e-4)
    assert found.tokens == 6 * 8
    assert {rank: len(v) for rank, v in found.random.items()} == {2: 3}


@pytest.mark.parametrize("site", [Site(0, "embed"), Site(1, "attn"), Site(2, "mlp"), Site(2)], ids=str)
def test_resampling_at_any_site_is_the_same_every_time(tiny: LoadedModel, site: Site):
    def of(seed: int) -> cost.Cost:
        direction = {"d": directed(site, BASIS)}
        return cost.ablation_cost(tiny, direction, TEXTS, ablation="resample", tokens=16, randoms=2, seed=seed)

    assert of(0) == of(0)
    assert of(0).increase != of(1).increase
    assert of(0).loss == pytest.approx(of(1).loss, abs=1e-6)
    assert of(0).increase["d"] != 0


def test_what_has_no_cost_is_named(tiny: LoadedModel):
    d = directed(Site(1), BASIS)
    for change, told in (
        ({"directions": {}}, "directions at 0 Sites; expected one Site"),
        ({"directions": {"a": d, "b": directed(Site(2), BASIS)}}, "directions at 2 Sites"),
        ({"ablation": "zero"}, "ablation is 'zero'; expected one of"),
        ({"tokens": 500}, "no plain passage has 500 tokens"),
        ({"texts": []}, "no plain passage has 32 tokens"),
    ):
        arguments: dict[str, Any] = {"directions": {"a": d}, "texts": TEXTS, **change}  # type: ignore[dict-item]
        with as_in_use(), pytest.raises(BadInput, match=told):
            cost.ablation_cost(tiny, arguments.pop("directions"), arguments.pop("texts"), **arguments)
