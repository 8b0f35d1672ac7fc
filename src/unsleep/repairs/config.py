"""How a repair is carried out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from unsleep.core import BadInput, Site
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
                raise BadInput(f"--sites names {site}; expected different residual Sites, such as resid.8 resid.20")
        if self.mask.error != "keep":
            raise BadInput(f"--mask.error is {self.mask.error}; a repair keeps what a dictionary does not explain")
        if not 1 <= self.passages <= PASSAGES:
            raise BadInput(f"--passages is {self.passages}; expected 1 to {PASSAGES}")
        if self.teach not in get_args(Teaching):
            raise BadInput(f"--teach is {self.teach!r}; expected one of {', '.join(get_args(Teaching))}")
        for name in ("first_sites", "most_sites", "attempts", "learn", "task_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"--{name.replace('_', '-')} is {value}; expected at least 1")
        if not self.reply_tokens or min(self.reply_tokens) < 1:
            raise BadInput(f"--reply-tokens is {self.reply_tokens}; expected lengths of at least 1 token")
