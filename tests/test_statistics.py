"""Statistics of features: equal to brute force over dense activations, in any batches, resumed or not, on disk."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import unsleep
from support.dictionaries import D, F, dictionary
from support.models import build
from support.planted_statistics import passages, plain_text
from support.tokenizers import byte_tokenizer
from unsleep.base.context import reporting, resumable
from unsleep.core import BadInput, Refused, Site
from unsleep.dictionaries.architectures.jumprelu import JumpReLU
from unsleep.dictionaries.architectures.standard import Standard
from unsleep.dictionaries.coders import Coder
from unsleep.explanations import statistics as module
from unsleep.explanations import streaming
from unsleep.explanations.outputs import token_change, with_changes
from unsleep.explanations.statistics import BINS, FeatureStatistics, StatisticsConfig, cofiring
from unsleep.explanations.tally import mixed
from unsleep.explanations.text import BEFORE, ROLES, WINDOW, Source, read_text
from unsleep.models.lens import logit_lens
from unsleep.models.model import LoadedModel
from unsleep.models.streams import capture, transformed
from unsleep.prompts.prompt import Message, Prompt, PromptSet

ASKED = PromptSet("asked", tuple(Prompt(t) for t in ("hello there", "a", "why do stars shine at night", "name a bird")))
SOURCES = [Source(ASKED, replies=(" ok", " well, no", " yes", " a wren")), Source(passages(12), plain=True)]
CONFIG = StatisticsConfig(top=3, drawn=5, sample=200, promoted=4, partners=3, batch_tokens=150)


def coders(model: LoadedModel) -> list[Coder]:
    """One dictionary of each kind of code."""
    topk = dictionary(model, 1)
    weights = topk.W_enc, topk.b_enc, topk.W_dec, topk.b_dec
    jump = JumpReLU(Site(2, "mlp"), model.fingerprint, *weights, threshold=torch.full((F,), 0.3))
    return [topk, Standard(Site(0), model.fingerprint, *weights), jump]


@torch.no_grad()
def dense(model: LoadedModel, d: Coder, sources: list[Source] = SOURCES) -> np.ndarray:
    """Activations `[token, feature]` of every token, each row run alone."""
    found: list[torch.Tensor] = []
    for rows in read_text(model, sources).rows:
        for row in rows:
            with capture(model.network, [d.site]) as seen:
                model.network(torch.tensor([row]))
            found.append(d.encode(seen[d.site][0].to(d.decoder)).float())
    return torch.cat(found).numpy()


def counted(statistics: FeatureStatistics) -> np.ndarray:
    """Tokens that count."""
    text = statistics.text
    return np.arange(len(text.ids)) - text.starts[text.row] >= text.repeated[text.row]


@pytest.mark.parametrize("which", range(3))
def test_figures_equal_brute_force(tiny: LoadedModel, which: int):
    d = coders(tiny)[which]
    [found] = unsleep.feature_statistics(tiny, [d], SOURCES, CONFIG).values()
    f, text, keep = found.figures, found.text, counted(found)
    x = dense(tiny, d)
    fires = (x > 0) & keep[:, None]
    assert text.repeated.max() > 10
    assert found.tokens == keep.sum() < len(text.ids)
    assert f.fires.tolist() == fires.sum(0).tolist()
    total = np.where(fires, x, 0).sum(0)
    np.testing.assert_allclose(f.mean, total / np.maximum(fires.sum(0), 1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(f.largest, np.where(keep[:, None], x, 0).max(0), rtol=1e-4, atol=1e-5)
    assert f.histogram.sum(1).tolist() == f.fires.tolist()
    for j in range(0, F, 7):
        values = x[fires[:, j], j]
        edges = np.linspace(0, float(f.largest[j]), BINS + 1)
        low = [(values <= edge * (1 - 0.01) - edges[-1] / 128).sum() for edge in edges[1:]]
        high = [(values <= edge + edges[-1] / 100).sum() for edge in edges[1:]]
        assert all(a <= b <= c for a, b, c in zip(low, f.histogram[j].cumsum(0).tolist(), high, strict=True))
        # the strongest contexts: one per text
        where = np.flatnonzero(fires[:, j])
        peaks = sorted((x[where[text.row[where] == r], j].max() for r in set(text.row[where])), reverse=True)[:3]
        kept = f.top[j][f.top[j] >= 0]
        np.testing.assert_allclose(f.top_around[j, : len(kept), BEFORE], peaks, rtol=1e-4, atol=1e-5)
        assert len({*text.row[kept]}) == len(kept)
        # random firings: those of the largest keys
        keys = mixed(mixed(torch.from_numpy(where) ^ int(mixed(torch.tensor(CONFIG.seed)))) + j)
        drawn = f.drawn[j][f.drawn[j] >= 0].tolist()
        assert drawn == where[keys.argsort(descending=True).numpy()][: CONFIG.drawn].tolist()
        # activations around them
        windows = text.windows(np.array(drawn, int).reshape(-1))
        expected = np.where(windows >= 0, x[:, j][windows], 0)
        np.testing.assert_allclose(f.drawn_around[j, : len(drawn)], expected, rtol=1e-4, atol=1e-5)


def test_the_sample_and_cofiring_equal_brute_force(tiny: LoadedModel):
    d = coders(tiny)[0]
    [found] = unsleep.feature_statistics(tiny, [d], SOURCES, CONFIG).values()
    f, text = found.figures, found.text
    keep = counted(found) & f.sampled.numpy()[text.row]
    assert 150 < keep.sum() < found.tokens
    fires = (dense(tiny, d) > 0) & keep[:, None]
    for j in range(F):
        part = slice(f.code_start[j], f.code_start[j + 1])
        assert f.code_token[part].tolist() == np.flatnonzero(fires[:, j]).tolist()
    both = fires.T.astype(int) @ fires
    either = np.maximum(fires.sum(0)[:, None] + fires.sum(0) - both, 1)
    jaccard = both / either
    np.fill_diagonal(jaccard, 0)
    np.testing.assert_allclose(f.overlap, -np.sort(-jaccard, 1)[:, :3], rtol=1e-5)
    assert int(f.pairs_of) == fires.any(1).sum()
    partner, overlap, tokens = cofiring(f.code_start.numpy(), f.code_token.numpy(), 3, pairs=64 * 40)
    assert tokens == 40
    assert partner.shape == overlap.shape == (F, 3)


def test_one_pass_feeds_all_sites_in_any_batches(tiny: LoadedModel):
    every = coders(tiny)
    together = unsleep.feature_statistics(tiny, every, SOURCES, CONFIG)
    assert set(together) == {d.site for d in every}
    for d in every:
        alone = unsleep.feature_statistics(tiny, [d], SOURCES, replace(CONFIG, batch_tokens=4000))[d.site]
        for name in ("fires", "top", "drawn", "code_token", "partner"):
            assert torch.equal(getattr(alone.figures, name), getattr(together[d.site].figures, name)), name
        torch.testing.assert_close(alone.figures.drawn_around, together[d.site].figures.drawn_around)
        assert torch.equal(alone.figures.promoted, together[d.site].figures.promoted)


def test_statistics_are_deterministic_and_another_seed_draws_others(tiny: LoadedModel):
    d = [dictionary(tiny)]
    one, same, other = (
        unsleep.feature_statistics(tiny, d, SOURCES, replace(CONFIG, seed=seed))[Site(1)] for seed in (0, 0, 1)
    )
    assert one.hash == same.hash
    assert not torch.equal(one.figures.drawn, other.figures.drawn)
    assert torch.equal(one.figures.top, other.figures.top)


@pytest.mark.parametrize("batches", [2, 3, 5])
def test_an_interrupted_pass_goes_on_and_gives_the_same_bytes(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
):
    monkeypatch.setattr(streaming, "CHECKPOINT", -1.0)
    monkeypatch.setattr(streaming, "SLOW", 0)
    d = [dictionary(tiny)]
    whole = unsleep.feature_statistics(tiny, d, SOURCES, CONFIG)[Site(1)]
    calls: list[int] = []

    def stop(stage: str, done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == batches + 1:
            raise KeyboardInterrupt

    def run() -> FeatureStatistics:
        with resumable(tmp_path / "out"):
            return unsleep.feature_statistics(tiny, d, SOURCES, CONFIG)[Site(1)]

    with pytest.raises(KeyboardInterrupt), reporting(stop):
        run()
    again: list[tuple[str, int]] = []
    with reporting(lambda stage, done, total: again.append((stage, done))):
        assert run().hash == whole.hash
    assert again[0][0] == "statistics, resumed"
    assert again[-1][1] == whole.tokens
    assert len(again) + len(calls) < 14
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_models_and_dictionaries(tiny: LoadedModel):
    model = LoadedModel(build("llama", torch.bfloat16), byte_tokenizer(), "tiny")
    d = dictionary(model).to(torch.bfloat16)
    [found] = unsleep.feature_statistics(model, [d], SOURCES, CONFIG).values()
    assert int(found.figures.fires.sum()) == found.tokens * d.k
    assert found.figures.mean.dtype == torch.float32
    assert found.card(3).promoted


def test_every_family_can_be_read(any_family: LoadedModel):
    d = dictionary(any_family)
    [found] = unsleep.feature_statistics(any_family, [d], SOURCES, CONFIG).values()
    assert int(found.figures.fires.sum()) <= found.tokens * d.k
    assert found.card(int(found.figures.fires.argmax())).contexts
    assert found.record.notes or found.card(0).promoted


def test_a_card_shows_what_is_known(tiny: LoadedModel):
    d = dictionary(tiny)
    [found] = unsleep.feature_statistics(tiny, [d], SOURCES, CONFIG).values()
    x = dense(tiny, d)
    feature = int(found.figures.fires.argmax())
    card = found.card(feature)
    groups = [context.group for context in card.contexts]
    assert groups[:3] == ["top"] * 3
    assert {"0.75–1", "0–0.25"} <= set(groups)
    first = card.contexts[0]
    assert first.values[first.at] == pytest.approx(card.largest, abs=1e-3)
    assert max(c.values[c.at] for c in card.contexts[3:]) <= card.largest
    for c in card.contexts:
        assert len(c.tokens) == len(c.values) <= WINDOW
        row = found.text.source.tolist().index(found.text.names.index(c.source)) + c.row
        assert "".join(c.tokens) in "".join(found.text.spelled(np.flatnonzero(found.text.row == row)))
    up = logit_lens(tiny, d.decoder, 4)[feature]
    assert [w.token for w in card.promoted] == [w for w, _ in up.promotes]
    assert [w.token for w in card.suppressed] == [w for w, _ in up.suppresses]
    assert card.density == pytest.approx((x[counted(found)][:, feature] > 0).mean())
    assert all(0 < c.overlap <= 1 and c.feature != feature for c in card.cofiring)
    with pytest.raises(BadInput, match=r"no feature 64; it has 0 to 63"):
        found.card(64)


def test_a_feature_that_never_fires_has_a_card(tiny: LoadedModel):
    d = dictionary(tiny)
    silent = JumpReLU(d.site, d.model, d.W_enc, d.b_enc, d.W_dec, d.b_dec, threshold=torch.full((F,), 1e6))
    card = unsleep.feature_statistics(tiny, [silent], SOURCES, CONFIG)[Site(1)].card(5)
    assert (card.density, card.mean, card.largest, card.contexts, card.cofiring) == (0, 0, 0, (), ())
    assert sum(card.histogram) == 0
    assert len(card.promoted) == len(card.suppressed) == 4


def test_statistics_come_back_from_disk(tiny: LoadedModel, tmp_path: Path):
    [found] = unsleep.feature_statistics(tiny, [dictionary(tiny)], SOURCES, CONFIG).values()
    found.save(tmp_path / "s")
    again = FeatureStatistics.load(tmp_path / "s")
    assert again.hash == found.hash
    assert again.record == found.record
    assert again.card(7) == found.card(7)
    assert (again.site, again.dictionary, again.model, again.size) == (Site(1), found.dictionary, tiny.named, F)
    torch.testing.assert_close(again.density, found.density)
    again.check(model=tiny.fingerprint, dictionary=found.dictionary, site=Site(1))
    for wrong in ({"model": "0" * 16}, {"dictionary": "0" * 16}, {"site": Site(2)}):
        with pytest.raises(Refused, match=f"of {next(iter(wrong)).replace('site', 'Site')} .*, not of"):
            again.check(**wrong)  # type: ignore[arg-type]


def test_damaged_statistics_are_refused_by_name(tiny: LoadedModel, tmp_path: Path):
    [found] = unsleep.feature_statistics(tiny, [dictionary(tiny)], SOURCES, CONFIG).values()
    with pytest.raises(BadInput, match=r"statistics.json does not exist"):
        FeatureStatistics.load(tmp_path)
    for bad in (replace(found.record, outputs=()), replace(found.record, spelling=found.record.spelling[:3])):
        FeatureStatistics(bad, found.figures, found.text).save(tmp_path)
        with pytest.raises(BadInput, match=r"statistics.safetensors: "):
            FeatureStatistics.load(tmp_path)
    small = found.figures._replace(top=found.figures.top[:5])
    FeatureStatistics(found.record, small, found.text).save(tmp_path)
    with pytest.raises(BadInput, match=r"top has shape"):
        FeatureStatistics.load(tmp_path)


def test_bad_input_is_refused(tiny: LoadedModel):
    d = dictionary(tiny)
    with pytest.raises(BadInput, match="no dictionary"):
        unsleep.feature_statistics(tiny, [], SOURCES)
    with pytest.raises(BadInput, match="two of one Site"):
        unsleep.feature_statistics(tiny, [d, d], SOURCES)
    with pytest.raises(Refused, match=f"of model {'0' * 16}, tiny-llama is"):
        unsleep.feature_statistics(tiny, [replace(d, model="0" * 16)], SOURCES)
    with pytest.raises(BadInput, match=r"Site resid\.9 is not in the model"):
        unsleep.feature_statistics(tiny, [replace(d, site=Site(9))], SOURCES)
    with pytest.raises(BadInput, match="no text"):
        unsleep.feature_statistics(tiny, [d], [])
    with pytest.raises(BadInput, match="has 3 tokens; statistics need at least 64"):
        unsleep.feature_statistics(tiny, [d], [Source(PromptSet("short", (Prompt("abc"),)), plain=True)])
    with pytest.raises(BadInput, match="1 replies for 4 prompts"):
        unsleep.feature_statistics(tiny, [d], [Source(ASKED, replies=("a",))])
    with pytest.raises(BadInput, match="top is 0; expected at least 1"):
        StatisticsConfig(top=0)
    narrow = replace(d, W_enc=d.W_enc[:8], W_dec=d.W_dec[:, :8], b_dec=d.b_dec[:8])
    with pytest.raises(BadInput, match="width 8; tiny-llama has 32"):
        unsleep.feature_statistics(tiny, [narrow], SOURCES)


def test_activations_that_are_not_finite_are_refused(tiny: LoadedModel):
    network = copy.deepcopy(tiny.network)
    with torch.no_grad():
        network.model.embed_tokens.weight[tiny.token_ids(["w"])[0]] = float("nan")
    broken = LoadedModel(network, tiny.tokenizer, "broken")
    with pytest.raises(BadInput, match=r"activations at resid\.1 has .* NaN"):
        unsleep.feature_statistics(broken, [replace(dictionary(tiny), model=broken.fingerprint)], SOURCES)


# Text


def test_roles_of_tokens(tiny: LoadedModel):
    turns = (Message("system", "be brief"), Message("user", "hi"), Message("assistant", "yes?"))
    prompts = PromptSet("p", (Prompt("one bird"), Prompt("two", before=turns), Prompt("two stars", before=turns)))
    text = read_text(tiny, [Source(prompts, replies=("ok", "no", "well"))]).text
    said = [
        {
            role: "".join(text.spelled(np.flatnonzero((text.row == r) & (text.role == i))))
            for i, role in enumerate(ROLES)
        }
        for r in range(3)
    ]
    assert [each["question"] for each in said] == ["one bird", "two", "two stars"]
    assert [each["reply"] for each in said] == ["ok", "no", "well"]
    assert [each["header"] for each in said] == [" A:"] * 3
    assert "be brief" in said[1]["system"]
    assert said[0]["system"] == "S: be kind. user: "
    assert [each["text"] for each in said] == [""] * 3
    tokens = np.flatnonzero((text.row == 0) & (text.role == ROLES.index("question")))
    assert text.since(tokens).tolist() == list(range(8))
    assert text.until(tokens).tolist() == list(range(8))[::-1]


def test_equal_texts_are_on_one_side_and_half_are_held_out(tiny: LoadedModel):
    one = passages(10)
    doubled = PromptSet("twice", (*one.prompts, *one.prompts))
    text = read_text(tiny, [Source(doubled, plain=True)]).text
    assert text.held_out[:10].tolist() == text.held_out[10:].tolist()
    assert text.held_out.sum() == 10
    assert 0 < text.chosen(100, 0).sum() < 20
    assert text.chosen(10**6, 0).all()


def test_windows_end_with_their_row_and_prefixes_stand_alone(tiny: LoadedModel):
    text = read_text(tiny, [Source(ASKED)]).text
    shared = int(text.shared[0])
    assert text.tokens == len(text.ids) - 3 * shared
    tokens = np.array([0, shared - 1, shared, int(text.starts[1]) + shared])
    windows = text.windows(tokens)
    assert windows[0].max() == min(shared - 1, 8)
    assert windows[1].max() == shared - 1
    assert windows[2].min() == max(0, shared - BEFORE)
    own = text.windows(tokens, counted=True)
    assert own[3][own[3] >= 0].min() == tokens[3]


# What features write


def test_token_change_is_the_change_of_the_mean_logits(tiny: LoadedModel):
    d = dictionary(tiny)
    rows = tiny.token_ids(["the sun is up", "we sing"])
    found = token_change(tiny, d, [3, 9, 11], [2.0, 5.0, 0.5], rows, 5)
    with torch.no_grad():
        bare = torch.cat([tiny.network(torch.tensor([row])).logits[0] for row in rows])

        def driven(x: torch.Tensor) -> torch.Tensor:
            f = d.encode(x)
            return x + (5.0 - f[..., 9:10]) * d.decoder[9]

        with transformed(tiny.network, {d.site: driven}):
            high = torch.cat([tiny.network(torch.tensor([row])).logits[0] for row in rows])
    best = (high.mean(0) - bare.mean(0)).topk(5)
    assert found.ids[1].tolist() == best.indices.tolist()
    torch.testing.assert_close(found.logits[1], best.values, rtol=1e-3, atol=1e-4)


def test_changes_are_on_the_cards_of_the_features_that_were_driven(tiny: LoadedModel):
    d = dictionary(tiny)
    plain = unsleep.feature_statistics(tiny, [d], SOURCES, CONFIG)[Site(1)]
    found = with_changes(tiny, d, plain, tiny.token_ids(["the sun is up", "we sing"]), [2, 5], 4)
    assert len(found.card(2).changed) == 4
    assert found.card(3).changed == ()
    assert found.card(2).promoted == plain.card(2).promoted
    with pytest.raises(Refused, match="not of"):
        with_changes(tiny, dictionary(tiny, 2), plain, [[5, 6]], [0])


def test_a_model_whose_unembedding_cannot_be_read_has_statistics_without_promoted_tokens(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise BadInput("no norm")

    monkeypatch.setattr(module, "vocabulary_ends", refuse)
    [found] = unsleep.feature_statistics(tiny, [dictionary(tiny)], SOURCES, CONFIG).values()
    assert found.record.notes == ("no promoted tokens: no norm",)
    assert found.card(0).promoted == ()


def test_spelling_is_without_the_model(tiny: LoadedModel):
    text = plain_text(tiny, 3)
    assert "".join(text.spelled(np.flatnonzero(text.row == 1))) == passages(40).texts[1]
    assert D == 32
