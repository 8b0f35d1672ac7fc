"""Trained dictionaries: what each architecture computes from an activation.

    pre = (x − b_dec) W_enc + b_enc        f = activate(pre)        x̂ = f W_dec + b_dec [+ x W_skip]

Architectures differ in `activate` only; a new one is a subclass with its own. A transcoder is any of
them with a `target`: it reads one Site and rebuilds another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from unsleep.base import store
from unsleep.core import BadInput, Dictionary, Encoded, Site, check_finite
from unsleep.dictionaries.sparse import top_k


@dataclass(frozen=True, eq=False)
class Coder(Dictionary):
    """The parts that all architectures share. Weights have SAELens' names and layout."""

    site: Site
    model: str
    """Fingerprint of the model whose activations it was trained on."""
    W_enc: Float[Tensor, "d_model feature"]
    b_enc: Float[Tensor, " feature"]
    W_dec: Float[Tensor, "feature d_out"]
    b_dec: Float[Tensor, " d_out"]
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    """Whatever else its file said; kept on a round trip."""
    sink_norm: float = math.inf
    """Tokens with a larger norm are attention sinks, which training left out: no feature fires on them."""
    subtract_bias: bool = True
    """Whether b_dec is taken off the input before encoding; never in a transcoder."""
    target: Site | None = None
    """The Site that a transcoder rebuilds; `None` where the dictionary rebuilds its own."""
    W_skip: Float[Tensor, "d_out d_model"] | None = None
    """A transcoder's linear path beside the features."""

    def __post_init__(self) -> None:
        d, f = self.W_enc.shape
        out = self.W_dec.shape[-1] if self.target else d
        shapes = {"b_enc": (f,), "W_dec": (f, out), "b_dec": (out,), "W_skip": (out, d)}
        for name in ("threshold", "b_mag", "r_mag"):
            shapes[name] = (f,)
        for name, tensor in self.tensors().items():
            if name in shapes and tuple(tensor.shape) != shapes[name]:
                raise BadInput(
                    f"dictionary at {self.site}: {name} has shape {list(tensor.shape)}; expected {list(shapes[name])}"
                )
            check_finite(tensor, f"dictionary at {self.site}: {name}")
        if self.target is not None and self.subtract_bias:
            raise BadInput(f"a transcoder at {self.site} takes b_dec off its input; expected subtract_bias=False")

    @property
    def d_model(self) -> int:
        """Width of the activation."""
        return self.W_enc.shape[0]

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    @property
    def decoder(self) -> Float[Tensor, "feature d_out"]:
        """What each feature writes when it fires with strength 1."""
        return self.W_dec

    @property
    def hash(self) -> str:
        """Content hash over weights, settings and Site, as they were trained or read."""
        return self._hash

    @cached_property
    def _hash(self) -> str:
        settings = [str(self.site), str(self.target), type(self).__name__, self.settings()]
        return store.hash_value([*settings, store.hash_tensors(self.tensors())])

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name."""
        named = {name: getattr(self, name) for name in (*self._weights, "W_skip")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    _weights = ("W_enc", "b_enc", "W_dec", "b_dec")

    def settings(self) -> dict[str, Any]:
        """What shapes the code beside the weights."""
        return {}

    @cached_property
    def _encoder_rows(self) -> Float[Tensor, "feature d_model"]:
        return self.W_enc.T.contiguous()

    @cached_property
    def _encoder_bias(self) -> Float[Tensor, " feature"]:
        """b_enc − b_dec W_enc, so that encoding needs no subtraction."""
        if not self.subtract_bias:
            return self.b_enc
        return (self.b_enc.float() - self.b_dec.float() @ self.W_enc.float()).to(self.W_enc.dtype)

    def pre_activations(self, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token feature"]:
        """(x − b_dec) W_enc + b_enc."""
        return linear(x, self._encoder_rows, self._encoder_bias)

    def activate(self, pre: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        """Feature activations from pre-activations: what an architecture is."""
        raise NotImplementedError

    def sparsify(
        self, pre: Float[Tensor, "*token feature"]
    ) -> tuple[Float[Tensor, "*token k"], Int[Tensor, "*token k"]]:
        """`activate` as strengths and ids; k is the largest number that fires on a token, at least 1."""
        f = self.activate(pre)
        return top_k(f, max(1, int((f > 0).sum(-1).max())) if f.numel() else 1)

    def encode_sparse(self, x: Float[Tensor, "*token d_model"]) -> Encoded:
        """The active features of each token: strengths and ids, `[*token, k]` each; padded with strength 0."""
        values, ids = self.sparsify(self.pre_activations(x))
        if math.isinf(self.sink_norm):
            return Encoded(values, ids)
        return Encoded(values.masked_fill(self.sinks(x), 0), ids)

    def sinks(self, x: Float[Tensor, "*token d_model"]) -> Bool[Tensor, "*token 1"]:
        """Which tokens are attention sinks."""
        return x.float().norm(dim=-1, keepdim=True) > self.sink_norm

    def encode(self, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token feature"]:
        """Feature activations, 0 where a feature does not fire."""
        f = self.activate(self.pre_activations(x))
        return f if math.isinf(self.sink_norm) else f.masked_fill(self.sinks(x), 0)

    def decode(self, f: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token d_out"]:
        """f W_dec + b_dec."""
        return f @ self.W_dec + self.b_dec

    def decode_sparse(self, code: Encoded) -> Float[Tensor, "*token d_out"]:
        """Σ values · W_dec[ids] + b_dec."""
        return self.combine(code) + self.b_dec

    def combine(self, code: Encoded) -> Float[Tensor, "*token d_out"]:
        """Σ values · W_dec[ids], without the bias."""
        k = code.ids.shape[-1]
        flat = embedding_bag(
            code.ids.reshape(-1, k),
            self.W_dec,
            per_sample_weights=code.values.reshape(-1, k).to(self.W_dec.dtype),
            mode="sum",
        )
        return flat.unflatten(0, code.ids.shape[:-1])

    def rebuild(self, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_out"]:
        """x̂: the decoded code of x, and what a transcoder's skip path adds."""
        rebuilt = self.decode_sparse(self.encode_sparse(x))
        return rebuilt if self.W_skip is None else rebuilt + x @ self.W_skip.T

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Coder:
        """The same dictionary in another dtype or place; it keeps its hash."""
        weights = {name: tensor.to(dtype=dtype, device=device) for name, tensor in self.tensors().items()}
        moved = replace(self, **weights)
        object.__setattr__(moved, "_hash", self.hash)
        return moved


@dataclass(frozen=True, eq=False)
class Standard(Coder):
    """Every positive pre-activation fires (Bricken et al. 2023, "Towards monosemanticity"); trained with an L1 cost."""

    def activate(self, pre: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        """relu(pre)."""
        return pre.relu()


@dataclass(frozen=True, eq=False)
class TopK(Coder):
    """The k largest positive pre-activations fire (Gao et al. 2024, "Scaling and evaluating sparse autoencoders")."""

    k: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.n_features:
            raise BadInput(
                f"dictionary at {self.site} has k = {self.k}; expected 1 to {self.n_features}, its number of features"
            )

    def settings(self) -> dict[str, Any]:
        """k."""
        return {"k": self.k}

    def activate(self, pre: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        """The k largest pre-activations, where positive."""
        values, ids = self.sparsify(pre)
        return torch.zeros_like(pre).scatter(-1, ids, values)

    def sparsify(
        self, pre: Float[Tensor, "*token feature"]
    ) -> tuple[Float[Tensor, "*token k"], Int[Tensor, "*token k"]]:
        """The k largest pre-activations, those below 0 set to 0."""
        values, ids = top_k(pre, self.k)
        return values.relu(), ids


@dataclass(frozen=True, eq=False)
class JumpReLU(Coder):
    """A feature fires with its pre-activation where that is over its own threshold (Rajamanoharan et al. 2024)."""

    threshold: Float[Tensor, " feature"] = field(kw_only=True)

    _weights = (*Coder._weights, "threshold")

    def activate(self, pre: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        """relu(pre) where pre is over the threshold, else 0."""
        return torch.where(pre > self.threshold, pre.relu(), 0)


@dataclass(frozen=True, eq=False)
class BatchTopK(Coder):
    """A feature fires where its pre-activation is over one threshold (Bussmann et al. 2024, "BatchTopK").

    In training the k · batch largest of a whole batch fire; the threshold is their smallest, averaged.
    """

    k: int = field(kw_only=True)
    """Features that fired on a token in training, on average."""
    threshold: float = field(kw_only=True)

    def settings(self) -> dict[str, Any]:
        """k and the threshold."""
        return {"k": self.k, "threshold": self.threshold}

    def activate(self, pre: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        """relu(pre) where pre is over the threshold, else 0."""
        return torch.where(pre > self.threshold, pre.relu(), 0)


@dataclass(frozen=True, eq=False)
class Matryoshka(BatchTopK):
    """BatchTopK whose first features rebuild x on their own (Bussmann et al. 2025, "Matryoshka SAEs")."""

    groups: tuple[int, ...] = field(kw_only=True)
    """Sizes of the nested groups, in the order of the features; they sum to the number of features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(self.groups) != self.n_features or min(self.groups, default=0) < 1:
            raise BadInput(
                f"dictionary at {self.site} has groups {list(self.groups)}; expected sizes over 0 "
                f"that sum to {self.n_features}, its number of features"
            )

    def settings(self) -> dict[str, Any]:
        """k, the threshold and the groups."""
        return {**super().settings(), "groups": list(self.groups)}


@dataclass(frozen=True, eq=False)
class Gated(Coder):
    """One path decides which features fire, another how strongly (Rajamanoharan et al. 2024, "Gated SAEs").

    Both share W_enc; `b_enc` is the gate's bias. With a = (x − b_dec) W_enc: f = relu(a e^r_mag + b_mag)
    where a + b_enc > 0, else 0.
    """

    b_mag: Float[Tensor, " feature"] = field(kw_only=True)
    r_mag: Float[Tensor, " feature"] = field(kw_only=True)

    _weights = (*Coder._weights, "b_mag", "r_mag")

    def activate(self, pre: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        """The magnitude where the gate is open."""
        magnitude = ((pre - self.b_enc) * self.r_mag.exp() + self.b_mag).relu()
        return torch.where(pre > 0, magnitude, 0)
