"""The nouns refuse what they cannot stand for, and their hashes and names are faithful."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from support.checks import as_in_use
from support.dictionaries import small_dictionary
from unsleep.core import Activations, BadInput, FeatureEvidence, Features, Site, check_finite, digest
from unsleep.interventions.features import Edit
from unsleep.judge.results import EvalResult, Row
from unsleep.prompts.prompt import Prompt, PromptSet

SITES = st.builds(Site, st.integers(0, 500), st.sampled_from(["resid", "mlp", "attn"])) | st.just(Site(0, "embed"))
TEXT = st.text(max_size=20).filter(lambda t: t.strip() != "")
PROMPTS = st.builds(
    Prompt,
    TEXT,
    st.sampled_from(["clean", "triggered", "variant", "near_miss", "control"]),
    st.none() | st.text(max_size=5),
    st.just(()),
)


@given(SITES)
def test_a_site_reads_back_from_its_own_text_and_its_hook_name(site: Site):
    assert Site.parse(str(site)) == site
    assert Site.parse(f"  {site}\n") == site
    assert Site.from_hook_name(site.hook_name) == site


@given(st.lists(SITES, min_size=2, max_size=6, unique=True))
def test_distinct_sites_have_distinct_names(places: list[Site]):
    assert len({str(s) for s in places}) == len(places)
    assert len({s.hook_name for s in places}) == len(places)


@pytest.mark.parametrize(
    ("text", "site", "hook_name"),
    [
        ("resid.12", Site(12, "resid"), "blocks.12.hook_resid_post"),
        ("mlp.3", Site(3, "mlp"), "blocks.3.hook_mlp_out"),
        ("attn.0", Site(0, "attn"), "blocks.0.hook_attn_out"),
        ("embed", Site(0, "embed"), "hook_embed"),
        ("7", Site(7, "resid"), "blocks.7.hook_resid_post"),
    ],
)
def test_sites_have_the_names_that_saelens_uses(text: str, site: Site, hook_name: str):
    assert Site.parse(text) == site
    assert site.hook_name == hook_name


@given(st.text(max_size=12) | st.text(max_size=4).map(lambda t: f"resid.{t}"))
@example("resid.²")
@example("³")
@example("resid.-1")
@example("resid")
@example("")
@example("embed.1")
@example("RESID.1")
@example("resid.1.0")
def test_any_text_is_a_site_or_is_refused_as_bad_input(text: str):
    try:
        site = Site.parse(text)
    except BadInput:
        return
    assert Site.parse(str(site)) == site
    assert text.strip().endswith(tuple("0123456789")) or text.strip() == "embed" or not text.isascii()


@pytest.mark.parametrize("text", [".12", ".", " .3", "resid.", "resid." + "9" * 5000, "9" * 5000, "-1", "mlp.-3"])
def test_half_a_site_and_a_layer_beyond_any_model_are_refused_in_short(text: str):
    with pytest.raises(BadInput, match=r"is unknown; expected resid\.12") as error:
        Site.parse(text)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("text", ["resid", "resid.", "resid.-1", "resid.1.0", "mpl.3", "embed.1", "", "resid.x", "1.5"])
def test_a_site_that_is_not_understood_is_named(text: str):
    with pytest.raises(BadInput, match="Site"):
        Site.parse(text)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.3.hook_resid_pre",
        "blocks.3.attn.hook_z",
        "blocks.x.hook_mlp_out",
        "blocks.².hook_mlp_out",
        "blocks." + "9" * 5000 + ".hook_mlp_out",
        "",
        "ln_final",
    ],
)
def test_hook_names_of_other_places_are_refused(name: str):
    with pytest.raises(BadInput, match="is not a residual, MLP or attention output"):
        Site.from_hook_name(name)


def test_sites_that_cannot_be_are_refused():
    with pytest.raises(BadInput, match="-1; layers count from 0"):
        Site(-1)
    with as_in_use(), pytest.raises(BadInput, match="'middle'; expected one of"):
        Site(0, "middle")
    with pytest.raises(BadInput, match="not of layer 2"):
        Site(2, "embed")


def test_prompts_need_text_and_a_known_role():
    for empty in ("", " ", "\n\t"):
        with pytest.raises(BadInput, match="a prompt is empty"):
            Prompt(empty)
    with as_in_use(), pytest.raises(BadInput, match="role is 'evil'"):
        Prompt("hello", "evil")


def test_prompt_sets_need_a_prompt_and_a_known_split():
    with pytest.raises(BadInput, match="'mine' is empty"):
        PromptSet("mine", ())
    with as_in_use(), pytest.raises(BadInput, match="split is 'test'"):
        PromptSet("mine", (Prompt("a"),), "test")
    with pytest.raises(BadInput, match="empty"):
        PromptSet("mine", (Prompt("a"),)).head(0)


@given(st.lists(PROMPTS, min_size=1, max_size=5), st.data())
def test_the_hash_of_a_set_changes_with_every_field_of_every_prompt(prompts: list[Prompt], data: st.DataObject):
    whole = PromptSet("a", tuple(prompts))
    i = data.draw(st.integers(0, len(prompts) - 1))
    other = data.draw(PROMPTS.filter(lambda p: p != prompts[i]))
    assert PromptSet("a", (*prompts[:i], other, *prompts[i + 1 :])).hash != whole.hash
    assert PromptSet("a", (*prompts, other)).hash != whole.hash
    assert PromptSet("another name", tuple(prompts), "train").hash == whole.hash
    for change in ({"text": prompts[i].text + "."}, {"role": "control" if prompts[i].role == "clean" else "clean"}):
        changed = dataclasses.replace(prompts[i], **change)
        assert PromptSet("a", (*prompts[:i], changed, *prompts[i + 1 :])).hash != whole.hash


@given(st.lists(PROMPTS, min_size=2, max_size=5, unique=True), st.randoms(use_true_random=False))
def test_the_hash_of_a_set_changes_with_the_order(prompts: list[Prompt], mix):
    mixed = list(prompts)
    mix.shuffle(mixed)
    same_order = mixed == prompts
    assert (PromptSet("a", tuple(mixed)).hash == PromptSet("a", tuple(prompts)).hash) == same_order


def test_no_skill_and_an_empty_skill_are_told_apart_by_the_hash():
    assert PromptSet("a", (Prompt("x"),)).hash != PromptSet("a", (Prompt("x", "clean", ""),)).hash


def test_a_set_is_a_sequence_and_its_head_keeps_name_and_split():
    prompts = tuple(Prompt(t) for t in "abc")
    whole = PromptSet("mine", prompts, "edit")
    assert (len(whole), list(whole), whole[1], whole.texts) == (3, list(prompts), prompts[1], ["a", "b", "c"])
    assert whole.head(2) == PromptSet("mine", prompts[:2], "edit")
    assert whole.head(9) == whole


def test_digest_is_the_beginning_of_sha_256():
    assert digest("abc") == digest(b"abc") == "ba7816bf8f01cfea"  # FIPS 180-2, appendix B.1


def test_activations_have_one_prompt_index_a_token():
    def make(tensor: torch.Tensor, index: torch.Tensor) -> Activations:
        return Activations(tensor, index, Site(2), "m", "p")

    assert make(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)).tensor.shape == (3, 4)
    for tensor, indices in ((torch.zeros(3, 4), 2), (torch.zeros(3), 3), (torch.zeros(2, 3, 4), 2)):
        with as_in_use(), pytest.raises(BadInput, match=r"activations at resid\.2 have shape"):
            make(tensor, torch.zeros(indices, dtype=torch.long))


def evidence(note: str) -> FeatureEvidence:
    return FeatureEvidence(((("a", note), (0.0, 1.0)),), (note,), (), 0.9, 0.1)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=8, unique=True), st.integers(0, 10))
def test_the_head_of_features_keeps_the_evidence_of_what_is_left(ids: list[int], n: int):
    told = {i: evidence(str(i)) for i in ids[::2]}
    whole = Features(Site(1), "d", tuple(ids), tuple(float(-i) for i in range(len(ids))), "attribution", told)
    head = whole.head(n)
    assert head.ids == tuple(ids[:n])
    assert head.scores == whole.scores[:n]
    assert head.evidence == {i: e for i, e in told.items() if i in ids[:n]}
    assert (head.site, head.dictionary, head.method) == (whole.site, whole.dictionary, whole.method)
    assert whole.evidence == told


def test_features_need_distinct_ids_with_a_score_each():
    with pytest.raises(BadInput, match="2 feature ids with 1 scores"):
        Features(Site(1), "d", (3, 4), (1.0,), "difference")
    with pytest.raises(BadInput, match=r"resid\.1 contain an id twice"):
        Features(Site(1), "d", (3, 3), (1.0, 0.5), "difference")


def test_an_edit_must_fit_its_dictionary():
    dictionary = small_dictionary()
    assert Edit(Site(1), dictionary, (0, 5), "project").removed == (0, 5)
    for beyond in (6, -1):
        with pytest.raises(BadInput, match=rf"removes feature {beyond}; the dictionary has 6"):
            Edit(Site(1), dictionary, (0, beyond))
    with pytest.raises(BadInput, match="removes a feature twice"):
        Edit(Site(1), dictionary, (2, 3, 2))
    for elsewhere in (Site(2), Site(1, "mlp")):
        with pytest.raises(BadInput, match=r"uses a dictionary of resid\.1"):
            Edit(elsewhere, dictionary, (0,))
    with as_in_use(), pytest.raises(BadInput, match=r"error rule is 'zero'; expected one of .*'keep'"):
        Edit(Site(1), dictionary, (0,), "zero")


@pytest.mark.parametrize("field", ["value", "low", "high"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_refuses_what_is_not_finite(field: str, bad: float):
    row = Row("edited", "clean", "kl", 0.5, 0.4, 0.6, 10)
    with pytest.raises(BadInput, match=r"edited/clean/kl is .*expected finite numbers"):
        dataclasses.replace(row, **{field: bad})


def test_a_result_gives_the_row_of_that_name_or_says_it_has_none():
    rows = tuple(Row(s, p, "asr", 0.1, 0.0, 0.2, 5) for s in ("suspect", "edited") for p in ("clean", "triggered"))
    result = EvalResult(rows, {}, {})
    assert result.get("edited", "clean", "asr") is rows[2]
    with pytest.raises(KeyError, match="edited/clean/skill"):
        result.get("edited", "clean", "skill")


def test_numbers_that_are_not_finite_are_counted():
    check_finite(torch.tensor([0.0, -3.0]), "fine")
    with pytest.raises(BadInput, match="weights has 2 NaN or infinite values of 3"):
        check_finite(torch.tensor([math.nan, 1.0, -math.inf]), "weights")


def test_nouns_do_not_change():
    for noun, field in ((Site(1), "layer"), (Prompt("a"), "text"), (PromptSet("a", (Prompt("a"),)), "prompts")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(noun, field, None)


def test_an_error_about_a_field_holds_it_and_can_call_it_by_another_name():
    error = BadInput.of("top", 0, "at least 1", "diff")
    assert (error.field, error.value, error.expected) == ("top", 0, "at least 1")
    assert str(error) == "diff top is 0; expected at least 1"
    assert error.under("--top") == "--top is 0; expected at least 1"
    assert str(BadInput.of("ranks", (), "at least one")) == "ranks are (); expected at least one"
    assert len(str(BadInput.of("name", "x" * 1000, "a short one"))) < 120
    assert BadInput("anything").field == ""
