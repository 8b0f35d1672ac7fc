"""Interventions that act on some rows of a batch alone: those whose prompt passes a condition.

A condition is the cosine similarity of h − center with a direction, at one Site, at a prompt's last token, or the mean
or largest over its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from unsleep.activations.held import batches_held, encoded
from unsleep.core import BadInput, Refused, Site, check_finite
from unsleep.interventions.intervention import Intervention, composed, depth
from unsleep.interventions.passes import Passes
from unsleep.models.hooks import Transform
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Prompts

Stream = Float[Tensor, "row position d_model"]

Comparator = Literal["larger", "smaller"]
Pool = Literal["last", "mean", "max"]


@dataclass(frozen=True, eq=False)
class Condition:
    """When a control acts: a value."""

    site: Site
    vector: Float[Tensor, " d_model"]
    center: Float[Tensor, " d_model"]
    """Subtracted before the cosine: the mean of the activations that the direction was fitted on."""
    threshold: float
    """Cosine that has to be passed."""
    comparator: Comparator = "larger"
    """Whether the similarity has to be larger than the threshold, or smaller."""
    pool: Pool = "last"
    """The token whose similarity counts, or how those of all tokens become one."""
    f1: float | None = None
    """On the prompts that chose the threshold, or on others (`condition_on`)."""

    def __post_init__(self) -> None:
        if self.comparator not in get_args(Comparator):
            raise BadInput(f"comparator is {self.comparator!r}; expected one of {get_args(Comparator)}")
        if self.pool not in get_args(Pool):
            raise BadInput(f"pool is {self.pool!r}; expected one of {get_args(Pool)}")
        if not -1 <= self.threshold <= 1:
            raise BadInput.of("threshold", self.threshold, "a cosine, between -1 and 1", "condition")
        check_finite(self.vector, f"the condition's vector at {self.site}")
        check_finite(self.center, f"the condition's center at {self.site}")
        if not bool(self.vector.any()):
            raise BadInput(f"the condition's vector at {self.site} is zero; it has no direction")

    def similarity(
        self, x: Float[Tensor, "row position d_model"], real: Bool[Tensor, "row position"]
    ) -> Float[Tensor, " row"]:
        """The similarity of each row; `real` is False on padding."""
        h = x.float() - self.center.to(x.device, torch.float32)
        each = cosine_similarity(h, self.vector.to(h).expand_as(h), dim=-1)
        if self.pool == "mean":
            return (each * real).sum(1) / real.sum(1).clamp_min(1)
        places = torch.arange(real.shape[1], device=real.device).expand_as(real)
        if self.pool == "max":
            return each.masked_fill(~real, -1.0).amax(1)
        return each.gather(1, torch.where(real, places, 0).amax(1, keepdim=True)).squeeze(1)

    def passes(self, similarity: Float[Tensor, " row"]) -> Bool[Tensor, " row"]:
        """Which rows the control acts on."""
        return similarity > self.threshold if self.comparator == "larger" else similarity < self.threshold

    def similarities(self, model: LoadedModel, texts: Prompts, *, plain: bool = False) -> Float[Tensor, " prompt"]:
        """The similarity of each prompt, in the chat template unless `plain`; raises as `held.batches_held` does."""
        rows = encoded(model, texts, plain=plain)
        out = torch.empty(len(rows))
        for index, found in batches_held(model, rows, [self.site]):
            x = found[self.site]
            lengths = torch.tensor([len(rows[i]) for i in index])
            out[index] = self.similarity(x, torch.arange(x.shape[1]) >= x.shape[1] - lengths[:, None])
        return out


@dataclass(frozen=True, eq=False)
class Conditional(Intervention):
    """Let interventions act on the rows of a batch whose prompt passes a condition, and on no other.

    Rows are judged in the pass over their prompts and keep that judgement while their replies grow. The condition is
    read as the pass goes by, so the interventions have to stand behind it. Raises `BadInput` for one at or before the
    condition's Site, and, as it runs, `Refused` where rows leave the batch in the middle or share a prefix: for many
    prompts at once see `locate.conditional.replies`.
    """

    interventions: tuple[Intervention, ...]
    condition: Condition

    def __post_init__(self) -> None:
        at = self.condition.site
        if len({each.made_on for each in self.interventions if each.made_on and each.acts}) > 1:
            raise BadInput("the interventions under a condition were found in several models; expected one")
        early = [site for each in self.interventions if each.acts for site in each.widths if depth(site) <= depth(at)]
        if early:
            raise BadInput(
                f"the intervention at {early[0]} stands before or at the condition's Site {at}, which is read in the "
                "same pass; act on later layers, or use conditional.replies"
            )

    @property
    def widths(self) -> dict[Any, int]:
        """The condition's Site and those of the interventions, with the widths of their vectors."""
        found: dict[Any, int] = {self.condition.site: len(self.condition.vector)}
        for each in self.interventions:
            found |= each.widths
        return found

    @property
    def made_on(self) -> str:
        """Fingerprint of the model that the interventions were found in."""
        return next((each.made_on for each in self.interventions if each.made_on and each.acts), "")

    @property
    def follows_passes(self) -> bool:
        """It judges the pass over the prompts alone."""
        return True

    def transforms(self, passes: Passes, dtype: torch.dtype, device: torch.device | str) -> dict[Any, Transform]:
        """The condition's Site judges, the others act behind it."""
        gate = _Gate(self.condition, passes)
        made = composed([each for each in self.interventions if each.acts], passes, dtype, device)
        return {self.condition.site: gate.judge, **{place: gate.behind(t) for place, t in made.items()}}


class _Gate:
    """Which rows of the running batch the control acts on."""

    def __init__(self, condition: Condition, passes: Passes) -> None:
        self.condition, self.passes_of = condition, passes
        self.open: Tensor | None = None

    def judge(self, x: Stream) -> Stream:
        """Judge the rows where their prompts run; the stream stays as it is."""
        passes = self.passes_of
        if passes.is_prefix:
            raise Refused(
                "a condition is judged prompt by prompt, but a prefix that all prompts share is run for all at once; "
                "use conditional.replies, or run the rows whole"
            )
        if not passes.goes_on:
            real = passes.touched("prompt", x.device)
            assert real is not None
            self.open = self.condition.passes(self.condition.similarity(x, real))
        elif self.open is None or len(self.open) != passes.rows:
            raise Refused("rows have left the batch in the middle of their replies; use conditional.replies")
        return x

    def behind(self, transform: Transform) -> Transform:
        """The transform, on the rows that are open alone."""

        def run(x: Stream) -> Stream:
            assert self.open is not None
            if not bool(self.open.any()):
                return x
            return torch.where(self.open[:, None, None], transform(x), x)

        return run
