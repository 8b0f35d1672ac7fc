"""The activation-difference lens: mean Δh on unrelated text, read by the logit lens and by steering.

Minder et al. 2025, "Narrow finetuning leaves clearly readable traces in activation differences" (arXiv:2510.13900).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base.context import progress
from unsleep.base.records import Count, Positive
from unsleep.core import BadInput, Site
from unsleep.interventions.intervention import applied
from unsleep.interventions.steering import Steering
from unsleep.models import generate
from unsleep.models.alike import check_alike
from unsleep.models.forward import build_rows, run, whole_rows
from unsleep.models.model import LoadedModel
from unsleep.models.sites import all_sites, tap, width
from unsleep.models.streams import capture


@dataclass(frozen=True, eq=False)
class Lens:
    """Mean Δh at one Site over the first tokens of unrelated texts."""

    site: Site
    mean: Float[Tensor, "position d_model"]
    """h_suspect − h_base at each position, mean over texts."""
    size: Float[Tensor, " position"]
    """Mean ‖Δh‖ at each position; a much shorter mean Δh cancels out between texts."""
    scale: float
    """Mean ‖h_suspect‖ over all positions except the first, often an attention sink."""
    texts: int

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """Unit vector of the mean over positions after the first; zeros where the models agree."""
        return torch.nn.functional.normalize(self.mean[1:].mean(0), dim=0)


@torch.no_grad()
def activation_differences(
    base: LoadedModel,
    suspect: LoadedModel,
    texts: Sequence[str],
    sites: Sequence[Site],
    *,
    positions: int = 5,
    batch: int = 100,
) -> list[Lens]:
    """Mean Δh over the first positions of texts, without the chat template, at every Site in one pass of each model.

    Raises `BadInput` for incompatible models, unknown Sites, fewer than 2 positions, no texts, or a
    text with too few tokens.
    """
    check_alike(base, suspect, chats=False)
    if positions < 2 or not texts or not sites:
        raise BadInput(
            f"{positions} positions of {len(texts)} texts at {len(sites)} Sites; expected at least 2 positions, a text "
            "and a Site"
        )
    for site in sites:
        tap(base.network, site)
    ids = suspect.token_ids(texts)
    short = min(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[short]) < positions:
        raise BadInput(
            f"a text has {len(ids[short])} tokens ({texts[short][:40]!r}); expected at least {positions}: give longer "
            "texts or ask for fewer positions"
        )
    total = {site: torch.zeros(positions, width(base.network), dtype=torch.float64) for site in sites}
    size = {site: torch.zeros(positions, dtype=torch.float64) for site in sites}
    scale = dict.fromkeys(sites, 0.0)
    for start in range(0, len(ids), batch):
        rows = [row[:positions] for row in ids[start : start + batch]]
        old, new = (_held(model, rows, sites) for model in (base, suspect))
        for site in sites:
            delta = new[site].double() - old[site].double()
            total[site] += delta.sum(0)
            size[site] += delta.norm(dim=-1).sum(0)
            scale[site] += float(new[site][:, 1:].double().norm(dim=-1).mean(1).sum())
        progress("unrelated text", min(start + batch, len(ids)), len(ids))
    n = len(ids)
    return [Lens(s, (total[s] / n).float(), (size[s] / n).float(), scale[s] / n, n) for s in sites]


def _held(model: LoadedModel, rows: Sequence[Sequence[int]], sites: Sequence[Site]) -> dict[Site, Tensor]:
    with capture(model.network, sites) as found:
        run(model.network, whole_rows(model, rows, []), 1)
    return {site: x.cpu() for site, x in found.items()}


def steered_replies(
    model: LoadedModel,
    site: Site,
    direction: Float[Tensor, " d_model"],
    texts: Sequence[str],
    strength: float,
    *,
    scale: float,
    max_new_tokens: int = 24,
) -> list[str]:
    """Greedy replies with h + strength · scale · v / ‖v‖ at every token of prompt and reply.

    `scale` is a norm such as `Lens.scale`, so that strength 1 adds a vector of typical norm. Raises `BadInput` for
    a zero direction or a wrong width.
    """
    if direction.shape != (width(model.network),) or not float(direction.norm()) > 0:
        raise BadInput(
            f"the direction has width {len(direction)} and norm {float(direction.norm()):g}; expected width "
            f"{width(model.network)} and a norm over 0"
        )
    with applied(model, Steering({site: direction / direction.norm()}, coefficient=strength * scale)):
        return generate.replies(model, texts, max_new_tokens=max_new_tokens)


class Divergence(NamedTuple):
    """Distance between two models' residual streams after one layer, mean over tokens."""

    layer: Count
    relative: Positive
    """‖Δh‖ / ‖h_base‖."""
    added: Positive
    """‖Δh − Δh of the previous layer‖ / ‖h_base‖: this layer's own contribution."""


@torch.no_grad()
def divergences(
    base: LoadedModel, suspect: LoadedModel, ids: Sequence[Sequence[int]], *, batch: int = 16
) -> list[Divergence]:
    """Divergence after every layer over the tokens of rows, without their common prefix.

    Layers with large contributions are good candidates for a dictionary of the suspect or of Δh. Raises `BadInput` for
    incompatible models.
    """
    check_alike(base, suspect, chats=False)
    rows = build_rows(suspect, ids)
    sites = [Site(0, "embed"), *all_sites(base.network, ("resid",))]
    sums = torch.zeros(len(sites), 2, dtype=torch.float64)
    for start in range(0, len(rows.ids), batch):
        some = rows.select(slice(start, start + batch))
        held: list[dict[Site, Tensor]] = []
        for model in (base, suspect):
            with capture(model.network, sites) as found:
                run(model.network, some, 1)
            held.append(found)
        before = torch.zeros(1)
        for i, site in enumerate(sites):
            old = held[0][site][some.own].float().cpu()
            delta = held[1][site][some.own].float().cpu() - old
            length = old.norm(dim=1).clamp_min(1e-12)
            sums[i, 0] += (delta.norm(dim=1) / length).double().sum()
            sums[i, 1] += ((delta - before).norm(dim=1) / length).double().sum()
            before = delta
    means = (sums / int(rows.own.sum())).tolist()
    return [Divergence(i, *means[i + 1]) for i in range(len(sites) - 1)]
