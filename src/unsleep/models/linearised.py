"""Linearised models: attention patterns, norm scales and MLP gates frozen at the values of a base run.

Around a base run, each of these becomes a constant, so that logits are an affine function of the stream at any Site:

    attention   queries and keys are held, so that the pattern is; values stay linear
    norm        y = w ⊙ P x · s + b with the scale s held (P takes the mean off in a LayerNorm)
    MLP         act(x) = x ⊙ r with r = act(x) / x held, or, where act(x) gates another projection, act(x) itself held

Gradients of the frozen model are those of relevance propagation in the form of Rezaei Jafari et al. 2025, "RelP"
(arXiv:2508.21258), except that a gate is held instead of sharing its product's relevance with what it gates.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, activations

from unsleep.core import BadInput, Site
from unsleep.models.anatomy import anatomy, probe
from unsleep.models.hooks import Transform, inputs_watched, observed, outputs_of_inputs
from unsleep.models.sites import Slot, final_norm, lanes, layers
from unsleep.models.streams import capture, transformed

ACTIVATIONS = tuple({type(made) for made in map(activations.ACT2FN.__getitem__, ("silu", "gelu", "gelu_new", "relu"))})
"""A few classes of activation functions; see `_is_activation` for the rest."""

TINY = 1e-4
"""Inputs nearer to 0 are taken for this one where the ratio act(x) / x is formed."""

AFFINE = 2e-3
"""Relative error up to which a model with all of this held is affine, beyond rounding."""

ROUNDING = 8
"""Rounding allowed in that, in units of the dtype's resolution."""

CHANGES = 32.0, 64.0
"""Sizes of the changes by which that is tested, relative to the stream that they are added to."""

TOLERANCE = 1e-3
"""Relative error up to which a norm is affine in its input once its scale is held."""


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm as y = w ⊙ P x · s + b."""

    module: nn.Module
    weight: Float[Tensor, " d_model"]
    """w, up to a factor that s makes good."""
    bias: Float[Tensor, " d_model"]
    centred: bool
    """True for a LayerNorm: P subtracts the mean."""

    def direction(self, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_model"]:
        """w ⊙ P x, in float32."""
        x = x.float()
        return self.weight * (x - x.mean(-1, keepdim=True) if self.centred else x)


@dataclass(eq=False)
class Linearisation:
    """The frozen factors of a base run: query and key projections, norm scales, gates and activation ratios.

    >>> base = Linearisation.of(network)          # doctest: +SKIP
    >>> with base.recording():                    # doctest: +SKIP
    ...     logits = network(ids).logits          # gradients are those of the frozen model
    >>> with base.held():                         # doctest: +SKIP
    ...     network(ids).logits                   # the frozen model itself, for streams that were changed
    """

    network: PreTrainedModel
    norms: list[Norm]
    gates: list[nn.Module]
    """Activation functions whose output multiplies another projection's."""
    alone: list[nn.Module]
    """Activation functions whose output the MLP's last projection reads."""
    queries: list[Slot]
    """Queries and keys of every layer."""
    values: dict[Any, list[Tensor]] = field(default_factory=dict[Any, list[Tensor]])
    """Frozen values by module or Slot, in call order."""

    @classmethod
    def of(cls, network: PreTrainedModel) -> Linearisation:
        """Find what is to be held in a model.

        Raises `BadInput` for a family whose queries and keys are not known, a norm that is not affine once its scale
        is held, an MLP without an activation function of its own, and a model that is not affine for all that.
        """
        norms = [_examined(module) for module in _norm_modules(network)]
        gates, alone = _activations(network)
        slots = [Slot(layer, part) for layer in range(len(layers(network))) for part in ("q", "k")]
        for slot in slots:
            lanes(network, slot)
        found = cls(network, norms, gates, alone, slots)
        found._check()
        return found

    @torch.no_grad()
    def _check(self) -> None:
        """Raise `BadInput` where the model with all of this held is not affine in what its first block reads.

        Changes are far larger than the stream itself, which an affine map does not mind: in bfloat16 small ones drown
        in the rounding of a real model's massive activations.
        """
        ids, last = probe(self.network), Site(len(layers(self.network)) - 1)
        streams: list[Tensor] = []
        for share in (0.0, *CHANGES):
            change: dict[Site, Transform] = {Site(0, "embed"): lambda x, share=share: x + share * x.roll(1, -1)}
            run = self.held() if streams else self.recording()
            with run, transformed(self.network, change if share else {}), capture(self.network, [last]) as found:
                self.network(input_ids=ids, use_cache=False)
            streams.append(found[last].float())
        self.values.clear()
        half, whole = streams[1] - streams[0], streams[2] - streams[0]
        error = float((whole - 2 * half).norm() / whole.norm())
        if not error <= AFFINE + ROUNDING * torch.finfo(self.network.dtype).eps:
            raise BadInput(
                f"{self.network.config.model_type} is not affine with its patterns, norms and gates held (relative "
                f"error {error:.2g}); take attribution, which holds nothing"
            )

    @contextlib.contextmanager
    def recording(self) -> Generator[PreTrainedModel]:
        """Hold each forward pass's own values: its logits are the model's, its gradients the frozen model's."""
        self.values.clear()

        def record(key: Any, make: Callable[[], Tensor]) -> Tensor:
            self.values.setdefault(key, []).append(make().detach())
            return self.values[key][-1]

        with self._running(record):
            yield self.network

    @contextlib.contextmanager
    def held(self) -> Generator[PreTrainedModel]:
        """Run the same rows again, in as many forward passes, with what the last recording held."""
        if not self.values:
            raise BadInput("nothing is held yet; expected a run under `recording()` before one under `held()`")
        calls = {key: iter(values) for key, values in self.values.items()}
        with self._running(lambda key, make: next(calls[key])):
            yield self.network

    @contextlib.contextmanager
    def _running(self, hold: Callable[[Any, Callable[[], Tensor]], Tensor]) -> Generator[None]:
        with contextlib.ExitStack() as stack:
            transforms: dict[Slot, Transform] = {
                slot: lambda x, slot=slot: hold(slot, lambda: x) for slot in self.queries
            }
            stack.enter_context(transformed(self.network, transforms))
            replaced: list[tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]] = []
            replaced += [(norm.module, lambda x, y, norm=norm: _scaled(norm, x, y, hold)) for norm in self.norms]
            replaced += [(gate, lambda x, y, gate=gate: hold(gate, lambda: y)) for gate in self.gates]
            replaced += [(act, lambda x, y, act=act: x * hold(act, lambda: _ratio(act, x))) for act in self.alone]
            stack.enter_context(outputs_of_inputs(replaced))
            yield


def _scaled(norm: Norm, x: Tensor, y: Tensor, hold: Callable[[Any, Callable[[], Tensor]], Tensor]) -> Tensor:
    """A norm's output with its scale held."""
    direction = norm.direction(x)

    def scale() -> Tensor:
        found = ((y.float() - norm.bias) * direction).sum(-1, keepdim=True)
        return found / direction.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

    return (direction * hold(norm.module, scale) + norm.bias).to(y.dtype)


def _ratio(act: nn.Module, x: Tensor) -> Tensor:
    """act(x) / x."""
    away = torch.where(x.abs() < TINY, torch.full_like(x, TINY), x)
    forward: Any = type(act).forward  # not a call, which hooks would answer
    return forward(act, away) / away


def _norm_modules(network: PreTrainedModel) -> list[nn.Module]:
    """The norms that the residual stream, or what a half adds to it, passes: as wide as the stream."""
    wide = anatomy(network).width
    inside = [m for block in layers(network) for m in block.modules()]
    found = [m for m in inside if "norm" in type(m).__name__.lower() and _width(m) == wide]
    return [*found, final_norm(network)]


def _width(norm: nn.Module) -> int | None:
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor):
        return weight.numel()
    shape = getattr(norm, "normalized_shape", None)
    return int(shape[-1]) if shape else None


@torch.no_grad()
def _examined(module: nn.Module) -> Norm:
    """The weight, bias and kind of a norm, from its outputs; raises `BadInput` where it is no such norm."""
    norm: Any = copy.deepcopy(module).float()
    width = _width(module)
    assert width is not None
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    one, two = torch.randn(2, width, generator=torch.Generator().manual_seed(0)).to(device)
    bias = norm(torch.zeros(1, 1, width, device=device))[0, 0]
    best: tuple[float, Norm] | None = None
    for centred in (False, True):
        unit = Norm(module, torch.ones(width, device=device), bias, centred)
        found = Norm(module, (norm(one[None, None])[0, 0] - bias) / unit.direction(one), bias, centred)
        y, direction = norm(two[None, None])[0, 0] - bias, found.direction(two)
        fitted = direction * (y @ direction) / direction.square().sum()
        error = float((y - fitted).norm() / y.norm())
        if best is None or error < best[0]:
            best = error, found
    assert best is not None
    if not best[0] <= TOLERANCE:
        raise BadInput(
            f"{type(module).__name__} is not affine once its scale is held (relative error {best[0]:.2g}); take "
            "attribution, which holds nothing"
        )
    return best[1]


def _is_activation(module: nn.Module) -> bool:
    """True for an activation function of PyTorch or transformers without weights."""
    home = type(module).__module__
    known = home in ("transformers.activations", "torch.nn.modules.activation") or isinstance(module, ACTIVATIONS)
    bare = not list(module.parameters()) and not list(module.children())
    return bare and (known or "gelu" in type(module).__name__.lower())


@torch.no_grad()
def _activations(network: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """The activation functions of all MLPs: those that gate another projection, and those whose output one reads."""
    inside = [m for block in layers(network) for m in block.modules()]
    acts = [m for m in inside if _is_activation(m)]
    projections = [m for m in inside if getattr(getattr(m, "weight", None), "ndim", 0) == 2]
    made: list[tuple[nn.Module, Tensor]] = []
    alone = list[nn.Module]()

    def read(_: int, x: Tensor) -> None:
        alone.extend(act for act, y in made if y.numel() == x.numel() and torch.equal(y.reshape(x.shape), x))

    watchers = [(act, None, lambda y, act=act: made.append((act, y.clone()))) for act in dict.fromkeys(acts)]
    with observed(watchers), inputs_watched(projections, read):
        network(input_ids=probe(network), use_cache=False)
    if len(made) < len(layers(network)):
        raise BadInput(
            f"{network.config.model_type} computes the activation of an MLP without a module of its own, so that it "
            "cannot be held; take attribution, which holds nothing"
        )
    return [act for act in dict.fromkeys(acts) if act not in alone], list(dict.fromkeys(alone))
