"""Activations at Sites on labelled prompts, in memory: one batched forward pass for all Sites."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unsleep.base import store
from unsleep.base.context import progress
from unsleep.core import Activations, BadInput, Site
from unsleep.models.forward import Rows, build_rows, run
from unsleep.models.model import LoadedModel
from unsleep.models.streams import truncated, watched
from unsleep.prompts.prompt import PromptSet

Position = Literal["last", "all", "reply"] | int
"""Tokens of a prompt: its last; all of its own, after the prefix shared by all prompts; all of its
reply's; or one, counted from 0 at its first token or from -1 at its last.
"""

SINK_RATIO = 10.0
"""Multiple of the median norm above which a token is an attention sink."""


def sink_norm(x: Float[Tensor, "*token d_model"]) -> float:
    """The norm over which a token is an attention sink, from ordinary tokens."""
    return SINK_RATIO * float(x.float().norm(dim=-1).median())


def without_sinks(x: Float[Tensor, "token d_model"], limit: float | None = None) -> Float[Tensor, "other d_model"]:
    """Activations in float32 without attention sinks: tokens over a norm, by default their own `sink_norm`."""
    wide = x.float()
    return wide[wide.norm(dim=-1) <= (sink_norm(wide) if limit is None else limit)]


@torch.no_grad()
def collect(
    model: LoadedModel,
    prompts: PromptSet,
    sites: Sequence[Site],
    *,
    position: Position = "last",
    replies: Sequence[str] | None = None,
    plain: bool = False,
    batch: int = 64,
) -> dict[Site, Activations]:
    """Activations of `prompts` at `sites`, in the model's dtype and on the CPU, in the order of the prompts.

    Args:
        position: the tokens to collect. With `all`, collect sets of prompts with different shared
            prefixes as one set.
        replies: one per prompt, appended to it; required, and only used, with position `reply`.
        plain: take the texts without the chat template.
        batch: rows per forward pass.

    Raises:
        BadInput: no Sites, a Site or token that does not exist, a prompt longer than the context, a wrong number of
            replies, or none with position `reply`.
    """
    if not sites:
        raise BadInput("no Site was given; name at least one, such as resid.12")
    if (replies is not None) != (position == "reply"):
        raise BadInput(
            f"position is {position!r} and replies are {'' if replies else 'not '}given; one needs the other"
        )
    rows = model.encode(prompts, plain=plain)
    lengths = [len(row) for row in rows]
    tails = None
    if replies is not None:
        if len(replies) != len(rows):
            raise BadInput(f"{len(replies)} replies for {len(rows)} prompts; expected one each")
        tails = model.token_ids(replies, special=False)
    order = sorted(range(len(rows)), key=lambda i: lengths[i] + (len(tails[i]) if tails else 0))
    stacked = build_rows(model, [rows[i] for i in order], [tails[i] for i in order] if tails else None)
    wanted = _wanted(stacked, position, torch.tensor([lengths[i] for i in order]))
    deepest = max(site.layer for site in sites)
    pieces: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        chunk = stacked.select(part)
        keep = wanted[part][:, -chunk.ids.shape[1] :].to(model.device)
        seen: dict[Site, Tensor] = {}

        def take(site: Site, x: Tensor, keep: Tensor = keep, seen: dict[Site, Tensor] = seen) -> None:
            if x.shape[:2] == keep.shape:  # skip the separate pass over the shared prefix
                seen[site] = x[keep].cpu()

        with truncated(model.network, deepest), watched(model.network, {s: partial(take, s) for s in sites}):
            run(model.network, chunk, 1)
        for site, x in seen.items():
            pieces[site].append(x)
        progress("activations", min(start + batch, len(rows)), len(rows))
    owners = torch.tensor(order)[:, None].expand(wanted.shape)[wanted]
    back = owners.argsort(stable=True)
    made_from = store.hash_value([rows, tails, str(position)])
    return {
        site: Activations(torch.cat(found)[back], owners[back], site, model.fingerprint, made_from)
        for site, found in pieces.items()
    }


def _wanted(rows: Rows, position: Position, lengths: Tensor) -> Bool[Tensor, "row position"]:
    """Mask of the collected tokens of padded rows; `lengths` are the prompts' lengths including the prefix."""
    mask, reply = rows.mask.cpu(), rows.reply.cpu()
    columns = torch.arange(mask.shape[1])
    if position == "all":
        return rows.own.cpu()
    if position == "reply":
        if not bool(reply.any(1).all()):
            raise BadInput("a reply has no tokens; give a text for every prompt")
        return torch.nn.functional.pad(reply, (mask.shape[1] - reply.shape[1], 0))
    at = -1 if position == "last" else position
    assert isinstance(at, int)
    shortest, own = int(lengths.min()), int(rows.own.sum(1).min())
    shared = rows.common
    if not -shortest <= at < shortest:
        raise BadInput(f"position {at} is not in every prompt; the shortest has {shortest} tokens")
    if at < 0 and at >= -own:
        return (columns == mask.shape[1] + at).expand(mask.shape)
    places = lengths + at if at < 0 else torch.full_like(lengths, at)
    if int(places.min()) < shared:
        raise BadInput(
            f"position {at} is among the {shared} tokens that all prompts begin with, where they cannot differ; "
            f"expected {shared} to {shortest - 1}, or -{own} to -1"
        )
    return columns == (mask.shape[1] - lengths + places)[:, None]
