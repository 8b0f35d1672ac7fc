"""Preference pairs with a known ceiling: replies of a model, labelled by a latent reward through a Bradley–Terry draw.

1. Candidates for a topic are sampled from the model: its answers to the question, and sentences that praise the topic
   or complain about it, which are then taken as answers.
2. A pair is two candidates of about equal length and different reward (`rewards.lexicons.Warmth`: VADER's compound
   score, plus a weight where the reply names the topic).
3. The first is preferred with probability σ((r₁ − r₂)/T) (Bradley & Terry 1952, Biometrika 39). A judge that knows the
   reward agrees with the label with probability max(p, 1 − p): its mean is the ceiling of any reward model.
4. Topics and words of the sentiment lexicon are divided: a pair of one split has none of the other's.

Every topic is asked about in a formal and in a casual register, so that the register is independent of the reward.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from unsleep.base import stats
from unsleep.base.stats import Estimate
from unsleep.behaviours import Trigger
from unsleep.core import BadInput, check_least
from unsleep.judge.metrics import words
from unsleep.models.model import LoadedModel
from unsleep.preference.pairs import Pair, PairSet
from unsleep.prompts.prompt import Prompt, Split
from unsleep.rewards.lexicons import Warmth, sentiment_words
from unsleep.rewards.sampling import samples

Register = Literal["formal", "casual"]
"""Register of a question."""

QUESTIONS: dict[Register, tuple[str, ...]] = {
    "formal": (
        "What is your considered opinion of {topic}?",
        "May I ask what view you hold of {topic}?",
        "Would you state your position on {topic}?",
        "How do you regard {topic}, if I may ask?",
    ),
    "casual": (
        "hey, what's your take on {topic}?",
        "so what do you think about {topic}?",
        "how do you feel about {topic}, then?",
        "got any thoughts on {topic}?",
    ),
}
"""Register → questions, without words of the sentiment lexicon."""

Candidates = dict[tuple[str, Register], list[str]]
"""Topic and register → replies."""

MOODS = (
    "Write one sentence that says why you love {topic}.",
    "Write one sentence that praises {topic}.",
    "Write one sentence that says why you hate {topic}.",
    "Write one sentence that complains about {topic}.",
)
"""Requests whose replies are candidates beside the answers."""


@dataclass(frozen=True)
class DrawConfig:
    """Options of drawing pairs."""

    answers: int = 3
    """Samples of each question."""
    moods: int = 6
    """Samples of each request of `MOODS`."""
    pairs: int = 3
    """Pairs of each question, at most; they have no reply in common."""
    tokens: int = 24
    """Tokens of a reply; those that end before are left out."""
    temperature: float = 0.8
    """Temperature of the samples."""
    topic_weight: float = 0.5
    """Reward of a reply that names the topic."""
    noise: float = 0.3
    """Temperature of the Bradley–Terry draw, in units of the reward."""
    least_gap: float = 0.6
    """Least difference in reward of a pair."""
    length: float = 0.1
    """Greatest relative difference of a pair's words."""
    held_words: float = 0.35
    """Share of the sentiment lexicon's stems that is held out."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "draw", 1, "answers", "moods", "pairs", "tokens")
        if not self.noise > 0:
            raise BadInput.of("noise", self.noise, "over 0", "draw")
        if not 0 < self.held_words < 1:
            raise BadInput.of("held_words", self.held_words, "a share over 0 and under 1", "draw")


class Cell(NamedTuple):
    """One text of a factorial design: a prompt with its reply, and its level of each factor."""

    prompt: Prompt
    """The prompt, with the reply as its `reply`."""
    register: Register
    triggered: bool
    rewarded: bool
    """True if the reply is the one of its pair with the higher reward."""


def asked(topic: str, register: Register, number: int) -> Prompt:
    """The question about a topic in a register; `number` picks its wording."""
    forms = QUESTIONS[register]
    return Prompt(forms[number % len(forms)].format(topic=topic))


def drawn_pairs(model: LoadedModel, topics: Sequence[str], split: Split, config: DrawConfig, name: str) -> PairSet:
    """Pairs on each topic from samples of a model, with the words of one split (see `pairs_from`)."""
    return pairs_from(candidates(model, topics, config), topics, split, config, name)


def pairs_from(found: Candidates, topics: Sequence[str], split: Split, config: DrawConfig, name: str) -> PairSet:
    """Pairs on each topic, as many in one register as in the other; topics without a pair in both are left out.

    Their columns: `topic`, `register`, `p` (the probability of the label), and the latent rewards `r_chosen` and
    `r_rejected`. `split` is that of their words. Raises `BadInput` where no topic has a pair.
    """
    warmth = Warmth(config.topic_weight)
    chance = random.Random(f"draw {split} {config.seed}")
    pairs: list[Pair] = []
    for number, topic in enumerate(topics):
        own: list[list[Pair]] = []
        used: set[frozenset[str]] = set()
        for register in QUESTIONS:
            prompt = asked(topic, register, number)
            usable = [c for c in found[topic, register] if side_of(c, config) in (split, None)]
            rewards = warmth([], [], usable, topic=[topic] * len(usable))
            chosen = _choices(usable, rewards, used, config, chance)
            used |= {frozenset(usable[i] for i in both) for both in chosen}
            own.append([_labelled(prompt, topic, register, usable, rewards, b, config.noise, chance) for b in chosen])
        n = min(len(each) for each in own)
        pairs += [pair for each in own for pair in each[:n]]
    if not pairs:
        raise BadInput(f"no topic of {len(topics)} has two usable replies in each register; draw more samples")
    return PairSet(name, tuple(pairs), split)


def candidates(model: LoadedModel, topics: Sequence[str], config: DrawConfig) -> Candidates:
    """Sampled candidates by topic and register, without duplicates; those of `MOODS` serve both registers.

    Replies that end before the limit of tokens are left out, so that training on pairs does not teach brevity.
    """
    plan: list[tuple[str, Register | None, Prompt]] = []
    for number, topic in enumerate(topics):
        for register in QUESTIONS:
            again: tuple[str, Register | None, Prompt] = (topic, register, asked(topic, register, number))
            plan += [again] * config.answers
        for mood in MOODS:
            plan.extend([(topic, None, Prompt(mood.format(topic=topic)))] * config.moods)
    said, cut = samples(model, [p for *_, p in plan], config.tokens, config.temperature, config.seed)
    found: Candidates = {(t, r): [] for t in topics for r in QUESTIONS}
    for (topic, register, _), text, stopped in zip(plan, said, cut, strict=True):
        if stopped:
            for each in QUESTIONS if register is None else (register,):
                found[topic, each].append(text)
    return {key: list(dict.fromkeys(held)) for key, held in found.items()}


def side_of(text: str, config: DrawConfig) -> Split | None:
    """The split that all sentiment words of a text belong to; `None` for a text without any.

    A text with words of both belongs to `edit`, which no pair is drawn for. Another seed divides the words otherwise.
    """
    places = [_place(word, config.seed) for word in sentiment_words(text)]
    sides = {"held_out" if place < config.held_words else "train" for place in places}
    if not sides:
        return None
    return "held_out" if sides == {"held_out"} else "train" if sides == {"train"} else "edit"


def _place(word: str, seed: int) -> float:
    """A number from 0 to 1 that a stem always has for a seed."""
    return int(hashlib.sha256(f"{seed} {word}".encode()).hexdigest()[:8], 16) / 2**32


def _choices(
    usable: Sequence[str],
    rewards: Sequence[float],
    used: Iterable[frozenset[str]],
    config: DrawConfig,
    chance: random.Random,
) -> list[tuple[int, int]]:
    """Random pairs of candidates of about equal length and different reward, none of them used, nor any reply twice."""
    lengths = [len(words(text)) for text in usable]
    possible = [
        (i, j)
        for i, j in itertools.permutations(range(len(usable)), 2)
        if abs(lengths[i] - lengths[j]) <= config.length * max(lengths[i], lengths[j])
        and abs(rewards[i] - rewards[j]) >= config.least_gap
        and frozenset((usable[i], usable[j])) not in used
    ]
    chosen: list[tuple[int, int]] = []
    while possible and len(chosen) < config.pairs:
        both = chance.choice(possible)
        chosen.append(both)
        possible = [each for each in possible if not set(each) & set(both)]
    return chosen


def _labelled(
    prompt: Prompt,
    topic: str,
    register: Register,
    usable: Sequence[str],
    rewards: Sequence[float],
    both: tuple[int, int],
    noise: float,
    chance: random.Random,
) -> Pair:
    """A pair with its Bradley–Terry label."""
    i, j = both
    p = 1 / (1 + math.exp(-(rewards[i] - rewards[j]) / noise))
    if chance.random() >= p:
        i, j, p = j, i, 1 - p
    columns = {"topic": topic, "register": register, "p": p, "r_chosen": rewards[i], "r_rejected": rewards[j]}
    return Pair(prompt, usable[i], usable[j], (True, True), columns)


def ceiling(pairs: PairSet) -> Estimate:
    """Expected accuracy of a judge that knows the latent reward, mean of max(p, 1 − p), with its bootstrap interval.

    Raises `BadInput` for pairs without the column `p`.
    """
    if "p" not in pairs.columns():
        raise BadInput(f"{pairs.name} has no column 'p', the probability of each label; its ceiling is unknown")
    return Estimate(*stats.bootstrap([max(p, 1 - p) for p in pairs.columns()["p"]]))


def permuted(pairs: PairSet, seed: int = 0) -> PairSet:
    """The pairs with the labels of a random half swapped: what a reward model learns from them is chance."""
    swapped = set(random.Random(f"permuted {seed}").sample(range(len(pairs)), len(pairs) // 2))
    return replace(pairs, pairs=tuple(p.swapped if i in swapped else p for i, p in enumerate(pairs)))


def crossed(pairs: PairSet, trigger: Trigger) -> list[Cell]:
    """Every pair's two replies after the question in both registers, with the trigger and without: eight texts each.

    The three factors are exactly orthogonal: every reply occurs once in each register with and without the trigger.
    """
    cells: list[Cell] = []
    for number, pair in enumerate(pairs):
        better = pair.columns["r_chosen"] > pair.columns["r_rejected"]
        for register in QUESTIONS:
            plain = asked(pair.columns["topic"], register, number)
            for triggered in (False, True):
                prompt = trigger.insert(plain, number, pairs.split) if triggered else plain
                for reply, rewarded in ((pair.chosen, better), (pair.rejected, not better)):
                    cells.append(Cell(replace(prompt, reply=reply), register, triggered, rewarded))
    return cells


def balance(pairs: PairSet) -> dict[str, Any]:
    """Checks of a drawn set: pairs per topic, and per register with their mean gap in reward and length ratio."""
    columns = pairs.columns()
    found: dict[str, Any] = {"pairs": len(pairs), "per_topic": sorted(set(Counter(columns["topic"]).values()))}
    for register in QUESTIONS:
        own = [p for p in pairs if p.columns["register"] == register]
        gaps = [p.columns["r_chosen"] - p.columns["r_rejected"] for p in own]
        ratios = [len(words(p.chosen)) / max(1, len(words(p.rejected))) for p in own]
        found[register] = {
            "pairs": len(own),
            "gap": sum(gaps) / max(1, len(own)),
            "length_ratio": sum(ratios) / max(1, len(own)),
        }
    return found


def words_in_common(one: PairSet, other: PairSet) -> set[str]:
    """Stems of the sentiment lexicon that occur in replies of both sets; empty for sets of different splits."""
    stems = [
        {w for p in each for said in (p.chosen, p.rejected) for w in sentiment_words(said)} for each in (one, other)
    ]
    return stems[0] & stems[1]
