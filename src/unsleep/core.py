"""Core types of unsleep: small frozen values, validated on construction.

    model + prompts -> activations -> dictionary -> features -> edit -> evaluation -> report

Nothing here touches a disk, a model or a random generator.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Point = Literal["embed", "attn", "mlp", "resid"]
"""Hook point within a block: embedding, attention output, MLP output or residual stream after the block."""


class BadInput(ValueError):
    """Invalid input from the caller; the command line exits with 2.

    Where one field is at fault, the error holds its name, its value and what was expected (see `of`), so that callers
    can report it under another name.
    """

    field: str = ""
    """Name of the invalid field; empty where no single field is at fault."""
    value: object = None
    expected: str = ""

    @classmethod
    def of(cls, field: str, value: object, expected: str, what: str = "") -> BadInput:
        """The error for a field of `what` (an object or a command).

        Examples:
            >>> BadInput.of("top", 0, "at least 1", "diff")
            BadInput('diff top is 0; expected at least 1')
        """
        made = cls()
        made.field, made.value, made.expected = field, value, expected
        made.args = (made.under(f"{what} {field}".strip()),)
        return made

    def under(self, name: str) -> str:
        """The message with the field under another name."""
        shown = repr(self.value)
        verb = "are" if isinstance(self.value, tuple) else "is"
        return f"{name} {verb} {shown if len(shown) <= 60 else shown[:60] + '…'}; expected {self.expected}"


def check_least(settings: object, what: str, least: int, *names: str) -> None:
    """Raise `BadInput` for the first of these fields that is below `least`; unset fields (`None`) pass."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise BadInput.of(name, value, f"at least {least}", what)


def check_choices(settings: object, what: str, **kinds: Any) -> None:
    """Raise `BadInput` for the first of these fields whose value is not among its Literal's choices."""
    for name, kind in kinds.items():
        if getattr(settings, name) not in get_args(kind):
            raise BadInput.of(name, getattr(settings, name), f"one of {', '.join(get_args(kind))}", what)


class Refused(RuntimeError):
    """The computation ran but its result must not be trusted; the command line exits with 3."""


@dataclass(frozen=True, order=True)
class Site:
    """A hook point of a model: layer (from 0) and point within the layer.

    `resid` is the residual stream after the block, `attn` and `mlp` are what the two sublayers add to it (after the
    post-norm where the family has one), `embed` is the input of layer 0.

    Examples:
        >>> Site.parse("mlp.12")
        Site(layer=12, point='mlp')
    """

    layer: int
    point: Point = "resid"

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise BadInput(f"Site layer is {self.layer}; layers count from 0")
        if self.point not in get_args(Point):
            raise BadInput(f"Site point is {self.point!r}; expected one of {get_args(Point)}")
        if self.point == "embed" and self.layer != 0:
            raise BadInput(f"Site 'embed' is the input of layer 0, not of layer {self.layer}")

    def __str__(self) -> str:
        return f"{self.point}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Parse `resid.12`, `mlp.3`, `attn.0`, `embed` or a bare layer number, which means its `resid`."""
        point, dot, layer = text.strip().rpartition(".")
        if text.strip() == "embed":
            point, layer = "embed", "0"
        elif not dot:
            point = "resid"
        if point not in get_args(Point) or not _is_layer(layer):
            raise BadInput(f"Site {text[:40]!r} is unknown; expected resid.12, mlp.3, attn.0 or embed")
        return cls(int(layer), cast("Point", point))

    @property
    def hook_name(self) -> str:
        """The TransformerLens hook name of this Site, as SAELens stores it."""
        if self.point == "embed":
            return "hook_embed"
        tail = {"resid": "hook_resid_post", "mlp": "hook_mlp_out", "attn": "hook_attn_out"}
        return f"blocks.{self.layer}.{tail[self.point]}"

    @classmethod
    def from_hook_name(cls, name: str) -> Site:
        """The Site of a TransformerLens hook name; raises `BadInput` for hook points that unsleep does not support."""
        if name == "hook_embed":
            return cls(0, "embed")
        heads: dict[str, Point] = {"hook_resid_post": "resid", "hook_mlp_out": "mlp", "hook_attn_out": "attn"}
        parts = name.split(".")
        if len(parts) != 3 or parts[0] != "blocks" or not _is_layer(parts[1]) or parts[2] not in heads:
            raise BadInput(f"hook name {name[:60]!r} is not a residual, MLP or attention output of a layer")
        return cls(int(parts[1]), heads[parts[2]])


def _is_layer(text: str) -> bool:
    """True for a layer number; at most six digits."""
    return text.isdecimal() and len(text) <= 6


def digest(data: str | bytes) -> str:
    """The first 16 hex digits of SHA-256: the length of every content hash in unsleep."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


@dataclass(frozen=True)
class Activations:
    """Activations at one Site, one row per token, without padding."""

    tensor: Float[Tensor, "token d_model"]
    prompt_index: Int[Tensor, " token"]
    """Index into the PromptSet of the prompt that each row comes from."""
    site: Site
    model: str
    """Fingerprint of the model (see `models.fingerprint`)."""
    prompts: str
    """Hash of the PromptSet."""

    def __post_init__(self) -> None:
        if self.tensor.ndim != 2 or len(self.tensor) != len(self.prompt_index):
            raise BadInput(
                f"activations at {self.site} have shape {tuple(self.tensor.shape)} with "
                f"{len(self.prompt_index)} prompt indices; expected [token, d_model] and one index per token"
            )


@dataclass(frozen=True)
class ActivationStream:
    """Activations of one Site as shards that are read one at a time and need not fit into memory together."""

    sizes: tuple[int, ...]
    """Tokens in each shard."""
    piece: Callable[[int], Float[Tensor, "token d_model"]]
    """Reads the piece of that number."""
    site: Site
    model: str
    """Fingerprint of the model."""
    prompts: str
    """Content hash of the harvested prompts or text."""

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(self.sizes)

    def sample(self, size: int = 16_384) -> Float[Tensor, "token d_model"]:
        """About `size` tokens, spread evenly over the shards."""
        stride = max(1, self.tokens // size)
        return torch.cat([self.piece(i)[::stride] for i in range(len(self.sizes))])


class Encoded(NamedTuple):
    """A sparse code: the active features of each token and how strongly they fire."""

    values: Float[Tensor, "*token k"]
    """Activations, at least 0; 0 where a token has fewer than k active features."""
    ids: Int[Tensor, "*token k"]
    """Feature indices; meaningless where the value is 0."""


class Dictionary(ABC):
    """A trained sparse autoencoder at one Site; base class of every architecture."""

    site: Site
    """The Site whose activations it was trained on."""
    model: str
    """Fingerprint of the model whose activations it was trained on."""

    @property
    @abstractmethod
    def d_model(self) -> int:
        """Width of the residual stream."""

    @property
    @abstractmethod
    def n_features(self) -> int:
        """Number of features."""

    @property
    @abstractmethod
    def decoder(self) -> Float[Tensor, "feature d_model"]:
        """Decoder directions, one row per feature, with any normalisation folded in."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token feature"]:
        """Feature activations; 0 where a feature is inactive."""

    @abstractmethod
    def encode_sparse(self, x: Float[Tensor, "*token d_model"]) -> Encoded:
        """The active features of each token."""

    @torch.no_grad()
    def encode_in_pieces(self, x: Float[Tensor, "token d_model"], size: int = 4096) -> Iterator[tuple[slice, Encoded]]:
        """The sparse codes of any number of tokens, `size` at a time, in float32 on the CPU; each with its place."""
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            code = self.encode_sparse(x[part].to(self.decoder))
            yield part, Encoded(code.values.float().cpu(), code.ids.cpu())

    @abstractmethod
    def decode(self, f: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token d_model"]:
        """Reconstructed activations."""

    @abstractmethod
    def decode_sparse(self, code: Encoded) -> Float[Tensor, "*token d_model"]:
        """`decode` of a sparse code."""

    @abstractmethod
    def combine(self, code: Encoded) -> Float[Tensor, "*token d_model"]:
        """Σ values · decoder rows, without the bias."""

    @abstractmethod
    def sinks(self, x: Float[Tensor, "*token d_model"]) -> Bool[Tensor, "*token 1"]:
        """Mask of attention sinks: tokens that it was not trained on, at which no feature is active."""

    @abstractmethod
    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Dictionary:
        """The same dictionary with another dtype or on another device."""

    @property
    @abstractmethod
    def hash(self) -> str:
        """Content hash of weights and Site."""


@dataclass(frozen=True)
class FeatureEvidence:
    """Evidence for a feature's place on a list, for display.

    Token contexts are `(token texts, activations)` pairs of equal length.
    """

    contexts: tuple[tuple[tuple[str, ...], tuple[float, ...]], ...]
    """Contexts of its highest activations."""
    promotes: tuple[str, ...]
    """Tokens whose logits its decoder row raises most (logit lens, nostalgebraist 2020)."""
    suppresses: tuple[str, ...]
    """Tokens whose logits it lowers most."""
    suspicious_rate: float
    """Share of suspicious prompts in which it is active at least once."""
    trusted_rate: float
    """Share of tokens of trusted text on which it is active."""


@dataclass(frozen=True)
class Features:
    """Features of one dictionary, best first, with scores and optionally the evidence."""

    site: Site
    dictionary: str
    """Hash of the dictionary that the indices refer to."""
    ids: tuple[int, ...]
    scores: tuple[float, ...]
    method: str
    """Definition of the score: `difference`, `attribution` or `ablation`."""
    evidence: dict[int, FeatureEvidence] = field(default_factory=dict[int, FeatureEvidence])

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.scores):
            raise BadInput(f"{len(self.ids)} feature ids with {len(self.scores)} scores; expected one score each")
        if len(set(self.ids)) != len(self.ids):
            raise BadInput(f"features at {self.site} contain an id twice; expected distinct ids")

    def head(self, n: int) -> Features:
        """The first `n` features."""
        kept = self.ids[:n]
        evidence = {i: self.evidence[i] for i in kept if i in self.evidence}
        return Features(self.site, self.dictionary, kept, self.scores[:n], self.method, evidence)


def check_classes(labels: Bool[Tensor, " token"]) -> None:
    """Raise `BadInput` for labels of a single class."""
    count = int(labels.sum())
    if not 0 < count < len(labels):
        raise BadInput(f"{count} of {len(labels)} labels are positive; expected tokens of both classes")


def check_finite(x: Tensor, what: str) -> None:
    """Raise `BadInput` where `x` contains NaN or infinity."""
    total = x.sum(dtype=torch.promote_types(x.dtype, torch.float32))  # one pass; NaN and infinity propagate
    if not bool(torch.isfinite(total)) and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise BadInput(f"{what} has {bad} NaN or infinite values of {x.numel()}; expected finite values")
