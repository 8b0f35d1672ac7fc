"""Memory of what runs without a backward pass through the model: harvest, audit, and training of a dictionary."""

from __future__ import annotations

from typing import Any

import torch

from unsleep.models.forward import keeps_logits
from unsleep.planning.config import PlanConfig
from unsleep.planning.record import Memory
from unsleep.planning.skeleton import Skeleton
from unsleep.planning.timeline import Peak, Timeline
from unsleep.planning.training import Step, traced

SINGLE = 4
"""Bytes of a float32."""

EXPANSION = 8
"""Features per dimension of the residual stream, by default."""


@torch.no_grad()
def _forward(skeleton: Skeleton, rows: int, length: int, *, replying: bool) -> Timeline:
    """The timeline of a forward pass: of the blocks alone, or with a KV cache and the last token's logits."""
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")

    def run(network: Any) -> None:
        if replying:
            network(input_ids=ids, use_cache=True, **keeps_logits(network, 1))
        else:
            network.base_model(input_ids=ids, use_cache=False)

    return traced(skeleton, run)


def harvest(skeleton: Skeleton, rows: int, length: int, config: PlanConfig) -> Step:
    """A batch of `unsleep harvest`: the forward pass, and copies of the activations at every Site."""
    held = sum(weight.bytes for weight in skeleton.weights())
    ledger = _forward(skeleton, rows, length, replying=False)
    site = rows * length * skeleton.width * skeleton.itemsize
    sites = config.sites * site
    # Copies are gathered token by token, without padding; then norms are taken in float32, one Site at a time.
    norms = rows * length * skeleton.width * SINGLE
    during = Peak(ledger.peak().bytes + sites, "forward")
    peak = max(during, Peak(2 * sites, "collection"), Peak(sites + max(norms, site), "collection"))
    memory = Memory(held, 0, 0, sites, 0, 0, held + peak.bytes, peak.phase)
    return Step(memory, ledger.flops, 0, skeleton.itemsize, rows * length)


def audit(skeleton: Skeleton, rows: int, length: int, config: PlanConfig) -> Step:
    """A batch of greedy replies, as `unsleep evaluate` generates them: prompts at once, then token by token."""
    held = sum(weight.bytes for weight in skeleton.weights())
    prompts = _forward(skeleton, rows, length, replying=True)
    whole = _forward(skeleton, rows, length + config.reply_tokens, replying=True)
    # Appending a token copies the keys of a block, then its values.
    copied = max(block.kept for block in whole.blocks) // 2
    peak = max(Peak(prompts.peak().bytes, "forward"), Peak(whole.kept + copied, "generation"))
    memory = Memory(held, 0, 0, 0, prompts.head, whole.kept, held + peak.bytes, peak.phase)
    heads = 2 * rows * config.reply_tokens * skeleton.width * skeleton.vocabulary
    moved = config.reply_tokens * (held + whole.kept)
    return Step(memory, whole.flops + heads, moved, skeleton.itemsize, rows * (length + config.reply_tokens))


def dictionary(width: int, config: PlanConfig, itemsize: int = 2) -> Step:
    """A step of `unsleep train` on a TopK dictionary.

    Float32 weights and Adam's state; the gradients of the last step are held while new ones are computed, and so are
    those of the auxiliary loss, by which dead features are revived. `itemsize` is that of the products.
    """
    features, batch = config.features or EXPANSION * width, config.dictionary_batch
    weights = SINGLE * (2 * features * width + features + width)
    matrices = SINGLE * 2 * features * width
    activations = batch * features * itemsize + 6 * batch * width * SINGLE
    peak = weights + 2 * weights + weights + 2 * matrices + activations
    memory = Memory(weights, weights, 2 * weights, activations, 0, 0, peak, "training step")
    moved = weights + 2 * (2 * weights) + 2 * weights
    return Step(memory, 2 * batch * features * width, moved, itemsize, batch)
