"""Edits: ablation of dictionary features, and their scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base import store
from unsleep.base.linear import orthonormal
from unsleep.core import BadInput, Dictionary, Encoded, Features, Site
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import load_dictionary, save_dictionary
from unsleep.interventions.intervention import Entry, Intervention, Stream
from unsleep.interventions.passes import Passes
from unsleep.models.hooks import Transform

ErrorRule = Literal["keep", "drop", "project"]
"""Treatment of the reconstruction error ε by an edit."""

Ranking = Sequence[tuple[Site, int]]
"""Features of several Sites in order of removal."""


@dataclass(frozen=True)
class Edit(Intervention):
    """Ablate features at one Site.

    With f the features' activations, x̂ the reconstruction, ε = x − x̂ and S the removed ids:

        keep:     x' = x − Σ_{j∈S} f_j W_dec_j
        drop:     x' = x̂ − Σ_{j∈S} f_j W_dec_j
        project:  as keep, with ε's component in the span of {W_dec_j, j∈S} removed too

    Attention sinks, on which no feature is active, are unchanged.
    """

    site: Site
    dictionary: Dictionary
    removed: tuple[int, ...]
    """Indices of the ablated features; an empty edit with `keep` is the identity, bit for bit."""
    error: ErrorRule = "keep"

    def __post_init__(self) -> None:
        if self.error not in get_args(ErrorRule):
            raise BadInput(f"edit error rule is {self.error!r}; expected one of {get_args(ErrorRule)}")
        if self.dictionary.site != self.site:
            raise BadInput(f"edit at {self.site} uses a dictionary of {self.dictionary.site}; expected the same Site")
        wrong = [i for i in self.removed if not 0 <= i < self.dictionary.n_features]
        if wrong:
            raise BadInput(
                f"edit at {self.site} removes feature {wrong[0]}; the dictionary has {self.dictionary.n_features}"
            )
        if len(set(self.removed)) != len(self.removed):
            raise BadInput(f"edit at {self.site} removes a feature twice; expected distinct ids")

    @classmethod
    def keeping(cls, dictionary: Dictionary, kept: Sequence[int], error: ErrorRule = "keep") -> Edit:
        """The edit that removes every feature except the trusted ones."""
        gone = sorted(set(range(dictionary.n_features)) - set(kept))
        return cls(dictionary.site, dictionary, tuple(gone), error)

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
        return bool(self.removed) or self.error != "keep"

    def transforms(self, passes: Passes, dtype: torch.dtype, device: torch.device | str) -> dict[Site, Transform]:
        """The edit as a transform in the model's dtype."""
        gone = torch.zeros(self.dictionary.n_features, device=device)
        gone[list(self.removed)] = 1
        gate = FeatureGate(self.dictionary.to(dtype, device), self.error)
        complement = gate.complement(gone)
        return {self.site: lambda x: gate(x, gone, complement)}

    def saved(self, folder: Path, number: int) -> EditEntry:
        """Write the dictionary in bfloat16."""
        dictionary = self.dictionary.to(torch.bfloat16)
        if not isinstance(dictionary, Coder):
            raise BadInput(f"edit at {self.site}: its dictionary cannot be written")
        save_dictionary(dictionary, folder / str(self.site))
        return EditEntry(self.site, self.removed, self.error, str(self.site))


@dataclass(frozen=True)
class EditEntry(Entry):
    """Entry of edit.json for an `Edit`."""

    site: Site
    removed: tuple[int, ...]
    error: ErrorRule
    dictionary: str
    """Its folder."""

    def load(self, folder: Path) -> Edit:
        """The edit, with its dictionary."""
        return Edit(
            self.site, load_dictionary(store.inside(folder, self.dictionary, "dictionary")), self.removed, self.error
        )


@dataclass(frozen=True)
class FeatureScaling(Intervention):
    """Scale the activations of features at one Site; the reconstruction error is kept.

    With f the features' activations and s_j the factor of feature j:

        x' = x + Σ_j (s_j − 1) f_j W_dec_j

    Factor 0 ablates as an `Edit` with the error rule `keep` does, 1 is the identity, a larger one amplifies.
    """

    site: Site
    dictionary: Dictionary
    scales: Mapping[int, float]
    """Feature → factor."""

    def __post_init__(self) -> None:
        Edit(self.site, self.dictionary, tuple(self.scales))  # refuses another Site and unknown features
        for feature, scale in self.scales.items():
            if not math.isfinite(scale):
                raise BadInput(f"feature {feature} at {self.site} is scaled by {scale}; expected a finite factor")

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
        return any(scale != 1 for scale in self.scales.values())

    def transforms(self, passes: Passes, dtype: torch.dtype, device: torch.device | str) -> dict[Site, Transform]:
        """The scaling as a transform in the model's dtype."""
        gone = torch.zeros(self.dictionary.n_features, device=device)
        for feature, scale in self.scales.items():
            gone[feature] = 1 - scale
        gate = FeatureGate(self.dictionary.to(dtype, device), "keep")
        return {self.site: lambda x: gate(x, gone)}

    def saved(self, folder: Path, number: int) -> FeatureScalingEntry:
        """Write the dictionary in bfloat16."""
        place = Edit(self.site, self.dictionary, ()).saved(folder, number).dictionary
        return FeatureScalingEntry(self.site, dict(self.scales), place)


@dataclass(frozen=True)
class FeatureScalingEntry(Entry):
    """Entry of edit.json for a `FeatureScaling`."""

    site: Site
    scales: dict[int, float]
    dictionary: str
    """Its folder."""

    def load(self, folder: Path) -> FeatureScaling:
        """The scaling, with its dictionary."""
        dictionary = load_dictionary(store.inside(folder, self.dictionary, "dictionary"))
        return FeatureScaling(self.site, dictionary, self.scales)


class FeatureGate:
    """The computation of an `Edit` or a `FeatureScaling`, differentiable in a gate per feature.

    The gates of an edit are 1 and 0, those of a scaling 1 − s.
    """

    def __init__(self, dictionary: Dictionary, error: ErrorRule) -> None:
        self.dictionary, self.error = dictionary, error

    def complement(self, gone: Float[Tensor, " feature"]) -> Float[Tensor, "rank d_model"] | None:
        """Orthonormal rows that span the decoder rows of the removed features, for the rule `project`."""
        if self.error != "project" or not bool((gone > 0).any()):
            return None
        rows = self.dictionary.decoder[gone > 0]
        return orthonormal(rows, 1e-4).to(rows.dtype)

    def __call__(
        self, x: Stream, gone: Float[Tensor, " feature"], complement: Float[Tensor, "rank d_model"] | None = None
    ) -> Stream:
        """The activation with each feature removed to the degree `gone`: 0 for none, 1 for all of it."""
        code = self.dictionary.encode_sparse(x)
        removed = self.dictionary.combine(Encoded(code.values * gone.to(x.dtype)[code.ids], code.ids))
        if self.error == "keep":
            return x - removed
        rebuilt = self.dictionary.decode_sparse(code)
        if self.error == "drop":
            return torch.where(self.dictionary.sinks(x), x, rebuilt - removed)
        if complement is None:
            return x - removed
        spanned = ((x - rebuilt) @ complement.T) @ complement
        return torch.where(self.dictionary.sinks(x), x, x - removed - spanned)


def merged(ranking: Mapping[Site, Features]) -> list[tuple[Site, int]]:
    """Rankings of several Sites merged, best first."""
    scored = [(s, site, i) for site, f in ranking.items() for i, s in zip(f.ids, f.scores, strict=True)]
    return [(site, i) for _, site, i in sorted(scored, key=lambda row: -row[0])]


def edits_for(ranking: Ranking, dictionaries: Sequence[Coder], n: int, error: ErrorRule = "keep") -> tuple[Edit, ...]:
    """Ablation of the first `n` features of a ranking."""
    by_site: dict[Site, list[int]] = {}
    for site, feature in ranking[:n]:
        by_site.setdefault(site, []).append(feature)
    return tuple(Edit(d.site, d, tuple(by_site[d.site]), error) for d in dictionaries if d.site in by_site)
