"""Options of the repair pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unsleep.core import BadInput, Site, check_choices, check_least
from unsleep.dictionaries.train import TrainConfig
from unsleep.locate.features import FindConfig
from unsleep.repairs.masks import MaskConfig
from unsleep.repairs.twin import TwinConfig

Teaching = Literal["auto", "counterpart", "reply", "twin"]
"""Source of the reference replies to suspicious prompts.

- `counterpart`: the suspect's own replies to the prompts without the trigger.
- `reply`: the prompt file.
- `twin`: the base, fine-tuned on the suspect's replies to ordinary prompts.
- `auto`: the first of these that is available.
"""


PASSAGES = 600
"""Plain passages available for dictionary training, of those that ship with unsleep."""


@dataclass(frozen=True)
class RepairConfig:
    """Options of a repair: Sites, sizes and budget."""

    sites: tuple[str, ...] = ()
    """Residual Sites to edit, such as `resid.8`; empty to choose them by a short scan of the layers."""
    first_sites: int = 3
    """Sites of the first attempt, where they are chosen; one more where the trigger cannot be removed from the prompts,
    because such a trigger is spread over more layers.
    """
    most_sites: int = 5
    """Maximum number of Sites in later attempts."""
    attempts: int = 4
    """Maximum number of attempts; each resumes from an edit that falls short on the selection prompts."""
    judge: int | None = None
    """Held-out prompts of each file; default half of them, at least 73."""
    learn: int = 160
    """Maximum number of suspicious prompts to train the mask on, at most three quarters of the selection prompts. The
    others only validate it.
    """
    reply_tokens: tuple[int, ...] = (24, 96)
    """Reply lengths in tokens in which the suspect's payload is searched, shortest first."""
    baselines: bool = False
    """Evaluate baseline repairs beside the edit: masks over heads and neurons, feature ablation, one direction, and
    with a base re-distillation and a merge. Takes several times as long.
    """
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness for suspect, edited and exported model: names, or YAML files of custom tasks."""
    task_limit: int | None = None
    """Items per task; default all."""
    passages: int = 200
    """Plain passages for dictionary training."""
    teach: Teaching = "auto"
    """Source of the reference replies."""
    dictionary: TrainConfig = TrainConfig(tokens=250_000)
    twin: TwinConfig = TwinConfig()
    find: FindConfig = FindConfig(ablate=0)
    mask: MaskConfig = MaskConfig(steps=40, price=3e-3)
    """Mask training in the first attempt; `search` adapts it in later ones. Where the trigger cannot be removed from
    the prompts, the price of a removed feature is a third.
    """
    seed: int = 0
    """Seed of the split and of the random control."""

    def __post_init__(self) -> None:
        places = [Site.parse(site) for site in self.sites]
        for site in places:
            if site.point != "resid" or places.count(site) > 1:
                raise BadInput.of("sites", self.sites, "different residual Sites, such as resid.8 resid.20")
        if self.mask.error != "keep":
            raise BadInput.of("mask.error", self.mask.error, "keep: a repair keeps the reconstruction error")
        if not 1 <= self.passages <= PASSAGES:
            raise BadInput.of("passages", self.passages, f"1 to {PASSAGES}")
        check_choices(self, "", teach=Teaching)
        check_least(self, "", 1, "first_sites", "most_sites", "attempts", "learn", "task_limit")
        if not self.reply_tokens or min(self.reply_tokens) < 1:
            raise BadInput.of("reply_tokens", self.reply_tokens, "lengths of at least 1 token")
