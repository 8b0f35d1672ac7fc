"""CE and KL scores: 1 for a perfect reconstruction, 0 for none, and the same as one row at a time between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from support.models import build
from support.tokenizers import byte_tokenizer
from unsleep.base.context import reporting
from unsleep.core import BadInput, Refused, Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.judge.splice import SpliceScore, splice_score
from unsleep.models.model import LoadedModel
from unsleep.models.streams import capture, transformed

D = 32
TEXTS = ["hi", "why do the stars shine at night", "name a bird", "x y z", "one more row of text, and a longer one"]
SITES = [Site(0, "embed"), Site(1, "attn"), Site(1, "mlp"), Site(1)]


def identity(site: Site, scale: float = 1.0) -> TopK:
    """x̂ = scale · x: one feature for each half of every axis."""
    axes = torch.cat([torch.eye(D), -torch.eye(D)])
    return TopK(site, "any", axes.T.contiguous(), torch.zeros(2 * D), axes * scale, torch.zeros(D), k=2 * D)


def partial(site: Site, sink_norm: float = float("inf")) -> TopK:
    """A dictionary that explains something and not all."""
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(64, D, generator=g), dim=1)
    weights = (rows.T.contiguous(), torch.zeros(64), rows, torch.randn(D, generator=g) / 10)
    return TopK(site, "any", *weights, sink_norm=sink_norm, k=6)


def transcoder(site: Site, target: Site, sink_norm: float = float("inf")) -> TopK:
    """A dictionary of one Site that rebuilds another, with a skip path."""
    own: dict[str, Any] = {"target": target, "subtract_bias": False, "sink_norm": sink_norm}
    skip = torch.randn(D, D, generator=torch.Generator().manual_seed(1)) / 20
    return replace(partial(site), **own, W_skip=skip)


def naive(model: LoadedModel, dictionary: TopK, rows: list[list[int]]) -> SpliceScore:
    """One row and one token at a time."""
    target = dictionary.target or dictionary.site

    def logits(row: list[int], way: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
        def splice(y: torch.Tensor) -> torch.Tensor:
            x = seen[dictionary.site] if dictionary.target else y
            tokens = [
                b if way is None or float(a.norm()) > dictionary.sink_norm else way(a)
                for a, b in zip(x.flatten(0, -2), y.flatten(0, -2), strict=True)
            ]
            return torch.stack(tokens).reshape(y.shape)

        ids = torch.tensor([row])
        network = model.network
        with torch.no_grad(), capture(network, [dictionary.site]) as seen, transformed(network, {target: splice}):
            return network(ids, use_cache=False).logits[0].double()

    def rebuild(t: torch.Tensor) -> torch.Tensor:
        rebuilt = dictionary.decode(dictionary.encode(t[None]))[0]
        return rebuilt if dictionary.W_skip is None else rebuilt + dictionary.W_skip @ t

    ways = {"clean": None, "spliced": rebuild, "zero": torch.zeros_like}
    ce, kl = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    for row in rows:
        found = {name: logits(row, way).log_softmax(-1) for name, way in ways.items()}
        for name, p in found.items():
            ce[name] -= sum(float(p[i, token]) for i, token in enumerate(row[1:]))
            kl[name] += float((found["clean"].exp() * (found["clean"] - p)).sum())
    held = sum(len(row) for row in rows)
    ce = {name: total / (held - len(rows)) for name, total in ce.items()}
    return SpliceScore(**ce, kl_spliced=kl["spliced"] / held, kl_zero=kl["zero"] / held, tokens=held - len(rows))


@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_perfect_reconstruction_scores_1_and_none_scores_0(tiny: LoadedModel, site: Site):
    rows = tiny.token_ids(TEXTS)
    perfect, none = (splice_score(tiny, identity(site, scale), rows) for scale in (1.0, 0.0))
    assert (perfect.score, perfect.kl_score) == pytest.approx((1.0, 1.0), abs=1e-4)
    assert (none.score, none.kl_score) == pytest.approx((0.0, 0.0), abs=1e-4)


def test_the_scores_equal_one_row_at_a_time(family_with_heads: LoadedModel):
    rows = family_with_heads.token_ids(TEXTS)
    dictionary = partial(Site(1))
    found = splice_score(family_with_heads, dictionary, rows, batch_tokens=50)
    assert found == pytest.approx(naive(family_with_heads, dictionary, rows), rel=1e-3, abs=1e-7)
    assert abs(found.spliced - found.clean) > 1e-4
    assert abs(found.spliced - found.zero) > 1e-4
    assert found.kl_score == pytest.approx(1 - found.kl_spliced / found.kl_zero)


def test_a_transcoder_is_scored_at_its_target(family_with_heads: LoadedModel):
    rows = family_with_heads.token_ids(TEXTS)
    dictionary = transcoder(Site(0), Site(1, "mlp"))
    found = splice_score(family_with_heads, dictionary, rows, batch_tokens=50)
    assert found == pytest.approx(naive(family_with_heads, dictionary, rows), rel=1e-3, abs=1e-7)
    assert found != pytest.approx(splice_score(family_with_heads, partial(Site(0)), rows), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(("site", "target"), [(Site(0, "embed"), Site(2)), (Site(1, "attn"), Site(1, "mlp"))])
def test_a_transcoder_may_rebuild_whatever_comes_later(tiny: LoadedModel, site: Site, target: Site):
    rows = tiny.token_ids(TEXTS)
    dictionary = transcoder(site, target)
    assert splice_score(tiny, dictionary, rows) == pytest.approx(naive(tiny, dictionary, rows), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("target", [Site(0), Site(1, "attn"), Site(1, "mlp")])
def test_a_transcoder_whose_target_comes_first_is_refused(tiny: LoadedModel, target: Site):
    ids = torch.tensor(tiny.token_ids(TEXTS[1:2]))
    before = tiny.network(ids).logits
    with pytest.raises(BadInput, match=rf"computes {target} before resid\.1, from which the transcoder reconstructs"):
        splice_score(tiny, transcoder(Site(1), target), tiny.token_ids(TEXTS))
    assert torch.equal(tiny.network(ids).logits, before)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_batches_do_not_change_the_score(tiny: LoadedModel, batch_tokens: int):
    rows = tiny.token_ids(TEXTS)
    told: list[tuple[str, int, int]] = []
    with reporting(lambda *x: told.append(x)):
        found = splice_score(tiny, partial(Site(1)), rows, batch_tokens=batch_tokens)
    assert found == pytest.approx(splice_score(tiny, partial(Site(1)), rows), rel=1e-4)
    assert found.tokens == sum(len(row) - 1 for row in rows)
    assert told[-1] == ("splice score at resid.1", 5, 5)


def test_attention_sinks_keep_what_they_hold(tiny: LoadedModel):
    rows = tiny.token_ids(TEXTS)
    norms: list[float] = []
    with transformed(tiny.network, {Site(1): lambda x: norms.extend(x.norm(dim=-1).flatten().tolist()) or x}):
        for row in rows:
            tiny.network(torch.tensor([row]), use_cache=False)
    between = sum(sorted(norms)[len(norms) // 2 :][:2]) / 2
    for dictionary in (partial(Site(1), between), transcoder(Site(1), Site(2), between)):
        found = splice_score(tiny, dictionary, rows)
        assert found == pytest.approx(naive(tiny, dictionary, rows), rel=1e-3, abs=1e-7)
        without = splice_score(tiny, replace(dictionary, sink_norm=float("inf")), rows)
        assert found.spliced != pytest.approx(without.spliced, rel=1e-3, abs=1e-7)


def test_the_model_is_as_it_was_afterwards(tiny: LoadedModel):
    ids = torch.tensor(tiny.token_ids(TEXTS[1:2]))
    before = tiny.network(ids).logits
    splice_score(tiny, partial(Site(1)), tiny.token_ids(TEXTS))
    assert torch.equal(tiny.network(ids).logits, before)


def test_bfloat16_models_score_a_float32_dictionary():
    model = LoadedModel(build("llama", torch.bfloat16), byte_tokenizer(), "tiny")
    assert splice_score(model, identity(Site(1)), model.token_ids(TEXTS)).score == pytest.approx(1.0, abs=0.02)


def test_what_cannot_be_scored_is_refused(tiny: LoadedModel):
    rows = tiny.token_ids(TEXTS)
    with pytest.raises(BadInput, match="shortest of 0 rows"):
        splice_score(tiny, partial(Site(1)), [])
    with pytest.raises(BadInput, match="shortest of 6 rows has 1 tokens"):
        splice_score(tiny, partial(Site(1)), [*rows, [5]])
    with pytest.raises(BadInput, match=r"layers 0 to 2"):
        splice_score(tiny, partial(Site(7)), rows)
    narrow = TopK(Site(1), "any", torch.eye(4), torch.zeros(4), torch.eye(4), torch.zeros(4), k=2)
    with pytest.raises(BadInput, match=r"splice at resid\.1 has width 4; the model's is 32"):
        splice_score(tiny, narrow, rows)
    wide = replace(transcoder(Site(0), Site(1)), W_dec=torch.ones(64, 7), b_dec=torch.ones(7), W_skip=None)
    with pytest.raises(BadInput, match=r"splice at .* has width 7; the model's is 32"):
        splice_score(tiny, wide, rows)
    with pytest.raises(Refused, match=r"with 0 at resid\.1 the loss does not change; the score is undefined"):
        splice_score(tiny, replace(partial(Site(1)), sink_norm=0.0), rows)
