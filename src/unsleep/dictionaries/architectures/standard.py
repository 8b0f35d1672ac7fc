"""Standard: a ReLU with an L1 cost."""

from __future__ import annotations

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
        """An L1 cost on activations, each weighted by its decoder row's norm."""
        pre = losses.encode(w, batch)
        norms = w.dec.norm(dim=1)
        slope = config.cost(step) / len(pre)
        active = pre > 0
        n = sparse.count(active)
        if losses.is_sparse(n, active):
            code = sparse.code_where(pre, active)
            code = code._replace(values=code.values.to(w.dec.dtype))
            done = losses.sparse_pass(w, batch, pre, code, slope * norms[code.ids])
            total = torch.zeros_like(norms).index_add_(0, code.ids, code.values)
        else:
            f = pre.relu()
            rebuilt = Dense(w, batch, f)
            of_f = rebuilt.slopes.add_((slope * norms).to(f.dtype))
            done = rebuilt.backward(pre, losses.threshold_backward(of_f, pre, 0), n)
            total = losses.column_sums(f).to(w.dec.dtype)
        done.grads["dec"] += (slope * total / norms.clamp_min(1e-12))[:, None] * w.dec
        return done

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
