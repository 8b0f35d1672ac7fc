"""Ablation of subspaces."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base import store
from unsleep.core import BadInput, Site, check_finite
from unsleep.interventions.intervention import Entry, Intervention, Stream
from unsleep.interventions.passes import Passes
from unsleep.models.hooks import Transform


@dataclass(frozen=True, eq=False)
class Projection(Intervention):
    """Ablate a subspace at one Site.

        x' = x − (x − center) Rᵀ B

    R is B unless `reads` is given: the component in the subspace is replaced by that of `center` (0 without one).
    Another R with R Bᵀ = 1 makes the projection oblique, as LEACE's is (Belrose et al. 2023, arXiv:2306.03819).
    """

    site: Site
    basis: Float[Tensor, "rank d_model"]
    """B: orthonormal rows that span the subspace."""
    center: Float[Tensor, " d_model"] | None = None
    model: str = ""
    """Fingerprint of the model that the subspace was fitted on; empty if any will do."""
    reads: Float[Tensor, "rank d_model"] | None = None
    """R: rows that read the removed component."""
    sink_norm: float = math.inf
    """Norm above which a token is an attention sink and stays unchanged."""

    def __post_init__(self) -> None:
        site: Any = self.site
        if not isinstance(site, Site) or self.basis.ndim != 2:
            raise BadInput(
                f"projection at {self.site!r} has a basis of shape {list(self.basis.shape)}; expected a Site and "
                "[rank, d_model]"
            )
        rank, d_model = self.basis.shape
        if not 1 <= rank <= d_model:
            raise BadInput(f"projection at {self.site} has rank {rank}; expected 1 to {d_model}")
        rows, one = self.basis.double(), torch.eye(rank, dtype=torch.double, device=self.basis.device)
        shapes = {"basis": (rank, d_model), "center": (d_model,), "reads": (rank, d_model)}
        for name, tensor in self.tensors.items():
            check_finite(tensor, f"projection at {self.site}: {name}")
        store.check_shapes(self.tensors, {name: shapes[name] for name in self.tensors}, f"projection at {self.site}")
        if float((rows @ rows.T - one).abs().max()) > 1e-3:
            raise BadInput(f"projection at {self.site}: the basis has rows that are not orthonormal; expected B Bᵀ = 1")
        if self.reads is not None and float((self.reads.double() @ rows.T - one).abs().max()) > 1e-3:
            raise BadInput(f"projection at {self.site}: reads do not fit the basis; expected R Bᵀ = 1")
        if not self.sink_norm > 0:
            raise BadInput(f"projection at {self.site}: sink_norm is {self.sink_norm}; expected more than 0")

    @property
    def reader(self) -> Float[Tensor, "rank d_model"]:
        """R."""
        return self.basis if self.reads is None else self.reads

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Basis, center and reads by name, where present."""
        held = {"basis": self.basis, "center": self.center, "reads": self.reads}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    @property
    def widths(self) -> dict[Site, int]:
        """Width of its basis at its Site."""
        return {self.site: self.basis.shape[1]}

    @property
    def made_on(self) -> str:
        """Fingerprint of the model that the subspace was fitted on."""
        return self.model

    def transforms(self, passes: Passes, dtype: torch.dtype, device: torch.device | str) -> dict[Site, Transform]:
        """Transform in float32, whatever the activation's dtype: bfloat16 would leave 1 % of the removed component."""
        basis, reads = (rows.to(device, torch.float32) for rows in (self.basis, self.reader))
        held = 0.0 if self.center is None else self.center.to(device, torch.float32) @ reads.T
        return {self.site: lambda x: exchanged(x, basis, reads, held, self.sink_norm)}

    def saved(self, folder: Path, number: int) -> ProjectionEntry:
        """Write basis, center and reads in float32."""
        name = f"{self.site}.safetensors"
        store.write_tensors(folder / name, {key: tensor.float() for key, tensor in self.tensors.items()})
        return ProjectionEntry(self.site, name, self.model, None if math.isinf(self.sink_norm) else self.sink_norm)


@dataclass(frozen=True)
class ProjectionEntry(Entry):
    """Entry of edit.json for a `Projection`."""

    site: Site
    subspace: str
    """File of its tensors."""
    model: str
    sink_norm: float | None

    def load(self, folder: Path) -> Projection:
        """The projection, with its tensors."""
        tensors = store.read_tensors(store.inside(folder, self.subspace, "subspace"), {"basis": (None, None)})
        sinks = math.inf if self.sink_norm is None else self.sink_norm
        return Projection(self.site, tensors["basis"], tensors.get("center"), self.model, tensors.get("reads"), sinks)


@dataclass(frozen=True, eq=False)
class Resampling(Intervention):
    """Resample ablation: replace each token's component in a subspace by another token's.

    x' = x − (x − x̃) Bᵀ B,    x̃ drawn anew for every token and pass

    Source: Chan et al. 2022, "Causal scrubbing", Alignment Forum.
    """

    site: Site
    basis: Float[Tensor, "rank d_model"]
    """B: orthonormal rows that span the subspace."""
    others: Float[Tensor, "token d_model"]
    """The tokens that x̃ is drawn from."""
    seed: int = 0
    sink_norm: float = math.inf
    """Norm above which a token is an attention sink and stays unchanged."""

    @property
    def widths(self) -> dict[Site, int]:
        """Width of its basis at its Site."""
        return {self.site: self.basis.shape[1]}

    def transforms(self, passes: Passes, dtype: torch.dtype, device: torch.device | str) -> dict[Site, Transform]:
        """Transform in float32; passes of equal shape draw the same tokens."""
        basis = self.basis.to(device, torch.float32)
        inside = self.others.to(device, torch.float32) @ basis.T

        def run(x: Stream) -> Stream:
            generator = torch.Generator().manual_seed(self.seed)
            pick = torch.randint(len(inside), x.shape[:-1], generator=generator)
            return exchanged(x, basis, basis, inside[pick.to(inside.device)], self.sink_norm)

        return {self.site: run}


def exchanged(
    x: Stream,
    basis: Float[Tensor, "rank d_model"],
    reads: Float[Tensor, "rank d_model"],
    held: Float[Tensor, "*held rank"] | float,
    sink_norm: float,
) -> Stream:
    """The activation with its component in a subspace replaced by `held`; sinks are unchanged."""
    wide = x.float()
    new = (wide - (wide @ reads.T - held) @ basis).to(x.dtype)
    if math.isinf(sink_norm):
        return new
    return torch.where(wide.norm(dim=-1, keepdim=True) > sink_norm, x, new)
