"""Coordinate systems for nodes: SAE features with their reconstruction error, MLP neurons, or whole activations.

A space writes an activation as x = Σ_j f_j d_j + rest. Its nodes are the f_j and, where it has an error, the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.core import Site
from unsleep.dictionaries.coders import Coder
from unsleep.models.sites import Place, Slot

Tokens = Float[Tensor, "token width"]

ERROR = -1
"""Feature id of the error node: the reconstruction error."""


class Space(ABC):
    """Coordinates of the activations at one place."""

    has_error: bool
    """True if features leave a reconstruction error."""

    @property
    @abstractmethod
    def place(self) -> Place:
        """Site or Slot of the activation."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of features."""

    @property
    def hash(self) -> str:
        """Identity of its coordinates."""
        return f"{type(self).__name__} {self.place} {self.size}"

    @abstractmethod
    def encode(self, x: Tokens) -> Float[Tensor, "token feature"]:
        """f, in float32."""

    @abstractmethod
    def combine(self, f: Float[Tensor, "token feature"], ids: Sequence[int] | None = None) -> Tokens:
        """Σ_j f_j d_j, over some features where `ids` names the columns of f."""

    @abstractmethod
    def read(self, g: Tokens) -> Float[Tensor, "token feature"]:
        """g · d_j: how a gradient with respect to the activation falls on each feature."""

    def rest(self, x: Tokens) -> Tokens:
        """x less its features, in float32: the reconstruction error of a dictionary, decoder bias included."""
        return x.float() - self.combine(self.encode(x))


@dataclass(frozen=True, eq=False)
class FeatureSpace(Space):
    """Features of a dictionary, and its reconstruction error; edges run between such spaces."""

    coder: Coder

    @property
    def place(self) -> Site:
        """Site of the dictionary."""
        return self.coder.site

    @property
    def size(self) -> int:
        """Number of features."""
        return self.coder.n_features

    has_error = True

    @property
    def hash(self) -> str:
        """Hash of the dictionary."""
        return self.coder.hash

    def encode(self, x: Tokens) -> Float[Tensor, "token feature"]:
        """Feature activations."""
        return self.coder.encode(x.to(self.coder.W_enc.dtype)).float()

    def combine(self, f: Float[Tensor, "token feature"], ids: Sequence[int] | None = None) -> Tokens:
        """f W_dec."""
        decoder = self.coder.decoder if ids is None else self.coder.decoder[list(ids)]
        return (f.to(decoder.dtype) @ decoder).float()

    def read(self, g: Tokens) -> Float[Tensor, "token feature"]:
        """g W_decᵀ."""
        return (g.to(self.coder.decoder.dtype) @ self.coder.decoder.T).float()

    def slopes(self, x: Tokens) -> Float[Tensor, "token feature"]:
        """∂f_j / ∂pre_j, the derivative of the activation function: 0 where a feature does not fire.

        The set of features that fire is held.
        """
        coder = self.coder
        with torch.enable_grad():
            pre = coder.pre_activations(x.to(coder.W_enc.dtype)).detach().requires_grad_()
            (slope,) = torch.autograd.grad(coder.activate(pre).sum(), pre)
        return slope.float().masked_fill(coder.sinks(x), 0)

    def back(self, g: Float[Tensor, "token feature"]) -> Tokens:
        """g W_encᵀ: a gradient with respect to pre-activations as one with respect to the activation."""
        return (g.to(self.coder.W_enc.dtype) @ self.coder.W_enc.T).float()

    def reads(self, feature: int) -> Float[Tensor, " width"]:
        """The encoder direction of a feature."""
        return self.coder.W_enc[:, feature].float()

    def pre(self, x: Tokens) -> Float[Tensor, "token feature"]:
        """x W_enc: a change of the activation as one of the pre-activations."""
        return x @ self.coder.W_enc.float()


@dataclass(frozen=True, eq=False)
class NeuronSpace(Space):
    """The inputs of an MLP's last projection: the coordinates that the model itself has."""

    slot: Slot
    width: int
    has_error = False

    @property
    def place(self) -> Slot:
        """Slot of the neurons."""
        return self.slot

    @property
    def size(self) -> int:
        """Number of neurons."""
        return self.width

    def encode(self, x: Tokens) -> Float[Tensor, "token feature"]:
        """x itself."""
        return x.float()

    def combine(self, f: Float[Tensor, "token feature"], ids: Sequence[int] | None = None) -> Tokens:
        """f itself."""
        return (
            f if ids is None else f.new_zeros(len(f), self.width).index_copy(1, torch.tensor(ids, device=f.device), f)
        )

    def read(self, g: Tokens) -> Float[Tensor, "token feature"]:
        """g itself."""
        return g.float()


@dataclass(frozen=True, eq=False)
class WholeSpace(Space):
    """The whole activation as one node, such as a token's embedding."""

    site: Site
    width: int
    has_error = True

    @property
    def place(self) -> Site:
        """Site of the activation."""
        return self.site

    @property
    def size(self) -> int:
        """No features."""
        return 0

    def encode(self, x: Tokens) -> Float[Tensor, "token feature"]:
        """No features."""
        return x.new_zeros(len(x), 0, dtype=torch.float32)

    def combine(self, f: Float[Tensor, "token feature"], ids: Sequence[int] | None = None) -> Tokens:
        """A sum over no features."""
        return f.new_zeros(len(f), self.width)

    def read(self, g: Tokens) -> Float[Tensor, "token feature"]:
        """No features."""
        return self.encode(g)
