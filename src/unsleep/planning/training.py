"""Memory of fine-tuning: weights, gradients, optimizer state, and a step on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from unsleep.models.hooks import passes_watched
from unsleep.planning.config import Optimizer, PlanConfig, Task
from unsleep.planning.ledger import Kernels, Ledger
from unsleep.planning.record import Memory
from unsleep.planning.skeleton import Skeleton, Weight
from unsleep.planning.timeline import Peak, Timeline, composed

SMALL = 4096
"""Numbers below which the 8-bit optimizer keeps a parameter's state in 32 bits (`min_8bit_size` of bitsandbytes)."""

BLOCK = 256
"""Numbers per float32 scale of an 8-bit optimizer state."""

HALF = 2
"""Bytes of a 16-bit number."""


class Step(NamedTuple):
    """A step of a task: its memory, and the work that takes time."""

    memory: Memory
    flops: int
    """Floating-point operations."""
    moved: int
    """Bytes read and written where the memory's bandwidth sets the pace: by optimizers and by generation."""
    itemsize: int
    """Bytes of the numbers that are multiplied."""
    tokens: int
    """Tokens that a step gets through."""


def state_bytes(weights: Iterable[Weight], optimizer: Optimizer, itemsize: int | None = None) -> int:
    """Bytes of the optimizer's state of trained weights, held in their own dtype or one of `itemsize` bytes."""
    total = 0
    for weight in weights:
        number = itemsize or weight.itemsize
        if optimizer == "adamw-8bit":
            total += weight.numel * 8 if weight.numel < SMALL else 2 * (weight.numel + 4 * -(-weight.numel // BLOCK))
        else:
            total += weight.numel * number * {"adamw": 2, "adamw-fused": 2, "momentum": 1, "sgd": 0}[optimizer]
    return total


def resident(skeleton: Skeleton, config: PlanConfig, mixed: bool) -> Memory:
    """Weights, gradients and optimizer state of a variant, and the peak of an optimizer step."""
    weights = list(skeleton.weights())
    trained = [weight for weight in weights if weight.trained]
    gradients = sum(weight.numel * weight.itemsize for weight in trained)
    masters = sum(4 * weight.numel for weight in trained) if mixed else 0
    state = masters + state_bytes(trained, config.optimizer, 4 if mixed else None)
    held = sum(weight.bytes for weight in weights)
    # A step of AdamW over lists of tensors makes the square roots of all second moments at once.
    roots = sum(weight.numel * (4 if mixed else weight.itemsize) for weight in trained)
    peak = held + gradients + state + (roots if config.optimizer == "adamw" else 0)
    return Memory(held, gradients, state, 0, 0, 0, peak, "optimizer step")


def loss_of(network: Any, ids: Tensor) -> Tensor:
    """The loss of a step of `unsleep plant`: cross-entropy in float32 of the logits that predict a token."""
    rows, length = ids.shape
    logits = network(input_ids=ids, use_cache=False).logits[:, -length:][:, :-1]
    row = torch.arange(rows, device=ids.device).repeat_interleave(length - 1)
    column = torch.arange(length - 1, device=ids.device).repeat(rows)
    picked = logits[row, column]
    del logits
    return cross_entropy(picked.float(), ids[:, 1:].reshape(-1))


def traced(skeleton: Skeleton, run: Callable[[Any], Tensor | None], *, checkpointed: bool = False) -> Timeline:
    """The timeline of a pass; what `run` returns is a loss, whose backward pass belongs to it, or nothing."""
    network = skeleton.network
    ledger = Ledger([*network.parameters(), *network.buffers()])
    watching = passes_watched(list(skeleton.blocks), ledger.mark)
    with checkpointing(network, ledger, checkpointed), ledger, Kernels(ledger), watching:
        with ledger.saving():
            loss = run(network)
            ledger.mark("loss")
        if loss is not None:
            loss.backward()
            ledger.mark("end")
    for parameter in network.parameters():
        parameter.grad = None
    return composed(ledger.marks, skeleton.kinds, [skeleton.gradients(i) for i in range(len(skeleton.blocks))])


@contextlib.contextmanager
def checkpointing(network: Any, ledger: Ledger, on: bool) -> Generator[None]:
    """Checkpoint the activations of every block inside the block of code, where `on`; needs training mode."""
    if not on:
        yield
        return
    is_new = hasattr(network, "activation_checkpointing_enable")
    name = "activation_checkpointing" if is_new else "gradient_checkpointing"
    # The backward pass suspends function modes, so that the second forward pass needs one of its own.
    contexts = lambda: (contextlib.nullcontext(), Kernels(ledger))  # noqa: E731
    getattr(network, f"{name}_enable")({"use_reentrant": False, "context_fn": contexts})
    network.train()
    try:
        yield
    finally:
        getattr(network, f"{name}_disable")()
        network.eval()


def timeline(skeleton: Skeleton, batch: int, length: int, checkpointed: bool) -> Timeline:
    """The timeline of a training step on whole rows."""
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    return traced(skeleton, lambda network: loss_of(network, ids), checkpointed=checkpointed)


def variants(skeleton: Skeleton, tasks: Iterable[Task], config: PlanConfig) -> dict[Task, Skeleton]:
    """The network that each fine-tuning task trains."""
    lora = {"rank": config.rank, "modules": config.modules}
    whole = {"dtype": torch.float32} if config.precision == "float32" else {}
    made: dict[Task, dict[str, Any]] = {
        "full": whole | {"trained": True},
        "lora": lora,
        "8bit": lora | {"bits": 8},
        "4bit": lora | {"bits": 4},
        "ppo": whole | {"trained": True},
    }
    return {task: skeleton.variant(**made[task]) for task in tasks if task in made}


def step(task: Task, skeleton: Skeleton, base: int, shape: tuple[int, int, bool], config: PlanConfig) -> Step:
    """Memory and arithmetic of one step.

    Args:
        skeleton: the variant that the task trains.
        base: bytes of the original weights.
        shape: rows, tokens per row, and whether blocks are checkpointed.
    """
    rows, length, checkpointed = shape
    mixed = task in ("full", "ppo") and config.precision == "mixed"
    held = config.accumulate > 1
    own, ledger = resident(skeleton, config, mixed), timeline(skeleton, rows, length, checkpointed)
    inside = ledger.peak(held=held)
    models, others, flops = 1, base if task == "full" and config.keep_base else 0, ledger.flops
    if task == "ppo":  # a policy and a value model are trained, a reference and a reward model score
        models, others = 2, 2 * base
        forward = ledger.flops // (4 if checkpointed else 3)  # a backward pass is two, and a recomputation one
        flops = 2 * (ledger.flops + forward)
    # The other trained model keeps its activations while this one is at its peak, or its gradients after that.
    beside = max(ledger.kept, 0 if held else own.gradients) * (models - 1)
    before = models * (own.weights + own.optimizer + (own.gradients if held else 0))
    peak = max(Peak(before + inside.bytes + beside, inside.phase), Peak(models * own.peak, "optimizer step"))
    memory = Memory(
        weights=models * own.weights + others,
        gradients=models * own.gradients,
        optimizer=models * own.optimizer,
        activations=models * (ledger.kept if checkpointed else max(ledger.saved, ledger.kept)),
        logits=ledger.head,
        cache=0,
        peak=peak.bytes + others,
        phase=peak.phase,
    )
    trained = sum(weight.bytes for weight in skeleton.weights() if weight.trained)
    moved = models * (own.gradients + 2 * own.optimizer + 2 * trained) // config.accumulate
    return Step(memory, flops, moved, HALF if mixed else skeleton.itemsize, rows * length)
