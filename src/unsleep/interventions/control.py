"""Control of a running model by vectors: `with controlled(model, control) as network: network.generate(…)`.

With h the residual stream at a Site, v its vector and c the coefficient (Zou et al. 2023, "Representation
Engineering", section 3.2):

    add         h + c·v
    piecewise   h + c·sign(h·v)·v
    projection  h − c·V⁺V h, V's rows spanning what is removed; c = 1 removes all of it
    contrast    h + c·v_i, v_i the vector of row i: activations of its positive minus its negative copy

Arithmetic is in float32, or in the model's dtype where that is wider. The weights are not touched.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from unsleep.activations.held import last_held
from unsleep.core import BadInput, Refused, Site, check_choices, check_finite
from unsleep.interventions.passes import Passes, TokenRule, check_rule
from unsleep.models import generate
from unsleep.models.hooks import Transform, calls_watched
from unsleep.models.model import LoadedModel
from unsleep.models.sites import width
from unsleep.models.streams import transformed
from unsleep.models.weights import fingerprint
from unsleep.prompts.prompt import Prompts, PromptSet

Operator = Literal["add", "piecewise", "projection", "contrast"]

Stream = Float[Tensor, "row position d_model"]


@dataclass(frozen=True, eq=False)
class Control:
    """What is done to the stream, where, how strongly and on which tokens: a value, not a hook."""

    vectors: Mapping[Site, Float[Tensor, "*row d_model"]]
    """One vector a Site; for `projection` also several rows, for `contrast` one a row of the batch."""
    operator: Operator = "add"
    coefficient: float = 1.0
    """In units of the vector; 0 changes nothing, bit for bit."""
    tokens: TokenRule = "all"
    """See `passes.TokenRule`."""
    layers: tuple[int, int] | None = None
    """First and last layer that are controlled, of those that have a vector; `None` for all."""
    keep_norm: bool = False
    """Give each token the norm back that it had before."""
    model: str = ""
    """Fingerprint of the model that the vectors are of; empty where it is not known."""

    def __post_init__(self) -> None:
        check_choices(self, "control", operator=Operator)
        if not math.isfinite(self.coefficient):
            raise BadInput.of("coefficient", self.coefficient, "a finite number", "control")
        check_rule(self.tokens)
        if not self.vectors:
            raise BadInput("a control has no vector; give it one for at least one Site")
        allowed = {"projection": (1, 2), "contrast": (2,)}.get(self.operator, (1,))
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
                f"no vector stands in layers {self.layers}; there are vectors at {', '.join(map(str, self.vectors))}"
            )

    @property
    def sites(self) -> list[Site]:
        """The Sites that are controlled."""
        low, high = self.layers or (0, math.inf)
        return sorted(site for site in self.vectors if low <= site.layer <= high)


def operate(x: Stream, vector: Float[Tensor, "*row d_model"], control: Control) -> Stream:
    """The stream after a control's operator, on every token, whatever the token rule.

    For `projection` the rows of `vector` are orthonormal, for the others `vector` is as in `Control`.
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


@contextlib.contextmanager
def controlled(
    model: LoadedModel | PreTrainedModel,
    control: Control | Sequence[Control],
    *,
    replies: Bool[Tensor, "row reply"] | None = None,
    any_model: bool = False,
) -> Generator[PreTrainedModel]:
    """Run a model under controls until the block ends; several at one Site act one after the other.

    It works in `generate`, with a KV cache, left padding and batches. Where prompt and reply run in one pass,
    `replies` marks the reply (see `passes.Passes`).

    Yields the Hugging Face model. Raises `BadInput` for a Site that the model does not have and a vector of another
    width, `Refused` where the vectors are of another model and `any_model` is off, or where contrast vectors, one
    a row, meet a prefix that all rows share (run the rows whole: `generate.greedy(…, share=False)`).
    """
    network = model.network if isinstance(model, LoadedModel) else model
    controls = [control] if isinstance(control, Control) else list(control)
    check_controls(model, controls, any_model=any_model)
    passes = Passes(replies)
    with contextlib.ExitStack() as stack:
        if transforms := transforms_of(controls, passes):
            stack.enter_context(calls_watched(network, passes.note))
            stack.enter_context(transformed(network, transforms))
        yield network


def check_controls(
    model: LoadedModel | PreTrainedModel, controls: Sequence[Control], *, any_model: bool = False
) -> None:
    """Raise `BadInput` or `Refused` where controls do not belong to a model (see `controlled`)."""
    network = model.network if isinstance(model, LoadedModel) else model
    d_model = width(network)
    for each in controls:
        for site in each.sites:
            if each.vectors[site].shape[-1] != d_model:
                raise BadInput(
                    f"the control vector at {site} has width {each.vectors[site].shape[-1]}; the model's is {d_model}"
                )
    made_on = {each.model for each in controls if each.model and each.coefficient}
    if made_on and not any_model:
        print_of = model.fingerprint if isinstance(model, LoadedModel) else fingerprint(network)
        if made_on != {print_of}:
            raise Refused(
                f"the control's vectors belong to model {', '.join(sorted(made_on))}, this one is {print_of}; a "
                "direction of one model need not mean anything in another. In Python, any_model=True takes it anyway"
            )


def transforms_of(controls: Sequence[Control], passes: Passes) -> dict[Site, Transform]:
    """The controls as functions of the stream at each Site; those with coefficient 0 are left out."""
    chains: dict[Site, list[Transform]] = {}
    for each in controls:
        for site in each.sites if each.coefficient else ():
            chains.setdefault(site, []).append(_transform(each, site, passes))
    return {site: partial(_chained, chain) for site, chain in chains.items()}


def _chained(chain: Sequence[Transform], x: Stream) -> Stream:
    for transform in chain:
        x = transform(x)
    return x


def _transform(control: Control, site: Site, passes: Passes) -> Callable[[Stream], Stream]:
    vector = control.vectors[site]
    if control.operator == "projection":
        vector = _orthonormal(vector)

    def run(x: Stream) -> Stream:
        touched = passes.touched(control.tokens, x.device)
        if touched is not None and not bool(touched.any()):
            return x
        if control.operator == "contrast":
            _check_rows(len(vector), passes)
        new = operate(x, vector, control)
        return new if touched is None else torch.where(touched[..., None], new, x)

    return run


def _orthonormal(vector: Float[Tensor, "*row d_model"]) -> Float[Tensor, "rank d_model"]:
    """Orthonormal rows with the same span."""
    rows = vector.reshape(-1, vector.shape[-1])
    _, strength, right = torch.linalg.svd(rows.to(torch.promote_types(rows.dtype, torch.float32)), full_matrices=False)
    return right[strength > 1e-6 * strength.max()]


def _check_rows(count: int, passes: Passes) -> None:
    if passes.is_prefix:
        raise Refused(
            "contrast vectors are one a prompt, but a prefix that all prompts share is run for all at once; run the "
            "rows whole, with generate.greedy(…, share=False)"
        )
    if count != passes.rows:
        raise BadInput(f"contrast vectors of {count} prompts meet a batch of {passes.rows} rows; expected one a row")


def contrast_vectors(
    model: LoadedModel, positive: Prompts, negative: Prompts, sites: Sequence[Site], *, plain: bool = False
) -> dict[Site, Float[Tensor, "prompt d_model"]]:
    """What the positive copy of each prompt holds at its last token, minus what the negative copy does.

    With `plain`, texts are taken as they are, without the chat template. Raises `BadInput` for lists of unequal
    length. Source: Zou et al. 2023, "Representation Engineering", section 3.2, contrast vectors.
    """
    if len(positive) != len(negative):
        raise BadInput(f"{len(positive)} positive copies with {len(negative)} negative ones; expected one each")
    high, low = (last_held(model, texts, sites, plain=plain) for texts in (positive, negative))
    return {site: high[site] - low[site] for site in high}


def control(
    model: LoadedModel,
    prompts: PromptSet,
    controls: Sequence[Control],
    *,
    reply_tokens: int = 24,
    any_model: bool = False,
) -> list[list[str]]:
    """Greedy replies to prompts under each of several controls, one list a control; raises as `controlled` does."""
    said: list[list[str]] = []
    for each in controls:
        with controlled(model, each, any_model=any_model):
            said.append(
                generate.replies(model, prompts, max_new_tokens=reply_tokens, stage=f"replies at {each.coefficient:g}")
            )
    return said
