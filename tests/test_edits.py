"""An edit is a value: applied it changes the stream as written, and it bakes into plain weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.checks import as_in_use
from support.dictionaries import D, F, dictionary
from support.models import build
from support.prompts import PROMPTS
from support.tokenizers import byte_tokenizer
from unsleep.activations.harvest import HarvestConfig, harvest, token_rows
from unsleep.base import store
from unsleep.core import BadInput, Features, Refused, Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.interventions.features import Edit, ErrorRule, edits_for, merged
from unsleep.interventions.files import load_edit, save_edit
from unsleep.interventions.intervention import applied, operation
from unsleep.locate.features import FindConfig, find, greedy_rows, rank_by_attribution, reply_log_odds, with_evidence
from unsleep.models import chat, generate
from unsleep.models.forward import Rows, build_rows, reply_logits
from unsleep.models.model import LoadedModel
from unsleep.models.streams import capture, transformed
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.repairs.bake import BakeConfig, _take, bake, faithfulness
from unsleep.repairs.edit import EditConfig, edit
from unsleep.repairs.masks import Lesson, MaskConfig, learn_mask, prepare_lesson


def run_operation(e: Edit, x: torch.Tensor) -> torch.Tensor:
    return operation(e, torch.float32, "cpu")(x)


# algebra


@given(st.integers(0, 500), st.sets(st.integers(0, F - 1), max_size=F))
def test_keeping_the_error_removes_exactly_what_the_features_wrote(seed: int, removed: set[int]):
    model = LoadedModel(build("llama"), byte_tokenizer(), "tiny")
    d = dictionary(model)
    x = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(seed))
    codes = d.encode(x)
    gone = codes.clone()
    gone[..., [i for i in range(F) if i not in removed]] = 0
    torch.testing.assert_close(
        run_operation(Edit(Site(1), d, tuple(removed)), x), x - gone @ d.W_dec, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("rule", ["keep", "project"])
def test_an_empty_edit_that_keeps_its_error_is_the_identity_bit_for_bit(any_family: LoadedModel, rule: ErrorRule):
    """Its operation runs inside the model too: `applied` passes over an edit that does nothing."""
    e = Edit(Site(1), dictionary(any_family), (), rule)
    ids = torch.tensor(any_family.token_ids(["the quick brown fox"]))
    bare, seen = any_family.network(ids).logits, list[torch.Tensor]()
    run = operation(e, torch.float32, "cpu")
    with transformed(any_family.network, {e.site: lambda x: seen.append(x) or run(x)}) as network:
        assert torch.equal(network(ids).logits, bare)
    assert len(seen) == 1
    assert not torch.allclose(e.dictionary.rebuild(seen[0]), seen[0], atol=0.1)
    with applied(any_family, e) as network:
        assert torch.equal(network(ids).logits, bare)


def test_an_empty_edit_that_drops_its_error_leaves_the_reconstruction(tiny: LoadedModel):
    e = Edit(Site(1), dictionary(tiny), (), "drop")
    ids = torch.tensor(tiny.token_ids(["the quick brown fox"]))
    bare = tiny.network(ids).logits
    with transformed(tiny.network, {e.site: e.dictionary.rebuild}) as network:
        rebuilt = network(ids).logits
    with applied(tiny, e) as network:
        found = network(ids).logits
    torch.testing.assert_close(found, rebuilt, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, bare, atol=0.1)


def test_dropping_the_error_leaves_the_kept_reconstruction(tiny: LoadedModel):
    d, x = dictionary(tiny), torch.randn(1, 6, D)
    codes = d.encode(x)
    codes[..., [3, 5]] = 0
    torch.testing.assert_close(
        run_operation(Edit(Site(1), d, (3, 5), "drop"), x), d.decode(codes), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("error", ["keep", "drop", "project"])
def test_attention_sinks_are_unchanged(tiny: LoadedModel, error: str):
    x = torch.randn(1, 6, D)
    x[0, 0] *= 100
    d = replace(dictionary(tiny), sink_norm=float(x[0, 1:].norm(dim=-1).max()) * 2)
    found = run_operation(Edit(Site(1), d, tuple(range(F)), error), x)  # type: ignore[arg-type]
    assert torch.equal(found[0, 0], x[0, 0])
    assert not torch.allclose(found[0, 1:], x[0, 1:])


def test_projecting_leaves_nothing_of_the_error_along_the_removed_rows(tiny: LoadedModel):
    d, x = dictionary(tiny), torch.randn(1, 6, D)
    removed = (3, 5, 11)
    out = run_operation(Edit(Site(1), d, removed, "project"), x)
    codes = d.encode(x)
    error = x - d.decode(codes)
    codes[..., list(removed)] = 0
    left = out - d.decode(codes)
    span = torch.linalg.qr(d.W_dec[list(removed)].T).Q
    assert float((left @ span).abs().max()) < 1e-4
    torch.testing.assert_close(left, error - error @ span @ span.T, rtol=1e-4, atol=1e-4)


def test_removing_every_feature_with_the_error_dropped_leaves_the_bias(tiny: LoadedModel):
    d, x = dictionary(tiny), torch.randn(1, 3, D)
    out = run_operation(Edit(Site(1), d, tuple(range(F)), "drop"), x)
    torch.testing.assert_close(out, torch.zeros_like(x), rtol=0, atol=1e-5)


# on a running model


def test_an_edit_works_under_generate_with_cache_left_padding_and_batches(any_family: LoadedModel):
    e = Edit(Site(1), dictionary(any_family), tuple(range(0, F, 2)))
    rows = chat.encode_prompts(any_family.tokenizer, PROMPTS)
    with applied(any_family, e):
        together = generate.greedy(any_family, rows, max_new_tokens=5)
        for row, reply in zip(rows, together, strict=True):
            ids = list(row)
            for token in reply:  # no cache, no padding: the whole text every time
                logits = any_family.network(torch.tensor([ids]), use_cache=False).logits
                assert int(logits[0, -1].argmax()) == token
                ids.append(token)
    ids = torch.tensor([rows[0]])
    bare = any_family.network(ids).logits
    with applied(any_family, e):
        assert not torch.allclose(any_family.network(ids).logits, bare, atol=1e-4)


def test_weights_are_untouched_and_the_edit_ends_with_its_block(tiny: LoadedModel):
    e = Edit(Site(1), dictionary(tiny), tuple(range(F)))
    ids = torch.tensor(tiny.token_ids(["the quick brown fox"]))
    bare = tiny.network(ids).logits
    with applied(tiny, e) as network:
        assert not torch.allclose(network(ids).logits, bare)
    with pytest.raises(RuntimeError), applied(tiny, e) as network:
        network(torch.zeros(1, 2, 3, 4))
    assert torch.equal(tiny.network(ids).logits, bare)


def test_a_dictionary_of_another_model_is_refused(tiny: LoadedModel):
    other = LoadedModel(build("qwen2"), byte_tokenizer(), "other")
    e = Edit(Site(1), dictionary(tiny), (1,))
    with pytest.raises(Refused, match="another"), applied(other, e):
        pass
    with applied(other, e, any_model=True):
        pass


def test_edits_of_one_site_act_one_after_the_other(tiny: LoadedModel):
    first, second = (Edit(Site(1), dictionary(tiny), ids) for ids in ((1, 2, 3), (4, 5)))
    seen: list[torch.Tensor] = []
    ids = torch.tensor(tiny.token_ids(["the quick brown fox"]))
    with applied(tiny, [first, second]) as network, capture(network, [Site(1)]) as held:
        network(ids)
    seen.append(held[Site(1)])
    with capture(tiny.network, [Site(1)]) as held:
        tiny.network(ids)
    seen.append(run_operation(second, run_operation(first, held[Site(1)])))
    torch.testing.assert_close(seen[0], seen[1])


def test_wrong_widths_are_refused(tiny: LoadedModel):
    narrow = TopK(Site(1), "m", torch.randn(8, 9), torch.zeros(9), torch.randn(9, 8), torch.zeros(8), k=2)
    with pytest.raises(BadInput, match="width 8; the model's is 32"), applied(tiny, Edit(Site(1), narrow, (1,))):
        pass


def test_a_saved_edit_does_the_same(tiny: LoadedModel, tmp_path: Path):
    edits = [
        Edit(Site(1), dictionary(tiny).to(torch.bfloat16), (5, 2)),
        Edit(Site(2), dictionary(tiny, 2).to(torch.bfloat16), ()),
    ]
    save_edit(edits, tmp_path / "e", chosen_on=["abc"])
    again, chosen_on = load_edit(tmp_path / "e")
    assert chosen_on == {"abc"}
    assert [(e.site, e.removed, e.error) for e in again] == [(e.site, e.removed, e.error) for e in edits]
    x = torch.randn(1, 4, D)
    assert torch.equal(run_operation(again[0], x), run_operation(edits[0], x))


def test_an_edit_file_cannot_reach_outside_its_folder(tiny: LoadedModel, tmp_path: Path):
    save_edit([Edit(Site(1), dictionary(tiny), (1,))], tmp_path / "e")
    card = tmp_path / "e" / "edit.json"
    card.write_text(card.read_text().replace('"dictionary": "resid.1"', '"dictionary": "../../etc"'))
    with pytest.raises(BadInput, match="inside"):
        load_edit(tmp_path / "e")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ([], "is []; expected an object"),
        ({"schema": "unsleep.edit/9"}, "edit.schema is 'unsleep.edit/9'; expected unsleep.edit/1"),
        ({"schema": None}, "edit.schema is None; expected unsleep.edit/1"),
        ({"edits": None}, "edits is None; expected a list"),
        ({"edits": {}}, "edits is {}; expected a list"),
        ({"edits": ["resid.1"]}, "edits[0] is 'resid.1'; expected an object"),
        ({"edits": [{}]}, "edits[0] has no 'site'"),
        ({"chosen_on": None}, "chosen_on is None; expected a list"),
        ({"chosen_on": [1]}, "chosen_on[0] is 1; expected text"),
        ({"site": 1}, "edits[0].site is 1; expected text"),
        ({"site": "resid"}, "Site 'resid' is unknown"),
        ({"site": "resid.2"}, "edit at resid.2 uses a dictionary of resid.1"),
        ({"removed": "12"}, "edits[0].removed is '12'; expected a list"),
        ({"removed": [1.5]}, "edits[0].removed[0] is 1.5; expected a whole number"),
        ({"removed": [True]}, "edits[0].removed[0] is True; expected a whole number"),
        ({"removed": [-1]}, "removes feature -1"),
        ({"removed": [3, 3]}, "removes a feature twice"),
        ({"error": "zero"}, "edits[0].error is 'zero'; expected one of keep, drop, project"),
        ({"error": 0}, "edits[0].error is 0; expected one of keep, drop, project"),
        ({"dictionary": None}, "edits[0].dictionary is None; expected text"),
        ({"dictionary": ".."}, "expected a name inside"),
        ({"dictionary": ""}, "expected a name inside"),
        ({"dictionary": "resid.9"}, "cfg.json does not exist"),
    ],
    ids=str,
)
def test_a_damaged_edit_file_is_named(tiny: LoadedModel, tmp_path: Path, change: Any, told: str):
    save_edit([Edit(Site(1), dictionary(tiny), (1,))], tmp_path / "e")
    path = tmp_path / "e" / "edit.json"
    card = store.read_json(path)
    if isinstance(change, dict):
        (card if change.keys() & card.keys() else card["edits"][0]).update(change)
    store.write_json(path, card if isinstance(change, dict) else change)
    with as_in_use(), pytest.raises(BadInput, match=re.escape(told)) as error:
        load_edit(tmp_path / "e")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("key", ["schema", "edits", "chosen_on", "site", "removed", "error", "dictionary"])
def test_a_key_that_an_edit_file_lacks_is_named(tiny: LoadedModel, tmp_path: Path, key: str):
    save_edit([Edit(Site(1), dictionary(tiny), (1,))], tmp_path / "e")
    path = tmp_path / "e" / "edit.json"
    card = store.read_json(path)
    del (card if key in card else card["edits"][0])[key]
    store.write_json(path, card)
    with pytest.raises(BadInput, match=rf"edit\.json.* has no '{key}'"):
        load_edit(tmp_path / "e")


# finding and choosing


def prompts(texts: Sequence[str], role: str = "clean") -> PromptSet:
    return PromptSet(role, tuple(Prompt(t, role) for t in texts), "edit")  # type: ignore[arg-type]


def test_log_odds_equal_their_definition(tiny: LoadedModel):
    rows = build_rows(tiny, chat.encode_prompts(tiny.tokenizer, PROMPTS), [[5, 6], [7], [8, 9], [3]])
    logits = reply_logits(tiny.network, rows)
    p = logits.softmax(-1).gather(-1, rows.targets[..., None]).squeeze(-1)
    expected = ((p / (1 - p)).log() * rows.reply).sum(1)
    torch.testing.assert_close(reply_log_odds(logits, rows), expected, rtol=1e-3, atol=1e-3)


def test_attribution_is_the_derivative_of_the_log_odds_in_each_feature(tiny: LoadedModel):
    d = dictionary(tiny)
    payload = greedy_rows(tiny, prompts(PROMPTS), 2)
    ranked = rank_by_attribution(tiny, [d], payload, {Site(1): torch.zeros(F)})[Site(1)]
    scores = dict(zip(ranked.ids, ranked.scores, strict=True))
    whole = reply_log_odds(reply_logits(tiny.network, payload.rows), payload.rows).mean()
    step = 1e-2  # remove a hundredth of the feature, on the prompts' own tokens only
    for feature in ranked.ids[:3] + ranked.ids[-3:]:
        run = operation(Edit(Site(1), d, (feature,)), torch.float32, "cpu")

        def shave(x: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor] = run) -> torch.Tensor:
            return x if x.shape[:2] != payload.rows.ids.shape else x + step * (run(x) - x)

        with transformed(tiny.network, {Site(1): shave}):
            less = reply_log_odds(reply_logits(tiny.network, payload.rows), payload.rows).mean()
        assert float(whole - less) / step == pytest.approx(scores[feature], rel=0.1, abs=0.02)


def test_find_ranks_what_differs_and_shows_where_it_fires(tiny: LoadedModel, tmp_path: Path):
    d = dictionary(tiny)
    suspicious = prompts([f"ZZZ {t}" for t in PROMPTS], "triggered")
    ordinary = prompts(PROMPTS)
    config = HarvestConfig(sink_ratio=1e9)
    pair = [harvest(tiny, s, [Site(1)], tmp_path / n, config=config) for s, n in ((suspicious, "s"), (ordinary, "o"))]
    found = find(tiny, [d], suspicious, (pair[0], pair[1]), FindConfig(prompts=4, ablate=5))[Site(1)]
    assert len(found.difference.ids) == F
    assert len(found.ablation.ids) == 5
    assert set(found.ablation.ids) == set(found.attribution.ids[:5])
    best = found.difference.head(2)
    shown = with_evidence(tiny, d, best, (pair[0], token_rows(tiny, suspicious)), pair[1])
    for feature in best.ids:
        evidence = shown.evidence[feature]
        assert evidence.suspicious_rate > 0
        assert len(evidence.promotes) == len(evidence.suppresses) == 8
        tokens, strengths = evidence.contexts[0]
        assert len(tokens) == len(strengths)
        assert max(strengths) > 0
        assert max(strengths) == max(max(s) for _, s in evidence.contexts)


def lesson_for(model: LoadedModel, config: MaskConfig) -> Lesson:
    suspicious = prompts([f"ZZZ {t}" for t in PROMPTS], "triggered")
    text = ["plain words that go on for a while and then some more of them"] * 3
    return prepare_lesson(model, suspicious, prompts(PROMPTS), text, config)


QUICK = MaskConfig(
    steps=25, batch=4, reply_tokens=4, text_tokens=16, price=1e-7, start=0.3, text_weight=0.1, trusted_weight=0.1
)


def test_a_mask_brings_the_suspicious_replies_closer_to_the_trusted_ones(tiny: LoadedModel):
    lesson = lesson_for(tiny, QUICK)
    d = dictionary(tiny, 1, k=16)
    edits = learn_mask(tiny, [d], lesson, None, QUICK)
    assert edits[0].removed
    n = lesson.n
    suspicious = lesson.rows.at(slice(0, n))

    def distance() -> float:
        p = torch.log_softmax(lesson.teacher.float(), -1)
        q = torch.log_softmax(reply_logits(tiny.network, suspicious).float(), -1)
        return float(((p.exp() * (p - q)).sum(-1) * suspicious.reply).sum())

    before = distance()
    with applied(tiny, edits):
        assert distance() < before


def test_only_candidates_are_removed(tiny: LoadedModel):
    lesson, d = lesson_for(tiny, QUICK), dictionary(tiny, 1, k=16)
    candidates = {
        Site(1): Features(Site(1), d.hash, tuple(range(10)), tuple(float(-i) for i in range(10)), "attribution")
    }
    [chosen] = learn_mask(tiny, [d], lesson, candidates, QUICK)
    assert set(chosen.removed) <= set(range(10))


def test_a_price_that_is_too_high_removes_nothing(tiny: LoadedModel):
    lesson, d = lesson_for(tiny, QUICK), dictionary(tiny)
    config = MaskConfig(steps=10, batch=4, reply_tokens=4, text_tokens=16, price=1e6)
    assert learn_mask(tiny, [d], lesson, None, config)[0].removed == ()


def test_a_mask_is_the_same_under_one_seed(tiny: LoadedModel):
    lesson, d = lesson_for(tiny, QUICK), dictionary(tiny, 1, k=16)
    first, second = (learn_mask(tiny, [d], lesson, None, QUICK)[0].removed for _ in range(2))
    assert first == second


def test_pairs_that_do_not_match_are_refused(tiny: LoadedModel):
    with pytest.raises(BadInput, match="4 suspicious prompts with 3"):
        prepare_lesson(tiny, prompts(PROMPTS), prompts(PROMPTS[:3]), ["x" * 100])
    with pytest.raises(BadInput, match="no plain passage has 32 tokens"):
        prepare_lesson(tiny, prompts(PROMPTS), prompts(PROMPTS), ["short"])


def test_plain_ablation_takes_the_best_over_all_sites(tiny: LoadedModel):
    dictionaries = [dictionary(tiny, 1), dictionary(tiny, 2)]
    ranking = {
        Site(1): Features(Site(1), "h", (4, 9, 2), (3.0, 1.0, 0.5), "attribution"),
        Site(2): Features(Site(2), "h", (7, 1, 0), (2.0, 1.5, 0.1), "attribution"),
    }
    assert merged(ranking)[:4] == [(Site(1), 4), (Site(2), 7), (Site(2), 1), (Site(1), 9)]
    assert [(e.site, e.removed) for e in edits_for(merged(ranking), dictionaries, 3)] == [
        (Site(1), (4,)),
        (Site(2), (7, 1)),
    ]
    lesson = lesson_for(tiny, QUICK)
    edits = edit(tiny, dictionaries, ranking, lesson, EditConfig(method="ablate", ablate=2))
    assert [(e.site, e.removed) for e in edits] == [(Site(1), (4,)), (Site(2), (7,))]


# baking


def rows_of(model: LoadedModel, n: int = 80) -> tuple[Rows, Rows]:
    """Random prompts with replies, and random text: enough tokens to fit a block's writers."""
    g = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(2, 250, (length,), generator=g).tolist()

    asked = chat.encode_prompts(model.tokenizer, ["x"] * n)
    chats = build_rows(model, [[*p, *draw(5, 15)] for p in asked], [draw(4, 8) for _ in asked])
    return chats, build_rows(model, [draw(8, 9) for _ in asked], [draw(8, 9) for _ in asked])


BAKEABLE = ["llama", "gpt2", "gpt_neox", "gpt_neo", "gptj", "phi", "opt", "falcon", "bloom", "mpt"]


@pytest.mark.parametrize("family", BAKEABLE)
def test_a_baked_model_follows_the_edited_one(family: str):
    model = LoadedModel(build(family), byte_tokenizer(), family)
    e = Edit(Site(1), dictionary(model, 1, k=4), tuple(range(0, F, 3)))
    rows = rows_of(model)
    baked = bake(model, [e], rows, BakeConfig(tolerance=1e3))
    assert baked.method == "ridge"
    held_back = [_take(group, 5, fit=False) for group in rows]
    assert baked.kl < 0.9 * faithfulness(model.network, model.network, [e], held_back)
    assert baked.kl == pytest.approx(faithfulness(model.network, baked.model.network, [e], held_back))
    assert baked.model.fingerprint != model.fingerprint


def test_families_with_a_post_norm_are_distilled():
    model = LoadedModel(build("gemma2"), byte_tokenizer(), "gemma2")
    e = Edit(Site(1), dictionary(model, 1, k=4), tuple(range(0, F, 3)))
    rows = rows_of(model)
    baked = bake(model, [e], rows, BakeConfig(tolerance=1e3, distil_steps=150, learning_rate=3e-3))
    assert baked.method == "distil"
    fitted = [_take(group, 5, fit=True) for group in rows]
    before = faithfulness(model.network, model.network, [e], fitted)
    assert faithfulness(model.network, baked.model.network, [e], fitted) < 0.9 * before


def test_a_baked_model_that_is_not_faithful_is_refused(tiny: LoadedModel):
    e = Edit(Site(1), dictionary(tiny), tuple(range(F)))
    with pytest.raises(Refused, match="not faithful"):
        bake(tiny, [e], rows_of(tiny, 10), BakeConfig(tolerance=1e-9))


def test_baking_nothing_changes_nothing(tiny: LoadedModel):
    baked = bake(tiny, [Edit(Site(1), dictionary(tiny), ())], rows_of(tiny, 10))
    assert baked.model.fingerprint == tiny.fingerprint
    assert baked.kl == pytest.approx(0.0, abs=1e-6)
