"""Tanh: a ReLU with a saturating cost, which avoids the shrinkage of strong features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from unsleep.dictionaries import losses, sparse
from unsleep.dictionaries.architectures.standard import Standard
from unsleep.dictionaries.losses import Batch, Dense, Pass, Weights

SATURATION = 1.0
"""Activation, on normalised activations, above which the cost saturates."""


@dataclass(frozen=True, eq=False)
class Tanh(Standard):
    """A `Standard` dictionary trained with a tanh cost (Jermyn et al. 2024, "Tanh penalty in dictionary learning").

    Transformer Circuits Thread, Circuits Updates, February 2024. Its authors report a better trade-off of L0 against
    error than with L1, and more features that are active on many tokens and hard to interpret.
    """

    @classmethod
    def gradients(cls, w: Weights, batch: Batch, config: Any, step: int) -> Pass:
        """Cost SATURATION · tanh(u / SATURATION), with u = f · norm of the decoder row; about u for small u."""
        pre = losses.encode(w, batch)
        norms = w.dec.norm(dim=1)
        slope = config.cost(step) / len(pre)
        active = pre > 0
        n = sparse.count(active)
        if losses.is_sparse(n, active):
            code = sparse.code_where(pre, active)
            code = code._replace(values=code.values.to(w.dec.dtype))
            of_u = slope * (1 - (code.values * norms[code.ids] / SATURATION).tanh().square())
            done = losses.sparse_pass(w, batch, pre, code, of_u * norms[code.ids])
            of_norm = torch.zeros_like(norms).index_add_(0, code.ids, of_u * code.values)
        else:
            f, wide = pre.relu(), norms.to(pre.dtype)
            of_u = slope * (1 - (f * (wide / SATURATION)).tanh_().square_())
            rebuilt = Dense(w, batch, f)
            done = rebuilt.backward(pre, losses.threshold_backward(rebuilt.slopes.addcmul_(of_u, wide), pre, 0), n)
            of_norm = losses.column_sums(of_u.mul_(f)).to(w.dec.dtype)
        done.grads["dec"] += (of_norm / norms.clamp_min(1e-12))[:, None] * w.dec
        return done

    in_saelens = Standard.in_saelens._replace(borrowed=True)
    in_dictionary_learning = tuple(layout._replace(borrowed=True) for layout in Standard.in_dictionary_learning)
