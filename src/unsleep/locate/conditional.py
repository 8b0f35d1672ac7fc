"""Control that acts only on prompts whose similarity to a direction passes a threshold.

    similarity = cosine of (h − center) with the direction, at one Site, at a prompt's last token, or the mean or
                 largest over its tokens

Threshold and comparator are those of the best F1 on labelled prompts. This is the natural form of a defence
that acts on triggered prompts alone (Lee et al. 2024, "Programming Refusal with Conditional Activation Steering",
section 3.2; there the similarity is that of h with its projection).
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from unsleep.activations.held import batches_held, encoded, last_held
from unsleep.core import BadInput, Refused, Site, check_choices, check_finite
from unsleep.interventions.control import Control, Stream, check_controls, controlled, transforms_of
from unsleep.interventions.passes import Passes
from unsleep.locate.directions.fit import Direction, Labelled, fit
from unsleep.locate.directions.measure import margins
from unsleep.models import generate
from unsleep.models.hooks import Transform, calls_watched
from unsleep.models.model import LoadedModel
from unsleep.models.sites import width
from unsleep.models.streams import transformed
from unsleep.prompts.prompt import Prompts

Comparator = Literal["larger", "smaller"]
Pool = Literal["last", "mean", "max"]

LEAST = 4
"""Fewest prompts of each kind that a condition is made of: of so many, two fit it, one chooses it, one is kept."""


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
        check_choices(self, "", comparator=Comparator, pool=Pool)
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


def fit_condition(
    model: LoadedModel,
    directions: Sequence[Direction],
    positive: Prompts,
    negative: Prompts,
    *,
    pools: Sequence[Pool] = ("last",),
    thresholds: int = 201,
    plain: bool = False,
) -> Condition:
    """The Site, pool, threshold and comparator of the best F1 at telling positive prompts from negative ones.

    Of Sites and pools that are equally good, the one with the largest margin is taken (`measure.margins`): a trigger's
    string is told apart by early layers too, but hardly. Thresholds form an even grid from the smallest to the largest
    similarity; of those that are equally good, the one in the middle of the longest stretch is taken, for that leaves
    the most room on both sides.

    Args:
        directions: candidates of rank 1, one a Site.
        positive: prompts on which the control shall act.
        negative: prompts on which it shall not.

    Raises `BadInput` for one class, no direction, one of more ranks or of features, a direction of another width, or
    a grid of fewer than 2 thresholds.
    """
    if not positive or not negative:
        raise BadInput(f"{len(positive)} positive and {len(negative)} negative prompts; expected some of each")
    if not directions or not pools:
        raise BadInput("no direction or no pool to condition on; give at least one of each")
    if thresholds < 2:
        raise BadInput(f"a grid of {thresholds} thresholds; expected at least 2")
    labels = torch.tensor([True] * len(positive) + [False] * len(negative))
    best: tuple[tuple[float, float], Condition] | None = None
    for direction in directions:
        if direction.space != "residual" or len(direction.vector) != 1:
            raise BadInput(
                f"the direction at {direction.site} has rank {len(direction.vector)} in {direction.space} space; a "
                "condition needs rank 1 in the residual stream"
            )
        _check_width(model.network, direction.site, direction.vector)
        for pool in pools:
            open_to = Condition(direction.site, direction.vector[0], direction.center, 0.0, pool=pool)
            found = open_to.similarities(model, [*positive, *negative], plain=plain)
            threshold, comparator, f1 = best_threshold(found, labels, thresholds)
            worth = round(f1, 9), abs(float(margins(found[None], labels)[0]))
            if best is None or worth > best[0]:
                threshold = min(1.0, max(-1.0, threshold))
                best = worth, replace(open_to, threshold=threshold, comparator=comparator, f1=f1)
    assert best is not None
    return best[1]


def condition_on(
    model: LoadedModel, like: Prompts, unlike: Prompts, sites: Sequence[Site], *, plain: bool = False
) -> Condition:
    """A condition that prompts like some pass and prompts like others do not: `fit_condition` of mean differences.

    Of four prompts two fit the directions at the last token, one chooses Site and threshold, and one is kept: its `f1`
    is that of the kept ones. Raises `BadInput` for fewer than 4 of either, and as `last_held` does.
    """
    if min(len(like), len(unlike)) < LEAST:
        raise BadInput(f"{len(like)} and {len(unlike)} prompts to tell apart; expected at least {LEAST} of each")
    fitted, choosing, kept = (
        [[text for i, text in enumerate(texts) if i % LEAST in places] for texts in (like, unlike)]
        for places in ((0, 1), (2,), (3,))
    )
    high, low = (last_held(model, texts, sites, plain=plain) for texts in fitted)
    directions = [
        fit(Labelled.of(high[site], low[site]), "mean_difference", site=site, model=model.fingerprint) for site in sites
    ]
    found = fit_condition(model, directions, choosing[0], choosing[1], plain=plain)
    told = found.passes(found.similarities(model, [*kept[0], *kept[1]], plain=plain))
    return replace(found, f1=f1_score(told, torch.arange(len(told)) < len(kept[0])))


def best_threshold(
    similarities: Float[Tensor, " prompt"], labels: Bool[Tensor, " prompt"], count: int = 201
) -> tuple[float, Comparator, float]:
    """Threshold and comparator of the best F1 on an even grid, and that F1 (see `fit_condition`)."""
    grid = torch.linspace(float(similarities.min()), float(similarities.max()), count)
    best: tuple[float, Comparator, float] = (0.0, "larger", -1.0)
    for comparator in get_args(Comparator):
        told = similarities > grid[:, None] if comparator == "larger" else similarities < grid[:, None]
        hits = (told & labels).sum(1)
        f1 = 2 * hits / (told.sum(1) + labels.sum()).clamp_min(1)
        top = f1.max()
        if float(top) > best[2] + 1e-9:
            best = (float(grid[_middle(f1 >= top - 1e-9)]), comparator, float(top))
    return best


def _middle(good: Bool[Tensor, " threshold"]) -> int:
    """The middle of the longest run of True."""
    edges = torch.nn.functional.pad(good.int(), (1, 1)).diff()
    starts, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    longest = int((ends - starts).argmax())
    return int(starts[longest] + ends[longest] - 1) // 2


def f1_score(told: Bool[Tensor, " prompt"], labels: Bool[Tensor, " prompt"]) -> float:
    """2·hits / (told + labelled); 0 where neither is any."""
    return float(2 * (told & labels).sum() / max(1, int(told.sum() + labels.sum())))


@contextlib.contextmanager
def conditioned(
    model: LoadedModel | PreTrainedModel,
    control: Control | Sequence[Control],
    condition: Condition,
    *,
    any_model: bool = False,
) -> Generator[PreTrainedModel]:
    """Run a model under controls that act only on the rows of a batch whose prompt passes the condition.

    Rows are judged in the pass over their prompts and keep that judgement while their replies grow. The condition is
    read as the pass goes by, so controls have to stand behind it. For many prompts at once see `replies`.

    Raises as `controlled` does, `BadInput` for a control at or before the condition's Site, and `Refused` where rows
    leave the batch in the middle or share a prefix.
    """
    network = model.network if isinstance(model, LoadedModel) else model
    controls = [control] if isinstance(control, Control) else list(control)
    check_controls(model, controls, any_model=any_model)
    _check_width(network, condition.site, condition.vector[None])
    early = [site for c in controls if c.coefficient for site in c.sites if _depth(site) <= _depth(condition.site)]
    if early:
        raise BadInput(
            f"the control at {early[0]} stands before or at the condition's Site {condition.site}, which is read in "
            "the same pass; control later layers, or use conditional.replies"
        )
    passes = Passes()
    gate = _Gate(condition, passes)
    transforms: dict[Site, Transform] = {condition.site: gate.judge}
    for site, transform in transforms_of(controls, passes).items():
        transforms[site] = gate.behind(transform)
    with calls_watched(network, passes.note), transformed(network, transforms):
        yield network


def replies(
    model: LoadedModel,
    texts: Prompts,
    control: Control | Sequence[Control],
    condition: Condition,
    *,
    max_new_tokens: int = 24,
    any_model: bool = False,
) -> tuple[list[str], Bool[Tensor, " prompt"]]:
    """Greedy replies, under control where the prompt passes the condition, and which prompts do.

    Prompts are judged on the bare model first, then each group is run as one; the replies to prompts that do not pass
    are those of the bare model. Raises as `controlled` and `models.generate.replies` do.
    """
    acts = condition.passes(condition.similarities(model, texts))
    rows = model.encode(texts, max_new_tokens)
    out: list[list[int]] = [[] for _ in texts]
    for name, group, used in (("controlled", acts, control), ("others", ~acts, ())):
        index: list[int] = group.nonzero().flatten().tolist()
        if not index:
            continue
        with controlled(model, used, any_model=any_model):
            said = generate.greedy(
                model, [rows[i] for i in index], max_new_tokens=max_new_tokens, stage=f"replies, {name}"
            )
        for i, ids in zip(index, said, strict=True):
            out[i] = ids
    return model.texts(out), acts


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


def _depth(site: Site) -> tuple[int, int]:
    """Where a Site stands in the order of a forward pass; attention and MLP count as one, for some blocks run both."""
    return site.layer, {"embed": 0, "attn": 1, "mlp": 1, "resid": 2}[site.point]


def _check_width(network: PreTrainedModel, site: Site, vector: Float[Tensor, "rank d_model"]) -> None:
    if vector.shape[1] != width(network):
        raise BadInput(f"the direction at {site} has width {vector.shape[1]}; the model's is {width(network)}")
