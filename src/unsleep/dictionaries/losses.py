"""Forward and backward pass of every architecture, by hand.

Loss = mean over tokens of ‖ŷ − y‖² + what the architecture charges for firing. The encoder runs in
bf16. Where few features fire, everything behind it touches active rows only (`sparse`); where many
do, the products are dense and in bf16 too. Gradients equal those of autograd on the plain dense
formulas up to rounding (tests/test_losses.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from unsleep.dictionaries import sparse
from unsleep.dictionaries.sparse import Code

threshold_backward = torch.ops.aten.threshold_backward
"""grad where x is over a level, else 0: one pass, where `torch.where` takes three."""

SPARSE_BELOW = 1 / 40
"""Share of features firing under which active rows are cheaper than dense products."""


@dataclass
class Weights:
    """What is trained, in float32. The encoder is held transposed: a feature is a row in both matrices."""

    enc: Float[Tensor, "feature d_in"]
    dec: Float[Tensor, "feature d_out"]
    b_enc: Float[Tensor, " feature"]
    b_dec: Float[Tensor, " d_out"]
    log_threshold: Float[Tensor, " feature"] | None = None
    """JumpReLU."""
    b_mag: Float[Tensor, " feature"] | None = None
    """Gated; `b_enc` is then the gate's bias."""
    r_mag: Float[Tensor, " feature"] | None = None
    skip: Float[Tensor, "d_out d_in"] | None = None
    """Transcoders only."""

    def named(self) -> dict[str, Tensor]:
        """The weights that there are."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


class Costs(NamedTuple):
    """What an architecture charges for firing, in the loss's units."""

    sparsity: float
    """A unit of activation (L1) or a firing feature (L0), this step."""
    bandwidth: float
    """Width of the rectangle that stands for a threshold's derivative."""


class Batch(NamedTuple):
    """Normalised activations of some tokens."""

    x: Float[Tensor, "token d_in"]
    """What is encoded: the bias is taken off already, where the architecture does so."""
    y: Float[Tensor, "token d_out"]
    """What is to be rebuilt, without b_dec."""
    subtracted: bool
    """Whether b_dec was taken off x, so that it has a gradient there as well."""
    compute: torch.dtype = torch.bfloat16
    """Dtype of the dense products."""

    def slope(self, error: Float[Tensor, "token d_out"]) -> Float[Tensor, "token d_out"]:
        """∂ mean ‖ŷ − y‖² / ∂ŷ."""
        return error * (2 / len(error))


class Pass(NamedTuple):
    """One forward and backward pass."""

    pre: Float[Tensor, "token feature"]
    error: Float[Tensor, "token d_out"]
    """ŷ − y."""
    grads: dict[str, Tensor]
    """By the names of `Weights`."""
    fired: Float[Tensor, " feature"]
    """Over 0 where a feature fired."""
    active: int
    """Entries that fired in the whole batch."""
    threshold: float = 0.0
    """BatchTopK: the smallest activation that was kept."""


def encode(w: Weights, batch: Batch, dtype: torch.dtype | None = None) -> Float[Tensor, "token feature"]:
    """Pre-activations, in the batch's compute dtype."""
    dtype = dtype or batch.compute
    return linear(batch.x.to(dtype), w.enc.to(dtype), w.b_enc.to(dtype))


def top_k(w: Weights, batch: Batch, k: int) -> Pass:
    """TopK: the k largest positive pre-activations of each token fire."""
    pre = encode(w, batch)
    values, ids = sparse.top_k(pre, k)
    return _sparse_pass(w, batch, pre, sparse.code_of_top_k(values.relu().to(w.dec.dtype), ids))


def batch_top_k(w: Weights, batch: Batch, k: int) -> Pass:
    """BatchTopK: the k · tokens largest positive pre-activations of the batch fire."""
    pre = encode(w, batch)
    code = sparse.largest(pre, k * len(pre))
    smallest = float(code.values.min()) if len(code.values) else 0.0
    return _sparse_pass(w, batch, pre, code._replace(values=code.values.to(w.dec.dtype)))._replace(threshold=smallest)


def matryoshka(w: Weights, batch: Batch, k: int, groups: tuple[int, ...]) -> Pass:
    """BatchTopK with the mean loss over the nested dictionaries that the first groups make."""
    pre = encode(w, batch)
    code = sparse.largest(pre, k * len(pre))
    smallest = float(code.values.min()) if len(code.values) else 0.0
    code = code._replace(values=code.values.to(w.dec.dtype))
    ends = torch.tensor(groups, device=pre.device).cumsum(0)
    codes = sparse.split(code, torch.bucketize(code.ids, ends, right=True), len(groups), len(pre))
    rebuilt = torch.zeros_like(batch.y)
    errors: list[Tensor] = []
    for part in codes:
        rebuilt = rebuilt + sparse.combine(part, w.dec)
        errors.append(rebuilt - batch.y)
    grads = {name: torch.zeros_like(tensor) for name, tensor in w.named().items()}
    slope = torch.zeros_like(batch.y)
    for part, error in zip(reversed(codes), reversed(errors), strict=True):
        own = batch.slope(error) / len(groups)
        slope += own  # what a group writes counts in every dictionary that holds it
        for name, grad in sparse_grads(w, batch.x, part, slope).items():
            grads[name] += grad
        grads["b_dec"] += own.sum(0)
    if batch.subtracted:
        grads["b_dec"] -= grads["b_enc"] @ w.enc
    return Pass(pre, errors[-1], grads, _fired(w, code), len(code.ids), smallest)


def _fired(w: Weights, code: Code) -> Float[Tensor, " feature"]:
    fired = torch.zeros_like(w.b_enc)
    fired[code.ids[code.values > 0]] = 1
    return fired


def standard(w: Weights, batch: Batch, costs: Costs) -> Pass:
    """ReLU with an L1 cost on activations, each weighted by its decoder row's norm."""
    pre = encode(w, batch)
    norms = w.dec.norm(dim=1)
    slope = costs.sparsity / len(pre)
    active = pre > 0
    n = sparse.count(active)
    if n < SPARSE_BELOW * active.numel():
        code = sparse.code_where(pre, active)
        code = code._replace(values=code.values.to(w.dec.dtype))
        done = _sparse_pass(w, batch, pre, code, slope * norms[code.ids])
        total = torch.zeros_like(norms).index_add_(0, code.ids, code.values)
    else:
        f = pre.relu()
        rebuilt = _Dense(w, batch, f)
        done = rebuilt.backward(pre, threshold_backward(rebuilt.slopes.add_((slope * norms).to(f.dtype)), pre, 0), n)
        total = column_sums(f).to(w.dec.dtype)
    done.grads["dec"] += (slope * total / norms.clamp_min(1e-12))[:, None] * w.dec
    return done


def jump_relu(w: Weights, batch: Batch, costs: Costs) -> Pass:
    """A threshold for each feature with an L0 cost, both trained through a rectangle.

    Rajamanoharan et al. 2024, "Jumping ahead", section 3.
    """
    assert w.log_threshold is not None
    pre = encode(w, batch)
    threshold = w.log_threshold.exp()
    over = pre - threshold.to(pre.dtype)
    active, near = over > 0, over.abs() < costs.bandwidth / 2
    n = sparse.count(active)
    if max(n, sparse.count(near)) < SPARSE_BELOW * active.numel():
        code = sparse.code_where(pre, active)
        done = _sparse_pass(w, batch, pre, code._replace(values=code.values.to(w.dec.dtype)))
        edge = sparse.code_where(pre, near)
        at_edge = sparse.row_dots(batch.slope(done.error), w.dec, edge)
        grad = torch.zeros_like(threshold).index_add_(0, edge.ids, at_edge)
        crowd = torch.bincount(edge.ids, minlength=len(threshold)).to(w.dec.dtype)
    else:
        rebuilt = _Dense(w, batch, pre.masked_fill(~active, 0))
        done = rebuilt.backward(pre, threshold_backward(rebuilt.slopes, over, 0), n)
        grad = column_sums(rebuilt.slopes.masked_fill(~near, 0)).to(w.dec.dtype)
        crowd = column_sums(near.to(pre.dtype)).to(w.dec.dtype)
    cost = costs.sparsity / len(pre)
    done.grads["log_threshold"] = -(grad * threshold + cost * crowd) / costs.bandwidth * threshold
    return done


def gated(w: Weights, batch: Batch, costs: Costs) -> Pass:
    """Gate and magnitude, with an L1 cost on the open gate and its own reconstruction (ibid. 2024, "Gated SAEs", 3.2).

    That reconstruction sees a frozen decoder.
    """
    assert w.b_mag is not None
    assert w.r_mag is not None
    pre = encode(w, batch)
    scale = w.r_mag.exp().to(pre.dtype)
    stretched = (pre - w.b_enc.to(pre.dtype)).mul_(scale)
    opened = pre.relu()
    f = threshold_backward((stretched + w.b_mag.to(pre.dtype)).relu_(), pre, 0)
    rebuilt, aside = _Dense(w, batch, f), _Dense(w, batch, opened)
    of_magnitude = threshold_backward(rebuilt.slopes, f, 0)
    of_gate = threshold_backward(aside.slopes.add_(costs.sparsity / len(pre)), pre, 0)
    done = rebuilt.backward(pre, of_magnitude * scale + of_gate, sparse.count(f > 0))
    done.grads["b_enc"] = column_sums(of_gate).to(w.dec.dtype)
    done.grads["b_mag"] = column_sums(of_magnitude).to(w.dec.dtype)
    done.grads["r_mag"] = column_sums(of_magnitude.mul_(stretched)).to(w.dec.dtype)
    return done


def revive(w: Weights, batch: Batch, done: Pass, silent: Tensor, k: int, coefficient: float) -> None:
    """Add the gradient of the auxiliary loss: dead features rebuild the error, as a share of its size.

    Gao et al. 2024, appendix A.2. `silent` holds the ids of dead features.
    """
    values, which = sparse.top_k(done.pre[:, silent], min(k, len(silent)))
    code = sparse.code_of_top_k(values.relu().to(w.dec.dtype), silent[which])
    off = sparse.combine(code, w.dec) + done.error  # error = ŷ − y, so the target is −error
    share = 2 * coefficient * off.shape[1] / done.error.square().sum().clamp_min(1e-20)
    extra = sparse_grads(w, batch.x, code, off * share)
    for name, grad in extra.items():
        done.grads[name] += grad
    if batch.subtracted:  # the error is taken as given: b_dec moves through the encoder alone
        done.grads["b_dec"] -= extra["b_enc"] @ w.enc


def sparse_grads(
    w: Weights,
    x: Float[Tensor, "token d_in"],
    code: Code,
    slope: Float[Tensor, "token d_out"],
    cost: float | Tensor = 0.0,
) -> dict[str, Tensor]:
    """Gradients of the matrices and b_enc from ∂loss/∂ŷ, and what an entry's activation costs."""
    order = sparse.by_feature(code, len(w.enc))
    of_value = (sparse.row_dots(slope, w.dec, code) + cost) * (code.values > 0)
    return {
        "dec": sparse.scatter(order, code.values, slope),
        "enc": sparse.scatter(order, of_value, x),
        "b_enc": torch.zeros_like(w.b_enc).index_add_(0, code.ids, of_value),
    }


def column_sums(x: Float[Tensor, "token feature"]) -> Float[Tensor, " feature"]:
    """Σ over tokens: as a matrix product, which adds up in float32 and is several times faster than a sum."""
    return (x.new_ones(1, len(x)) @ x).squeeze(0)


def _sparse_pass(w: Weights, batch: Batch, pre: Tensor, code: Code, cost: float | Tensor = 0.0) -> Pass:
    error = _with_skip(w, batch, sparse.combine(code, w.dec)) - batch.y
    slope = batch.slope(error)
    grads = sparse_grads(w, batch.x, code, slope, cost)
    through = grads["b_enc"]
    return Pass(pre, error, _with_bias(w, batch, grads, slope, through), _fired(w, code), sparse.count(code.values > 0))


class _Dense:
    """A reconstruction from dense activations, and the way back from it."""

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
    """Add what b_dec and the skip path learn; `through` is Σ over tokens of ∂loss/∂pre."""
    grads["b_dec"] = slope.sum(0)
    if batch.subtracted:
        grads["b_dec"] = grads["b_dec"] - through @ w.enc
    if w.skip is not None:
        grads["skip"] = slope.T @ batch.x
    return grads
