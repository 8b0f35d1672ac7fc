"""Explanations, scores and classes of features by a language model as judge.

1. The judge writes an explanation from contexts in which the feature fires, with their activations (Bills et al. 2023;
   Paulo et al. 2024, arXiv:2410.13928), and from the tokens that the feature promotes and suppresses (Gur-Arieh et al.
   2025, arXiv:2501.08319).
2. The judge predicts held-out contexts from the explanation (`judged.py`), and from two baselines: the explanation of
   another feature, and the token at which the feature fires most often.
3. The judge names classes for the explanation (`votes.py`).
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from unsleep.base import records, stats, store
from unsleep.base.stats import Estimate
from unsleep.core import BadInput, Site, check_least
from unsleep.explanations import answers, wording
from unsleep.explanations.calls import Answer, Asker, Tally
from unsleep.explanations.explained import Explanations
from unsleep.explanations.judged import METHODS, HeldOut, Item, JudgedConfig, Method, marks_of, spread
from unsleep.explanations.judges import Question
from unsleep.explanations.record import ClassScore, Context, Explanation, FeatureCard
from unsleep.explanations.statistics import FeatureStatistics
from unsleep.explanations.votes import FILE as VOTES_FILE
from unsleep.explanations.votes import VoteConfig, VotesRecord, classify
from unsleep.models.model import Named

EXPLANATION_TOKENS = 160
"""Maximum tokens of an explanation."""

ANSWERED = 0.8
"""Smallest share of contexts with an answer for which there is a score: those without one may be the hard ones."""


@runtime_checkable
class FeatureContexts(Protocol):
    """Contexts of the features of one dictionary, from texts for explanations and from others for scores."""

    @property
    def model(self) -> Named:
        """The model that the features are of."""
        ...

    @property
    def dictionary(self) -> str:
        """Hash of the dictionary."""
        ...

    @property
    def site(self) -> Site:
        """Its Site."""
        ...

    def card(self, feature: int) -> FeatureCard:
        """A feature's card, with the contexts from which its explanation is written."""
        ...

    def held_out(self, feature: int) -> HeldOut:
        """Its contexts of other texts, on which the explanation is scored."""
        ...


@dataclass(frozen=True)
class AskConfig(JudgedConfig, VoteConfig):
    """Explanations, scores and classes by a judge."""

    promoted: int = 10
    """Promoted tokens shown with the contexts, and as many suppressed ones."""

    def __post_init__(self) -> None:
        JudgedConfig.__post_init__(self)
        VoteConfig.__post_init__(self)
        check_least(self, "", 0, "promoted")


class Asked(NamedTuple):
    """Explanations, scores and classes by a judge."""

    explanations: dict[int, Explanation]
    """Feature → its explanation and scores."""
    classes: dict[int, tuple[ClassScore, ...]]
    """Feature → classes with their share of votes, largest first."""
    means: dict[str, Estimate]
    """Score → its mean over features, and over each baseline its mean advantage."""
    left_out: dict[int, str]
    """Feature → the reason why it has no explanation."""
    tally: Tally
    stopped: str
    """The reason why calls were left out; empty for a complete run."""
    judge: str
    provenance: dict[str, Any]


class Trial(NamedTuple):
    """Calls that score one explanation of a feature by one method."""

    feature: int
    score: str
    """Name of the score, such as `detection` or `detection_shuffled`."""
    method: Method
    items: list[Item]
    questions: list[Question[list[Any]]]


def ask(contexts: FeatureContexts, features: Sequence[int], asker: Asker, config: AskConfig = AskConfig()) -> Asked:
    """Explain features, score the explanations on held-out contexts and classify them.

    Only features whose scores were all asked for are in the result; after a limit or an interrupt, the same call
    resumes from the cache. Scores are `detection`, `fuzzing`, `simulation` with `_shuffled` and `_token` for the
    baselines, and `answered`, the share of questions about contexts that have an answer.

    Raises `BadInput` for held-out contexts of a text from which the explanation was written, and for a request that the
    endpoint refuses.
    """
    known = {feature: contexts.card(feature) for feature in dict.fromkeys(features)}
    shown = {feature: shown_contexts(card, config.shown) for feature, card in known.items()}
    left_out = {feature: "it fires in no context" for feature, found in shown.items() if not found}
    wanted = [feature for feature in known if feature not in left_out]
    held = {f: _unseen(f, shown[f], contexts.held_out(f)) for f in wanted} if config.methods else {}
    said = asker.ask([_explaining(known[f], shown[f], config) for f in wanted], "explanations")
    texts = {f: answer.value for f, answer in zip(wanted, said, strict=True) if answer.value is not None}
    trials = _trials(texts, shown, held, config)
    scores = _scored(trials, asker)
    classes = classify(texts, asker, config)
    for feature, answer in zip(wanted, said, strict=True):
        if answer.why:
            left_out[feature] = answer.why
        elif not answer.asked or scores.get(feature, {}) is None:
            left_out[feature] = "not asked"
    name = asker.judge.name
    done = {f: Explanation(text, name, scores.get(f) or {}) for f, text in texts.items() if f not in left_out}
    means = mean_scores(list(done.values()))
    provenance = store.provenance(
        config.seed,
        judge={"name": name, **asker.judge.identity, "notes": list(asker.judge.notes)},
        asked=records.plain(config),
        calls=asker.tally._asdict(),
        means=records.plain(means),
        left_out=dict(Counter(left_out.values())),
        stopped=asker.stopped,
    )
    labelled = {f: found for f, found in classes.items() if found and f in done}
    return Asked(done, labelled, means, left_out, asker.tally, asker.stopped, name, provenance)


def estimate(
    contexts: FeatureContexts, features: Sequence[int], asker: Asker, config: AskConfig = AskConfig()
) -> Tally:
    """Calls, tokens and cost that `ask` would need at most, cached calls excepted; nothing is called.

    Answers count at their maximum length. Further tries after a failure or a nonsensical answer are not in it; the
    limits hold for them too.
    """
    dry = Asker(asker.judge, asker.cache, asker.limits, dry=True)
    return ask(contexts, features, dry, config).tally


def shown_contexts(card: FeatureCard, n: int) -> list[Context]:
    """At most `n` contexts in which a feature fires, strongest first: half from the top, half over all quantiles."""
    firing = sorted((c for c in card.contexts if max(c.values, default=0) > 0), key=lambda c: -max(c.values))
    top, rest = ([c for c in firing if (c.group == "top") is kind] for kind in (True, False))
    other = spread(rest, max(n // 2, n - len(top)))
    return sorted([*top[: n - len(other)], *other], key=lambda c: -max(c.values))


def _unseen(feature: int, shown: Sequence[Context], held: HeldOut) -> HeldOut:
    """The held-out contexts that are no copies of shown ones; raises `BadInput` for one of the same text."""
    held.check(feature)
    places, tokens = {(c.source, c.row) for c in shown}, {c.tokens for c in shown}
    for c in (*held.firing, *held.silent):
        if (c.source, c.row) in places:
            raise BadInput(
                f"the held-out contexts of feature {feature} include {c.source} row {c.row}, from which its "
                "explanation is written; give other texts"
            )
    firing, silent = (tuple(c for c in side if c.tokens not in tokens) for side in held)
    return HeldOut(firing, silent)


def _explaining(card: FeatureCard, contexts: Sequence[Context], config: AskConfig) -> Question[str]:
    """The question for an explanation."""
    rows: list[tuple[str, list[tuple[str, int]]]] = []
    for c in contexts:
        marks = marks_of(c, config.mark)
        levels = [
            min(wording.LEVELS, max(1, round(wording.LEVELS * value / (card.largest or 1)))) for value in c.values
        ]
        found = [(token, level) for token, level, mark in zip(c.tokens, levels, marks, strict=True) if mark]
        rows.append((wording.marked(c.tokens, marks), found))
    promoted, suppressed = (
        [each.token for each in side[: config.promoted]] for side in (card.promoted, card.suppressed)
    )
    placeholder = f"feature {card.feature} " + "word " * 50
    return Question(
        wording.EXPLAIN,
        wording.explain(rows, promoted, suppressed),
        EXPLANATION_TOKENS + config.reasoning_tokens,
        answers.explanation,
        json.dumps({"explanation": placeholder}),
    )


def frequent_token(contexts: Sequence[Context]) -> str:
    """The token at which a feature is most often strongest in its contexts."""
    peaks = Counter(c.tokens[max(range(len(c.values)), key=c.values.__getitem__)] for c in contexts)
    return peaks.most_common(1)[0][0]


def _trials(
    texts: Mapping[int, str], shown: Mapping[int, Sequence[Context]], held: Mapping[int, HeldOut], config: AskConfig
) -> list[Trial]:
    """The calls for all scores of all explanations."""
    order = list(texts)
    random.Random(config.seed).shuffle(order)
    other = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    found: list[Trial] = []
    for feature, text in texts.items():
        variants = {"": text}
        if config.baselines:
            variants["_token"] = (
                f"It fires at the token {json.dumps(frequent_token(shown[feature]), ensure_ascii=False)}."
            )
            if len(texts) > 1:
                variants["_shuffled"] = texts[other[feature]]
        for name in config.methods:
            method = METHODS[name](config)
            items = method.items(feature, held[feature])
            chunks = [items[i : i + config.per_call] for i in range(0, len(items), config.per_call)]
            for suffix, variant in variants.items():
                questions = [method.question(variant, chunk) for chunk in chunks]
                found.append(Trial(feature, f"{name}{suffix}", method, items, questions))
    return found


def _scored(trials: Sequence[Trial], asker: Asker) -> dict[int, dict[str, Estimate] | None]:
    """Feature → its scores, or `None` where a call was not made."""
    said = iter(asker.ask([question for trial in trials for question in trial.questions], "scores"))
    found: dict[int, dict[str, Estimate] | None] = {}
    counts: dict[int, list[int]] = {}
    for trial in trials:
        batches: list[Answer[list[Any]]] = [next(said) for _ in trial.questions]
        scores = found.setdefault(trial.feature, {})
        if scores is None or not all(batch.asked for batch in batches):
            found[trial.feature] = None
            continue
        pairs = _answered(trial, batches)
        score = trial.method.score(pairs) if len(pairs) >= ANSWERED * len(trial.items) else None
        if score is not None:
            scores[trial.score] = score
        count = counts.setdefault(trial.feature, [0, 0])
        count[:] = count[0] + len(pairs), count[1] + len(trial.items)
    for feature, (answered, n) in counts.items():
        scores = found[feature]
        if scores is not None and n:
            scores["answered"] = Estimate(answered / n, *stats.wilson(answered, n))
    return found


def _answered(trial: Trial, batches: Sequence[Answer[list[Any]]]) -> list[tuple[Item, Any]]:
    """The items of a trial that have an answer, with it."""
    pairs: list[tuple[Item, Any]] = []
    size = trial.method.config.per_call
    for i, batch in enumerate(batches):
        if batch.value is not None:
            pairs += zip(trial.items[i * size : (i + 1) * size], batch.value, strict=True)
    return pairs


def mean_scores(explanations: Sequence[Explanation]) -> dict[str, Estimate]:
    """Means of scores over features, with bootstrap intervals; `detection − shuffled` is the paired advantage."""
    found: dict[str, Estimate] = {}
    for name in METHODS:
        own = {i: e.scores[name].value for i, e in enumerate(explanations) if name in e.scores}
        if own:
            found[name] = Estimate(*stats.bootstrap(list(own.values())))
        for baseline in ("shuffled", "token"):
            key = f"{name}_{baseline}"
            gaps = [
                value - explanations[i].scores[key].value for i, value in own.items() if key in explanations[i].scores
            ]
            if gaps:
                found[f"{name} − {baseline}"] = Estimate(*stats.bootstrap(gaps))
    return found


def write(asked: Asked, folder: str | Path, statistics: FeatureStatistics, config: AskConfig) -> Explanations:
    """Add a judge's explanations to explanations.json of the statistics' folder, and write judged_classes.json.

    A judge's own earlier explanations of the same features are replaced. Its provenance is under `judges`, by name.
    Raises `BadInput` or `Refused` as `Explanations.load` does.
    """
    old = Explanations.load(folder, statistics)
    judges = {**old.provenance.get("judges", {}), asked.judge: asked.provenance}
    whole = old.added({feature: (found,) for feature, found in asked.explanations.items()}, judges=judges)
    whole.save(folder)
    if asked.classes:
        head = (statistics.model, statistics.dictionary, statistics.site, asked.judge)
        record = VotesRecord(*head, config.meanings, asked.classes, asked.provenance)
        records.save(record, Path(folder) / VOTES_FILE)
    return whole
