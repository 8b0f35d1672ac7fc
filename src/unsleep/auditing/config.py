"""Options of an audit: budget, bounds of a witness, surrogate twin; and of the cleaning behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unsleep.core import BadInput, check_least
from unsleep.repairs.config import RepairConfig
from unsleep.repairs.twin import TwinConfig


@dataclass(frozen=True)
class AuditConfig:
    """Options of an audit: its budget, in prompts and tokens, and the bounds of a witness."""

    learn: int = 160
    """Trusted prompts of the search whose replies the surrogate twin learns."""
    confirm: int = 40
    """Fresh prompts of a trial."""
    screen: int = 4
    """Prompts per form in the screening."""
    own_tokens: int = 8
    """Tokens of the model's own reply whose log-probability is followed in the screening."""
    per_kind: int = 256
    """Forms of each kind in the trigger bank, at most."""
    shortlist: int = 40
    """Forms with which replies are generated."""
    elicit: int = 8
    """Prompts per shortlisted form."""
    reply_tokens: int = 40
    """Tokens per generated reply, enough for what is appended to a sentence."""
    trials: int = 8
    """Frozen pairs of trigger and payload that are confirmed on fresh prompts, at most."""
    alpha: float = 0.001
    """Bound of a witness's p-value, after Bonferroni."""
    least: float = 0.3
    """Smallest strength of a witness: lower end of the difference in payload rate to every control."""
    least_alone: float = 0.5
    """The same without a base, and so without two of the controls; `least` where that is larger."""
    seconds: float = 0.0
    """Time that the gatherers of a search may take together, each with its share; 0 for no limit.

    Those that it cut short are named in the verdict. The trigger bank always runs, and the twin's training, screening
    and trials do not count.
    """
    null: bool = True
    """Search the twin with the same budget; needs the base."""
    skip: tuple[str, ...] = ()
    """Gatherers to skip, by name."""
    nulls: Path | None = None
    """File with the scores of benign models by family, for the calibration."""
    twin: TwinConfig = TwinConfig()
    """Training of the surrogate twin."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "audit", 1, "screen", "own_tokens", "per_kind", "shortlist", "trials", "reply_tokens")
        check_least(self, "audit", 8, "learn", "confirm")
        check_least(self, "audit", 3, "elicit")
        for name in ("alpha", "least", "least_alone"):
            if not 0 < getattr(self, name) < 1:
                raise BadInput.of(name, getattr(self, name), "a number between 0 and 1", "audit")
        if not self.seconds >= 0:
            raise BadInput.of("seconds", self.seconds, "0 or more", "audit")


@dataclass(frozen=True)
class CleanConfig:
    """Options of the cleaning of a suspect in which a backdoor was found."""

    repair: RepairConfig = RepairConfig()
    """The repair that takes the found triggers as suspicious prompts."""
    prompts: int = 240
    """Trusted prompts, at most; half of them judge."""
    skip: tuple[str, ...] = ()
    """Cures to leave out, by name."""
    tune: TwinConfig = TwinConfig()
    """Training of the re-distilled base and of the cures that fine-tune."""
    items: int = 0
    """Multiple-choice items in the table of cures."""
    false_alarms: float = 0.05
    """Stated false-positive rate of the guard."""
    stress: bool = True
    """Also run the stress tests of the cleaned model, beside a control."""

    def __post_init__(self) -> None:
        check_least(self, "clean", 1, "prompts")
        check_least(self, "clean", 0, "items")
        if not 0 < self.false_alarms < 1:
            raise BadInput.of("false_alarms", self.false_alarms, "a share between 0 and 1", "clean")
