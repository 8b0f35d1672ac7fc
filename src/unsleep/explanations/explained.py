"""Offline explanations of a dictionary's features, scored on held-out text beside baselines: explanations.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from unsleep.base import records, store
from unsleep.base.context import kept, progress
from unsleep.base.records import Count
from unsleep.base.stats import Estimate
from unsleep.core import BadInput, Site, check_least
from unsleep.explanations.examples import Examples
from unsleep.explanations.learning import LearnConfig, frequent, learn
from unsleep.explanations.predicates import Predicate
from unsleep.explanations.record import Explanation, FeatureCard
from unsleep.explanations.scoring import Judge, means
from unsleep.explanations.statistics import FeatureStatistics, refuse_others
from unsleep.models.lens import stronger
from unsleep.models.model import Named

FILE = "explanations.json"

SOURCE = "predicate"
"""Source of an offline explanation."""

BLOCK = 128
"""Features per resumable step."""


@dataclass(frozen=True)
class ExplainConfig(LearnConfig):
    """Examples of explanations and their baselines."""

    firings: int = 96
    """Firings of a feature that its explanation is learned from, at most, with as many negatives."""
    judged: int = 32
    """Held-out firings that it is scored on, at most, with as many negatives."""
    least: int = 4
    """Firings that a feature needs in either half of the text to be explained."""
    named: int = 5
    """Tokens that an explanation names, of those that the feature promotes or, where these have the larger logits,
    suppresses."""
    controls: int = 500
    """Random features on which the baselines are scored, per Site; 0 for none."""
    changes: int = 0
    """Random texts on which every explained feature is driven high, for the tokens it changes; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "explanations", 1, "firings", "judged", "least")
        check_least(self, "explanations", 0, "named", "controls", "changes")


class Compared(NamedTuple):
    """Mean of a score over features, of explanations or of a baseline."""

    method: str
    """`predicate`; `frequent token`, `shuffled`; `random dictionary`, `random model`: predicates learned on those."""
    metric: str
    features: Count
    """Features that have the score."""
    value: Estimate


@dataclass(frozen=True)
class Explanations:
    """explanations.json: explanations of one dictionary's features, by source."""

    SCHEMA: ClassVar = "unsleep.explanations/1"

    model: Named
    dictionary: str
    site: Site
    explanations: dict[int, tuple[Explanation, ...]]
    unexplained: Count
    """Features that fire in too few texts."""
    compared: tuple[Compared, ...]
    provenance: dict[str, Any]

    def of(self, feature: int) -> tuple[Explanation, ...]:
        """The explanations of a feature."""
        return self.explanations.get(feature, ())

    def predicate(self, feature: int) -> Predicate | None:
        """The offline explanation of a feature; `None` where it has none."""
        found = [e.text for e in self.of(feature) if e.source == SOURCE]
        return Predicate.parse(found[0]) if found else None

    def card(self, statistics: FeatureStatistics, feature: int) -> FeatureCard:
        """The feature's card with its explanations."""
        return replace(statistics.card(feature), explanations=self.of(feature))

    def added(self, found: Mapping[int, Sequence[Explanation]], **made_from: Any) -> Explanations:
        """With further explanations; those of the same feature and source are replaced.

        `made_from` is added to the provenance.
        """
        every = dict(self.explanations)
        for feature, new in found.items():
            sources = {e.source for e in new}
            every[feature] = (*(e for e in self.of(feature) if e.source not in sources), *new)
        ordered = {feature: every[feature] for feature in sorted(every)}
        return replace(self, explanations=ordered, provenance={**self.provenance, **made_from})

    def with_compared(self, compared: Sequence[Compared]) -> Explanations:
        """With the scores of further baselines."""
        return replace(self, compared=(*self.compared, *compared))

    def save(self, folder: str | Path) -> None:
        """Write explanations.json into the folder of the statistics."""
        records.save(self, Path(folder) / FILE)

    @classmethod
    def load(cls, folder: str | Path, statistics: FeatureStatistics) -> Explanations:
        """Read explanations.json.

        Raises `BadInput` where it is missing or damaged, and `Refused` where it is of another model, dictionary or Site
        than the statistics.
        """
        path = Path(folder) / FILE
        found = records.load(cls, path)
        have = (found.model.fingerprint, found.dictionary, found.site)
        refuse_others(str(path), have, (statistics.model.fingerprint, statistics.dictionary, statistics.site))
        wrong = [feature for feature in found.explanations if feature >= statistics.size]
        if wrong:
            raise BadInput(f"{path} explains feature {wrong[0]}; the dictionary has 0 to {statistics.size - 1}")
        return found


@dataclass(frozen=True)
class _Row:
    """A feature's predicate, its scores and those of its most frequent token."""

    feature: Count
    text: str
    scores: dict[str, Estimate]
    frequent: dict[str, Estimate]


@dataclass(frozen=True)
class _Step:
    """Result of a resumable step."""

    rows: tuple[_Row, ...] = ()
    scores: tuple[dict[str, Estimate], ...] = ()


def explained(
    statistics: FeatureStatistics,
    config: ExplainConfig = ExplainConfig(),
    *,
    features: Sequence[int] | None = None,
    compare_on: Sequence[int] | None = None,
) -> Explanations:
    """Explain features by predicates, learned on half of the texts and scored on the other half.

    Args:
        features: those to explain; all where `None`. Those that fire too rarely are left out and counted.
        compare_on: features on which the most frequent token and shuffled explanations are scored as well; random ones
            where `None`, `config.controls` of them.

    Raises:
        BadInput: a feature that does not exist, or none that fires in enough texts.
    """
    wanted = list(range(statistics.size)) if features is None else list(features)
    for feature in wanted:
        if not 0 <= feature < statistics.size:
            raise BadInput(f"there is no feature {feature} at {statistics.site}; expected 0 to {statistics.size - 1}")
    if compare_on is None:
        order = np.random.default_rng(statistics.record.config.seed).permutation(len(wanted))
        compare_on = [wanted[i] for i in order[: config.controls]]
    work = _Work(statistics, config, frozenset(compare_on), f"explanations at {statistics.site}")
    rows = work.rows(wanted)
    if not rows:
        raise BadInput(
            f"no feature at {statistics.site} fires {config.least} times in either half of {statistics.tokens:,} "
            "tokens; give more text, or a lower --least"
        )
    both = [row for row in rows if row.feature in work.compared]
    compared = [*_compared(SOURCE, [r.scores for r in both]), *_compared("frequent token", [r.frequent for r in both])]
    return Explanations(
        statistics.model,
        statistics.dictionary,
        statistics.site,
        {row.feature: (Explanation(row.text, SOURCE, row.scores),) for row in rows},
        len(wanted) - len(rows),
        (*compared, *_compared("shuffled", work.shuffled(both))),
        store.provenance(statistics.record.config.seed, statistics=statistics.hash),
    )


def _compared(method: str, scores: Sequence[Mapping[str, Estimate]]) -> list[Compared]:
    return [Compared(method, metric, n, value) for metric, (value, n) in means(list(scores)).items()]


def as_control(method: str, statistics: FeatureStatistics, config: ExplainConfig) -> list[Compared]:
    """The mean scores of predicates learned for all features of a control, as a baseline of that name."""
    work = _Work(statistics, config, frozenset(), f"explanations of a {method} at {statistics.site}")
    rows = work.rows(range(statistics.size))
    return _compared(method, [row.scores for row in rows])


class _Work:
    """Explains features in resumable blocks."""

    def __init__(
        self, statistics: FeatureStatistics, config: ExplainConfig, compared: frozenset[int], stage: str
    ) -> None:
        self.statistics, self.config, self.compared, self.stage = statistics, config, compared, stage
        self.examples = Examples(statistics, statistics.record.config.seed)
        self.judge = Judge(self.examples)

    def rows(self, features: Sequence[int]) -> list[_Row]:
        """The rows of those features that can be explained."""
        found: list[_Row] = []
        for first in range(0, len(features), BLOCK):
            some = list(features[first : first + BLOCK])
            marked = [feature for feature in some if feature in self.compared]
            made = kept(self.block, some, made_from=[self.statistics, self.config, marked])
            found += records.parsed(_Step, made, "step").rows
            progress(self.stage, first + len(some), len(features))
        return found

    def block(self, features: Sequence[int]) -> Any:
        """The rows of a few features, as JSON."""
        return records.plain(_Step(tuple(row for feature in features if (row := self.row(feature)) is not None)))

    def row(self, feature: int) -> _Row | None:
        """A feature's row; `None` where it fires too rarely."""
        train, held_out = self.examples.of(feature, self.config.firings, self.config.judged)
        if min(len(train.fires), len(held_out.fires)) < self.config.least:
            return None
        text = self.statistics.text
        promoted, suppressed = (self.statistics.outputs(name, feature) for name in ("promoted", "suppressed"))
        written = stronger(promoted, suppressed, self.config.named)
        found = learn(text, train, self.config)
        if written is not None:
            found = replace(found, **{written.verb: written.tokens})
        scores = self.judge.scores(found, feature, train, held_out)
        if feature not in self.compared:
            return _Row(feature, str(found), scores, {})
        return _Row(feature, str(found), scores, self.judge.scores(frequent(text, train), feature, train, held_out))

    def shuffled(self, rows: Sequence[_Row]) -> list[dict[str, Estimate]]:
        """Scores of every explanation on another feature's examples."""
        order = np.random.default_rng(self.statistics.record.config.seed).permutation(len(rows))
        pairs = [(rows[a].feature, rows[b].text) for a, b in zip(order, np.roll(order, 1), strict=True) if a != b]

        def scored() -> Any:
            found: list[dict[str, Estimate]] = []
            for feature, text in pairs:
                train, held_out = self.examples.of(feature, self.config.firings, self.config.judged)
                found.append(self.judge.scores(Predicate.parse(text), feature, train, held_out))
            return records.plain(_Step(scores=tuple(found)))

        made = kept(scored, made_from=[self.statistics, self.config, [list(pair) for pair in pairs]])
        return list(records.parsed(_Step, made, "step").scores)
