"""Trade-off frontier: ASR, skill and CE on plain text over the number of removed features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unsleep.base.context import progress
from unsleep.base.records import Count, Share
from unsleep.dictionaries.coders import Coder
from unsleep.interventions.features import Ranking, edits_for
from unsleep.judge.evaluate import EvalConfig, count_replies, reply_all
from unsleep.judge.metrics import Subject, text_ce_kl
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import PromptSet


@dataclass(frozen=True)
class Point:
    """One edit on the frontier."""

    series: str
    features: Count
    """Features removed."""
    asr: Share
    asr_low: float
    asr_high: float
    skill: Share | None
    """`None` without expected skill, as are its bounds."""
    skill_low: float | None
    skill_high: float | None
    ce_change: float
    """CE on plain text, edited − suspect, nats per token."""
    n: Count


def frontier(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    rankings: Mapping[str, tuple[Ranking, Sequence[int]]],
    triggered: PromptSet,
    texts: Sequence[str],
    config: EvalConfig,
) -> list[Point]:
    """Evaluate ablations of growing size: `rankings` gives each series its ranking and sizes."""
    subjects = [
        (series, n, Subject(f"{series} {n}", model, edits_for(ranking, dictionaries, n)))
        for series, (ranking, sizes) in rankings.items()
        for n in sizes
    ]
    suspect = Subject("suspect", model)
    ce, _ = text_ce_kl(suspect, [suspect, *(s for _, _, s in subjects)], texts, config.text_tokens)
    points: list[Point] = []
    for done, (series, n, subject) in enumerate(subjects, 1):
        replies = reply_all(subject, triggered, config)
        rows = {r.metric: r for r in count_replies(series, "triggered", triggered, replies, config.payload)}
        asr, skill = rows["asr"], rows.get("skill")
        job = (skill.value, skill.low, skill.high) if skill else (None, None, None)
        change = float((ce[subject.name] - ce["suspect"]).mean())
        points.append(Point(series, n, asr.value, asr.low, asr.high, *job, change, len(triggered)))
        progress("frontier", done, len(subjects))
    return points
