"""Explanations: predicates as sentences, what is learned of a planted rule, scores and baselines, the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unsleep
from support.checkpoints import save_base
from support.dictionaries import D, F, dictionary
from support.planted_statistics import firing, passages, plain_text, statistics_of
from unsleep import cli
from unsleep.base.context import reporting
from unsleep.base.stats import Estimate
from unsleep.core import BadInput, Refused, Site
from unsleep.dictionaries.files import save_dictionary
from unsleep.explanations.controls import calibration, densities, frozen, matched, randomised
from unsleep.explanations.examples import Examples
from unsleep.explanations.explained import ExplainConfig, Explanations, explained
from unsleep.explanations.learning import LearnConfig, frequent, learn
from unsleep.explanations.predicates import (
    Before,
    Here,
    Kind,
    Pattern,
    Place,
    Predicate,
    Tokens,
    Words,
    pattern,
    quoted,
    unquoted,
)
from unsleep.explanations.record import Explanation
from unsleep.explanations.run import ExplainRecord
from unsleep.explanations.scoring import balanced_accuracy, correlation, marked, mean, rates
from unsleep.explanations.statistics import FeatureStatistics, StatisticsConfig
from unsleep.explanations.text import KINDS, ROLES, Source, read_text
from unsleep.models.load import load_model
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Prompt, PromptSet

CONFIG = ExplainConfig(controls=8, least=2)
RULES = ("'h'", "'o' right after 'l'", "'s' or 'm' right after ' '", "the word 'i'", "'e' up to 8 tokens after 'I'")

# Sentences

SENTENCES = [
    "no token",
    "' hate'",
    "' hate', ' hated' or ' hates' right after ' I', or the word 'fury' in the reply; promotes ' you', ' them'",
    "any token in the header; suppresses '['",
    "any token at the first token of the reply",
    "a number 2 tokens after '$' among the last 4 tokens of the question",
    "any token up to 8 tokens after a capitalised word",
    "'it\\'s' or 'a\\\\b\\n' right after the word 'or', 'and' or 'the'",
    "the word 'may' that is a capitalised word right after 'in'",
    "'\\u{200b}'",
]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_is_parsed_and_printed(sentence: str):
    assert str(Predicate.parse(sentence)) == sentence


STRINGS = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=6)
WHICH = st.one_of(
    st.builds(Tokens, st.lists(STRINGS, min_size=1, max_size=3).map(tuple)),
    st.builds(Words, st.lists(STRINGS, min_size=1, max_size=3).map(tuple)),
    st.builds(Kind, st.sampled_from(sorted(KINDS))),
)
TESTS = st.one_of(
    st.builds(Before, WHICH, st.just(1)),
    st.builds(Before, WHICH, st.integers(2, 8), st.booleans()),
    st.builds(Place, st.sampled_from(ROLES)),
    st.builds(Place, st.sampled_from(ROLES), st.integers(1, 9), st.booleans()),
)
PATTERNS = st.builds(
    lambda here, tests: Pattern((*here, *tests)),
    st.lists(st.builds(Here, WHICH), max_size=2),
    st.lists(TESTS, max_size=2),
)


@given(st.builds(Predicate, st.lists(PATTERNS, max_size=3).map(tuple), st.lists(STRINGS, max_size=2).map(tuple)))
def test_every_predicate_comes_back_from_its_sentence(predicate: Predicate):
    assert Predicate.parse(str(predicate)) == predicate
    assert str(predicate).isprintable()


@given(STRINGS)
def test_quotes_are_undone(token: str):
    assert unquoted(quoted(token)) == token


@pytest.mark.parametrize(
    "text", ["", "'a", "'a' before 'b'", "the number", "'a', or ", "'a' in the kitchen", "'a'; says 'b'"]
)
def test_a_sentence_that_is_none_is_refused_with_its_place(text: str):
    with pytest.raises(BadInput, match="; expected"):
        Predicate.parse(text)


# Application


def holds(model: LoadedModel, sentence: str, said: str = "I see 3 Big, BIG suns\nI") -> str:
    """The characters at which it holds, others as dots."""
    text = read_text(model, [Source(PromptSet("p", (Prompt(said),)), plain=True)]).text
    return "".join(c if h else "." for c, h in zip(said, Predicate.parse(sentence).holds(text), strict=True))


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("'s'", "..s..............s..s.."),
        ("the word 'i'", "I........i....I.......I"),
        ("a number", "......3................"),
        ("punctuation", "...........,..........."),
        ("a line break", ".....................⏎."),
        ("'I' right after a line break", "......................I"),
        ("any token right after 'B'", ".........i....I........"),
        ("any token 2 tokens after 'B'", "..........g....G......."),
        ("'s' up to 8 tokens after 'B'", ".................s..s.."),
        ("'I' at the first token of the text", "I......................"),
        ("any token among the last 2 tokens of the text", ".....................⏎I"),
        ("any token in the reply", "......................."),
        ("'3', or ','", "......3....,..........."),
        ("no token", "......................."),
        ("'absent'", "......................."),
    ],
)
def test_a_predicate_holds_where_it_says(tiny: LoadedModel, sentence: str, expected: str):
    assert holds(tiny, sentence).replace("\n", "⏎") == expected


def test_predicates_do_not_look_into_other_rows_and_know_roles(tiny: LoadedModel):
    prompts = PromptSet("p", (Prompt("ab"), Prompt("bb")))
    text = read_text(tiny, [Source(prompts, plain=True), Source(prompts, replies=("b", "c"))]).text
    hits = Predicate.parse("'b' right after 'a'").holds(text)
    assert text.row[hits].tolist() == [0, 2]
    first = Predicate.parse("any token at the first token of the reply").holds(text)
    assert text.spelled(np.flatnonzero(first)) == ("b", "c")
    some = np.array([0, 1, 3])
    assert Predicate.parse("'b'").holds(text, some).tolist() == [False, True, True]
    weights = np.array([2.0, 3.0])
    both = Predicate.parse("'b', or 'b' right after 'a'").weighted(text, some, weights)
    assert both.tolist() == [0, 3, 2]


# Learning


def both_halves(model: LoadedModel, rule: str, seed: int = 0) -> tuple[FeatureStatistics, Examples]:
    text = plain_text(model, 60, seed)
    statistics = statistics_of(model, text, firing(text, [rule, *RULES]))
    return statistics, Examples(statistics)


@pytest.mark.parametrize("rule", RULES)
def test_a_planted_rule_is_found(tiny: LoadedModel, rule: str):
    statistics, examples = both_halves(tiny, rule)
    train, _ = examples.of(0, 96, 32)
    found = learn(statistics.text, train)
    truth, said = (p.holds(statistics.text) for p in (Predicate.parse(rule), found))
    assert (said & truth).sum() >= 0.97 * truth.sum()
    assert (said & truth).sum() >= 0.97 * said.sum()
    assert found.size <= 2 * Predicate.parse(rule).size + 2, str(found)


def test_rules_of_roles_are_found(tiny: LoadedModel):
    prompts = passages(40, words=3)
    replies = tuple(f"{'abc'[i % 3]} reply" for i in range(40))
    text = read_text(tiny, [Source(prompts, replies=replies)]).text
    rules = ["any token at the first token of the reply", "any token at the last token of the header"]
    statistics = statistics_of(tiny, text, firing(text, rules))
    for feature, rule in enumerate(rules):
        train, _ = Examples(statistics).of(feature, 96, 32)
        found = learn(text, train).holds(text)
        assert (found == Predicate.parse(rule).holds(text))[text.role > 1].all(), rule


def test_alternatives_of_one_form_are_one_pattern(tiny: LoadedModel):
    text = plain_text(tiny, 60)
    statistics = statistics_of(tiny, text, firing(text, ["'h', 'v', 'r' or 'g'"]))
    train, _ = Examples(statistics).of(0, 96, 32)
    [only] = learn(text, train).patterns
    [test] = only.tests
    assert isinstance(test, Here)
    assert sorted(getattr(test.which, "tokens", getattr(test.which, "words", ()))) == ["g", "h", "r", "v"]


def test_noise_costs_more_than_it_gains(tiny: LoadedModel):
    text = plain_text(tiny, 60)
    rng = np.random.default_rng(0)
    noise = (rng.random((len(text.ids), 8)) < 0.01).astype(np.float32)
    statistics = statistics_of(tiny, text, noise)
    examples = Examples(statistics)
    sizes = [learn(text, examples.of(j, 96, 32)[0], LearnConfig(price=p)).size for p in (0.2, 0.0) for j in range(8)]
    assert max(sizes[:8]) <= 2
    assert sum(sizes[8:]) > sum(sizes[:8])


def test_the_most_frequent_token_is_a_predicate(tiny: LoadedModel):
    statistics, examples = both_halves(tiny, RULES[1])
    train, _ = examples.of(0, 96, 32)
    assert str(frequent(statistics.text, train)) == "'o'"


def test_bad_settings_are_refused():
    with pytest.raises(BadInput, match=r"price is -1\.0; expected at least 0"):
        LearnConfig(price=-1.0)
    with pytest.raises(BadInput, match="least is 0; expected at least 1"):
        ExplainConfig(least=0)


# Examples


def test_examples_are_what_they_are_said_to_be(tiny: LoadedModel):
    statistics, examples = both_halves(tiny, RULES[1])
    text = statistics.text
    truth = Predicate.parse(RULES[1]).holds(text)
    halves = examples.of(0, 40, 16)
    for half, side, count in zip(halves, (False, True), (40, 16), strict=True):
        assert 0 < len(half.fires) <= count
        assert truth[half.fires.centre].all()
        inside = half.fires.inside
        assert (half.fires.values[inside] > 0).tolist() == truth[half.fires.tokens[inside]].tolist()
        quiet = half.quiet
        assert 0 < len(half.similar) <= count // 2
        assert len(quiet) <= count
        assert not truth[quiet.tokens[quiet.inside]].any()
        assert set(text.spelled(half.similar.centre)) == {"o"}
        for windows in half[:3]:
            assert (text.held_out[text.row[windows.centre]] == side).all()
            assert len({*windows.centre.tolist()}) == len(windows)
        near, example = half.near
        assert not truth[near].any()
        assert (text.row[near] == text.row[half.fires.centre[example]]).all()
        assert len(marked(half, 0)) == len(np.unique(example))
    again = Examples(statistics).of(0, 40, 16)
    assert again[0].quiet.centre.tolist() == halves[0].quiet.centre.tolist()
    shown = examples.contexts(halves[1].fires, "held out")[0]
    assert shown.tokens[shown.at] == "o"
    assert shown.tokens[shown.at - 1] == "l"
    assert shown.values[shown.at] > 0


def test_rare_features_have_examples_beyond_the_sample(tiny: LoadedModel):
    text = plain_text(tiny, 60)
    statistics = statistics_of(tiny, text, firing(text, RULES), StatisticsConfig(sample=300, drawn=30))
    examples = Examples(statistics)
    train, held_out = examples.of(3, 96, 32)
    rows = np.concatenate([text.row[h.fires.centre] for h in (train, held_out)])
    assert not statistics.figures.sampled.numpy()[rows].all()
    truth = Predicate.parse(RULES[3]).holds(text)
    fires = train.fires
    assert (fires.values[fires.inside] > 0).tolist() == truth[fires.tokens[fires.inside]].tolist()


# Scores


def test_balanced_accuracy_and_its_interval():
    rng = np.random.default_rng(0)
    yes = np.array([True] * 30 + [False] * 10)
    no = np.array([True] * 5 + [False] * 15)
    found = balanced_accuracy(yes, no)
    assert found is not None
    assert found.value == pytest.approx((0.75 + 0.75) / 2)
    assert 0.6 < found.low < found.value < found.high < 0.87
    assert balanced_accuracy(yes, no[:0]) is None
    inside = 0
    for _ in range(100):
        each = balanced_accuracy(rng.random(60) < 0.8, rng.random(60) < 0.3)
        assert each is not None
        inside += each.low <= 0.75 <= each.high
    assert inside >= 88


def test_correlation_equals_numpys():
    rng = np.random.default_rng(0)
    x, y = rng.random(200), rng.random(200)
    example = np.repeat(np.arange(20), 10)
    found = correlation(x, x + y, example)
    assert found is not None
    assert found.value == pytest.approx(np.corrcoef(x, x + y)[0, 1])
    assert found.low < found.value < found.high
    constant = correlation(np.zeros(200), y, example)
    assert constant is not None
    assert constant.value == 0
    assert correlation(x, np.zeros(200), example) is None


def test_precision_and_recall_over_texts():
    row = np.repeat(np.arange(10), 10)
    fires = np.arange(100) % 5 == 0
    found = rates(np.arange(100) % 10 == 0, fires, row)
    assert (found["precision"].value, found["recall"].value) == (1.0, 0.5)
    assert rates(np.zeros(100, bool), fires, row).keys() == {"recall"}
    assert rates(fires, np.zeros(100, bool), row).keys() == {"precision"}
    assert mean(np.array([0.5, 0.7, 0.9])).value == pytest.approx(0.7)


# Explanations


def planted(model: LoadedModel) -> FeatureStatistics:
    text = plain_text(model, 80)
    return statistics_of(model, text, firing(text, [*RULES, "'n' right after 'u'", "'d'", "'g'"]))


def test_explanations_of_planted_rules_beat_their_baselines(tiny: LoadedModel):
    found = explained(planted(tiny), CONFIG)
    means = {(c.method, c.metric): c.value for c in found.compared}
    assert len(found.explanations) == 8
    assert found.unexplained == 0
    for metric in ("detection", "fuzzing"):
        assert means["predicate", metric].low > 0.97
        assert means["predicate", metric].value >= means["frequent token", metric].value
        assert means["shuffled", metric].value < 0.7
    assert means["predicate", "simulation"].value > 0.9
    assert means["predicate", "precision"].value > 0.95
    assert means["predicate", "recall"].value > 0.95
    for feature, [explanation] in found.explanations.items():
        assert explanation.source == "predicate"
        assert explanation.scores.keys() == {"detection", "fuzzing", "simulation", "precision", "recall"}
        assert ("; promotes '" in explanation.text) != ("; suppresses '" in explanation.text)
        assert found.predicate(feature) == Predicate.parse(explanation.text)
    assert found.predicate(99) is None


def test_noise_is_explained_at_chance(tiny: LoadedModel):
    text = plain_text(tiny, 120)
    noise = (np.random.default_rng(1).random((len(text.ids), 16)) < 0.004).astype(np.float32)
    found = explained(statistics_of(tiny, text, noise), replace(CONFIG, controls=16))
    means = {(c.method, c.metric): c.value for c in found.compared}
    for method in ("predicate", "frequent token", "shuffled"):
        for metric in ("detection", "fuzzing"):
            score = means[method, metric]
            assert abs(score.value - 0.5) < 0.12, (method, metric, score)
    assert abs(means["predicate", "simulation"].value) < 0.15


def test_some_features_and_those_that_fire_too_rarely(tiny: LoadedModel):
    text = plain_text(tiny, 40)
    activations = firing(text, RULES)
    activations[:, 2] = 0
    activations[5, 2] = 1
    statistics = statistics_of(tiny, text, activations)
    found = explained(statistics, CONFIG, features=[1, 2])
    assert [*found.explanations] == [1]
    assert found.unexplained == 1
    with pytest.raises(BadInput, match="no feature 7 at"):
        explained(statistics, CONFIG, features=[7])
    with pytest.raises(BadInput, match="give more text, or a lower --least"):
        explained(statistics, CONFIG, features=[2])
    with pytest.raises(BadInput, match="give more text"):
        explained(statistics, replace(CONFIG, least=10_000))


def test_explanations_come_back_and_take_others(tiny: LoadedModel, tmp_path: Path):
    statistics = planted(tiny)
    found = explained(statistics, CONFIG)
    found.save(tmp_path)
    again = Explanations.load(tmp_path, statistics)
    assert again == found
    assert json.loads((tmp_path / "explanations.json").read_text())["schema"] == "unsleep.explanations/1"
    judged = Explanation("fires at h", "some/judge", {"detection": Estimate(0.9, 0.8, 0.95)})
    more = again.added({0: [judged]}, judge="some/judge").added({0: [judged]})
    assert [e.source for e in more.of(0)] == ["predicate", "some/judge"]
    assert more.of(1) == found.of(1)
    assert more.provenance["judge"] == "some/judge"
    card = more.card(statistics, 0)
    assert [e.source for e in card.explanations] == ["predicate", "some/judge"]
    assert card.contexts == statistics.card(0).contexts


def test_explanations_of_something_else_are_refused_by_name(tiny: LoadedModel, tmp_path: Path):
    statistics = planted(tiny)
    found = explained(statistics, CONFIG)
    with pytest.raises(BadInput, match=r"explanations.json does not exist"):
        Explanations.load(tmp_path, statistics)
    others = (
        ("model", replace(found, model=found.model._replace(fingerprint="0" * 16))),
        ("dictionary", replace(found, dictionary="0" * 16)),
        ("Site", replace(found, site=Site(2))),
    )
    for name, other in others:
        other.save(tmp_path)
        with pytest.raises(Refused, match=rf"explanations.json: it is of {name}"):
            Explanations.load(tmp_path, statistics)
    replace(found, explanations={99: found.of(0)}).save(tmp_path)
    with pytest.raises(BadInput, match="explains feature 99; the dictionary has 0 to 7"):
        Explanations.load(tmp_path, statistics)


# Controls


def test_a_frozen_dictionary_has_random_directions_of_the_same_densities(tiny: LoadedModel):
    d = dictionary(tiny)
    x = calibration(tiny, [Source(passages(30), plain=True)], [d.site], StatisticsConfig())[d.site]
    fires = densities(d, x)
    assert fires.tolist() == (d.encode(x) > 0).sum(0).tolist()
    chosen = fires.nonzero()[:, 0][:20]
    control = frozen(d, chosen, x, seed=3)
    assert control.site == d.site
    assert control.n_features == 20
    low = fires[chosen] < 0.4 * len(x)
    apart = (densities(control, x) - fires[chosen]).abs()[low]
    assert apart.float().mean() < 1  # ties, of first tokens that are the same in several texts
    assert (control.decoder @ d.decoder[chosen].T).diagonal().abs().mean() < 0.3
    own = matched(d, d.W_enc.T[chosen], fires[chosen], x, "0" * 16)
    assert own.model == "0" * 16
    torch.testing.assert_close(own.W_enc, d.W_enc[:, chosen])


def test_a_randomised_model_has_other_weights_of_the_same_scale(tiny: LoadedModel):
    other = randomised(tiny)
    assert other.fingerprint != tiny.fingerprint
    assert other.fingerprint == randomised(tiny).fingerprint != randomised(tiny, 1).fingerprint
    for (name, a), b in zip(tiny.network.named_parameters(), other.network.parameters(), strict=True):
        if a.ndim == 1:
            assert torch.equal(a, b)
        else:
            assert not torch.equal(a, b), name
            assert b.std() == pytest.approx(float(a.std()), rel=0.1)


# The command

SMALL = ["--controls", "6", "--least", "2", "--top", "3", "--drawn", "12", "--batch-tokens", "400"]
TextFile = Callable[[str, str], Path]


@pytest.fixture
def suspect(tmp_path: Path) -> Path:
    return save_base(tmp_path / "suspect")


@pytest.fixture
def folder(suspect: Path, tmp_path: Path, text_file: TextFile) -> Path:
    """A model, dictionaries of two Sites, prompts and passages."""
    model = load_model(str(suspect))
    width = model.network.config.hidden_size
    for layer in (0, 1):
        d = dictionary(model, layer) if width == D else None
        assert d is not None
        save_dictionary(d, tmp_path / "dictionaries" / str(d.site))
    text_file("passages.txt", "\n".join(passages(40).texts))
    text_file("prompts.txt", "\n".join(["hello there", "why do stars shine", "name a bird"]))
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    files = ["--prompts", str(folder / "prompts.txt"), "--passages", str(folder / "passages.txt")]
    dictionaries = ["--dictionaries", str(folder / "dictionaries"), "--out", str(folder / "out")]
    return ["explain", str(folder / "suspect"), *dictionaries, *files, *SMALL, *more]


def test_the_command_explains_every_site(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run(arguments(folder, "--reply-tokens", "2", "--changes", "2", "--show", "2")) == 0
    said = capsys.readouterr()
    shown = said.out
    assert f"next: unsleep explore {folder / 'out'}" in said.err
    assert "resid.0: 64 features over " in shown
    assert re_row(shown, "detection") == 5
    assert shown.count("detection 0.") + shown.count("detection 1.00:") >= 2
    record = json.loads((folder / "out" / "explain.json").read_text())
    assert [row["site"] for row in record["sites"]] == ["resid.0", "resid.1"]
    assert record["texts"] == ["prompts", "passages"]
    methods = {each["method"] for each in record["sites"][0]["compared"]}
    assert methods == {"predicate", "frequent token", "shuffled", "random dictionary", "random model"}
    for site in ("resid.0", "resid.1"):
        statistics = FeatureStatistics.load(folder / "out" / site)
        found = Explanations.load(folder / "out" / site, statistics)
        card = found.card(statistics, next(iter(found.explanations)))
        assert card.changed
        assert card.explanations[0].scores
    assert {p.name for p in folder.iterdir() if p.name.startswith(".")} == set()
    feature, [explanation] = next(iter(found.explanations.items()))
    again = ["explain", str(folder / "suspect"), "--dictionaries", str(folder / "dictionaries")]
    again += ["--out", str(folder / "out"), "--features"]
    assert cli.run([*again, f"resid.1/{feature}"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"resid.1/{feature}: fires at ")
    assert explanation.text in shown
    assert "⟦" in shown
    for name, told in (
        ("resid.1", "--features names 'resid.1'"),
        ("resid.1/64", "feature resid.1/64 does not exist; resid.1 has 0 to 63"),
        ("mlp.1/3", "there is no dictionary at mlp.1 for mlp.1/3"),
    ):
        assert cli.run([*again, name]) == 2
        assert told in capsys.readouterr().err


def re_row(shown: str, metric: str) -> int:
    """Number of intervals in a metric's first row."""
    line = next(line for line in shown.splitlines() if line.strip().startswith(metric))
    return line.count("[")


def test_an_interrupted_command_resumes_and_gives_the_same(folder: Path, capsys: pytest.CaptureFixture[str]):
    stages: list[str] = []

    def stop(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        if stage == "explanations at resid.1":
            raise KeyboardInterrupt

    model = load_model(str(folder / "suspect"))
    coders = [dictionary(model, layer) for layer in (0, 1)]
    texts = [Source(passages(40), plain=True)]

    def run(out: str) -> ExplainRecord:
        small = StatisticsConfig(top=3, drawn=12)
        return unsleep.explain(model, coders, texts, folder / out, small, ExplainConfig(controls=6, least=2))

    with pytest.raises(KeyboardInterrupt), reporting(stop):
        run("one")
    assert not (folder / "one").exists()
    again: list[str] = []
    with reporting(lambda stage, done, total: again.append(stage)):
        resumed = run("one")
    assert "statistics" not in again
    whole = run("other")
    assert resumed.sites == whole.sites
    for name in ("resid.0", "resid.1"):
        assert Explanations.load(folder / "one" / name, FeatureStatistics.load(folder / "other" / name)).explanations
    assert run("one").sites == whole.sites


def test_the_command_refuses_bad_input(folder: Path, capsys: pytest.CaptureFixture[str]):
    def fails(code: int, *arguments: str) -> str:
        assert cli.run(arguments) == code
        return capsys.readouterr().err

    start = ["explain", str(folder / "suspect"), "--dictionaries", str(folder / "dictionaries")]
    passages_ = ["--passages", str(folder / "passages.txt")]
    out = ["--out", str(folder / "out")]
    assert "give --prompts, --passages or both" in fails(2, *start, *out)
    message = fails(2, *start, *out, *passages_, "--sites", "resid.1", "mlp.2")
    assert "no dictionary at mlp.2; those given are at resid.0, resid.1" in message
    assert "--reply-tokens is 3 with 0 files" in fails(2, *start, *out, *passages_, "--reply-tokens", "3")
    assert "--drawn is 0; expected at least 1" in fails(2, *start, *out, *passages_, "--drawn", "0")
    other = replace(dictionary(load_model(str(folder / "suspect"))), model="0" * 16)
    save_dictionary(other, folder / "alien")
    alien = ["explain", str(folder / "suspect"), "--dictionaries", str(folder / "alien"), *out, *passages_]
    assert f"trained on model {'0' * 16}" in fails(3, *alien)
    (folder / "short.txt").write_text("ab\ncd\n")
    assert "statistics need at least 64" in fails(2, *start, *out, "--passages", str(folder / "short.txt"))
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("mine")
    assert "exists already" in fails(2, *start, *out, *passages_)
    assert [p.name for p in (folder / "out").iterdir()] == ["mine.txt"]


def test_controls_can_be_left_out(folder: Path):
    assert cli.run(arguments(folder, "--controls", "0", "--site", "resid.1", "--json")) == 0
    record = json.loads((folder / "out" / "explain.json").read_text())
    assert [row["site"] for row in record["sites"]] == ["resid.1"]
    assert "compared" not in record["sites"][0] or record["sites"][0]["compared"] == []
    assert F == 64
    assert pattern(Place("text"), Here(Kind("a number"))).tests[0] == Here(Kind("a number"))
