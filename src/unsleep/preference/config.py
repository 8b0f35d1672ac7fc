"""Options of preference training and of reward models, and what each method defaults to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from unsleep.base.records import Range, Share
from unsleep.core import BadInput, check_choices, check_least
from unsleep.organisms.recipe import Method as Tune

Method = Literal["dpo", "sft", "rloo", "grpo", "best-of-n"]
"""Method of preference training:

dpo         direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290), optionally with the NLL of the
            chosen reply (Pang et al. 2024, arXiv:2404.19733)
sft         fine-tuning on the chosen replies
rloo        REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv:2402.14740)
grpo        group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300)
best-of-n   fine-tuning on the best of n own samples of each prompt (Stiennon et al. 2020, arXiv:2009.01325)
"""

ONLINE = ("rloo", "grpo", "best-of-n")
"""Methods that sample replies and score them with a reward; the pairs' replies are not used."""


class Rates(NamedTuple):
    """Default learning rates of a method."""

    lora: float
    full: float


LEARNING_RATES: dict[str, Rates] = {
    "dpo": Rates(3e-4, 5e-6),
    "sft": Rates(5e-4, 2e-5),
    "best-of-n": Rates(5e-4, 2e-5),
    "rloo": Rates(2e-4, 3e-6),
    "grpo": Rates(2e-4, 3e-6),
    "reward": Rates(5e-4, 1e-5),
}
"""Method → learning rates. TRL's own defaults, such as 1e-6 for DPO, are for full fine-tunes: LoRA would not move."""

MODULES = ("q_proj", "v_proj", "up_proj", "down_proj")
"""Linear layers that LoRA adapts by default."""


@dataclass(frozen=True)
class _Training:
    """Options of any training, of a policy or of a reward model."""

    tune: Tune = "lora"
    """Trained weights: LoRA matrices, LoRA over weights in 4 bits (load the model with --quantize 4bit), or all."""
    rank: int = 16
    """Rank of the LoRA matrices."""
    modules: tuple[str, ...] = MODULES
    """Linear layers that LoRA adapts."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW, warmed up over a tenth of the steps, then linear to 0; by default the method's."""
    batch: int = 8
    """Pairs, or prompts, in one forward pass."""
    accumulate: int = 1
    """Batches whose gradients are summed for one step."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: slower, and less memory."""
    epochs: float = 1.0
    """Passes over the training pairs."""
    steps: int | None = None
    """Steps, instead of epochs."""
    reply_tokens: int = 128
    """Tokens of a reply at most; longer ones are cut, and not trained to end there."""
    held_out: Share = 0.1
    """Share of the pairs held out for judging, by prompt."""
    keep_every: int = 20
    """Steps between the states from which an interrupted training resumes."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0

    @property
    def what(self) -> str:
        """Name of the stage, for errors."""
        return "prefer"

    def __post_init__(self) -> None:
        check_choices(self, self.what, tune=Tune)
        check_least(self, self.what, 1, "rank", "batch", "accumulate", "steps", "reply_tokens", "keep_every")
        check_least(self, self.what, 0, "seed")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise BadInput.of("learning_rate", self.learning_rate, "over 0 and at most 1", self.what)
        if not 0 < self.epochs <= 1000:
            raise BadInput.of("epochs", self.epochs, "over 0 and at most 1000", self.what)
        if not 0 < self.held_out < 1:
            raise BadInput.of("held_out", self.held_out, "a share over 0 and under 1", self.what)

    def rate(self, method: str) -> float:
        """The learning rate of a method."""
        rates = LEARNING_RATES[method]
        return self.learning_rate or (rates.full if self.tune == "full" else rates.lora)


@dataclass(frozen=True)
class PreferConfig(_Training):
    """Options of preference training."""

    method: Method = "dpo"
    """Direct preference optimisation, fine-tuning on chosen replies, two kinds of reinforcement, or best of n."""
    beta: float | None = None
    """Strength of the pull to the model before training: dpo 0.1, rloo and grpo 0.05 by default."""
    nll: float = 0.0
    """Weight of the chosen reply's mean negative log-likelihood in dpo; keeps replies likely that were not its own."""
    generations: int = 4
    """Samples per prompt and step in rloo and grpo; n of best-of-n."""
    temperature: float = 1.0
    """Temperature at which replies are sampled in training; replies that are judged are greedy."""
    eval_limit: int = 200
    """Held-out prompts, at most, on which the model is judged before and after."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, self.what, method=Method)
        check_least(self, self.what, 2, "generations", "eval_limit")
        if self.beta is not None and not self.beta >= 0:
            raise BadInput.of("beta", self.beta, "at least 0", self.what)
        if self.beta == 0 and self.method == "dpo":
            raise BadInput.of("beta", self.beta, "over 0 for dpo", self.what)
        if not self.nll >= 0:
            raise BadInput.of("nll", self.nll, "at least 0", self.what)
        if self.nll and self.method != "dpo":
            raise BadInput(f"prefer nll is {self.nll}, which is of dpo, and the method is {self.method}; leave it out")
        if not self.temperature > 0:
            raise BadInput.of("temperature", self.temperature, "over 0", self.what)

    @property
    def pull(self) -> float:
        """β of the method."""
        return self.beta if self.beta is not None else 0.1 if self.method == "dpo" else 0.05


@dataclass(frozen=True)
class RewardModelConfig(_Training):
    """Options of a reward model's training (Bradley–Terry on pairs; Ouyang et al. 2022, arXiv:2203.02155)."""

    centre: float = 0.01
    """Weight of the squared sum of both rewards, which centres them (Eisenstein et al. 2023, arXiv:2312.09244)."""

    @property
    def what(self) -> str:
        """Name of the stage, for errors."""
        return "reward-model"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.centre >= 0:
            raise BadInput.of("centre", self.centre, "at least 0", self.what)
