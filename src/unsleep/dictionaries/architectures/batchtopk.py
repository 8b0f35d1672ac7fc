"""BatchTopK: the largest pre-activations of a batch are active in training, those above one threshold at inference.

SAELens saves it for inference, as a JumpReLU with a constant threshold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.dictionaries import sparse
from unsleep.dictionaries.architectures.jumprelu import JumpReLU
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.layouts import LINEAR, Buffer, Learned
from unsleep.dictionaries.losses import Batch, Pass, Weights, encode, sparse_pass
from unsleep.dictionaries.sparse import Code

BUFFERS = {"k": Buffer("k", torch.int32), "threshold": Buffer("threshold", torch.float32)}


def largest(pre: Float[Tensor, "token feature"], k: int, dtype: torch.dtype) -> tuple[Code, float]:
    """The k · tokens largest positive pre-activations of the batch, and the smallest of them."""
    code = sparse.largest(pre, k * len(pre))
    smallest = float(code.values.min()) if len(code.values) else 0.0
    return code._replace(values=code.values.to(dtype)), smallest


@dataclass(frozen=True, eq=False)
class BatchTopK(Coder):
    """Active above one threshold (Bussmann et al. 2024, "BatchTopK Sparse Autoencoders", arXiv:2412.06410).

    In training the k · batch largest pre-activations of a batch are active; the threshold is the running mean of the
    smallest.
    """

    k: int = field(kw_only=True)
    """Mean number of active features per token in training."""
    threshold: float = field(kw_only=True)

    has_k = True
    kinds: ClassVar[dict[str, Any]] = {"k": int | None, "threshold": int | float | None}

    def activate(self, pre: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        """relu(pre) where pre is above the threshold, else 0."""
        return torch.where(pre > self.threshold, pre.relu(), 0)

    @classmethod
    def gradients(cls, w: Weights, batch: Batch, config: Any, step: int) -> Pass:
        """Squared error only."""
        pre = encode(w, batch)
        code, smallest = largest(pre, config.k, w.dec.dtype)
        return sparse_pass(w, batch, pre, code)._replace(threshold=smallest)

    @classmethod
    def follow(cls, threshold: Float[Tensor, ""], found: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Running mean of the smallest active pre-activation."""
        return torch.where(threshold == 0, found, 0.99 * threshold + 0.01 * found) if found > 0 else threshold

    @classmethod
    def trained(cls, w: Weights, config: Any, stretch: Float[Tensor, " feature"], level: float) -> dict[str, Any]:
        """k and the threshold."""
        return {"k": config.k, "threshold": level}

    @property
    def level(self) -> float:
        """The threshold."""
        return self.threshold

    in_saelens = JumpReLU.in_saelens._replace(borrowed=True)
    in_dictionary_learning = (
        Learned(
            "BatchTopKSAE",
            "BatchTopKTrainer",
            {**LINEAR, "encoder.bias": "b_enc", "b_dec": "b_dec"},
            subtracts=True,
            buffers=BUFFERS,
        ),
    )

    @classmethod
    def restored(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """The settings, if every feature still has the saved threshold."""
        level, threshold = settings["threshold"], tensors["threshold"]
        if level is None or settings["k"] is None or not bool((threshold == torch.full_like(threshold, level)).all()):
            return None
        return {**tensors, **settings, "threshold": float(level)}

    def saved(self) -> dict[str, Tensor]:
        """The weights, and the threshold repeated per feature."""
        return {**self.tensors(), "threshold": torch.full_like(self.b_enc, self.threshold)}
