"""Ablation cost of directions on plain text, against random subspaces of equal rank.

    mean ablation:      x' = x − (x − x̄) Vᵀ V,    x̄ = the text's own mean at the Site
    resample ablation:  x' = x − (x − x̃) Vᵀ V,    x̃ = another token of the batch

The cost is the increase of the mean cross-entropy, in nats per token. Attention sinks are unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from unsleep.activations.collect import sink_norm, without_sinks
from unsleep.base.context import kept, progress
from unsleep.base.linear import rotated
from unsleep.base.records import Count, Positive
from unsleep.core import BadInput, Site
from unsleep.interventions.intervention import Intervention, applied
from unsleep.interventions.subspaces import Projection, Resampling
from unsleep.locate.directions.fit import Direction
from unsleep.models.forward import Below, Rows, build_rows, reply_logits, reply_logits_from, run, run_below
from unsleep.models.model import LoadedModel
from unsleep.models.streams import capture, truncated

Ablation = Literal["mean", "resample"]


class Cost(NamedTuple):
    """Increase of the loss by ablating each direction, in nats per token."""

    loss: Positive
    """Cross-entropy of the unmodified model."""
    increase: dict[str, float]
    random: dict[int, tuple[float, ...]]
    """Rank → the increase for each random subspace."""
    tokens: Count
    """Number of predicted tokens."""


@torch.no_grad()
def ablation_cost(
    model: LoadedModel,
    directions: Mapping[str, Direction],
    texts: Sequence[str],
    *,
    ablation: Ablation = "mean",
    randoms: int = 8,
    tokens: int = 32,
    seed: int = 0,
) -> Cost:
    """Ablation cost of every direction, all at one Site, on plain passages.

    Args:
        texts: passages; those shorter than `tokens` are skipped, the others truncated. The second half of each
            is predicted.
        randoms: random subspaces per rank.

    Raises `BadInput` for directions of different Sites or in feature space, an unknown ablation, and where no passage
    is long enough.
    """
    sites = {d.site for d in directions.values()}
    if len(sites) != 1 or any(d.space != "residual" for d in directions.values()):
        raise BadInput(f"directions at {len(sites)} Sites; expected one Site, and directions in the residual space")
    if ablation not in get_args(Ablation):
        raise BadInput(f"ablation is {ablation!r}; expected one of {get_args(Ablation)}")
    passages = [row[:tokens] for row in (model.token_ids(texts) if texts else []) if len(row) >= tokens]
    if not passages or tokens < 2:
        raise BadInput(f"no plain passage has {max(tokens, 2)} tokens; give longer ones")
    site = next(iter(sites))
    half = tokens // 2
    rows = build_rows(model, [p[:half] for p in passages], [p[half:] for p in passages])
    below = None if site.point == "embed" else run_below(model.network, rows, site.layer)
    held = _held(model, rows, site)
    generator = torch.Generator().manual_seed(seed)
    whole = _loss(model, rows, below)
    limit = sink_norm(held)
    bases = {("", name): d.vector for name, d in directions.items()}
    for rank in sorted({d.rank for d in directions.values()}):
        for i in range(randoms):
            drawn = torch.randn(held.shape[-1], rank, generator=generator)
            bases[str(rank), str(i)] = rotated(drawn.T)

    def increased(basis: Tensor, site: Site, ablation: Ablation) -> float:
        taken: Intervention = Projection(site, basis, held.mean(0), model.fingerprint, sink_norm=limit)
        if ablation == "resample":
            taken = Resampling(site, basis, held, seed, limit)
        with applied(model, taken):
            return _loss(model, rows, below) - whole

    increase: dict[str, float] = {}
    random: dict[int, list[float]] = {}
    for done, ((rank, name), basis) in enumerate(bases.items(), 1):
        found = kept(increased, basis, site, ablation, made_from=(model, passages, seed))
        if rank:
            random.setdefault(int(rank), []).append(found)
        else:
            increase[name] = found
        progress(f"ablation cost at {site}", done, len(bases))
    return Cost(whole, increase, {rank: tuple(v) for rank, v in random.items()}, int(rows.reply.sum()))


def _held(model: LoadedModel, rows: Rows, site: Site) -> Float[Tensor, "token d_model"]:
    """Activations at the Site on the passages, without attention sinks."""
    with truncated(model.network, site.layer), capture(model.network, [site]) as found:
        run(model.network, rows, 1)
    return without_sinks(found[site][rows.own])


def _loss(model: LoadedModel, rows: Rows, below: Below | None, size: int = 32) -> float:
    """Mean cross-entropy of the reply tokens, in nats."""
    total = 0.0
    for i in range(0, len(rows.ids), size):
        index = slice(i, i + size)
        part = rows.select(index)
        if below is None:  # the embedding is the first layer
            logits = reply_logits(model.network, part)
        else:
            logits = reply_logits_from(model.network, part, below.select(index, part))
        total += float(cross_entropy(logits[part.reply].float(), part.targets[part.reply], reduction="sum"))
    return total / int(rows.reply.sum())
