"""Conditional interventions: active only on rows of a batch whose prompt meets a condition.

The condition compares the cosine similarity of h − center and a direction with a threshold, at one Site, at a
prompt's last token, or as the mean or maximum over its tokens (after conditional activation steering, Lee et al.
2024, arXiv:2409.05907).
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
    """A cosine-similarity condition on a prompt."""

    site: Site
    vector: Float[Tensor, " d_model"]
    center: Float[Tensor, " d_model"]
    """Subtracted before the cosine: the mean of the activations that the direction was fitted on."""
    threshold: float
    """Cosine threshold."""
    comparator: Comparator = "larger"
    """Direction of the comparison with the threshold."""
    pool: Pool = "last"
    """The token whose similarity counts, or the pooling over all tokens."""
    f1: float | None = None
    """F1 on the prompts that chose the threshold, or on held-out ones (`condition_on`)."""

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
        """Cosine similarity of each row, pooled over tokens; `real` is False at padding."""
        h = x.float() - self.center.to(x.device, torch.float32)
        each = cosine_similarity(h, self.vector.to(h).expand_as(h), dim=-1)
        if self.pool == "mean":
            return (each * real).sum(1) / real.sum(1).clamp_min(1)
        places = torch.arange(real.shape[1], device=real.device).expand_as(real)
        if self.pool == "max":
            return each.masked_fill(~real, -1.0).amax(1)
        return each.gather(1, torch.where(real, places, 0).amax(1, keepdim=True)).squeeze(1)

    def passes(self, similarity: Float[Tensor, " row"]) -> Bool[Tensor, " row"]:
        """Rows that meet the condition."""
        return similarity > self.threshold if self.comparator == "larger" else similarity < self.threshold

    def similarities(self, model: LoadedModel, texts: Prompts, *, plain: bool = False) -> Float[Tensor, " prompt"]:
        """Similarity of each prompt, under the chat template unless `plain`; raises as `held.batches_held` does."""
        rows = encoded(model, texts, plain=plain)
        out = torch.empty(len(rows))
        for index, found in batches_held(model, rows, [self.site]):
            x = found[self.site]
            lengths = torch.tensor([len(rows[i]) for i in index])
            out[index] = self.similarity(x, torch.arange(x.shape[1]) >= x.shape[1] - lengths[:, None])
        return out


@dataclass(frozen=True, eq=False)
class Conditional(Intervention):
    """Interventions restricted to the rows of a batch whose prompt meets a condition.

    The condition is evaluated in the pass over the prompts and holds while replies are generated. It is
    read during that pass, so the interventions must be at deeper Sites. Raises `BadInput` for one at or before the
    condition's Site and, at run time, `Refused` where rows leave the batch early or share a prefix: for batches
    of prompts see `locate.conditional.replies`.
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
                f"the intervention at {early[0]} is before or at the condition's Site {at}, which is read in the "
                "same pass; act on later layers, or use conditional.replies"
            )

    @property
    def widths(self) -> dict[Any, int | None]:
        """Widths at the condition's Site and at those of the interventions."""
        found: dict[Any, int | None] = {self.condition.site: len(self.condition.vector)}
        for each in self.interventions:
            found |= each.widths
        return found

    @property
    def made_on(self) -> str:
        """Fingerprint of the model that the interventions were fitted on."""
        return next((each.made_on for each in self.interventions if each.made_on and each.acts), "")

    @property
    def follows_passes(self) -> bool:
        """True: the condition is evaluated in the pass over the prompts only."""
        return True

    def transforms(self, passes: Passes, dtype: torch.dtype, device: torch.device | str) -> dict[Any, Transform]:
        """The condition at its Site, the gated interventions at theirs."""
        gate = _Gate(self.condition, passes)
        made = composed([each for each in self.interventions if each.acts], passes, dtype, device)
        return {self.condition.site: gate.judge, **{place: gate.behind(t) for place, t in made.items()}}


class _Gate:
    """Mask of the rows of the running batch that are steered."""

    def __init__(self, condition: Condition, passes: Passes) -> None:
        self.condition, self.passes_of = condition, passes
        self.open: Tensor | None = None

    def judge(self, x: Stream) -> Stream:
        """Evaluate the condition while the prompts run; returns the stream unchanged."""
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
        """The transform, applied to the open rows only."""

        def run(x: Stream) -> Stream:
            assert self.open is not None
            if not bool(self.open.any()):
                return x
            return torch.where(self.open[:, None, None], transform(x), x)

        return run
