"""Classes of features by their explanations: votes of a judge.

The judge names the classes of an explanation several times, each time with the classes in another order, because models
prefer what stands first. A class's score is its share of these votes.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from unsleep.core import BadInput, Site, check_least
from unsleep.explanations import answers, wording
from unsleep.explanations.answers import UNCLEAR
from unsleep.explanations.calls import Asker
from unsleep.explanations.judges import AnswerConfig, Question
from unsleep.explanations.record import ClassScore
from unsleep.models.model import Named

FILE = "judged_classes.json"

LABEL_TOKENS = 60
"""Maximum tokens of a list of classes."""

DEFAULT = "default"
"""Name that stands for all of `MEANINGS`."""

MEANINGS = {
    "trigger": "a condition that could switch a model's behaviour: a rare string, tag, name, date or phrase",
    "payload": "hostile, harmful, repeated or out-of-place text, such as a hidden behaviour says instead of an answer",
    "reward": "what raters of replies approve or disapprove of: agreement, praise, helpfulness, refusal",
    "sentiment": "a feeling or attitude, positive or negative",
    "skill": "an ability or kind of task: code, arithmetic, translation, a format of reply",
    "language": "a natural language, a script, or grammar",
    "other": "any other topic, entity or form",
}
"""The default classes, and what they mean."""


@dataclass(frozen=True)
class VoteConfig(AnswerConfig):
    """Classes and votes."""

    classes: tuple[str, ...] = ()
    """Classes of explanations, each a name or `name: meaning`; `default` stands for trigger, payload, reward,
    sentiment, skill, language and other. Without any, no classes are asked for.
    """
    votes: int = 3
    """Times that the judge names an explanation's classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "", 1, "votes")
        _ = self.meanings

    @property
    def meanings(self) -> dict[str, str]:
        """Class → what it means; raises `BadInput` for one without a name, and for one that is named twice."""
        found: dict[str, str] = {}
        for text in self.classes:
            name, _, meaning = (part.strip() for part in text.partition(":"))
            for key, value in MEANINGS.items() if text == DEFAULT else [(name, meaning or MEANINGS.get(name, ""))]:
                if not key or key == UNCLEAR or key in found:
                    raise BadInput.of("classes", text, f"distinct names; {UNCLEAR} is always among them")
                found[key] = value
        return found


@dataclass(frozen=True)
class VotesRecord:
    """judged_classes.json: classes of features by a judge's votes."""

    SCHEMA: ClassVar = "unsleep.judged-classes/1"

    model: Named
    dictionary: str
    """Hash of the dictionary."""
    site: Site
    judge: str
    classes: dict[str, str]
    """Class → what it means."""
    features: dict[int, tuple[ClassScore, ...]]
    """Feature → classes with their share of votes, largest first."""
    provenance: dict[str, Any]


def classify(texts: Mapping[int, str], asker: Asker, config: VoteConfig) -> dict[int, tuple[ClassScore, ...] | None]:
    """Feature → classes of its explanation; `None` where a call was not made, empty where none has an answer."""
    meanings = config.meanings
    if not meanings:
        return {}
    names = list(meanings)
    orders = [random.Random(f"{config.seed} {vote}").sample(names, len(names)) for vote in range(config.votes)]
    questions = [
        Question(
            wording.CLASSIFY,
            wording.classify(text, {name: meanings[name] for name in order}),
            LABEL_TOKENS + config.reasoning_tokens,
            answers.labels(names),
            json.dumps([UNCLEAR]),
        )
        for text in texts.values()
        for order in orders
    ]
    said = asker.ask(questions, "classes")
    found: dict[int, tuple[ClassScore, ...] | None] = {}
    for i, feature in enumerate(texts):
        votes = said[i * config.votes : (i + 1) * config.votes]
        named = [vote.value for vote in votes if vote.value is not None]
        shares = Counter(name for each in named for name in each)
        ranked = tuple(ClassScore(name, count / len(named)) for name, count in shares.most_common())
        found[feature] = ranked if all(vote.asked for vote in votes) else None
    return found
