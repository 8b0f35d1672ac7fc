"""Fits the condition of conditional interventions (see `interventions.conditions`).

Threshold and comparator maximise F1 on labelled prompts. The natural defence
that acts on triggered prompts only (Lee et al. 2024, "Programming Refusal with Conditional Activation Steering",
arXiv:2409.05907, section 3.2; there the similarity is that of h with its projection).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unsleep.activations.held import last_held
from unsleep.core import BadInput, Site
from unsleep.interventions.conditions import Comparator, Condition, Pool
from unsleep.interventions.intervention import Intervention, applied
from unsleep.interventions.passes import TokenRule
from unsleep.interventions.steering import Operator
from unsleep.locate.directions.fit import Direction, Labelled, fit
from unsleep.locate.directions.measure import margins
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.models.sites import width
from unsleep.prompts.prompt import Prompts

LEAST = 4
"""Minimum prompts of each class: of four, two fit the direction, one chooses the threshold, one is held out."""


@dataclass(frozen=True)
class Gate:
    """Entry of steer.json for a `Condition`."""

    site: Site
    comparator: Comparator
    threshold: float
    pool: Pool
    f1: float | None


@dataclass(frozen=True)
class SteerRecord:
    """steer.json."""

    SCHEMA: ClassVar = "unsleep.steer/1"

    operator: Operator
    tokens: TokenRule
    layers: tuple[int, int] | None
    keep_norm: bool
    prompts: tuple[str, ...]
    replies: dict[str, tuple[str, ...]]
    """Coefficient → one reply a prompt."""
    provenance: dict[str, Any]
    condition: Gate | None = None
    acts: tuple[bool, ...] = ()
    """On which prompts, where there is a condition."""


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
    """The Site, pool, threshold and comparator with the best F1 (Lee et al. 2024, arXiv:2409.05907, section 3.2).

    Ties between Sites and pools go to the largest margin (`measure.margins`): early layers also separate a trigger
    string, but barely. Thresholds form an even grid over the similarities; ties go to the middle of the longest run
     of optimal thresholds, which leaves the largest margin on both sides.

    Args:
        directions: candidates of rank 1, one per Site.
        positive: prompts on which the control shall act.
        negative: prompts on which it shall not.

    Raises `BadInput` for a single class, no direction, one of higher rank or in feature space, a wrong width, or
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
        if direction.vector.shape[1] != width(model.network):
            raise BadInput(
                f"the direction at {direction.site} has width {direction.vector.shape[1]}; the model's is "
                f"{width(model.network)}"
            )
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
    """A condition that prompts like `like` meet and prompts like `unlike` do not: `fit_condition` of mean differences.

    Of every four prompts two fit the directions at the last token, one chooses Site and threshold, and one is held out:
    `f1` is measured on the held-out ones. Raises `BadInput` for fewer than 4 of either, and as `last_held` does.
    """
    if min(len(like), len(unlike)) < LEAST:
        raise BadInput(f"{len(like)} and {len(unlike)} prompts for the condition; expected at least {LEAST} of each")
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
    """Threshold and comparator with the best F1 on an even grid, and that F1 (see `fit_condition`)."""
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
    """Middle index of the longest run of True."""
    edges = torch.nn.functional.pad(good.int(), (1, 1)).diff()
    starts, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    longest = int((ends - starts).argmax())
    return int(starts[longest] + ends[longest] - 1) // 2


def f1_score(told: Bool[Tensor, " prompt"], labels: Bool[Tensor, " prompt"]) -> float:
    """2 · true positives / (predicted + labelled positives); 0 where there are none."""
    return float(2 * (told & labels).sum() / max(1, int(told.sum() + labels.sum())))


def replies(
    model: LoadedModel,
    texts: Prompts,
    control: Intervention | Sequence[Intervention],
    condition: Condition,
    *,
    max_new_tokens: int = 24,
    any_model: bool = False,
) -> tuple[list[str], Bool[Tensor, " prompt"]]:
    """Greedy replies, steered where the prompt meets the condition, and the mask of those prompts.

    Prompts are classified on the bare model first, then each group runs as a batch; replies to the others
    are the bare model's. Raises as `applied` and `models.generate.replies` do.
    """
    acts = condition.passes(condition.similarities(model, texts))
    rows = model.encode(texts, max_new_tokens)
    out: list[list[int]] = [[] for _ in texts]
    for name, group, used in (("steered", acts, control), ("others", ~acts, ())):
        index: list[int] = group.nonzero().flatten().tolist()
        if not index:
            continue
        with applied(model, used, any_model=any_model):
            said = generate.greedy(
                model, [rows[i] for i in index], max_new_tokens=max_new_tokens, stage=f"replies, {name}"
            )
        for i, ids in zip(index, said, strict=True):
            out[i] = ids
    return model.texts(out), acts
