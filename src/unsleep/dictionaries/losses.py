"""Hand-written forward and backward passes shared by the architectures.

Loss = mean over tokens of ‖ŷ − y‖² + the architecture's sparsity cost. The encoder runs in
bf16. Where few features are active, later steps touch active rows only (`sparse`); where many
are, the products are dense and in bf16 too. Gradients equal those of autograd on the plain dense
formulas up to rounding (tests/test_losses.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear

from unsleep.dictionaries import sparse
from unsleep.dictionaries.sparse import Code

threshold_backward = torch.ops.aten.threshold_backward
"""Gradient where x is above a threshold, else 0: one pass, where `torch.where` takes three."""

SPARSE_BELOW = 1 / 40
"""Share of active features below which sparse products are cheaper than dense ones."""


@dataclass
class Weights:
    """Trained parameters, in float32. The encoder is transposed: a feature is a row in both matrices."""

    enc: Float[Tensor, "feature d_in"]
    dec: Float[Tensor, "feature d_out"]
    b_enc: Float[Tensor, " feature"]
    b_dec: Float[Tensor, " d_out"]
    own: dict[str, Float[Tensor, " feature"]] = field(default_factory=dict[str, Tensor])
    """Parameters that an architecture adds."""
    skip: Float[Tensor, "d_out d_in"] | None = None
    """Skip connection, transcoders only."""

    def named(self) -> dict[str, Tensor]:
        """The parameters by name."""
        found = {"enc": self.enc, "dec": self.dec, "b_enc": self.b_enc, "b_dec": self.b_dec, **self.own}
        return found if self.skip is None else {**found, "skip": self.skip}


class Batch(NamedTuple):
    """Normalised activations of a batch of tokens."""

    x: Float[Tensor, "token d_in"]
    """Encoder input, after subtraction of the bias where the architecture does so."""
    y: Float[Tensor, "token d_out"]
    """Reconstruction target, without b_dec."""
    subtracted: bool
    """True if b_dec was subtracted from x, so that it has a gradient there too."""
    compute: torch.dtype = torch.bfloat16
    """Dtype of the dense products."""

    def slope(self, error: Float[Tensor, "token d_out"]) -> Float[Tensor, "token d_out"]:
        """∂ mean ‖ŷ − y‖² / ∂ŷ."""
        return error * (2 / len(error))


class Pass(NamedTuple):
    """Result of one forward and backward pass."""

    pre: Float[Tensor, "token feature"]
    error: Float[Tensor, "token d_out"]
    """ŷ − y."""
    grads: dict[str, Tensor]
    """Gradients by the names of `Weights`."""
    fired: Float[Tensor, " feature"]
    """Positive for features that were active."""
    active: int
    """Number of active entries in the batch."""
    threshold: float = 0.0
    """The smallest kept activation, where the architecture selects over a batch."""


def encode(w: Weights, batch: Batch, dtype: torch.dtype | None = None) -> Float[Tensor, "token feature"]:
    """Pre-activations, in the batch's compute dtype."""
    dtype = dtype or batch.compute
    return linear(batch.x.to(dtype), w.enc.to(dtype), w.b_enc.to(dtype))


def is_sparse(count: int, active: Bool[Tensor, "token feature"]) -> bool:
    """True if so few entries are active that sparse products are cheaper than dense ones."""
    return count < SPARSE_BELOW * active.numel()


def fired(w: Weights, code: Code) -> Float[Tensor, " feature"]:
    """1 for features that were active."""
    found = torch.zeros_like(w.b_enc)
    found[code.ids[code.values > 0]] = 1
    return found


def revive(w: Weights, batch: Batch, done: Pass, silent: Tensor, k: int, coefficient: float) -> None:
    """Add the gradient of the auxiliary loss: dead features reconstruct the error, relative to its size.

    Gao et al. 2024 (arXiv:2406.04093), appendix A.2. `silent` are the indices of dead features.
    """
    values, which = sparse.top_k(done.pre[:, silent], min(k, len(silent)))
    code = sparse.code_of_top_k(values.relu().to(w.dec.dtype), silent[which])
    off = sparse.combine(code, w.dec) + done.error  # error = ŷ − y, so the target is −error
    share = 2 * coefficient * off.shape[1] / done.error.square().sum().clamp_min(1e-20)
    extra = sparse_grads(w, batch.x, code, off * share)
    for name, grad in extra.items():
        done.grads[name] += grad
    if batch.subtracted:  # the error is constant: b_dec has a gradient only through the encoder
        done.grads["b_dec"] -= extra["b_enc"] @ w.enc


def sparse_grads(
    w: Weights,
    x: Float[Tensor, "token d_in"],
    code: Code,
    slope: Float[Tensor, "token d_out"],
    cost: float | Tensor = 0.0,
) -> dict[str, Tensor]:
    """Gradients of the matrices and b_enc from ∂loss/∂ŷ, and the cost per active entry."""
    order = sparse.by_feature(code, len(w.enc))
    of_value = (sparse.row_dots(slope, w.dec, code) + cost) * (code.values > 0)
    return {
        "dec": sparse.scatter(order, code.values, slope),
        "enc": sparse.scatter(order, of_value, x),
        "b_enc": torch.zeros_like(w.b_enc).index_add_(0, code.ids, of_value),
    }


def column_sums(x: Float[Tensor, "token feature"]) -> Float[Tensor, " feature"]:
    """Sum over tokens as a matrix product, which accumulates in float32 and is several times faster."""
    return (x.new_ones(1, len(x)) @ x).squeeze(0)


def sparse_pass(
    w: Weights, batch: Batch, pre: Float[Tensor, "token feature"], code: Code, cost: float | Tensor = 0.0
) -> Pass:
    """All gradients by sparse products; `cost` is ∂loss/∂value of an entry besides the squared error."""
    error = _with_skip(w, batch, sparse.combine(code, w.dec)) - batch.y
    slope = batch.slope(error)
    grads = sparse_grads(w, batch.x, code, slope, cost)
    through = grads["b_enc"]
    return Pass(pre, error, _with_bias(w, batch, grads, slope, through), fired(w, code), sparse.count(code.values > 0))


class Dense:
    """A dense reconstruction with its backward pass."""

    def __init__(self, w: Weights, batch: Batch, f: Float[Tensor, "token feature"]) -> None:
        self.w, self.batch, self.f = w, batch, f
        dec = w.dec.to(f.dtype)
        self.error = _with_skip(w, batch, (f @ dec).to(w.dec.dtype)) - batch.y
        self.slope = batch.slope(self.error)
        self.slopes = self.slope.to(f.dtype) @ dec.T
        """∂ mean ‖ŷ − y‖² / ∂f."""

    def backward(self, pre: Tensor, of_pre: Float[Tensor, "token feature"], active: int) -> Pass:
        """All gradients, from those of the pre-activations."""
        w, f = self.w, self.f
        through = column_sums(of_pre).to(w.dec.dtype)
        grads = {
            "dec": (f.T @ self.slope.to(f.dtype)).to(w.dec.dtype),
            "enc": (of_pre.T @ self.batch.x.to(f.dtype)).to(w.dec.dtype),
            "b_enc": through,
        }
        fired = column_sums(f).to(w.dec.dtype)
        return Pass(pre, self.error, _with_bias(w, self.batch, grads, self.slope, through), fired, active)


def _with_skip(w: Weights, batch: Batch, rebuilt: Tensor) -> Tensor:
    return rebuilt if w.skip is None else rebuilt + batch.x @ w.skip.T


def _with_bias(
    w: Weights, batch: Batch, grads: dict[str, Tensor], slope: Tensor, through: Float[Tensor, " feature"]
) -> dict[str, Tensor]:
    """Add the gradients of b_dec and the skip connection; `through` is Σ over tokens of ∂loss/∂pre."""
    grads["b_dec"] = slope.sum(0)
    if batch.subtracted:
        grads["b_dec"] = grads["b_dec"] - through @ w.enc
    if w.skip is not None:
        grads["skip"] = slope.T @ batch.x
    return grads
