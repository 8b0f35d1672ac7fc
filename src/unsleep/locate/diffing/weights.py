"""Weight diffs: norm, spectrum and singular vectors of every matrix's ΔW."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from unsleep.base.context import kept, progress
from unsleep.base.records import Count, Positive, Share
from unsleep.core import BadInput
from unsleep.models.alike import check_alike
from unsleep.models.anatomy import anatomy
from unsleep.models.model import LoadedModel
from unsleep.models.weights import named

PIECE = 4096
"""Columns of a matrix converted to float64 at a time."""

NEGLIGIBLE = 1e-7
"""Singular values below this share of the largest are rounding errors of the Gram matrix, and set to 0."""


class Spectrum(NamedTuple):
    """Singular values of a matrix, and its top singular vectors."""

    values: Float[Tensor, " value"]
    """All singular values, largest first, in float64."""
    left: Float[Tensor, "top out"]
    """Left singular vectors as unit rows; fewer than requested for a lower rank."""
    right: Float[Tensor, "top in"]
    """Right singular vectors: W right[i] = values[i] left[i]."""

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of σ_i / Σσ (Roy & Vetterli 2007, "The effective rank"); 0 for a zero matrix."""
        share = self.values / self.values.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return float(torch.exp(torch.special.entr(share).sum())) if float(self.values.sum()) > 0 else 0.0

    def share(self, count: int) -> float:
        """Share of the squared norm in the first `count` singular values; 0 for a zero matrix."""
        square = self.values.square()
        return float(square[:count].sum() / square.sum()) if float(square.sum()) > 0 else 0.0


def spectrum(matrix: Float[Tensor, "out in"], top: int = 8) -> Spectrum:
    """Singular values and the top `top` singular vectors, from the smaller Gram matrix in float64.

    Time is cubic in the smaller side: 0.1 s for 576, minutes for 8,192.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    small = matrix.T if tall else matrix
    gram = torch.zeros(len(small), len(small), dtype=torch.float64)
    for piece in small.split(PIECE, dim=1):
        wide = piece.double()
        gram += wide @ wide.T
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.flip(0).clamp_min(0).sqrt()
    values = torch.where(values > NEGLIGIBLE * values[0], values, 0)
    count = min(top, int((values > 0).sum()))
    near = vectors.flip(1)[:, :count].T.float()
    far = normalize(near @ small.float(), dim=1)
    return Spectrum(values, far if tall else near, near if tall else far)


@dataclass(frozen=True)
class Changed:
    """Entry of diff.json for a `Delta`."""

    name: str
    layer: Count | None
    module: str
    shape: tuple[Count, ...]
    norm: Positive
    relative: Positive
    effective_rank: Positive
    first: Share
    """Of the squared norm, that of the first singular value."""
    singular_values: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Delta:
    """ΔW of one weight. A vector, such as a norm's, is a one-column matrix."""

    name: str
    """Name in the model's checkpoint."""
    layer: int | None
    """Layer; `None` outside the blocks."""
    module: str
    """Name within the block, or the full name."""
    shape: tuple[int, int]
    """[out, in]."""
    norm: float
    """Frobenius norm ‖ΔW‖."""
    base_norm: float
    spectrum: Spectrum

    @property
    def relative(self) -> float:
        """‖ΔW‖ / ‖W_base‖; ‖ΔW‖ for a zero base weight."""
        return self.norm / self.base_norm if self.base_norm > 0 else self.norm

    def row(self) -> Changed:
        """Entry of diff.json."""
        s, where = self.spectrum, (self.name, self.layer, self.module, self.shape)
        values = tuple(s.values[: max(8, len(s.left))].tolist())
        return Changed(*where, self.norm, self.relative, s.effective_rank, s.share(1), values)


@torch.no_grad()
def weight_differences(base: LoadedModel, suspect: LoadedModel, *, top: int = 8) -> list[Delta]:
    """ΔW = W_suspect − W_base of every weight, in checkpoint order.

    Differences are computed in float32. Raises `BadInput` for models of different shapes or tokenizers.
    """
    if top < 1:
        raise BadInput(f"top is {top}; expected at least 1 singular vector")
    found: list[Delta] = []
    for name, old, delta in _changes(base, suspect):
        layer, inner = _place(name, anatomy(base.network).layers)
        norms = [float(w.double().norm()) for w in (delta, old)]
        shape = (delta.shape[0], delta.shape[1])
        parts = kept(lambda delta=delta: spectrum(delta, top)._asdict(), made_from=(base, suspect, name, top))
        found.append(Delta(name, layer, inner, shape, norms[0], norms[1], Spectrum(**parts)))
    return found


def layer_differences(base: LoadedModel, suspect: LoadedModel) -> list[LayerDelta]:
    """Total weight change of every layer, in order of depth, without spectra; raises as `weight_differences` does."""
    blocks = anatomy(base.network).layers
    return _totals(
        (_place(name, blocks)[0], float(delta.double().norm()), float(old.double().norm()))
        for name, old, delta in _changes(base, suspect)
    )


def _changes(base: LoadedModel, suspect: LoadedModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, base weight and difference of every weight as [out, in] matrices in float32, in checkpoint order."""
    check_alike(base, suspect, chats=False)
    before, after = (dict(named(m.network, shared=True)) for m in (base, suspect))
    names = list(dict.fromkeys(name for m in (base, suspect) for name, _ in m.network.named_parameters()))
    for done, name in enumerate(names, 1):
        module = base.network.get_submodule(name.rpartition(".")[0])
        old, new = (_matrix(module, each[name].detach().float().cpu()) for each in (before, after))
        yield name, old, new - old
        progress("weights", done, len(names))


def _matrix(module: nn.Module, weight: Tensor) -> Float[Tensor, "out in"]:
    """A weight as an [out, in] matrix: GPT-2's Conv1D and embeddings are transposed.

    A mixture of experts' matrices are stacked along the outputs.
    """
    if weight.ndim != 2:
        return weight.flatten(0, -2) if weight.ndim > 2 else weight.reshape(-1, 1)
    return weight.T if hasattr(module, "nf") or isinstance(module, nn.Embedding) else weight


def _place(name: str, blocks: str) -> tuple[int | None, str]:
    """Layer, and name within the block."""
    number, _, inner = name.removeprefix(f"{blocks}.").partition(".")
    inside = name.startswith(f"{blocks}.") and number.isdecimal()
    return (int(number), inner) if inside else (None, name)


class LayerDelta(NamedTuple):
    """Total weight change of one layer."""

    layer: Count
    norm: Positive
    """√Σ‖ΔW‖² over its weights."""
    relative: Positive
    """√Σ‖ΔW‖² / √Σ‖W_base‖²."""


def by_layer(deltas: Sequence[Delta]) -> list[LayerDelta]:
    """Layers in order of depth; sort by `relative` for a ranking."""
    return _totals((delta.layer, delta.norm, delta.base_norm) for delta in deltas)


def _totals(weights: Iterable[tuple[int | None, float, float]]) -> list[LayerDelta]:
    """Layers from layer, ‖ΔW‖ and ‖W_base‖ of each weight."""
    sums: dict[int, list[float]] = {}
    for layer, norm, base_norm in weights:
        if layer is not None:
            total = sums.setdefault(layer, [0.0, 0.0])
            total[0] += norm**2
            total[1] += base_norm**2
    return [LayerDelta(n, a**0.5, (a / b) ** 0.5 if b else a**0.5) for n, (a, b) in sorted(sums.items())]
