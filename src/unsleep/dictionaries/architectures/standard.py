"""Standard: a ReLU with an L1 cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.dictionaries import losses, sparse
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.layouts import LINEAR, Learned, SAELens
from unsleep.dictionaries.losses import Batch, Dense, Pass, Weights


@dataclass(frozen=True, eq=False)
class Standard(Coder):
    """A ReLU (Bricken et al. 2023, "Towards Monosemanticity", Transformer Circuits Thread), with an L1 cost."""

    def activate(self, pre: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        """relu(pre)."""
        return pre.relu()

    @classmethod
    def gradients(cls, w: Weights, batch: Batch, config: Any, step: int) -> Pass:
        """The squared error and the cost of `penalize`."""
        pre = losses.encode(w, batch)
        norms, slope = w.dec.norm(dim=1), config.cost(step) / len(pre)
        active = pre > 0
        n = sparse.count(active)
        if losses.is_sparse(n, active):
            code = sparse.code_where(pre, active)
            ids, values = code.ids, code.values.to(w.dec.dtype)
            of_f = torch.zeros_like(values)
            of_norms = cls.penalize(
                of_f, values, norms[ids], slope, lambda x: torch.zeros_like(norms).index_add_(0, ids, x)
            )
            done = losses.sparse_pass(w, batch, pre, code._replace(values=values), of_f)
        else:
            f = pre.relu()
            rebuilt = Dense(w, batch, f)
            of_norms = cls.penalize(rebuilt.slopes, f, norms, slope, lambda x: losses.column_sums(x).to(w.dec.dtype))
            done = rebuilt.backward(pre, losses.threshold_backward(rebuilt.slopes, pre, 0), n)
        done.grads["dec"] += (of_norms / norms.clamp_min(1e-12))[:, None] * w.dec
        return done

    @classmethod
    def penalize(
        cls, of_f: Tensor, f: Tensor, norms: Tensor, slope: float, summed: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, " feature"]:
        """Add the cost's gradient by the activations to `of_f`; returns that by the norms of the decoder rows.

        The cost is L1 on u = f · norm, at `slope` a unit of u.

        Args:
            f: activations, of every token and feature or only of those that fire.
            norms: of their decoder rows.
            summed: adds up what has the shape of `f`, feature by feature.
        """
        of_f.add_((slope * norms).to(f.dtype))
        return slope * summed(f)

    in_saelens = SAELens("standard", transcoder="", activation="relu")
    in_dictionary_learning = (
        Learned("AutoEncoder", "StandardTrainer", {**LINEAR, "encoder.bias": "b_enc", "bias": "b_dec"}, subtracts=True),
        Learned(
            "AutoEncoderNew",
            "StandardTrainerAprilUpdate",
            {**LINEAR, "encoder.bias": "b_enc", "decoder.bias": "b_dec"},
            subtracts=False,
        ),
    )
