"""Records of classes: rules, classes.json of a dictionary's features, and ablation.json of a study of classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from unsleep.base.records import Count, Range, Share
from unsleep.base.stats import Estimate
from unsleep.core import BadInput, Site
from unsleep.explanations.answers import UNCLEAR
from unsleep.explanations.figures import FIGURES
from unsleep.explanations.record import ClassScore
from unsleep.models.model import Named

OTHER = "other"

SOURCES = ("fires", "promotes")
"""Endings of a lexicon's figures."""

Grounds = Literal["behaviour", "keywords", "votes"]
"""Evidence of a label: figures of behaviour; keywords of an explanation; a judge's votes on an explanation."""


class Condition(NamedTuple):
    """A figure that must be at least as large as a threshold."""

    figure: str
    least: float


@dataclass(frozen=True)
class ClassRule:
    """A class of features: all of its conditions hold. Several rules of one name are alternatives."""

    name: str
    conditions: tuple[Condition, ...] = ()
    words: tuple[str, ...] = ()
    """Lexicon of the class; its figures are NAME_fires and NAME_promotes. Without conditions, half of the tokens on
    which the feature fires must be in it."""
    keywords: tuple[str, ...] = ()
    """Words of an explanation that name the class."""

    def __post_init__(self) -> None:
        if not self.name.strip() or self.name in (OTHER, UNCLEAR):
            raise BadInput.of("name", self.name, f"a name other than {OTHER} and {UNCLEAR}", "class")
        if not (self.conditions or self.words or self.keywords):
            raise BadInput(f"class {self.name!r} has no conditions, words or keywords; expected at least one of them")
        if self.words and not self.conditions:
            object.__setattr__(self, "conditions", (Condition(f"{self.name}_fires", 0.5),))

    def check(self, lexicons: tuple[str, ...]) -> None:
        """Raise `BadInput` for a condition on a figure that is not measured with these lexicons."""
        known = {*FIGURES, *(f"{name}_{source}" for name in lexicons for source in SOURCES)}
        for condition in self.conditions:
            if condition.figure not in known:
                raise BadInput.of(
                    "figure", condition.figure, f"one of {', '.join(sorted(known))}", f"class {self.name!r}"
                )


@dataclass(frozen=True)
class RulesFile:
    """A TOML file of classes: a table `[[rules]]` each."""

    rules: tuple[ClassRule, ...]


@dataclass(frozen=True)
class Labelled:
    """A feature's classes and the evidence behind them."""

    classes: tuple[ClassScore, ...]
    """Best first; `unclear` or `other` alone where there are none."""
    evidence: dict[str, Estimate]
    """Figure → value with its interval (see `figures.FIGURES`); left out for `other`."""
    words: tuple[str, ...] = ()
    """Tokens on which it fires most."""
    votes: tuple[ClassScore, ...] = ()
    """Classes by a judge, with their share of its votes."""
    grounds: dict[str, tuple[Grounds, ...]] = field(default_factory=dict[str, tuple[Grounds, ...]])
    """Label → the evidence for it; behaviour, where it is among it, alone gives the score."""


@dataclass(frozen=True)
class ClassesRecord:
    """classes.json: classes of the features of one dictionary that are active enough to be judged."""

    SCHEMA: ClassVar = "unsleep.classes/1"

    model: Named
    site: Site
    dictionary: str
    """Hash."""
    size: Count
    """Features of the dictionary."""
    scorer: str
    rules: tuple[ClassRule, ...]
    features: dict[int, Labelled]
    chosen_on: tuple[str, ...]
    """Digests of the prompts that the evidence is from (`judge.evaluate.prompt_digests`); a study refuses them."""
    provenance: dict[str, Any]
    judge: str = ""
    """Language model whose votes are among the evidence; empty without."""

    @property
    def names(self) -> list[str]:
        """Classes of the rules, and others that a judge named."""
        labels = (label.name for each in self.features.values() for label in each.classes)
        every = dict.fromkeys([*(rule.name for rule in self.rules), *labels])
        return [name for name in every if name not in (OTHER, UNCLEAR)]

    def of(self, name: str, least: float) -> list[int]:
        """Features of a class with at least this score."""
        held = {i: {c.name: c.score for c in each.classes} for i, each in self.features.items()}
        return sorted(i for i, scores in held.items() if scores.get(name, 0.0) >= least and name in scores)


Arm = Literal["intact", "reconstruction", "class", "random", "pca"]
"""Change of the model: none; every Site of the class replaced by its reconstruction; the class ablated with the error
kept; as many matched random features ablated; a PCA subspace of equal rank."""

Metric = Literal["payload", "restored", "skill", "degenerate", "reward", "sentiment", "kl", "ce"]


@dataclass(frozen=True)
class StudyRow:
    """A metric of one arm, and its change against the intact model on the same prompts."""

    of: str
    """The class; empty for the intact model."""
    arm: Arm
    metric: Metric
    value: float
    low: float
    high: float
    change: float
    """Mean of the paired differences to the intact model."""
    change_low: float
    change_high: float
    n: Annotated[int, Range(1)]
    """Prompts, passages or pairs of reviews."""
    draws: tuple[float, ...] = ()
    """Change of each random draw."""
    p: Share | None = None
    """Of a class: (1 + draws whose |change| is at least as large) / (1 + draws)."""


@dataclass(frozen=True)
class StudiedClass:
    """A class that is ablated: its features by Site, and the rank of the PCA subspaces."""

    name: str
    features: dict[Site, tuple[Count, ...]]
    ranks: dict[Site, Count]


@dataclass(frozen=True)
class StudyRecord:
    """ablation.json: what ablating each class of features does, beside its controls."""

    SCHEMA: ClassVar = "unsleep.ablation/1"

    model: Named
    payload: str
    scorer: str
    classes: tuple[StudiedClass, ...]
    rows: tuple[StudyRow, ...]
    dictionaries: dict[Site, str]
    """Site → hash."""
    provenance: dict[str, Any]

    def get(self, of: str, arm: Arm, metric: Metric) -> StudyRow:
        """The one row of that name; raises `KeyError` where it was not measured."""
        for row in self.rows:
            if (row.of, row.arm, row.metric) == (of, arm, metric):
                return row
        raise KeyError(f"no row {of}/{arm}/{metric}")
