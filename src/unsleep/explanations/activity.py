"""Activations of dictionary features on prompts and texts: by role, by span, and the tokens with the highest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unsleep.activations.held import batches_held
from unsleep.base.context import progress
from unsleep.core import Site
from unsleep.dictionaries.coders import Coder
from unsleep.locate.circuits.align import ROLES, Aligned
from unsleep.locate.circuits.contrast import Contrast
from unsleep.locate.circuits.effects import by_role, differences, node_effects, shifted
from unsleep.locate.circuits.spaces import FeatureSpace
from unsleep.locate.features import reply_log_odds
from unsleep.models.forward import Rows, reply_logits
from unsleep.models.model import LoadedModel

START, BEGUN = ROLES.index("start"), ROLES.index("begun")


class Strongest:
    """The tokens with each feature's highest activations, over any number of batches."""

    def __init__(self, features: int, count: int) -> None:
        self.values = torch.zeros(count, features)
        self.tokens = torch.full((count, features), -1)

    def add(self, f: Float[Tensor, "token feature"], ids: Int[Tensor, " token"]) -> None:
        """Take the activations on some tokens into account."""
        top = f.topk(min(len(self.values), len(f)), dim=0)
        values, tokens = torch.cat([self.values, top.values]), torch.cat([self.tokens, ids[top.indices]])
        self.values, order = values.topk(len(self.values), dim=0)
        self.tokens = tokens.gather(0, order)

    def of(self, feature: int) -> list[int]:
        """Token ids on which a feature fires, strongest first."""
        return self.tokens[self.values[:, feature] > 0, feature].tolist()


@dataclass(frozen=True, eq=False)
class Triggered:
    """A dictionary's features on aligned prompts with the payload forced, and on their references."""

    excess: Float[Tensor, "prompt role feature"]
    """Activation above the reference's, summed over the tokens of a role."""
    effect: Float[Tensor, "prompt role feature"]
    """Attribution to the payload's log-odds, in nats per token of the payload (`circuits.effects.node_effects`)."""
    message: Float[Tensor, "prompt feature"]
    """Peak over the prompt's tokens, without the template before the message."""
    other: Float[Tensor, "prompt feature"]
    """The same in the reference."""
    reply: Float[Tensor, "prompt feature"]
    """Peak from the prompt's last token to the end of the payload."""


def triggered(
    model: LoadedModel, coders: Sequence[Coder], aligned: Aligned, strongest: dict[Site, Strongest], batch: int
) -> dict[Site, Triggered]:
    """Features of every dictionary on aligned prompts: one pass with gradients and one of the references a batch."""
    spaces = [FeatureSpace(coder) for coder in coders]
    found: dict[Site, list[Triggered]] = {space.place: [] for space in spaces}
    places, k = [space.place for space in spaces], aligned.rows.reply.shape[1]
    contrast = Contrast(model, aligned, reply_log_odds, batch=batch)
    for start, part in contrast.parts():
        theirs, _ = contrast.run_reference(part, places)
        with shifted(model, places) as (held, zeros):
            gradients = torch.autograd.grad(contrast.value(part).sum(), [zeros[place] for place in places])
            slopes = dict(zip(places, gradients, strict=True))
        asked, said, before = _parts(part)
        for space in spaces:
            mine, place = held[space.place].detach(), space.place
            change = differences(space, part, mine, theirs[place]).features
            effect = node_effects(space, part, mine, theirs[place], slopes[place])[..., : space.size] / k
            one, other = (space.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (mine, theirs[place]))
            peaks = _peak(one, asked), _peak(other, before), _peak(one, said)
            each = by_role(part, change.clamp_min(0)), effect, *peaks
            found[place].append(Triggered(*(figure.float().cpu() for figure in each)))
            strongest[place].add(one[part.role >= 0].cpu(), part.rows.ids[part.role >= 0].cpu())
        progress("features on triggered prompts", start + len(part), len(aligned))
    return {place: _joined(parts) for place, parts in found.items()}


def _parts(part: Aligned) -> tuple[Bool[Tensor, "row position"], Bool[Tensor, "row position"], Tensor]:
    """Masks of the prompt's own tokens, of those from its last to the end of the payload, and of the reference's own.

    The template before the message is left out: it is the same in both, and holds the attention sink.
    """
    tail, start = part.role >= BEGUN, part.role == START
    said = tail | torch.cat([tail[:, 1:], tail[:, -1:]], 1)
    columns = torch.arange(part.reference.ids.shape[1], device=tail.device)
    before = part.reference.mask & (columns < len(columns) - tail.sum(1, keepdim=True))
    before &= part.reference.mask.cumsum(1) > start.sum(1, keepdim=True)
    return (part.role >= 0) & ~tail & ~start, said, before


def _peak(
    f: Float[Tensor, "row position feature"], where: Bool[Tensor, "row position"]
) -> Float[Tensor, "row feature"]:
    return f.masked_fill(~where[..., None], 0).amax(1)


def _joined(parts: Sequence[Triggered]) -> Triggered:
    names = ("excess", "effect", "message", "other", "reply")
    return Triggered(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True, eq=False)
class Spans:
    """A dictionary's features over spans of rows."""

    peak: Float[Tensor, "span row feature"]
    mean: Float[Tensor, "span row feature"]


@torch.no_grad()
def over_spans(
    model: LoadedModel,
    coders: Sequence[Coder],
    rows: Sequence[Sequence[int]],
    spans: Sequence[Sequence[range]],
    strongest: dict[Site, Strongest],
    batch: int,
    stage: str,
) -> dict[Site, Spans]:
    """Peak and mean activation of every feature over spans of token rows.

    Args:
        rows: token ids, with template and reply where there are any.
        spans: for each row as many ranges of positions, none of them empty.
        strongest: takes the tokens of the first span into account.
    """
    width = len(spans[0])
    shape = (width, len(rows))
    found = {c.site: Spans(*(torch.zeros(*shape, c.n_features) for _ in range(2))) for c in coders}
    done = 0
    for index, held in batches_held(model, rows, [c.site for c in coders], batch):
        for coder in coders:
            x, into = held[coder.site].to(coder.decoder), found[coder.site]
            for at, i in enumerate(index):
                f = coder.encode(x[at, x.shape[1] - len(rows[i]) :]).float().cpu()
                for s, span in enumerate(spans[i]):
                    piece = f[span.start : span.stop]
                    into.peak[s, i], into.mean[s, i] = piece.amax(0), piece.mean(0)
                first = spans[i][0]
                strongest[coder.site].add(f[first.start : first.stop], torch.tensor(rows[i][first.start : first.stop]))
        done += len(index)
        progress(stage, done, len(rows))
    return found


@torch.no_grad()
def attribution(
    model: LoadedModel, coders: Sequence[Coder], rows: Rows, batch: int
) -> dict[Site, Float[Tensor, "row feature"]]:
    """First-order loss of the replies' log-odds by ablating a feature, Σ_tokens f_j (∂m/∂x · d_j), in nats per token.

    `rows` have no prefix of their own (`forward.whole_rows`). Attribution patching with 0 as the patch state (Marks et
    al. 2024, arXiv:2403.19647, eq. 3).
    """
    spaces, k = [FeatureSpace(coder) for coder in coders], rows.reply.shape[1]
    found: dict[Site, list[Tensor]] = {space.place: [] for space in spaces}
    for start in range(0, len(rows.ids), batch):
        part = rows.at(slice(start, start + batch))
        with shifted(model, [space.place for space in spaces]) as (x, zeros):
            value = reply_log_odds(reply_logits(model.network, part), part)
            slopes = torch.autograd.grad(value.sum(), [zeros[space.place] for space in spaces])
        row = torch.arange(len(part.ids), device=part.ids.device)[:, None].expand_as(part.mask)[part.mask]
        for space, slope in zip(spaces, slopes, strict=True):
            each = space.encode(x[space.place].detach()[part.mask]) * space.read(slope[part.mask]) / k
            into = each.new_zeros(len(part.ids), each.shape[1])
            found[space.place].append(into.index_add_(0, row, each).cpu())
        progress("attribution", min(start + batch, len(rows.ids)), len(rows.ids))
    return {place: torch.cat(parts) for place, parts in found.items()}
