"""Keep-list edits: only features and error directions that trusted data shows pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base import store
from unsleep.core import BadInput, Site, check_finite
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import load_dictionary
from unsleep.interventions.features import Edit
from unsleep.interventions.intervention import Entry, Intervention, Stream
from unsleep.interventions.passes import Passes
from unsleep.models.hooks import Transform


@dataclass(frozen=True, eq=False)
class TrustedOnly(Intervention):
    """Let only some features and a subspace of the reconstruction error pass at one Site.

    With f the features' activations, K the kept ids, ε = x − x̂ and B the error's directions around its mean μ:

        x' = Σ_{j∈K} f_j W_dec_j + b_dec + μ + (ε − μ) Bᵀ B

    Attention sinks, on which no feature is active, are unchanged.
    """

    site: Site
    dictionary: Coder
    kept: tuple[int, ...]
    basis: Float[Tensor, "rank d_model"]
    """B: orthonormal rows."""
    center: Float[Tensor, " d_model"]
    """μ."""

    def __post_init__(self) -> None:
        Edit(self.site, self.dictionary, self.kept)  # refuses another Site, and unknown or repeated features
        if self.dictionary.target is not None:
            raise BadInput(f"the dictionary of {self.site} is a transcoder; features of an autoencoder can be kept")
        for name, tensor in (("basis", self.basis), ("center", self.center)):
            check_finite(tensor, f"keep-list at {self.site}: {name}")
            if tensor.shape[-1] != self.dictionary.d_model:
                width = f"{tensor.shape[-1]}; the dictionary's is {self.dictionary.d_model}"
                raise BadInput(f"keep-list at {self.site}: {name} has width {width}")

    @property
    def widths(self) -> dict[Site, int]:
        """Width of its dictionary at its Site."""
        return {self.site: self.dictionary.d_model}

    @property
    def made_on(self) -> str:
        """Fingerprint of the model that its dictionary was trained on."""
        return self.dictionary.model

    def transforms(self, passes: Passes, dtype: torch.dtype, device: torch.device | str) -> dict[Site, Transform]:
        """The edit as a transform; the error's projection is computed in float32."""
        dictionary = self.dictionary.to(dtype, device)
        passing = torch.zeros(dictionary.n_features, dtype=dtype, device=device)
        passing[list(self.kept)] = 1
        basis, center = (x.to(device, torch.float32) for x in (self.basis, self.center))

        def run(x: Stream) -> Stream:
            f = dictionary.encode(x)
            error = (x - dictionary.decode(f)).float() - center
            put = dictionary.decode(f * passing).float() + center + error @ basis.T @ basis
            return torch.where(dictionary.sinks(x), x, put.to(x.dtype))

        return {self.site: run}

    def saved(self, folder: Path, number: int) -> TrustedOnlyEntry:
        """Write the dictionary in bfloat16, and the directions in float32."""
        place = Edit(self.site, self.dictionary, ()).saved(folder, number).dictionary
        name = f"{self.site}.errors.safetensors"
        store.write_tensors(folder / name, {"basis": self.basis.float(), "center": self.center.float()})
        return TrustedOnlyEntry(self.site, self.kept, name, place)


@dataclass(frozen=True)
class TrustedOnlyEntry(Entry):
    """Entry of edit.json for a `TrustedOnly`."""

    site: Site
    kept: tuple[int, ...]
    errors: str
    """File of the error's directions."""
    dictionary: str
    """Its folder."""

    def load(self, folder: Path) -> TrustedOnly:
        """The edit, with its dictionary."""
        dictionary = load_dictionary(store.inside(folder, self.dictionary, "dictionary"))
        wanted = {"basis": (None, dictionary.d_model), "center": (dictionary.d_model,)}
        tensors = store.read_tensors(store.inside(folder, self.errors, "errors"), wanted)
        return TrustedOnly(self.site, dictionary, self.kept, tensors["basis"], tensors["center"])
