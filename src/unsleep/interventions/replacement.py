"""Replacement of dictionary features' activations by fixed values: zero ablation, or mean ablation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base import store
from unsleep.core import BadInput, Site, check_finite
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import load_dictionary
from unsleep.interventions.features import Edit, FeatureGate
from unsleep.interventions.intervention import Entry, Intervention, Stream
from unsleep.interventions.passes import Passes
from unsleep.models.hooks import Transform

Kept = Literal["keep", "drop"]
"""Treatment of the reconstruction error ε."""


@dataclass(frozen=True, eq=False)
class Replacement(Intervention):
    """Replace the activations of features at one Site by fixed values v, such as 0 or their means.

    With f the features' activations, x̂ the reconstruction, ε = x − x̂ and S the replaced ids:

        keep:  x' = x − Σ_{j∈S} (f_j − v_j) W_dec_j
        drop:  x' = x̂ − Σ_{j∈S} (f_j − v_j) W_dec_j

    Attention sinks, on which no feature is active, are unchanged. With `keep` and values of 0 it is an `Edit`.
    """

    site: Site
    dictionary: Coder
    replaced: tuple[int, ...]
    values: Float[Tensor, " replaced"]
    """One per replaced feature."""
    error: Kept = "keep"

    def __post_init__(self) -> None:
        Edit(self.site, self.dictionary, self.replaced)  # refuses another Site, and unknown or repeated features
        if self.error not in get_args(Kept):
            raise BadInput(f"replacement error rule is {self.error!r}; expected one of {get_args(Kept)}")
        if self.dictionary.target is not None:
            raise BadInput(f"the dictionary of {self.site} is a transcoder; features of an autoencoder can be replaced")
        if self.values.shape != (len(self.replaced),):
            raise BadInput(
                f"{len(self.replaced)} features at {self.site} are replaced by values of shape "
                f"{list(self.values.shape)}; expected one each"
            )
        check_finite(self.values, f"the values of features at {self.site}")

    @classmethod
    def all_but(
        cls,
        dictionary: Coder,
        kept: tuple[int, ...],
        error: Kept = "keep",
        values: Float[Tensor, " feature"] | None = None,
    ) -> Replacement:
        """Replace all features except `kept`, by 0 or by their `values`."""
        gone = tuple(sorted(set(range(dictionary.n_features)) - set(kept)))
        by = torch.zeros(len(gone)) if values is None else values[list(gone)].float().cpu()
        return cls(dictionary.site, dictionary, gone, by, error)

    @property
    def widths(self) -> dict[Site, int]:
        """Width of its dictionary at its Site."""
        return {self.site: self.dictionary.d_model}

    @property
    def made_on(self) -> str:
        """Fingerprint of the model that its dictionary was trained on."""
        return self.dictionary.model

    @property
    def acts(self) -> bool:
        """False for the identity."""
        return bool(self.replaced) or self.error != "keep"

    def transforms(self, passes: Passes, dtype: torch.dtype, device: torch.device | str) -> dict[Site, Transform]:
        """The replacement as a transform in the model's dtype."""
        dictionary = self.dictionary.to(dtype, device)
        gone = torch.zeros(dictionary.n_features, device=device)
        gone[list(self.replaced)] = 1
        gate = FeatureGate(dictionary, self.error)
        rows = self.dictionary.decoder[list(self.replaced)].float().cpu()
        put = (self.values.float().cpu() @ rows).to(device, dtype)

        def run(x: Stream) -> Stream:
            return torch.where(dictionary.sinks(x), x, gate(x, gone) + put)

        return {self.site: run}

    def saved(self, folder: Path, number: int) -> ReplacementEntry:
        """Write the dictionary in bfloat16, and the values in float32."""
        place = Edit(self.site, self.dictionary, ()).saved(folder, number).dictionary
        name = f"{self.site}.values.safetensors"
        store.write_tensors(folder / name, {"values": self.values.float()})
        return ReplacementEntry(self.site, self.replaced, name, self.error, place)


@dataclass(frozen=True)
class ReplacementEntry(Entry):
    """Entry of edit.json for a `Replacement`."""

    site: Site
    replaced: tuple[int, ...]
    values: str
    """File of the values."""
    error: Kept
    dictionary: str
    """Its folder."""

    def load(self, folder: Path) -> Replacement:
        """The replacement, with its dictionary."""
        dictionary = load_dictionary(store.inside(folder, self.dictionary, "dictionary"))
        path = store.inside(folder, self.values, "values")
        values = store.read_tensors(path, {"values": (len(self.replaced),)})["values"]
        return Replacement(self.site, dictionary, self.replaced, values, self.error)
