"""Unsupervised trigger detectors: ΔW's singular vectors, and features that differ between the models.

Every list has the best by AUROC on half of the prompts, with the AUROC on the other half (see `pooling`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from unsleep.activations.harvest import harvest
from unsleep.activations.pairs import paired
from unsleep.base.records import Count
from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.crosscoders import Crosscoder, decoder_norm_ratio, train_crosscoder
from unsleep.dictionaries.train import train
from unsleep.locate.diffing.pooling import Contrast, Detector, Told, best, pooled
from unsleep.locate.diffing.weights import Delta
from unsleep.models.anatomy import anatomy
from unsleep.models.model import LoadedModel
from unsleep.models.sites import width, writers
from unsleep.prompts.prompt import PromptSet

Method = Literal["dictionary", "difference", "crosscoder"]
"""Features of a dictionary of the suspect, of a diff-SAE on Δh, or of a crosscoder of both models."""


@dataclass(frozen=True)
class Watched(Detector):
    """A singular vector of ΔW as a detector."""

    site: Site
    matrix: str
    """Name within its block of the matrix with this ΔW."""
    vector: Count
    """Index of the left singular vector."""
    sign: int
    """1 if the score is the largest cosine, −1 for the smallest."""


def monitor(
    suspect: LoadedModel, deltas: Sequence[Delta], prompts: Contrast, *, vectors: int = 4, count: int = 10
) -> list[Watched]:
    """Cosines of the residual stream with the top left singular vectors of each layer's two writing matrices.

    Zhong & Raghunathan 2025, "Watch the weights" (arXiv:2508.00161): ΔW writes along these vectors, whatever
    activates it. A prompt's score is its largest cosine, or its negated smallest. Returns the best `count` of all
    layers by the selection half; none for a family that writes through a norm, or where no writer has changed.
    """
    network = suspect.network
    by_name = {delta.name: delta for delta in deltas}
    rows: dict[Site, list[tuple[str, Float[Tensor, "vector d_model"]]]] = {}
    for layer in sorted({delta.layer for delta in deltas if delta.layer is not None}):
        for writer in writers(network, layer):
            delta = by_name.get(f"{anatomy(network).layers}.{layer}.{writer.path}.weight")
            if delta is not None and len(delta.spectrum.left):
                rows.setdefault(Site(layer), []).append((writer.path, delta.spectrum.left[:vectors]))
    names = {site: [(name, i) for name, u in own for i in range(len(u))] for site, own in rows.items()}
    matrices = {site: torch.cat([u for _, u in own]).to(suspect.device) for site, own in rows.items()}
    if not matrices:
        return []

    def cosines(u: Tensor) -> Any:
        def score(h: Float[Tensor, "token d_model"]) -> Float[Tensor, "token score"]:
            found = normalize(h.float(), dim=1) @ u.T
            return torch.cat([found, -found], dim=1)

        return score

    scores = pooled([suspect], prompts.ids, {site: cosines(u) for site, u in matrices.items()})
    places = [
        (site, *names[site][i % len(names[site])], 1 if i < len(names[site]) else -1)
        for site in scores
        for i in range(2 * len(names[site]))
    ]
    return [
        Watched(t.auroc, t.low, t.high, t.chosen, t.margin, t.n, *places[t.id])
        for t in best(torch.cat(list(scores.values()), 1), prompts, count)
    ]


@dataclass(frozen=True)
class FeatureList:
    """The best detectors among one dictionary's features, with held-out AUROC."""

    site: Site
    method: Method
    features: Count
    """Number of features of the dictionary."""
    best: tuple[Told, ...]


def feature_lists(
    base: LoadedModel,
    suspect: LoadedModel,
    coders: Sequence[tuple[Method, Coder | Crosscoder]],
    prompts: Contrast,
    *,
    count: int = 10,
) -> list[FeatureList]:
    """The best features of each dictionary, by AUROC of their maximum activation in a prompt.

    Raises `BadInput` for a dictionary whose width differs from the models'.
    """
    found: list[FeatureList] = []
    for method, coder in coders:
        needs = [suspect] if method == "dictionary" else [base, suspect]
        scores = pooled(needs, prompts.ids, {coder.site: _scorer(method, coder, suspect)})[coder.site]
        told = tuple(best(scores, prompts, count))
        if isinstance(coder, Crosscoder):
            ratios = decoder_norm_ratio(coder).nan_to_num(0.5)
            told = tuple(replace(t, ratio=float(ratios[t.id])) for t in told)
        found.append(FeatureList(coder.site, method, coder.n_features, told))
    return found


def _scorer(method: Method, coder: Coder | Crosscoder, model: LoadedModel) -> Any:
    if coder.d_model != width(model.network):
        raise BadInput(f"the {method} at {coder.site} has width {coder.d_model}; the models' is {width(model.network)}")
    ready = coder.to(torch.float32, model.device)
    if isinstance(ready, Crosscoder):
        return lambda old, new: ready.encode(old.float(), new.float())
    if method == "difference":
        return lambda old, new: ready.encode(new.float() - old.float())
    return lambda new: ready.encode(new.float())


def train_differences(
    base: LoadedModel,
    suspect: LoadedModel,
    prompts: Sequence[PromptSet],
    site: Site,
    folder: Path,
    config: TrainConfig = TrainConfig(architecture="batchtopk"),
) -> list[tuple[Method, Coder | Crosscoder]]:
    """Train a diff-SAE on Δh and a crosscoder on both models' activations at one Site.

    Args:
        prompts: harvested from both models; must exclude held-out prompts.
        folder: for the harvests and checkpoints; resumes earlier ones.
        config: of both; a crosscoder needs BatchTopK. For Δh no token counts as an attention sink, because its long
            tail may carry the behaviour.
    """
    sides = [
        [harvest(model, each, [site], folder / f"{i}-{name}") for i, each in enumerate(prompts)]
        for name, model in (("base", base), ("suspect", suspect))
    ]
    pair = paired(sides[0], sides[1], site)
    differences = replace(config, sink_ratio=1e9)
    device = suspect.device
    delta = train(pair.difference(), differences, checkpoint=folder / "difference", device=device)
    both = train_crosscoder(pair.before, pair.after, config, checkpoint=folder / "crosscoder", device=device)
    return [("difference", delta), ("crosscoder", both)]
