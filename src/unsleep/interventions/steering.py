"""Activation steering: adding vectors to the residual stream.

With h the residual stream at a Site, v its vector and c the coefficient (Zou et al. 2023, "Representation
Engineering", arXiv:2310.01405, section 3.2):

    add         h + c·v
    piecewise   h + c·sign(h·v)·v
    projection  h − c·V⁺V h, V's rows spanning the removed subspace; c = 1 removes all of it
    contrast    h + c·v_i, v_i the vector of row i: activations of its positive minus its negative copy
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.activations.held import last_held
from unsleep.base import store
from unsleep.base.linear import orthonormal
from unsleep.core import BadInput, Refused, Site, check_choices, check_finite
from unsleep.interventions.intervention import Entry, Intervention, applied
from unsleep.interventions.passes import Passes, TokenRule, check_rule
from unsleep.models import generate
from unsleep.models.hooks import Transform
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Prompts, PromptSet

Operator = Literal["add", "piecewise", "projection", "contrast"]

Stream = Float[Tensor, "row position d_model"]


@dataclass(frozen=True, eq=False)
class Steering(Intervention):
    """Steer the residual stream at some Sites along their vectors (Zou et al. 2023, arXiv:2310.01405).

    Operator `contrast` has one vector per row of the batch, so that generation must not run a shared prefix once for
    all rows (`generate.greedy(…, share=False)`).
    """

    vectors: Mapping[Site, Float[Tensor, "*row d_model"]]
    """Site → vector, `[d_model]`; for `projection` also `[rank, d_model]`, for `contrast` `[prompt, d_model]`."""
    operator: Operator = "add"
    coefficient: float = 1.0
    """Multiple of the vector; 0 is the identity, bit for bit."""
    tokens: TokenRule = "all"
    """Steered tokens (see `passes.TokenRule`)."""
    layers: tuple[int, int] | None = None
    """First and last steered layer, among those with a vector; `None` for all."""
    keep_norm: bool = False
    """Rescale each token to its norm before steering."""
    model: str = ""
    """Fingerprint of the model that the vectors were fitted on; empty if unknown."""

    def __post_init__(self) -> None:
        check_choices(self, "control", operator=Operator)
        if not math.isfinite(self.coefficient):
            raise BadInput.of("coefficient", self.coefficient, "a finite number", "control")
        check_rule(self.tokens)
        if not self.vectors:
            raise BadInput("a control has no vector; give it one for at least one Site")
        allowed = {"projection": (1, 2), "contrast": (2,)}.get(self.operator, (1,))
        places: list[Any] = list(self.vectors)
        if wrong := [place for place in places if not isinstance(place, Site)]:
            raise BadInput(f"a steering vector is at {wrong[0]!r}; expected a Site, such as Site(12)")
        for site, vector in self.vectors.items():
            check_finite(vector, f"the control vector at {site}")
            if vector.ndim not in allowed:
                shapes = " or ".join(("[d_model]", "[row, d_model]")[n - 1] for n in allowed)
                raise BadInput(
                    f"the {self.operator} vector at {site} has shape {list(vector.shape)}; expected {shapes}"
                )
            if self.operator in ("piecewise", "projection") and not bool(vector.any()):
                raise BadInput(f"the {self.operator} vector at {site} is zero; it has no direction")
        if self.layers is not None and not 0 <= self.layers[0] <= self.layers[1]:
            raise BadInput(f"layer range is {self.layers}; expected the first and the last layer, such as (8, 16)")
        if not self.sites:
            raise BadInput(
                f"there is no vector in layers {self.layers}; there are vectors at {', '.join(map(str, self.vectors))}"
            )

    @property
    def sites(self) -> list[Site]:
        """The steered Sites."""
        low, high = self.layers or (0, math.inf)
        return sorted(site for site in self.vectors if low <= site.layer <= high)

    @property
    def widths(self) -> dict[Site, int]:
        """Width of the vectors at each steered Site."""
        return {site: self.vectors[site].shape[-1] for site in self.sites}

    @property
    def made_on(self) -> str:
        """Fingerprint of the model that the vectors were fitted on."""
        return self.model

    @property
    def acts(self) -> bool:
        """False for coefficient 0."""
        return self.coefficient != 0

    @property
    def follows_passes(self) -> bool:
        """True if it acts on some tokens only, or differs between rows."""
        return self.tokens != "all" or self.operator == "contrast"

    def transforms(self, passes: Passes, dtype: torch.dtype, device: torch.device | str) -> dict[Site, Transform]:
        """Transforms computed in float32, or in the activation's dtype where that is wider."""
        return {site: self._transform(site, passes) for site in self.sites}

    def saved(self, folder: Path, number: int) -> SteeringEntry:
        """Write the vectors in float32."""
        name = f"steering-{number}.safetensors"
        store.write_tensors(folder / name, {str(site): vector.float() for site, vector in self.vectors.items()})
        how = (self.model, self.operator, self.coefficient, self.tokens, self.layers, self.keep_norm)
        return SteeringEntry(name, *how)

    def _transform(self, site: Site, passes: Passes) -> Transform:
        vector = self.vectors[site]
        if self.operator == "projection":
            vector = orthonormal(vector.reshape(-1, vector.shape[-1]))

        def run(x: Stream) -> Stream:
            touched = passes.touched(self.tokens, x.device)
            if touched is not None and not bool(touched.any()):
                return x
            if self.operator == "contrast":
                _check_rows(len(vector), passes)
            new = operate(x, vector, self)
            return new if touched is None else torch.where(touched[..., None], new, x)

        return run


@dataclass(frozen=True)
class SteeringEntry(Entry):
    """Entry of edit.json for a `Steering`."""

    vectors: str
    """File of the vectors, by Site."""
    model: str
    operator: Operator
    coefficient: float
    tokens: TokenRule = "all"
    layers: tuple[int, int] | None = None
    keep_norm: bool = False

    def load(self, folder: Path) -> Steering:
        """The steering, with its vectors."""
        vectors = store.read_tensors(store.inside(folder, self.vectors, "vectors"))
        named = {Site.parse(site): vector for site, vector in vectors.items()}
        how = (self.operator, self.coefficient, self.tokens, self.layers, self.keep_norm, self.model)
        return Steering(named, *how)


def operate(x: Stream, vector: Float[Tensor, "*row d_model"], control: Steering) -> Stream:
    """Apply a control's operator to every token, whatever the token rule.

    For `projection` the rows of `vector` are orthonormal, for the others `vector` is as in `Steering`.
    """
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    v, c = vector.to(h), control.coefficient
    match control.operator:
        case "add":
            new = h + c * v
        case "piecewise":
            new = h + c * torch.sign(h @ v)[..., None] * v
        case "projection":
            new = h - c * (h @ v.T) @ v
        case "contrast":
            new = h + c * v[:, None]
    if control.keep_norm:
        new = new * (h.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    return new.to(x.dtype)


def _check_rows(count: int, passes: Passes) -> None:
    if passes.is_prefix:
        raise Refused(
            "there is one contrast vector per prompt, but a prefix that all prompts share is run for all at once; run "
            "the rows whole, with generate.greedy(…, share=False)"
        )
    if count != passes.rows:
        raise BadInput(f"contrast vectors of {count} prompts meet a batch of {passes.rows} rows; expected one per row")


def contrast_vectors(
    model: LoadedModel, positive: Prompts, negative: Prompts, sites: Sequence[Site], *, plain: bool = False
) -> dict[Site, Float[Tensor, "prompt d_model"]]:
    """Contrast vectors: last-token activations of each prompt's positive copy minus those of its negative copy.

    With `plain`, texts are taken without the chat template. Raises `BadInput` for lists of unequal
    length. Source: Zou et al. 2023, "Representation Engineering", arXiv:2310.01405, section 3.2, contrast vectors.
    """
    if len(positive) != len(negative):
        raise BadInput(f"{len(positive)} positive copies with {len(negative)} negative ones; expected one each")
    high, low = (last_held(model, texts, sites, plain=plain) for texts in (positive, negative))
    return {site: high[site] - low[site] for site in high}


def steer(
    model: LoadedModel,
    prompts: PromptSet,
    controls: Sequence[Steering],
    *,
    reply_tokens: int = 24,
    any_model: bool = False,
) -> list[list[str]]:
    """Greedy replies to prompts under each of several controls, one list per control; raises as `applied` does."""
    said: list[list[str]] = []
    for each in controls:
        with applied(model, each, any_model=any_model):
            said.append(
                generate.replies(model, prompts, max_new_tokens=reply_tokens, stage=f"replies at {each.coefficient:g}")
            )
    return said
