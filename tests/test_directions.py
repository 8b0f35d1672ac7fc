"""Directions: every method finds what was planted, the measures equal their definitions, and bad input is named."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from support.angles import principal_angles
from support.checks import as_in_use
from unsleep.activations.collect import collect
from unsleep.core import BadInput, Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.locate.directions import das, leace, measure
from unsleep.locate.directions.fit import (
    ANY_RANK,
    METHODS,
    ONE_SIDED,
    Direction,
    Labelled,
    components,
    decoded,
    fit,
    oriented,
)
from unsleep.locate.directions.study import Found, best_site
from unsleep.models.model import LoadedModel
from unsleep.models.streams import capture
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet

SITE = Site(1)
FINDING = tuple(m for m in METHODS if m not in ("random", *ONE_SIDED))


def planted(n: int = 120, d: int = 24, gap: float = 6.0, seed: int = 0) -> tuple[Labelled, torch.Tensor]:
    """Two Gaussian classes apart along one direction, off the origin, and that direction."""
    g = torch.Generator().manual_seed(seed)
    v = torch.nn.functional.normalize(torch.randn(d, generator=g), dim=0)
    y = torch.arange(n) % 2 == 0
    x = torch.randn(n, d, generator=g) + 3.0 + gap * y[:, None] * v
    return Labelled(x, y, torch.randn(n, d, generator=g) + 3.0 + 0.5 * gap * v), v


def run_fit(labelled: Labelled, method: str, rank: int = 1, seed: int = 0) -> Direction:
    return fit(labelled, method, site=SITE, model="m", rank=rank, seed=seed)


# Fitting


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
def test_every_method_finds_a_planted_direction(method: str):
    labelled, v = planted(400)
    if method == "lat":  # the planted direction must be what the pairs' differences vary along
        labelled = Labelled(labelled.x, labelled.y)
    found = run_fit(labelled, method)
    assert found.vector.shape == (1, 24)
    assert float(found.vector[0] @ v) > 0.9
    assert float(found.vector.norm()) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(found.center, labelled.x.mean(0))


@pytest.mark.parametrize("method", FINDING)
def test_swapping_the_labels_turns_a_direction_round(method: str):
    labelled, _ = planted()
    there, back = run_fit(labelled, method), run_fit(Labelled(labelled.x, ~labelled.y), method)
    assert float(there.vector[0] @ back.vector[0]) < -0.9


@given(st.integers(0, 1000))
def test_the_mean_difference_equals_its_definition(seed: int):
    labelled, _ = planted(n=20, d=5, seed=seed)
    positive = [x for x, y in zip(labelled.x, labelled.y, strict=True) if y]
    negative = [x for x, y in zip(labelled.x, labelled.y, strict=True) if not y]
    gap = sum(positive) / len(positive) - sum(negative) / len(negative)
    expected = gap / gap.norm()  # type: ignore[union-attr]
    torch.testing.assert_close(run_fit(labelled, "mean_difference").vector[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run_fit(labelled, "cluster_mean").vector[0], expected, rtol=1e-4, atol=1e-5)


def test_one_sided_directions_equal_their_definition_and_need_neutral_tokens():
    labelled, _ = planted()
    assert labelled.neutral is not None
    neutral = labelled.neutral.mean(0)
    for method, gap in (
        ("positive_side", labelled.x[labelled.y].mean(0) - neutral),
        ("negative_side", neutral - labelled.x[~labelled.y].mean(0)),
    ):
        torch.testing.assert_close(run_fit(labelled, method).vector[0], gap / gap.norm(), rtol=1e-4, atol=1e-5)
        with pytest.raises(BadInput, match="needs neutral tokens"):
            run_fit(Labelled(labelled.x, labelled.y), method)


def test_the_logistic_direction_is_the_classifiers_coefficients():
    labelled, _ = planted(gap=2.0)
    centred = labelled.x - labelled.x.mean(0)
    x = centred * (math.sqrt(24) / float(centred.norm(dim=1).mean()))
    row = torch.tensor(LogisticRegression(solver="liblinear", max_iter=1000).fit(x.numpy(), labelled.y.numpy()).coef_)
    cosine = torch.nn.functional.cosine_similarity(row[0].float(), run_fit(labelled, "logistic").vector[0], dim=0)
    assert float(cosine) > 0.9999


@pytest.mark.parametrize(("n", "d"), [(40, 12), (12, 40)])
def test_components_are_those_of_a_singular_value_decomposition(n: int, d: int):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(3))
    right = torch.linalg.svd(x.double(), full_matrices=False).Vh[:4]
    torch.testing.assert_close((components(x, 4) @ right.T).abs(), torch.eye(4).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ANY_RANK)
def test_a_subspace_has_orthonormal_rows_whose_first_is_the_mean_difference_within_it(method: str):
    labelled, _ = planted()
    found = run_fit(labelled, method, rank=4)
    torch.testing.assert_close(found.vector @ found.vector.T, torch.eye(4), atol=1e-5, rtol=0)
    seen = found.vector @ labelled.gap
    assert float(seen[0]) > 0
    assert float(seen[1:].abs().max()) < 1e-4 * float(seen[0])


def test_orientation_keeps_the_span():
    labelled, _ = planted()
    rows = torch.randn(3, 24, generator=torch.Generator().manual_seed(5))
    angles = principal_angles(rows, oriented(rows, labelled))
    assert float(angles.max()) < 1e-5


def test_a_seed_gives_the_same_direction_and_another_seed_another():
    labelled, _ = planted()
    for method in ("random", "lat", "kmeans"):
        assert torch.equal(run_fit(labelled, method, seed=1).vector, run_fit(labelled, method, seed=1).vector)
    assert not torch.equal(run_fit(labelled, "random", seed=1).vector, run_fit(labelled, "random", seed=2).vector)


X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([True, False] * 3)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Labelled(X, torch.ones(6, dtype=torch.bool)), "6 of 6 labels are positive; expected tokens of both"),
        (lambda: Labelled(X, torch.zeros(6, dtype=torch.bool)), "0 of 6 labels are positive"),
        (lambda: Labelled(X, Y[:4]), "labels [4]; expected [token, d] and one label per token"),
        (lambda: Labelled(X / 0, Y), "labelled activations has 24 NaN or infinite values"),
        (lambda: Labelled(X, Y, X[:, :3]), "neutral activations have shape [6, 3]"),
        (lambda: Labelled(X, Y, X[:0]), "neutral activations have shape [0, 4]"),
        (lambda: Labelled.of(X, X[:, :3]), "classes of width 4 and 3"),
        (lambda: run_fit(Labelled(X, Y), "svm"), "method 'svm' is unknown; expected one of mean_difference"),
        (lambda: run_fit(Labelled(X, Y), "pca", rank=5), "rank 5; expected 1 to 4"),
        (lambda: run_fit(Labelled(X, Y), "pca", rank=0), "rank 0; expected 1 to 4"),
        (lambda: run_fit(Labelled(X, Y), "mean_difference", rank=2), "rank 2; expected 1"),
        (lambda: run_fit(Labelled(X, Y), "lat", rank=3), "3 pairs for 3 directions of LAT; expected at least 4"),
        (lambda: run_fit(Labelled(X[:3], Y[:3]), "pca", rank=3), "3 tokens for 3 principal components"),
        (lambda: run_fit(Labelled(torch.ones(6, 4), Y), "mean_difference"), "the classes have the same mean"),
        (lambda: run_fit(Labelled(torch.ones(6, 4), Y), "leace"), "the two classes have the same mean"),
        (lambda: leace.fit_eraser(X, Y, shrinkage=2.0), "shrinkage is 2.0; expected 0 to 1"),
        (lambda: leace.fit_eraser(X, ~Y & Y), "0 of 6 labels are positive"),
        (lambda: Direction(X[:2], SITE, "x", "m", "residual", X[0]), "rows that are not orthonormal"),
        (lambda: Direction(torch.eye(4), SITE, "x", "m", "residual", X[0, :3]), "center has shape [3]; expected [4]"),
        (lambda: measure.auroc(X[:, 0], Y | ~Y), "6 of 6 labels are positive"),
        (lambda: measure.auroc(X[:5, 0], Y), "5 scores with 6 labels"),
        (lambda: measure.random_floor(Labelled(X, Y), Labelled(X, Y), 0), "0 random directions were asked for"),
    ],
)
def test_bad_input_is_named(make: Callable[[], object], told: str):
    with as_in_use(), pytest.raises(BadInput) as error:
        make()
    assert told in str(error.value)


# Erasing


def test_leace_leaves_a_linear_probe_at_chance():
    labelled, _ = planted(300, gap=3.0)
    probe = LogisticRegression(max_iter=1000)
    before = probe.fit(labelled.x.numpy(), labelled.y.numpy()).score(labelled.x.numpy(), labelled.y.numpy())
    erased = leace.fit_eraser(labelled.x, labelled.y)(labelled.x)
    probe.fit(erased.numpy(), labelled.y.numpy())
    assert before > 0.9
    assert abs(float(probe.coef_.max())) < 1e-3  # the best linear probe is the constant
    scores = torch.tensor(probe.decision_function(erased.numpy()))
    assert float((scores > scores.median()).eq(labelled.y).float().mean()) < 0.65
    fresh, _ = planted(300, gap=3.0, seed=0)
    held = leace.fit_eraser(fresh.x[:150], fresh.y[:150])(fresh.x[150:])
    probe.fit(held[:75].numpy(), fresh.y[150:225].numpy())
    assert probe.score(held[75:].numpy(), fresh.y[225:].numpy()) < 0.65


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, None])
@pytest.mark.parametrize(("n", "d"), [(60, 8), (16, 40)])
def test_after_erasing_the_classes_have_one_mean_and_erasing_again_changes_nothing(
    n: int, d: int, shrinkage: float | None
):
    labelled, _ = planted(n, d)
    erase = leace.fit_eraser(labelled.x, labelled.y, shrinkage=shrinkage)
    once = erase(labelled.x)
    torch.testing.assert_close(once[labelled.y].mean(0), once[~labelled.y].mean(0), atol=2e-4, rtol=0)
    torch.testing.assert_close(erase(once), once, atol=2e-4, rtol=1e-4)


def test_leace_equals_its_definition_with_matrix_roots():
    labelled, _ = planted(200, 8)
    x, z = labelled.x.double(), labelled.y.double()
    centred, z = x - x.mean(0), z - z.mean()
    covariance, cross = centred.T @ centred / len(x), centred.T @ z / len(x)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    inside = (root @ cross)[:, None]
    onto = inside @ torch.linalg.pinv(inside)
    expected = x - centred @ (torch.linalg.inv(root) @ onto @ root).T
    found = leace.fit_eraser(labelled.x, labelled.y, shrinkage=0.0)(labelled.x)
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)


def test_leace_moves_tokens_less_than_taking_the_mean_difference_out():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(400, 10, generator=g) * torch.linspace(0.3, 4, 10)
    y = torch.arange(400) % 2 == 0
    x = x + y[:, None] * torch.ones(10)
    v = run_fit(Labelled(x, y), "mean_difference").vector
    projected = x - ((x - x.mean(0)) @ v.T) @ v
    erased = leace.fit_eraser(x, y, shrinkage=0.0)(x)
    assert float((erased - x).norm()) < float((projected - x).norm())


def test_the_shrinkage_is_that_of_ledoit_and_wolf():
    from sklearn.covariance import ledoit_wolf_shrinkage

    for n, d in ((200, 8), (20, 30)):
        labelled, _ = planted(n, d)
        centred = labelled.x.double() - labelled.x.double().mean(0)
        expected = ledoit_wolf_shrinkage(centred.numpy(), assume_centered=True)
        assert leace._ledoit_wolf(centred) == pytest.approx(float(expected), rel=1e-6)


# DAS


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_das_finds_planted_directions(rank: int):
    d, n = 32, 96
    g = torch.Generator().manual_seed(rank)
    planted_rows = torch.linalg.qr(torch.randn(d, rank, generator=g)).Q.T
    signs = torch.randint(2, (n, rank), generator=g) * 2.0 - 1  # what each coordinate has to say in the clean prompt
    sides: list[torch.Tensor] = []
    for side in (signs, -signs):
        x = torch.randn(n, d, generator=g)
        x = x - x @ planted_rows.T @ planted_rows
        sides.append(x + (side * (2 + torch.rand(n, rank, generator=g))) @ planted_rows)
    clean, corrupted = sides

    def loss_of(part: slice) -> das.Loss:
        def loss(basis: torch.Tensor) -> torch.Tensor:
            swapped = corrupted[part] + (clean[part] - corrupted[part]) @ basis.T @ basis
            return torch.nn.functional.softplus(-signs[part] * (swapped @ planted_rows.T)).mean()

        return loss

    losses = [loss_of(slice(i, i + 16)) for i in range(0, n, 16)]
    found = das.train_rotation(losses, d, das.DasConfig(rank=rank, epochs=150, seed=7))
    assert float(principal_angles(found.basis, planted_rows).cos().min()) > 0.99
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(rank), atol=1e-5, rtol=0)
    assert min(found.losses) < 0.5 * found.losses[0]


def test_das_keeps_the_best_epoch():
    target = torch.nn.functional.normalize(torch.ones(6), dim=0)
    calls = 0

    def loss(basis: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return (basis[0] @ target) ** 2  # the start is already best: every step along noise is worse

    start = torch.tensor([[1.0, -1.0, 0, 0, 0, 0]]) / 2**0.5
    found = das.train_rotation([loss], 6, das.DasConfig(epochs=5), start=start)
    assert calls == 11
    torch.testing.assert_close(found.basis.abs(), start.abs(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("change", [{"rank": 0}, {"epochs": 0}, {"learning_rate": 0.0}, {"clip": -1.0}])
def test_das_settings_are_checked(change: dict[str, float]):
    with pytest.raises(BadInput, match="DAS settings"):
        das.DasConfig(**change)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="rank 9 of a space of 6 dimensions"):
        das.train_rotation([], 6, das.DasConfig(rank=9))


# Measures


@given(st.integers(0, 1000), st.booleans())
def test_auroc_equals_scikit_learns_with_ties_and_without(seed: int, coarse: bool):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 40, generator=g)
    scores = scores.round() if coarse else scores
    labels = torch.randperm(40, generator=g) < 13
    found = measure.aurocs(scores, labels)
    for row, value in zip(scores, found, strict=True):
        assert float(value) == pytest.approx(float(roc_auc_score(labels.numpy(), row.numpy())), abs=1e-12)
        assert measure.auroc(row, labels) == float(value)


@given(st.integers(0, 1000))
def test_the_threshold_is_the_best_of_all(seed: int):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(20, generator=g).mul(3).round()
    labels = torch.arange(20) < 7
    found = measure.best_threshold(scores, labels)
    right = int(((scores > found) == labels).sum())
    cuts = torch.cat([scores - 0.5, scores + 0.5])
    assert right == max(int(((scores > c) == labels).sum()) for c in cuts)


def test_held_out_figures_use_the_training_threshold():
    train = Labelled(torch.tensor([[0.0], [1.0], [4.0], [5.0]]), torch.tensor([False, False, True, True]))
    test = Labelled(torch.tensor([[2.0], [2.4], [2.6], [9.0]]), torch.tensor([False, True, False, True]))
    found = measure.held_out(run_fit(train, "mean_difference"), train, test)
    assert found.threshold == pytest.approx(0.0)  # 2.5, less the centre
    assert found.accuracy == 0.5
    assert found.auroc == 0.75
    assert found.n == 4


def test_the_margin_counts_the_gap_in_standard_deviations_and_goes_on_where_auroc_stops():
    labels = torch.arange(6) < 3
    scores = torch.tensor([[4.0, 5.0, 6.0, 1.0, 2.0, 3.0], [14.0, 15.0, 16.0, 1.0, 2.0, 3.0], [7.0] * 6])
    assert measure.margins(scores, labels).tolist() == pytest.approx([3 / (2 / 3) ** 0.5, 13 / (2 / 3) ** 0.5, 0])
    assert measure.margins(-scores, labels).tolist() == (-measure.margins(scores, labels)).tolist()
    assert measure.aurocs(scores, labels).tolist() == [1.0, 1.0, 0.5]
    with pytest.raises(BadInput, match="6 of 6 labels are positive"):
        measure.margins(scores, torch.ones(6, dtype=torch.bool))


def test_of_sites_that_tell_all_tokens_apart_the_clearest_is_the_best():
    near, far = (measure.HeldOut(1.0, 1.0, margin, 0.0, 4) for margin in (2.0, 9.0))
    made = [Direction(torch.eye(1, 2), Site(layer), "pca", "m", "residual", torch.zeros(2)) for layer in (0, 1)]
    assert best_site([Site(0), Site(1)], [Found(made[0], near), Found(made[1], far)], {}) == Site(1)


def test_the_random_floor_is_over_chance_and_equals_a_loop():
    (train, _), (test, _) = planted(seed=0), planted(seed=1)
    floor = measure.random_floor(train, test, 50, seed=4)
    drawn = torch.randn(50, 24, generator=torch.Generator().manual_seed(4))
    each: list[float] = []
    for row in drawn:
        sign = 1.0 if float(row @ train.gap) >= 0 else -1.0
        each.append(measure.auroc(sign * (test.x @ row), test.y))
    assert floor.best == pytest.approx(max(each), abs=1e-6)
    assert floor.mean == pytest.approx(sum(each) / 50, abs=1e-6)
    assert floor.n == 50
    assert floor.best > floor.mean


def test_a_thousand_random_directions_take_one_product():
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    labelled = Labelled(x, torch.arange(400) % 2 == 0)
    floor = measure.random_floor(labelled, labelled, 1000)
    assert 0.5 < floor.mean < floor.best < 0.7


def test_cosines_and_angles_of_lines_and_subspaces():
    def of(rows: torch.Tensor) -> Direction:
        return Direction(rows, SITE, "x", "m", "residual", torch.zeros(4))

    e = torch.eye(4)
    tilted = torch.tensor([[math.cos(0.3), math.sin(0.3), 0, 0]])
    found = measure.cosines([of(e[:1]), of(-e[:1]), of(tilted), of(e[1:3])])
    expected = [[1, -1, math.cos(0.3), 0], [-1, 1, -math.cos(0.3), 0]]
    torch.testing.assert_close(found[:2], torch.tensor(expected), atol=1e-6, rtol=0)
    assert float(found[2, 3]) == pytest.approx(math.sin(0.3), abs=1e-6)
    torch.testing.assert_close(found, found.T)
    with as_in_use(), pytest.raises(BadInput, match="expected one width"):
        measure.cosines([of(e[:1]), Direction(torch.eye(3)[:1], SITE, "x", "m", "residual", torch.zeros(3))])


# Feature space


def test_a_direction_of_features_decodes_to_what_it_writes():
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(64, 32, generator=g), dim=1)
    d = TopK(SITE, "m", rows.T.contiguous(), torch.zeros(64), rows, torch.randn(32, generator=g), k=8)
    x = torch.randn(50, 32, generator=g)
    y = torch.arange(50) % 2 == 0
    x = x + 4.0 * y[:, None] * rows[5]
    codes = Labelled(d.encode(x), y)
    found = fit(codes, "mean_difference", site=SITE, model="m", space="features")
    assert found.vector.shape == (1, 64)
    assert int(found.vector[0].argmax()) == 5
    written = decoded(found, d)
    assert written.space == "residual"
    expected = found.vector[0] @ rows
    torch.testing.assert_close(written.vector[0], expected / expected.norm(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(written.center, d.decode(found.center), atol=1e-5, rtol=1e-4)
    two = decoded(fit(codes, "pca", site=SITE, model="m", rank=2, space="features"), d)
    torch.testing.assert_close(two.vector @ two.vector.T, torch.eye(2), atol=1e-5, rtol=0)
    with pytest.raises(BadInput, match="does not decode through a dictionary of 64 features"):
        decoded(written, d)
    elsewhere = TopK(Site(2), "m", d.W_enc, d.b_enc, d.W_dec, d.b_dec, k=8)
    with pytest.raises(BadInput, match=r"at resid\.1 does not decode through a dictionary of resid\.2"):
        decoded(found, elsewhere)


# Collecting


TEXTS = ("hello there", "a", "why do the stars shine at night", "name a bird", "b c")


def prompts(texts: tuple[str, ...] = TEXTS) -> PromptSet:
    return PromptSet("p", tuple(Prompt(t) for t in texts), "edit")


@pytest.mark.parametrize("position", ["last", "all", -2, 18])
def test_collected_activations_are_those_of_whole_prompts(any_family: LoadedModel, position: str | int):
    sites = [Site(0, "embed"), Site(1), Site(1, "attn")]
    found = collect(any_family, prompts(), sites, position=position, batch=2)  # type: ignore[arg-type]
    rows = any_family.encode(prompts())
    for i, row in enumerate(rows):
        with capture(any_family.network, sites) as held:
            any_family.network(input_ids=torch.tensor([row]), use_cache=False)
        for site in sites:
            own = found[site].tensor[found[site].prompt_index == i]
            x = held[site][0]
            if position == "all":
                assert 0 < len(own) <= len(row)
                expected = x[len(row) - len(own) :]
            else:
                expected = x[-1:] if position == "last" else x[position : position + 1 or None]  # type: ignore[index]
            torch.testing.assert_close(own, expected, atol=2e-4, rtol=1e-3)
    assert found[Site(1)].model == any_family.fingerprint
    assert found[Site(1)].prompt_index.tolist() == sorted(found[Site(1)].prompt_index.tolist())


def test_tokens_of_replies_are_collected(tiny: LoadedModel):
    replies = ["yes", "no no", "x", "maybe", "hm"]
    found = collect(tiny, prompts(), [SITE], position="reply", replies=replies, batch=2)[SITE]
    assert found.prompt_index.bincount().tolist() == [len(r) for r in replies]
    row = [*tiny.encode(prompts())[1], *tiny.token_ids(["no no"], special=False)[0]]
    with capture(tiny.network, [SITE]) as held:
        tiny.network(input_ids=torch.tensor([row]), use_cache=False)
    torch.testing.assert_close(found.tensor[found.prompt_index == 1], held[SITE][0, -5:], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sites": []}, "no Site was given"),
        ({"sites": [Site(9)]}, "Site resid.9 is not in the model: it has layers 0 to 2"),
        ({"position": 500}, "position 500 is not in every prompt; the shortest has"),
        ({"position": -500}, "position -500 is not in every prompt"),
        ({"position": 3}, "position 3 is among the"),
        ({"position": "reply"}, "one needs the other"),
        ({"replies": ["a"] * 5}, "one needs the other"),
        ({"position": "reply", "replies": ["a"]}, "1 replies for 5 prompts; expected one each"),
        ({"position": "reply", "replies": ["a", "", "b", "c", "d"]}, "a reply has no tokens"),
        ({"prompts": prompts(("x" * 300, "y"))}, "the model's context is 128; shorten it"),
        ({"prompts": prompts(("x" * 300, "y")), "plain": True}, "has 300 tokens"),
    ],
)
def test_what_cannot_be_collected_is_named(tiny: LoadedModel, change: dict[str, object], told: str):
    arguments = {"prompts": prompts(), "sites": [SITE], **change}
    with as_in_use(), pytest.raises(BadInput) as error:
        collect(tiny, arguments.pop("prompts"), arguments.pop("sites"), **arguments)  # type: ignore[arg-type]
    assert told in str(error.value)


def test_plain_texts_stand_without_the_template(tiny: LoadedModel):
    rows = tiny.encode(prompts(), plain=True)
    assert tiny.texts(rows) == list(TEXTS)
    found = collect(tiny, prompts(), [SITE], plain=True)[SITE]
    with capture(tiny.network, [SITE]) as held:
        tiny.network(input_ids=torch.tensor([rows[0]]), use_cache=False)
    torch.testing.assert_close(found.tensor[0], held[SITE][0, -1], atol=1e-4, rtol=1e-3)


# The movie reviews


def test_reviews_come_in_pairs_and_no_word_of_a_split_is_in_another():
    words: dict[str, set[str]] = {}
    for split in ("train", "edit", "held_out"):
        found = sets.reviews(split, 20)  # type: ignore[arg-type]
        assert len(found.positive) == len(found.negative) == 20
        words[split] = set()
        for a, b in zip(found.positive.texts, found.negative.texts, strict=True):
            one, other = a.split(), b.split()
            changed = [(x, y) for x, y in zip(one, other, strict=True) if x != y]
            assert len(changed) == 2
            words[split] |= {w.strip(".,") for pair in changed for w in pair}
    assert words["train"] & words["held_out"] == words["train"] & words["edit"] == set()
    with pytest.raises(BadInput, match="9999 pairs of reviews were asked of split 'train'; it has"):
        sets.reviews("train", 9999)
