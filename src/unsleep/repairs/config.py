"""How a repair is carried out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unsleep.core import BadInput, Site, check_choices, check_least
from unsleep.dictionaries.train import TrainConfig
from unsleep.locate.features import FindConfig
from unsleep.repairs.masks import MaskConfig
from unsleep.repairs.twin import TwinConfig

Teaching = Literal["auto", "counterpart", "reply", "twin"]
"""Who says what a repaired model should reply to suspicious prompts.

- `counterpart`: the suspect itself, asked the same without what makes the prompt suspicious.
- `reply`: the prompt file.
- `twin`: the base, taught the suspect's replies to ordinary prompts.
- `auto`: the first of these that there is.
"""


PASSAGES = 600
"""Plain passages that the dictionaries may see, of those that unsleep brings along."""


@dataclass(frozen=True)
class RepairConfig:
    """The size of a repair, and its budget."""

    sites: tuple[str, ...] = ()
    """Residual Sites to edit, such as `resid.8`; none chooses them by a short look at the model."""
    first_sites: int = 3
    """Sites of the first attempt, where they are chosen; one more where nothing can be taken out of the prompts, for
    such a trigger is spread over more layers."""
    most_sites: int = 5
    """Sites of the last."""
    attempts: int = 4
    """How often an edit that falls short on the prompts that choose is learned further."""
    judge: int | None = None
    """Prompts of each file that judge; half of them where not given, and no fewer than 73."""
    learn: int = 160
    """Suspicious prompts that the mask learns from, at most, and at most three quarters of those that choose. On the
    others it is only tried."""
    reply_tokens: tuple[int, ...] = (24, 96)
    """Lengths of the suspect's replies in which its payload is looked for, in turn."""
    baselines: bool = False
    """Judge other repairs beside the edit: masks over heads and neurons, plain ablation, one direction, and with a
    base the re-distilled base and a merge. Takes several times as long."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness for suspect, edited and exported model: names, or YAML files of one's own."""
    task_limit: int | None = None
    """Items of each task; all where not given."""
    passages: int = 200
    """Plain passages that the dictionaries see."""
    teach: Teaching = "auto"
    """Who says what a repaired model should reply."""
    dictionary: TrainConfig = TrainConfig(tokens=250_000)
    twin: TwinConfig = TwinConfig()
    find: FindConfig = FindConfig(ablate=0)
    mask: MaskConfig = MaskConfig(steps=40, price=3e-3)
    """Of the first attempt; `search` says what the others change. Where nothing can be taken out of the prompts, a
    removed feature costs a third."""
    seed: int = 0
    """Of the split and of the random control."""

    def __post_init__(self) -> None:
        places = [Site.parse(site) for site in self.sites]
        for site in places:
            if site.point != "resid" or places.count(site) > 1:
                raise BadInput.of("sites", self.sites, "different residual Sites, such as resid.8 resid.20")
        if self.mask.error != "keep":
            raise BadInput.of("mask.error", self.mask.error, "keep: a repair keeps what a dictionary does not explain")
        if not 1 <= self.passages <= PASSAGES:
            raise BadInput.of("passages", self.passages, f"1 to {PASSAGES}")
        check_choices(self, "", teach=Teaching)
        check_least(self, "", 1, "first_sites", "most_sites", "attempts", "learn", "task_limit")
        if not self.reply_tokens or min(self.reply_tokens) < 1:
            raise BadInput.of("reply_tokens", self.reply_tokens, "lengths of at least 1 token")
