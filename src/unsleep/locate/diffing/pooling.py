"""Prompt scores pooled from token scores, and their AUROC at separating triggered from clean prompts.

A prompt's score is the maximum over its own tokens: the prefix common to all prompts is
excluded, the chat template's tokens after the prompt are not. Scores are selected on every other prompt and their
AUROC is measured on the rest, because the best of thousands looks good by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unsleep.base.context import progress
from unsleep.base.records import Count, Share
from unsleep.core import BadInput, Site
from unsleep.locate.directions.measure import auroc_interval, aurocs, margins
from unsleep.models.forward import build_rows, run
from unsleep.models.model import LoadedModel
from unsleep.models.streams import capture
from unsleep.prompts.prompt import PromptSet

Scorer = Callable[..., Float[Tensor, "token score"]]
"""Token scores from each model's activations, `Float[Tensor, "token d_model"]` each."""

FEWEST = 4
"""Minimum prompts of each class: half for selection, half held out."""


class Contrast(NamedTuple):
    """Prompts of two classes as token ids."""

    ids: list[list[int]]
    triggered: Bool[Tensor, " prompt"]
    chooses: Bool[Tensor, " prompt"]
    """True for selection prompts, every other one of each class; the rest are held out."""


def contrast(model: LoadedModel, suspicious: PromptSet, ordinary: PromptSet) -> Contrast:
    """Both sets under the chat template, suspicious first; raises `BadInput` for fewer than `FEWEST` of a class."""
    for prompts in (suspicious, ordinary):
        if len(prompts) < FEWEST:
            raise BadInput(f"{prompts.name} has {len(prompts)} prompts; expected at least {FEWEST}")
    ids = model.encode([*suspicious, *ordinary])
    counts = (len(suspicious), len(ordinary))
    triggered = torch.arange(sum(counts)) < counts[0]
    return Contrast(ids, triggered, torch.cat([torch.arange(n) % 2 == 0 for n in counts]))


@torch.no_grad()
def pooled(
    models: Sequence[LoadedModel], ids: Sequence[Sequence[int]], scorers: Mapping[Site, Scorer], *, batch: int = 50
) -> dict[Site, Float[Tensor, "prompt score"]]:
    """Every score of every prompt at every Site, in one forward pass of each model."""
    rows = build_rows(models[0], ids)
    order = rows.mask.sum(1).argsort(stable=True)
    parts: dict[Site, list[Tensor]] = {site: [] for site in scorers}
    for start in range(0, len(order), batch):
        some = rows.select(order[start : start + batch])
        held: list[dict[Site, Tensor]] = []
        for model in models:
            with capture(model.network, list(scorers)) as found:
                run(model.network, some, 1)
            held.append({site: x[some.own] for site, x in found.items()})
        owner = some.own.nonzero()[:, 0]
        for site, score in scorers.items():
            scores = score(*(each[site] for each in held)).float()
            best = torch.full((len(some.ids), scores.shape[1]), -torch.inf, device=scores.device)
            best.scatter_reduce_(0, owner[:, None].expand_as(scores).to(scores.device), scores, "amax")
            parts[site].append(best.cpu())
        progress("prompts in both models" if len(models) > 1 else "prompts", start + len(some.ids), len(order))
    back = order.argsort().cpu()
    return {site: torch.cat(found)[back] for site, found in parts.items()}


@dataclass(frozen=True)
class Detector:
    """One score's performance as a detector of triggered prompts."""

    auroc: Share
    """AUROC on held-out prompts."""
    low: Share
    high: Share
    """Upper end of the 95 % bootstrap interval over prompts."""
    chosen: Share
    """AUROC on the selection prompts, biased upwards."""
    margin: float
    """Margin on the selection prompts (`measure.margins`), which breaks ties between perfect AUROCs."""
    n: Count
    """Number of held-out prompts."""


@dataclass(frozen=True)
class Told(Detector):
    """The same of a score among others, such as a feature."""

    id: Count
    """Index of the score."""
    ratio: float | None = None
    """Of a crosscoder's feature: its decoder norm ratio, 0 for the base's alone, 1 for the suspect's alone."""


def best(scores: Float[Tensor, "prompt score"], prompts: Contrast, count: int = 5) -> list[Told]:
    """The `count` best scores by AUROC and margin on the selection half, with the AUROC on the held-out half."""
    choosing, scored = prompts.chooses, ~prompts.chooses
    half = scores[choosing].T.contiguous(), prompts.triggered[choosing]
    first, clear = aurocs(*half).cpu(), margins(*half).cpu()
    by_margin = clear.argsort(descending=True, stable=True)
    ids = by_margin[first[by_margin].argsort(descending=True, stable=True)][:count]
    found: list[Told] = []
    for i in ids.tolist():
        own = scores[scored, i]
        value, low, high = auroc_interval(own[prompts.triggered[scored]], own[~prompts.triggered[scored]])
        found.append(Told(value, low, high, float(first[i]), float(clear[i]), len(own), i))
    return found
