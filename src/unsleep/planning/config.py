"""Settings of a plan: tasks, shapes of a batch, optimizer, and what is assumed of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from unsleep.base.records import Range
from unsleep.core import BadInput, check_choices, check_least

Task = Literal["full", "lora", "8bit", "4bit", "ppo", "harvest", "dictionary", "audit"]
TASKS: tuple[Task, ...] = get_args(Task)

TUNED = ("full", "lora", "8bit", "4bit", "ppo")
"""Tasks with a backward pass through the model."""

Optimizer = Literal["adamw", "adamw-fused", "adamw-8bit", "momentum", "sgd"]
Precision = Literal["float32", "mixed"]
Checkpointing = Literal["off", "on", "both"]
Quantize = Literal["none", "8bit", "4bit"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class PlanConfig:
    """Settings of a plan."""

    tasks: tuple[Task, ...] = TASKS
    """Tasks: fine-tuning of all weights, by LoRA, by LoRA over 8-bit or 4-bit weights; PPO of all weights; harvest of
    activations; training of a dictionary; audit, which generates replies.
    """
    lengths: tuple[int, ...] | None = None
    """Tokens per row, in an audit of the prompt; default 512 and 2048, or the model's context where it is shorter."""
    batches: tuple[int, ...] = (1, 8)
    """Rows per step."""
    checkpointing: Checkpointing = "both"
    """Activation checkpointing of every block: off, on, or a plan for either."""
    optimizer: Optimizer = "adamw"
    """`adamw` is PyTorch's default on a GPU, whose step needs a copy of all trained weights; `adamw-fused` needs none;
    `adamw-8bit` is that of bitsandbytes; SGD with momentum, or without.
    """
    precision: Precision = "float32"
    """Of fine-tuning all weights: `float32` throughout, as `unsleep plant` does; or `mixed`, 16-bit weights, gradients
    and activations with float32 master weights and optimizer state. Either takes 16 bytes per parameter with Adam.
    """
    accumulate: int = 1
    """Batches per optimizer step; with more than one, gradients are held during every forward pass."""
    rank: int = 16
    """Rank of LoRA matrices, which are float32."""
    modules: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers with LoRA matrices; `all-linear` for all but the unembedding. Matrices that PEFT
    adds to the experts of a mixture are not counted.
    """
    dtype: Dtype = "auto"
    """Dtype of weights that are neither quantised nor fine-tuned themselves; `auto` is the checkpoint's."""
    keep_base: bool = False
    """Full fine-tune: hold the original weights too, as `unsleep plant` does."""
    quantize: Quantize = "none"
    """Weights of a harvest and an audit, as `--quantize` of those commands loads them."""
    sites: int = 1
    """Sites harvested in one pass."""
    features: int | None = None
    """Features of the dictionary; default 8 × d_model."""
    dictionary_batch: int = 2048
    """Tokens per step of the dictionary's training."""
    reply_tokens: int = 64
    """Tokens generated per row of an audit."""
    tokens: int = 1_000_000
    """Tokens in all that hours and cost are for: trained on, harvested, or read and written by an audit."""
    efficiency: Annotated[float, Range(0, 1)] = 0.4
    """Share of the GPU's peak throughput and bandwidth that is reached. Pretraining of Llama 3 reached 0.38 to 0.43 on
    H100s (Grattafiori et al. 2024, arXiv:2407.21783, table 4); small batches and models reach less.
    """
    reserve: float = 1.0
    """GiB set aside for the CUDA context, libraries' workspaces and fragmentation."""

    def __post_init__(self) -> None:
        kinds = {"checkpointing": Checkpointing, "optimizer": Optimizer, "precision": Precision}
        check_choices(self, "plan", **kinds, quantize=Quantize, dtype=Dtype)
        for name in ("tasks", "lengths", "batches", "modules"):
            if getattr(self, name) in ((), []):
                raise BadInput.of(name, getattr(self, name), "at least one", "plan")
        for task in self.tasks:
            if task not in TASKS:
                raise BadInput.of("tasks", task, f"one of {', '.join(TASKS)}", "plan")
        for name, least in (("lengths", 2), ("batches", 1)):
            for value in getattr(self, name) or ():
                if value < least:
                    raise BadInput.of(name, value, f"at least {least}", "plan")
        names = ("accumulate", "rank", "sites", "features", "dictionary_batch", "reply_tokens", "tokens")
        check_least(self, "plan", 1, *names)
        if not 0 < self.efficiency <= 1:
            raise BadInput.of("efficiency", self.efficiency, "a share above 0, at most 1", "plan")
        if not 0 <= self.reserve < 1000:
            raise BadInput.of("reserve", self.reserve, "GiB, at least 0", "plan")

    @property
    def switches(self) -> tuple[bool, ...]:
        """Gradient checkpointing, off and on: one plan each."""
        return {"off": (False,), "on": (True,), "both": (False, True)}[self.checkpointing]
