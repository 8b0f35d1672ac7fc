"""Crosscoders: one sparse code for the activations of two models, with a decoder for each.

    f = activate(Σ_m x_m W_enc[m] + b_enc)        x̂_m = f W_dec[m] + b_dec[m]

A shared feature has decoder rows in both models, an exclusive one in one model only
(Lindsey et al. 2024, "Sparse crosscoders for cross-layer features and model diffing", Transformer Circuits
Thread). A crosscoder is a dictionary of the models' concatenated activations (`Crosscoder.joint`), and is
trained as one, with BatchTopK, as Minder et al. 2025 recommend ("Robustly identifying concepts introduced during
chat fine-tuning using crosscoders", arXiv:2504.02922), because an L1 cost makes shared features look exclusive.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unsleep.base import records, store
from unsleep.core import Activations, ActivationStream, BadInput, Encoded, Site
from unsleep.dictionaries import sparse
from unsleep.dictionaries.architectures.batchtopk import BatchTopK
from unsleep.dictionaries.buffer import streamed
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.train import train
from unsleep.dictionaries.trainer import measure


@dataclass(frozen=True)
class CrosscoderRecord:
    """crosscoder.json: what a `Crosscoder` has beside its weights."""

    SCHEMA: ClassVar = "unsleep.crosscoder/1"

    site: Site
    models: tuple[str, ...]
    k: int
    threshold: float
    scales: tuple[float, ...]
    sink_norms: tuple[float | None, ...]
    metadata: dict[str, Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Crosscoder:
    """A shared code for the activations of several models at one Site; weights in the activations' own scales."""

    site: Site
    models: tuple[str, ...]
    """Fingerprints of the models, in the order of the first axis of the weights."""
    W_enc: Float[Tensor, "model d_model feature"]
    b_enc: Float[Tensor, " feature"]
    W_dec: Float[Tensor, "model feature d_model"]
    b_dec: Float[Tensor, "model d_model"]
    k: int
    """Mean number of active features per token in training."""
    threshold: float
    """A feature is active with its pre-activation above this; 0 for one trained with an L1 cost."""
    scales: tuple[float, ...] = (1.0, 1.0)
    """Normalisation factors of each model's activations; decoder rows are compared on that scale."""
    sink_norms: tuple[float, ...] = (math.inf, math.inf)
    """Per model, the norm above which a token is an attention sink: no feature is active there."""
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.W_enc.ndim != 3 or len(self.models) != len(self.W_enc):
            raise BadInput(
                f"crosscoder at {self.site}: W_enc has shape {list(self.W_enc.shape)} for {len(self.models)} models; "
                "expected [model, d_model, feature]"
            )
        m, d, f = self.W_enc.shape
        shapes = {"b_enc": (f,), "W_dec": (m, f, d), "b_dec": (m, d)}
        store.check_shapes(self.tensors(), shapes, f"crosscoder at {self.site}")
        for name in ("scales", "sink_norms"):
            values = getattr(self, name)
            if len(values) != m or not all(v > 0 for v in values):
                raise BadInput(f"crosscoder at {self.site}: {name} is {values}; expected {m} numbers over 0")
        _ = self.joint  # validates finite weights

    @property
    def d_model(self) -> int:
        """Width of each model's activation."""
        return self.W_enc.shape[1]

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.W_enc.shape[2]

    @property
    def hash(self) -> str:
        """Content hash of weights, settings, models and Site."""
        return store.hash_value([self.joint.hash, self.models, self.scales, self.sink_norms])

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name."""
        return {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Crosscoder:
        """The same crosscoder with another dtype or on another device."""
        return replace(self, **{name: x.to(dtype=dtype, device=device) for name, x in self.tensors().items()})

    @cached_property
    def joint(self) -> BatchTopK:
        """The crosscoder as a dictionary of concatenated activations, `[token, model · d_model]` (see `joined`).

        It ignores attention sinks.
        """
        return self._view(self.W_dec.transpose(0, 1).flatten(1).contiguous(), self.b_dec.flatten(), None)

    def of(self, model: int) -> BatchTopK:
        """The crosscoder as a transcoder from all models' concatenated activations to those of one."""
        return self._each[model]

    @cached_property
    def _each(self) -> list[BatchTopK]:
        return [self._view(w_dec, b_dec, self.site) for w_dec, b_dec in zip(self.W_dec, self.b_dec, strict=True)]

    def _view(
        self, w_dec: Float[Tensor, "feature d_out"], b_dec: Float[Tensor, " d_out"], target: Site | None
    ) -> BatchTopK:
        return BatchTopK(
            site=self.site,
            model=" | ".join(self.models),
            W_enc=self.W_enc.flatten(0, 1),
            b_enc=self.b_enc,
            W_dec=w_dec,
            b_dec=b_dec,
            k=self.k,
            threshold=self.threshold,
            subtract_bias=False,
            target=target,
        )

    def contribution(self, x: Float[Tensor, "*token d_model"], model: int) -> Float[Tensor, "*token feature"]:
        """One model's contribution to the pre-activations: x W_enc[model]."""
        return x @ self.W_enc[model]

    def encode(self, *x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token feature"]:
        """Feature activations from every model's activations of the same tokens, in the order of `models`."""
        beside = self._beside(x)
        return self.joint.encode(beside).masked_fill(self._sinks(x), 0)

    def encode_sparse(self, *x: Float[Tensor, "*token d_model"]) -> Encoded:
        """The active features of each token: strengths and indices, padded with strength 0."""
        code = self.joint.encode_sparse(self._beside(x))
        return Encoded(code.values.masked_fill(self._sinks(x), 0), code.ids)

    def decode(self, f: Float[Tensor, "*token feature"], model: int) -> Float[Tensor, "*token d_model"]:
        """Reconstructed activations of one model."""
        return f @ self.W_dec[model] + self.b_dec[model]

    def decode_sparse(self, code: Encoded, model: int) -> Float[Tensor, "*token d_model"]:
        """`decode` of a sparse code."""
        return self.of(model).decode_sparse(code)

    def _beside(self, x: tuple[Tensor, ...]) -> Float[Tensor, "*token model_and_d"]:
        if len(x) != len(self.models) or any(each.shape != x[0].shape for each in x):
            raise BadInput(
                f"a crosscoder of {len(self.models)} models is given activations of shapes "
                f"{[list(each.shape) for each in x]}; expected the same tokens of each model"
            )
        return torch.cat([each.to(self.W_enc) for each in x], dim=-1)

    def _sinks(self, x: tuple[Tensor, ...]) -> Tensor:
        norms = [each.to(self.W_enc.device).float().norm(dim=-1, keepdim=True) for each in x]
        return torch.stack([norm > limit for norm, limit in zip(norms, self.sink_norms, strict=True)]).any(0)


def joined(
    first: Activations | ActivationStream, second: Activations | ActivationStream, scales: tuple[float, float] = (1, 1)
) -> ActivationStream:
    """Two models' activations of the same tokens, concatenated to `[token, 2 · d_model]` in float32, each scaled.

    Raises `BadInput` for activations of different tokens or Sites (see `pairs.paired`).
    """
    a, b = streamed(first), streamed(second)
    if (a.site, a.prompts, a.sizes) != (b.site, b.prompts, b.sizes):
        raise BadInput(
            f"the first model has {a.tokens} tokens at {a.site} of prompts {a.prompts}, the second {b.tokens} at "
            f"{b.site} of {b.prompts}; expected the same tokens at the same Site, in the same pieces"
        )

    def piece(i: int) -> Float[Tensor, "token d_and_d"]:
        return torch.cat([s.piece(i).float() * scale for s, scale in zip((a, b), scales, strict=True)], dim=1)

    return ActivationStream(a.sizes, piece, a.site, f"{a.model} | {b.model}", a.prompts)


def train_crosscoder(
    first: Activations | ActivationStream,
    second: Activations | ActivationStream,
    config: TrainConfig = TrainConfig(architecture="batchtopk"),
    *,
    checkpoint: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Crosscoder:
    """Train a crosscoder on two models' activations of the same tokens.

    Each model's activations are normalised on their own scale (`config.normalize`), so that both have equal
    weight; a BatchTopK dictionary is trained on their concatenation, and the scales are folded into its weights.

    Args:
        first, second: such as the two sides of `pairs.paired`; the same tokens in the same order.
        checkpoint: a folder; an interrupted run with the same activations and config resumes from it.

    Raises:
        BadInput: activations of different tokens or widths, constant ones, or an architecture other
            than `batchtopk`.
    """
    if config.architecture != BatchTopK.name():
        raise BadInput(f"training architecture is {config.architecture!r}; expected 'batchtopk' for a crosscoder")
    samples = [s.sample() for s in (streamed(first), streamed(second))]
    if samples[0].shape[1] != samples[1].shape[1]:
        raise BadInput(
            f"the models' activations have widths {samples[0].shape[1]} and {samples[1].shape[1]}; expected the same"
        )
    names = ("the first model's activations", "the second model's activations")
    sizes = [measure(sample, config, name) for sample, name in zip(samples, names, strict=True)]
    scales = (sizes[0].scale, sizes[1].scale)
    beside = joined(first, second, scales)
    own = replace(config, normalize="none")
    trained = train(beside, own, checkpoint=checkpoint, device=device)
    assert isinstance(trained, BatchTopK)
    scale = torch.tensor(scales)[:, None, None]
    w_enc, w_dec = trained.W_enc.unflatten(0, (2, -1)), trained.W_dec.unflatten(1, (2, -1)).transpose(0, 1)
    return Crosscoder(
        site=beside.site,
        models=(first.model, second.model),
        W_enc=w_enc * scale,
        b_enc=trained.b_enc - trained.b_dec @ trained.W_enc,  # training subtracts b_dec from the input
        W_dec=w_dec / scale,
        b_dec=trained.b_dec.unflatten(0, (2, -1)) / scale[:, 0],
        k=trained.k,
        threshold=trained.threshold,
        scales=scales,
        sink_norms=(config.sink_ratio * sizes[0].median_norm, config.sink_ratio * sizes[1].median_norm),
        metadata={**trained.metadata, "training": asdict(config)},
    )


def for_crosscoder(config: TrainConfig) -> TrainConfig:
    """The config of a dictionary as one of a crosscoder: with BatchTopK as its architecture."""
    return replace(config, architecture=BatchTopK.name())


def decoder_norm_ratio(crosscoder: Crosscoder) -> Float[Tensor, " feature"]:
    """‖W_dec[1]‖ / (‖W_dec[0]‖ + ‖W_dec[1]‖) of every feature, on the normalised scale; NaN where both are 0.

    The relative decoder norm of Lindsey et al. 2024: about 0 for features of the first model only, ½ for shared
    ones, 1 for those of the second only. A shared feature can look exclusive; see `latent_scaling`.
    Raises `BadInput` unless there are two models.
    """
    norms = _normalised_rows(crosscoder).norm(dim=-1)
    return norms[1] / norms.sum(0)


class LatentScaling(NamedTuple):
    """Latent scaling coefficients of every feature in both models. NaN for features that are never active."""

    error: Float[Tensor, "model feature"]
    """β against the residual without the feature, x − Σ_{i≠j} f_i W_dec_i − b_dec."""
    reconstruction: Float[Tensor, "model feature"]
    """β against the full reconstruction, x̂ − b_dec."""
    of: int
    """Index of the model whose decoder rows are scaled."""
    fired: Int[Tensor, " feature"]
    """Number of tokens on which each feature is active."""

    @property
    def error_ratio(self) -> Float[Tensor, " feature"]:
        """ν^ε = β of the other model / β of its own, by `error`.

        Near 0: exclusive. Near 1: shared, with a decoder row shrunk by training.
        """
        return self.error[1 - self.of] / self.error[self.of]

    @property
    def reconstruction_ratio(self) -> Float[Tensor, " feature"]:
        """ν^r: as `error_ratio`, by `reconstruction`.

        Near 0: exclusive. Near 1: other features reconstruct the same in the other model.
        """
        return self.reconstruction[1 - self.of] / self.reconstruction[self.of]


@torch.no_grad()
def latent_scaling(
    crosscoder: Crosscoder,
    first: Activations | ActivationStream,
    second: Activations | ActivationStream,
    *,
    of: int = 1,
    batch: int = 4096,
) -> LatentScaling:
    """Latent scaling: test whether features are exclusive to a model, by least squares over all tokens, in float64.

    For feature j with decoder row d_j of model `of`, and a target y_m of each model m, in closed form:

        β_j = argmin Σ ‖β f_j d_j − y_m‖² = Σ f_j ⟨d_j, y_m⟩ / (‖d_j‖² Σ f_j²)

    Minder et al. 2025 (arXiv:2504.02922), section 3.2, on the normalised scale; reconstructions exclude b_dec, because
    a mean along d_j carries no information on the feature.

    Args:
        first, second: activations of the same tokens, preferably not trained on.
        of: 0 for features of the first model, 1 for those of the second.
        batch: tokens encoded at a time.

    Raises `BadInput` for activations of different tokens, and unless there are two models.
    """
    if of not in (0, 1):
        raise BadInput(f"of is {of}; expected 0 for the first model or 1 for the second")
    crosscoder = crosscoder.to(crosscoder.W_enc.dtype)
    rows = _normalised_rows(crosscoder)
    scale = torch.tensor(crosscoder.scales, dtype=torch.float64)
    bias = crosscoder.b_dec.double() * scale[:, None]
    square = torch.zeros(crosscoder.n_features, dtype=torch.float64)
    fired = torch.zeros(crosscoder.n_features, dtype=torch.long)
    along = torch.zeros(2, 2, crosscoder.n_features, dtype=torch.float64)
    """Σ f_j ⟨d_j, y⟩ for the error of all features and for their reconstruction, per model."""
    beside = joined(first, second)
    for i in range(len(beside.sizes)):
        for x in beside.piece(i).split(batch):
            parts = x.unflatten(1, (2, -1))
            found = crosscoder.encode(parts[:, 0], parts[:, 1])
            code = sparse.code_where(found, found > 0)
            code = code._replace(values=code.values.double())
            square.index_add_(0, code.ids, code.values.square())
            fired += torch.bincount(code.ids, minlength=len(fired))
            for m in (0, 1):
                rebuilt = sparse.combine(code, rows[m])
                left = parts[:, m].double() * scale[m] - rebuilt - bias[m]
                for target, y in enumerate((left, rebuilt)):
                    dots = sparse.row_dots(y, rows[of], code)
                    along[target, m].index_add_(0, code.ids, code.values * dots)
    length = rows[of].square().sum(1) * square
    back = (rows[of] * rows).sum(2)  # add the feature's own part back to the error
    return LatentScaling((along[0] + back * square) / length, along[1] / length, of, fired)


def _normalised_rows(crosscoder: Crosscoder) -> Float[Tensor, "2 feature d_model"]:
    """Decoder rows on the normalised scale, in float64."""
    if len(crosscoder.models) != 2:
        raise BadInput(f"the crosscoder is of {len(crosscoder.models)} models; expected 2")
    return crosscoder.W_dec.double() * torch.tensor(crosscoder.scales, dtype=torch.float64)[:, None, None]


def save_crosscoder(crosscoder: Crosscoder, folder: str | Path, *, replace: bool = False) -> Path:
    """Write crosscoder.json and crosscoder.safetensors into a folder, atomically."""
    c, sinks = crosscoder, tuple(None if math.isinf(n) else n for n in crosscoder.sink_norms)
    record = CrosscoderRecord(c.site, c.models, c.k, c.threshold, c.scales, sinks, c.metadata)
    with store.new_folder(folder, replace=replace) as scratch:
        records.save(record, scratch / "crosscoder.json")
        store.write_tensors(scratch / "crosscoder.safetensors", crosscoder.tensors())
    return Path(folder)


def load_crosscoder(folder: str | Path) -> Crosscoder:
    """Load a crosscoder saved by `save_crosscoder`.

    Raises `BadInput` naming the file, the key and the expected shape for anything invalid.
    """
    path = Path(folder) / "crosscoder.json"
    record = records.load(CrosscoderRecord, path)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    ranks = {"W_enc": 3, "b_enc": 1, "W_dec": 3, "b_dec": 2}
    tensors = store.read_tensors(path.with_suffix(".safetensors"), {name: (None,) * ranks[name] for name in names})
    with store.reading(path):
        sinks = tuple(math.inf if n is None else n for n in record.sink_norms)
        parts: dict[str, Any] = {**vars(record), "sink_norms": sinks, **{name: tensors[name] for name in names}}
        return Crosscoder(**parts)
