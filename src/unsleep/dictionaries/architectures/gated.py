"""Gated: separate paths determine which features are active and how strongly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.dictionaries import sparse
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.layouts import LINEAR, Learned, SAELens
from unsleep.dictionaries.losses import Batch, Dense, Pass, Weights, column_sums, encode, threshold_backward


@dataclass(frozen=True, eq=False)
class Gated(Coder):
    """A gate and a magnitude path (Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse
    autoencoders", arXiv:2404.16014).

    Both share W_enc; `b_enc` is the gate's bias. With a = (x − b_dec) W_enc: f = relu(a e^r_mag + b_mag)
    where a + b_enc > 0, else 0.
    """

    b_mag: Float[Tensor, " feature"] = field(kw_only=True)
    r_mag: Float[Tensor, " feature"] = field(kw_only=True)

    takes_skip = False
    _weights = (*Coder._weights, "b_mag", "r_mag")

    def activate(self, pre: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        """The magnitude where the gate is open, else 0."""
        magnitude = ((pre - self.b_enc) * self.r_mag.exp() + self.b_mag).relu()
        return torch.where(pre > 0, magnitude, 0)

    def biased(self, shift: Float[Tensor, " feature"]) -> dict[str, Tensor]:
        """Both biases."""
        b_mag = self.b_mag.double() + shift * self.r_mag.double().exp()
        return {**super().biased(shift), "b_mag": b_mag.to(self.b_enc.dtype)}

    @classmethod
    def initial(cls, config: Any, zeros: Float[Tensor, " feature"]) -> dict[str, Tensor]:
        """Magnitude parameters that equal the gate's pre-activation."""
        return {"b_mag": zeros.clone(), "r_mag": zeros.clone()}

    @classmethod
    def gradients(cls, w: Weights, batch: Batch, config: Any, step: int) -> Pass:
        """L1 cost on the open gate, and an auxiliary reconstruction through a frozen decoder (ibid., 3.2)."""
        pre = encode(w, batch)
        scale = w.own["r_mag"].exp().to(pre.dtype)
        stretched = (pre - w.b_enc.to(pre.dtype)).mul_(scale)
        opened = pre.relu()
        f = threshold_backward((stretched + w.own["b_mag"].to(pre.dtype)).relu_(), pre, 0)
        rebuilt, aside = Dense(w, batch, f), Dense(w, batch, opened)
        of_magnitude = threshold_backward(rebuilt.slopes, f, 0)
        of_gate = threshold_backward(aside.slopes.add_(config.cost(step) / len(pre)), pre, 0)
        done = rebuilt.backward(pre, of_magnitude * scale + of_gate, sparse.count(f > 0))
        done.grads["b_enc"] = column_sums(of_gate).to(w.dec.dtype)
        done.grads["b_mag"] = column_sums(of_magnitude).to(w.dec.dtype)
        done.grads["r_mag"] = column_sums(of_magnitude.mul_(stretched)).to(w.dec.dtype)
        return done

    @classmethod
    def trained(cls, w: Weights, config: Any, stretch: Float[Tensor, " feature"], level: float) -> dict[str, Any]:
        """The magnitude path's parameters."""
        return {"b_mag": (w.own["b_mag"] * stretch).cpu(), "r_mag": w.own["r_mag"].clone().cpu()}

    def own_weights(
        self, like: Tensor, stretch: Float[Tensor, " feature"], shift: Float[Tensor, " feature"]
    ) -> dict[str, Tensor]:
        """The magnitude path's parameters."""
        r_mag = self.r_mag.to(like)
        return {"b_mag": (self.b_mag.to(like) + shift * r_mag.exp()) * stretch, "r_mag": r_mag}

    in_saelens = SAELens("gated", {"b_gate": "b_enc", "b_mag": "b_mag", "r_mag": "r_mag"})
    in_dictionary_learning = (
        Learned(
            "GatedAutoEncoder",
            "GatedSAETrainer",
            {**LINEAR, "gate_bias": "b_enc", "decoder_bias": "b_dec", "mag_bias": "b_mag", "r_mag": "r_mag"},
            subtracts=True,
        ),
    )
