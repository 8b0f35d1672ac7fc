"""Erasers: oblique projections that remove a subspace with minimal change of ordinary tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.activations.collect import Position, collect, sink_norm
from unsleep.base.context import kept, progress
from unsleep.base.records import Count
from unsleep.core import BadInput, Point, Site
from unsleep.interventions.intervention import applied
from unsleep.interventions.subspaces import Projection
from unsleep.models import chat, generate
from unsleep.models.forward import Rows, build_rows, kl, reply_logits
from unsleep.models.model import LoadedModel
from unsleep.prompts.pairs import check_pairs
from unsleep.prompts.prompt import Prompt, PromptSet

STREAM: tuple[Point, ...] = ("resid", "embed")
"""Points with large-norm attention sinks; sublayer outputs have none, and projections there bake exactly."""

RIDGE = 1e-3
"""Ridge added to the diagonal of a second moment, in units of its mean."""

PASSAGE = 300
"""Characters used of a plain passage."""


def sink_norm_at(site: Site, x: Float[Tensor, "token d_model"]) -> float:
    """`collect.sink_norm` of ordinary tokens at a Site of the stream; infinite at what is added to it."""
    return sink_norm(x) if site.point in STREAM else float("inf")


def spanned(rows: Float[Tensor, "row d"], rank: int) -> Float[Tensor, "rank d"]:
    """Orthonormal basis of the first `rank` dimensions spanned by rows, in order (Gram-Schmidt, twice, in float64).

    Rows within 3° of the span of earlier ones are skipped; fewer are returned for a smaller span.
    """
    basis = torch.empty(0, rows.shape[1], dtype=torch.double)
    for row in rows.double():
        left = row / row.norm()
        for _ in range(2):
            left = left - (basis @ left) @ basis
        if float(left.norm()) > 0.05 and len(basis) < rank:
            basis = torch.cat([basis, left[None] / left.norm()])
    return basis.float()


def reader(
    basis: Float[Tensor, "rank d_model"],
    mean: Float[Tensor, " d_model"],
    covariance: Float[Tensor, "d_model d_model"],
    center: Float[Tensor, " d_model"],
) -> Float[Tensor, "rank d_model"]:
    """R with R Bᵀ = 1 and the smallest response to ordinary tokens around a centre.

    R = (B S⁻¹ Bᵀ)⁻¹ B S⁻¹ with S the second moment around `center` of tokens of that mean and covariance: generalised
    least squares (Aitken 1935). Removing the component read by R moves ordinary tokens least; for one direction between
    two classes it is LEACE's projection (Belrose et al. 2023, arXiv:2306.03819), up to the tokens that define S.
    """
    off = (mean - center).double()
    second = covariance.double() + off[:, None] * off
    second.diagonal().add_(RIDGE * second.diagonal().mean())
    weighed = torch.linalg.solve(second, basis.double().T).T
    return torch.linalg.solve(weighed @ basis.double().T, weighed).float()


@torch.no_grad()
def erasers(
    model: LoadedModel,
    suspicious: PromptSet,
    ordinary: PromptSet,
    texts: Sequence[str],
    sites: Sequence[Site],
    *,
    position: Position = "last",
    plain: bool = False,
    batch: int = 64,
) -> list[Projection]:
    """Erasers of the mean difference at every Site, with minimal response to ordinary tokens (`reader`).

    Suspicious tokens are moved to the mean of the ordinary ones at the same position; ordinary tokens, of prompts and
    of plain text, stay nearly unchanged.

    Args:
        texts: plain passages; their tokens, and those of the ordinary prompts, are the ordinary tokens.
        position: the compared tokens of both groups.

    Raises `BadInput` for no passage, as `collect` does, and for groups with equal means.
    """
    if not texts:
        raise BadInput("erasing needs plain passages as well, and none were given; give some")
    prompts = PromptSet("both groups", (*suspicious, *ordinary), "edit")
    letters = min(PASSAGE, (chat.context_length(model.network) or 2 * PASSAGE) // 2)
    passages = PromptSet("plain text", tuple(Prompt(t[:letters]) for t in texts), "edit")
    here = collect(model, prompts, sites, position=position, plain=plain, batch=batch)
    beside = [
        collect(model, passages, sites, position="all", plain=True, batch=batch),
        collect(model, ordinary, sites, position="all", plain=plain, batch=batch),
    ]
    made: list[Projection] = []
    for site in sites:
        is_suspicious = here[site].prompt_index < len(suspicious)
        x = here[site].tensor.float()
        center = x[~is_suspicious].mean(0)
        gap = x[is_suspicious].mean(0) - center
        if not float(gap.norm()) > 1e-6 * float(center.norm()):
            raise BadInput(f"suspicious and ordinary prompts have the same mean at {site}; there is nothing to ablate")
        rest = torch.cat([acts[site].tensor.float() for acts in beside])
        limit = sink_norm_at(site, rest)
        rest = torch.cat([x[~is_suspicious], rest])
        rest = rest[rest.norm(dim=1) <= limit].double()
        basis = (gap / gap.norm())[None]
        reads = reader(basis, rest.mean(0).float(), rest.T.cov().float(), center)
        made.append(Projection(site, basis, center, model.fingerprint, reads, limit))
    return made


class Removed(NamedTuple):
    """KL from replies to suspicious prompts to the model's own replies to ordinary ones, in nats per token."""

    before: float
    """Without erasure."""
    after: dict[Site, float]
    """With one Site's eraser."""
    pairs: Count

    @property
    def best(self) -> Site:
        """The Site with the smallest remaining KL."""
        return min(self.after, key=lambda site: self.after[site])


@torch.no_grad()
def removed_alone(
    model: LoadedModel,
    edits: Sequence[Projection],
    suspicious: PromptSet,
    ordinary: PromptSet,
    *,
    plain: bool = False,
    reply_tokens: int = 6,
    batch: int = 32,
) -> Removed:
    """Apply each edit alone and measure the KL to the model's own replies to ordinary prompts.

    `ordinary[i]` is `suspicious[i]` without the trigger. The model's greedy reply to it is teacher-forced after
    both, and its distributions along it are the target, which distinguishes a repair from mere silence. Raises
    `BadInput` for groups of unequal size, or no edit.
    """
    if len(suspicious) != len(ordinary) or not edits:
        raise BadInput(
            f"{len(edits)} edits, {len(suspicious)} suspicious and {len(ordinary)} ordinary prompts; expected at least "
            "one edit, and pairs"
        )
    asked, own = (model.encode(group, plain=plain) for group in (suspicious, ordinary))
    replies = generate.greedy(model, own, max_new_tokens=reply_tokens)
    pieces: list[tuple[Rows, Tensor]] = []
    for i in range(0, len(asked), batch):
        part = slice(i, i + batch)
        trusted = build_rows(model, own[part], replies[part])
        target = reply_logits(model.network, trusted)[trusted.reply]
        pieces.append((build_rows(model, asked[part], replies[part]), target))

    def left() -> float:
        each = [kl(target, reply_logits(model.network, rows)[rows.reply]) for rows, target in pieces]
        return float(torch.cat(each).mean())

    before, after = left(), dict[Site, float]()

    def left_without(edit: Projection) -> float:
        with applied(model, edit):
            return left()

    for edit in edits:
        after[edit.site] = kept(left_without, edit, made_from=(model, asked, own, replies))
        progress("Site selection", len(after), len(edits))
    return Removed(before, after, len(asked))


def tried_erasers(
    model: LoadedModel,
    suspicious: PromptSet,
    ordinary: PromptSet,
    texts: Sequence[str],
    sites: Sequence[Site],
    *,
    kept: int = 3,
    pairs: int | None = None,
    position: Position = "last",
    plain: bool = False,
    batch: int = 64,
) -> tuple[list[Projection], Removed]:
    """`erasers` fitted on most prompts, evaluated one at a time (`removed_alone`) on the held-out ones.

    Args:
        kept: every n-th pair is held out; `pairs` of them are evaluated, all where `None`.

    Raises as both do, and `BadInput` where the groups are not paired.
    """
    check_pairs(suspicious, ordinary)
    n = len(suspicious)
    tried = [i for i in range(n) if i % kept == kept - 1][:pairs]
    others = [i for i in range(n) if i % kept != kept - 1]
    made = erasers(
        model,
        suspicious.at(others),
        ordinary.at(others),
        texts,
        sites,
        position=position,
        plain=plain,
        batch=batch,
    )
    alone = suspicious.at(tried), ordinary.at(tried)
    return made, removed_alone(model, made, *alone, plain=plain, batch=batch)
