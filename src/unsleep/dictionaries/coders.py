"""Base class of dictionaries: encoding and decoding, and an architecture's hooks for training and files.

    pre = (x − b_dec) W_enc + b_enc        f = activate(pre)        x̂ = f W_dec + b_dec [+ x W_skip]

An architecture is a subclass in a file of `architectures/` with its own `activate` and `gradients`; it overrides
the rest where it differs. A transcoder is any of them with a `target`: it reads one Site and reconstructs another
(Dunefsky et al. 2024, arXiv:2406.11944; with a skip connection, Paulo et al. 2025, arXiv:2501.18823).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import linear

from unsleep.base import store
from unsleep.core import BadInput, Dictionary, Encoded, Site, check_finite
from unsleep.dictionaries.layouts import Learned, SAELens
from unsleep.dictionaries.losses import Batch, Pass, Weights
from unsleep.dictionaries.settings import Settings
from unsleep.dictionaries.sparse import top_k, weighted_rows


@dataclass(frozen=True, eq=False)
class Coder(Dictionary):
    """Base class of all architectures. Weights have SAELens' names and layout."""

    site: Site
    model: str
    """Fingerprint of the model whose activations it was trained on."""
    W_enc: Float[Tensor, "d_model feature"]
    b_enc: Float[Tensor, " feature"]
    W_dec: Float[Tensor, "feature d_out"]
    b_dec: Float[Tensor, " d_out"]
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    """Unrecognised metadata of its file, kept on a round trip."""
    sink_norm: float = math.inf
    """Norm above which a token is an attention sink, excluded from training: no feature is active there."""
    subtract_bias: bool = True
    """Subtract b_dec from the input before encoding; never in a transcoder."""
    target: Site | None = None
    """The Site that a transcoder reconstructs; `None` for an autoencoder."""
    W_skip: Float[Tensor, "d_out d_model"] | None = None
    """Linear skip connection of a transcoder."""

    kinds: ClassVar[dict[str, Any]] = {}
    """Setting fields and their JSON types (see `store.fields_of`)."""
    has_k: ClassVar[bool] = False
    """True if k controls the sparsity, by strength, with unit decoder rows; otherwise `sparsity` does."""
    takes_skip: ClassVar[bool] = True
    """True if a transcoder may have a skip connection."""
    training: ClassVar[type[Settings]] = Settings
    """Its part of `TrainConfig`."""
    in_saelens: ClassVar[SAELens]
    in_dictionary_learning: ClassVar[tuple[Learned, ...]] = ()
    """Its classes in dictionary_learning, distinguished by `subtracts` and by the names of the tensors."""
    in_sparsify: ClassVar[str | None] = None
    """Name of its activation in sparsify, for an architecture with k."""

    def __init_subclass__(cls, **more: Any) -> None:
        """Mark layouts inherited from another architecture as borrowed, so that its files still load as its own."""
        super().__init_subclass__(**more)
        if "in_saelens" not in vars(cls) and hasattr(cls, "in_saelens"):
            cls.in_saelens = cls.in_saelens._replace(borrowed=True)
        if "in_dictionary_learning" not in vars(cls):
            cls.in_dictionary_learning = tuple(each._replace(borrowed=True) for each in cls.in_dictionary_learning)

    def __post_init__(self) -> None:
        d, f = self.W_enc.shape
        out = self.W_dec.shape[-1] if self.target else d
        shapes = {"W_enc": (d, f), "W_dec": (f, out), "b_dec": (out,), "W_skip": (out, d)}
        weights, where = self.tensors(), f"dictionary at {self.site}"
        store.check_shapes(weights, {name: shapes.get(name, (f,)) for name in weights}, where)
        for name, tensor in weights.items():
            check_finite(tensor, f"{where}: {name}")
        if self.target is not None and self.subtract_bias:
            raise BadInput(f"a transcoder at {self.site} takes b_dec off its input; expected subtract_bias=False")

    @classmethod
    def name(cls) -> str:
        """The architecture's name."""
        return cls.__name__.lower()

    @property
    def d_model(self) -> int:
        """Width of the input activation."""
        return self.W_enc.shape[0]

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    @property
    def decoder(self) -> Float[Tensor, "feature d_out"]:
        """Decoder directions, one row per feature."""
        return self.W_dec

    @property
    def hash(self) -> str:
        """Content hash of weights, settings and Site, as trained or loaded."""
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
    """Weight fields; those beyond these four have one entry per feature."""

    def settings(self) -> dict[str, Any]:
        """Settings that determine the code besides the weights."""
        values = {name: getattr(self, name) for name in self.kinds}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @cached_property
    def _encoder_rows(self) -> Float[Tensor, "feature d_model"]:
        return self.W_enc.T.contiguous()

    @cached_property
    def _encoder_bias(self) -> Float[Tensor, " feature"]:
        """b_enc − b_dec W_enc: the bias that makes the subtraction unnecessary."""
        if not self.subtract_bias:
            return self.b_enc
        return (self.b_enc.float() - self.b_dec.float() @ self.W_enc.float()).to(self.W_enc.dtype)

    def pre_activations(self, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token feature"]:
        """(x − b_dec) W_enc + b_enc."""
        return linear(x, self._encoder_rows, self._encoder_bias)

    def activate(self, pre: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        """Feature activations from pre-activations; defines the architecture."""
        raise NotImplementedError

    def sparsify(
        self, pre: Float[Tensor, "*token feature"]
    ) -> tuple[Float[Tensor, "*token k"], Int[Tensor, "*token k"]]:
        """`activate` as strengths and indices; k is the largest number of active features on a token, at least 1."""
        f = self.activate(pre)
        return top_k(f, max(1, int((f > 0).sum(-1).max())) if f.numel() else 1)

    def encode_sparse(self, x: Float[Tensor, "*token d_model"]) -> Encoded:
        """The active features of each token: strengths and indices, `[*token, k]` each; padded with strength 0."""
        values, ids = self.sparsify(self.pre_activations(x))
        if math.isinf(self.sink_norm):
            return Encoded(values, ids)
        return Encoded(values.masked_fill(self.sinks(x), 0), ids)

    def sinks(self, x: Float[Tensor, "*token d_model"]) -> Bool[Tensor, "*token 1"]:
        """Mask of attention sinks: tokens whose norm is over `sink_norm`."""
        return x.float().norm(dim=-1, keepdim=True) > self.sink_norm

    def encode(self, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token feature"]:
        """Feature activations; 0 where a feature is inactive."""
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
        flat = weighted_rows(self.W_dec, code.ids.reshape(-1, k), code.values.reshape(-1, k).to(self.W_dec.dtype))
        return flat.unflatten(0, code.ids.shape[:-1])

    def rebuild(self, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_out"]:
        """The reconstruction x̂, including a transcoder's skip connection."""
        rebuilt = self.decode_sparse(self.encode_sparse(x))
        return rebuilt if self.W_skip is None else rebuilt + x @ self.W_skip.T

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Coder:
        """The same dictionary with another dtype or device; its hash is unchanged."""
        weights = {name: tensor.to(dtype=dtype, device=device) for name, tensor in self.tensors().items()}
        moved = replace(self, **weights)
        object.__setattr__(moved, "_hash", self.hash)
        return moved

    def with_bias(self, *, subtracted: bool) -> Coder:
        """An equivalent dictionary with or without subtraction of b_dec from the input, compensated in b_enc."""
        if self.subtract_bias == subtracted:
            return self
        shift = self.b_dec.double() @ self.W_enc.double() * (1 if subtracted else -1)
        return replace(self, subtract_bias=subtracted, **self.biased(shift))

    def biased(self, shift: Float[Tensor, " feature"]) -> dict[str, Any]:
        """The biases after adding `shift` to b_enc's, to compensate for (x − b_dec) W_enc decreasing by it."""
        return {"b_enc": (self.b_enc.double() + shift).to(self.b_enc.dtype)}

    # training; `config` is a `TrainConfig`, of which an architecture sees `training`

    @classmethod
    def gradients(cls, w: Weights, batch: Batch, config: Any, step: int) -> Pass:
        """Forward and backward pass of a step: squared error plus the architecture's sparsity cost."""
        raise NotImplementedError

    @classmethod
    def initial(cls, config: Any, zeros: Float[Tensor, " feature"]) -> dict[str, Tensor]:
        """Initial values of `Weights.own`."""
        return {}

    @classmethod
    def follow(cls, threshold: Float[Tensor, ""], found: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Update of the running threshold after a step with `Pass.threshold`."""
        return threshold

    @classmethod
    def trained(cls, w: Weights, config: Any, stretch: Float[Tensor, " feature"], level: float) -> dict[str, Any]:
        """The architecture's own fields after training.

        `stretch` is the factor from trained strengths to the activations' own scale, `level` the running
        threshold on that scale.
        """
        return {}

    # warm start

    @property
    def level(self) -> float:
        """Initial running threshold of a warm start."""
        return 0.0

    def fitting(self) -> dict[str, Any]:
        """Fields of a `TrainConfig` determined by its own settings, besides k."""
        return {}

    def check_start(self, config: Any) -> None:
        """Raise `BadInput` where `config` does not fit its own settings."""

    def own_weights(
        self, like: Tensor, stretch: Float[Tensor, " feature"], shift: Float[Tensor, " feature"]
    ) -> dict[str, Tensor]:
        """`Weights.own` of this dictionary, in the dtype and on the device of `like`: the inverse of `trained`.

        `shift` was added to b_enc because training subtracts b_dec from the input.
        """
        return {}

    # SAELens files

    @classmethod
    def of_saelens(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with further settings of a config folded in."""
        return tensors

    def to_saelens(self) -> dict[str, Any]:
        """Its keys of the config."""
        return {}

    @classmethod
    def restored(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """Own fields and weights from a file under another architecture's name, with unsleep's `settings`.

        `None` where the file has been changed and now is of that architecture.
        """
        return {**tensors, **settings}

    def saved(self) -> dict[str, Tensor]:
        """The weights for such a file."""
        return self.tensors()
