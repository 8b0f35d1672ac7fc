"""The records of an evaluation: result.json and report.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from unsleep.base import store
from unsleep.base.records import Count, Share, Words
from unsleep.base.stopwatch import Stage
from unsleep.behaviours import Payload
from unsleep.core import BadInput
from unsleep.judge.audited import AuditVerdict
from unsleep.judge.frontier import Point
from unsleep.judge.results import OTHERS, UNTRIGGERED, EvalResult, Row, TaskRow
from unsleep.judge.verdict import Label, contract, verdict


@dataclass(frozen=True)
class Verdict:
    """Label and score, from 0 to 1."""

    label: Label
    score: Share


class Shipped(NamedTuple):
    """The checkpoint that an audit wrote."""

    subject: str
    """Subject of the rows that judge it; empty where nothing was shipped."""
    words: str


@dataclass(frozen=True)
class Result:
    """result.json: the verdict and all measurements behind it; result.schema.json is its schema."""

    SCHEMA: ClassVar = "unsleep.result/1"

    verdict: AuditVerdict | Verdict
    rows: tuple[Row, ...]
    provenance: dict[str, Any]
    tasks: tuple[TaskRow, ...] = ()
    cleaned: Shipped | None = None
    """Of an audit that cleaned."""

    def __post_init__(self) -> None:
        names = [f"{row.subject}/{row.panel}/{row.metric}" for row in self.rows]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise BadInput(f"rows[{i}] measures {name} a second time; expected one row each")


@dataclass(frozen=True)
class Summary:
    """Key figures of the run, and advice on what remains."""

    payload: str | None = None
    payload_kind: str | None = None
    trigger: str | None = None
    part: str | None = None
    """Text that only suspicious prompts share, taken for the trigger where that is not known."""
    model: str | None = None
    checkpoint: str | None = None
    """Folder of the exported checkpoint."""
    removed: Count | None = None
    features_total: Count | None = None
    sites: tuple[str, ...] | None = None
    minutes: float | None = None
    next: tuple[str, ...] = ()


@dataclass(frozen=True)
class Requirement:
    """A line of the contract (`verdict.Check`), and whether it is met."""

    subject: str
    panel: str
    metric: str
    relation: Literal["<=", ">="]
    bound: float
    value: float | None
    met: bool
    too_few: bool = False
    high: float | None = None
    text: str | None = None


@dataclass(frozen=True)
class Context:
    """Tokens with their activations."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.activations):
            raise BadInput(f"{len(self.tokens)} tokens and {len(self.activations)} activations; expected one each")


@dataclass(frozen=True)
class Shown:
    """A removed feature with its evidence."""

    site: str
    id: Count
    rank: Count
    scores: dict[str, float] | None = None
    contexts: tuple[Context, ...] | None = None
    promotes: tuple[str, ...] | None = None
    suppresses: tuple[str, ...] | None = None
    suspicious_rate: Share | None = None
    trusted_rate: Share | None = None


@dataclass(frozen=True)
class Replies:
    """A prompt and each subject's reply."""

    panel: str
    prompt: str
    replies: dict[str, str]
    expected: str | None = None
    shown: tuple[str, ...] | None = None
    """The subjects whose reply shows the payload, or `untriggered`, where the page cannot tell."""
    untriggered: str | None = None
    """The suspect's reply to the same prompt without its trigger."""


@dataclass(frozen=True)
class Fitted:
    """Quality of fit of a dictionary."""

    site: str
    features: Count
    k: Count | None = None
    fvu: float | None = None
    l0: float | None = None
    dead: Share | None = None
    ce_score: float | None = None


@dataclass(frozen=True)
class Looked:
    """Site scan: share of the divergence removed by ablation at a layer, and KL on trusted replies."""

    layer: Count
    restored: float
    moved: float


@dataclass(frozen=True)
class Tried:
    """An attempt of a repair, and its result on the selection prompts."""

    what: str
    removed: dict[str, Count]
    """Place → number of removed parts."""
    shown: Count
    n: Count
    degenerate: float
    followed: Share
    kl: float
    seconds: float
    kept: bool


@dataclass(frozen=True)
class Baseline:
    """A baseline repair."""

    subject: Annotated[str, Words(OTHERS)]
    what: str


@dataclass(frozen=True)
class Repaired:
    """History of a repair."""

    teacher: str
    notes: tuple[str, ...]
    sites: tuple[str, ...]
    look: tuple[Looked, ...]
    attempts: tuple[Tried, ...]
    baselines: tuple[Baseline, ...] = ()


@dataclass(frozen=True)
class Report:
    """report.json, the input of `report`; absent or empty parts are omitted."""

    SCHEMA: ClassVar = "unsleep.report/1"

    title: str
    result: Result
    summary: Summary | None = None
    contract: tuple[Requirement, ...] | None = None
    replies: tuple[Replies, ...] | None = None
    provenance: dict[str, Any] | None = None
    frontier: tuple[Point, ...] | None = None
    features: tuple[Shown, ...] | None = None
    dictionaries: tuple[Fitted, ...] | None = None
    stages: tuple[Stage, ...] | None = None
    repair: Repaired | None = None
    reply_tokens: Count | None = None
    """Length at which the replies are cut, in tokens."""


def record(result: EvalResult, seed: int | None, tasks: Sequence[TaskRow] = (), **made_from: Any) -> Result:
    """The record of an evaluation: verdict, rows, tasks and provenance."""
    label, score = verdict(result, contract(result))
    panels = {name: panel.hash for name, panel in result.prompts.items()}
    provenance = store.provenance(seed, panels=panels, **made_from)
    return Result(Verdict(label, round(score, 4)), result.rows, provenance, tuple(tasks))


def page(
    result: EvalResult, kept: Result, title: str, summary: Summary, payload: Payload | None = None, **parts: Any
) -> Report:
    """The record of the page; `parts` are further sections."""
    checks = tuple(Requirement(**asdict(c), met=c.met, too_few=c.too_few) for c in contract(result))
    replies = tuple(side_by_side(result, ("suspect", "edited", "baked"), 6))
    if payload is not None:
        summary = replace(summary, **payload.to_dict())
        if summary.payload_kind is not None:  # which the page cannot tell
            every = [row.replies | ({"untriggered": row.untriggered} if row.untriggered else {}) for row in replies]
            shown = [tuple(s for s, said in one.items() if payload.shows(said)) for one in every]
            replies = tuple(replace(row, shown=who) for row, who in zip(replies, shown, strict=True))
    return Report(title, kept, summary, checks, replies, kept.provenance, reply_tokens=result.reply_tokens, **parts)


def side_by_side(result: EvalResult, subjects: Sequence[str], n: int) -> list[Replies]:
    """The first replies of several subjects to the same prompts, by panel."""
    rows: list[Replies] = []
    untriggered = result.replies.get(UNTRIGGERED)
    for panel, prompts in result.prompts.items():
        have = [s for s in subjects if f"{s}/{panel}" in result.replies]
        for i, prompt in enumerate(prompts.prompts[:n]):
            replies = {s: result.replies[f"{s}/{panel}"][i] for s in have}
            row = Replies(panel, prompt.shown, replies, prompt.expected)
            rows.append(replace(row, untriggered=untriggered[i]) if panel == "triggered" and untriggered else row)
    return rows
