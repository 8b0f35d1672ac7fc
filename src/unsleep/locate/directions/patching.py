"""Directional activation patching: the effect of a direction alone on the model's answer.

    h' = h_cor + Vᵀ V (h_clean − h_cor)        recovered = (LD_patched − LD_cor) / (LD_clean − LD_cor)

LD is the logit of the clean prompt's answer minus that of the corrupted one's, at the last token, mean over
pairs (Tigges et al. 2023, arXiv:2310.15154, section 2.3). 1: the direction carries the whole difference; 0: none.

Clean prompts are the donors of corrupted ones, all pairs of a batch at once (see `locate.patching.engine`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unsleep.base.context import kept, progress
from unsleep.core import BadInput, Site
from unsleep.interventions.donors import subspace_of, whole
from unsleep.locate.directions.fit import Direction
from unsleep.locate.patching.engine import Resumable, Side
from unsleep.locate.patching.engine import prepare as run_sides
from unsleep.models.forward import run, splits, whole_rows
from unsleep.models.model import LoadedModel
from unsleep.models.sites import embedding
from unsleep.prompts.prompt import PromptSet

PatchPosition = Literal["last", "all"] | int
"""Patched tokens: the last, all (pairs of equal length), or one counted from -1 at the last."""


class Batch(NamedTuple):
    """A batch of pairs, run up to their last tokens: clean prompts are the donors of corrupted ones."""

    ready: Resumable
    answers: Int[Tensor, "pair 2"]
    """Answer tokens of the clean and of the corrupted prompt."""
    clean: Float[Tensor, " pair"]
    """Logit differences of the clean prompts."""
    corrupted: Float[Tensor, " pair"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of prompts, prepared for patching."""

    model: LoadedModel
    batches: tuple[Batch, ...]
    sites: tuple[Site, ...]

    def __len__(self) -> int:
        return sum(len(b.clean) for b in self.batches)

    @property
    def gap(self) -> tuple[float, float]:
        """Mean logit difference of the clean and of the corrupted prompts."""
        ends = [torch.cat([getattr(b, name) for b in self.batches]).double().mean() for name in ("clean", "corrupted")]
        return float(ends[0]), float(ends[1])

    def recovered(self, patched: Float[Tensor, " pair"]) -> float:
        """Share of the mean logit-difference gap that a patch recovers."""
        clean, corrupted = self.gap
        return (float(patched.double().mean()) - corrupted) / (clean - corrupted)


@torch.no_grad()
def prepare(
    model: LoadedModel,
    clean: PromptSet,
    corrupted: PromptSet,
    sites: Sequence[Site],
    *,
    answers: tuple[Sequence[int], Sequence[int]] | None = None,
    position: PatchPosition = "last",
    plain: bool = False,
    batch: int = 32,
) -> Pairs:
    """Run both prompts of every pair: `clean[i]` is paired with `corrupted[i]`.

    Args:
        sites: Sites that can be patched.
        answers: token ids of the clean and of the corrupted prompts' answers; default the model's
            most likely next tokens, without pairs where they are equal.
        plain: take the texts without the chat template.
        batch: pairs per forward pass.

    Raises:
        BadInput: unequal numbers of prompts or answers, a token outside the vocabulary, no pair with different
            answers, a position that a prompt lacks, or pairs of unequal length where all tokens are patched.
    """
    if len(clean) != len(corrupted) or not sites:
        raise BadInput(
            f"{len(clean)} clean and {len(corrupted)} corrupted prompts at {len(sites)} Sites; "
            "expected pairs, and at least one Site"
        )
    rows = [(a, b) for a, b in zip(*(model.encode(p, plain=plain) for p in (clean, corrupted)), strict=True)]
    if answers is None:
        firsts = [_next_tokens(model, [pair[i] for pair in rows], batch) for i in (0, 1)]
    else:
        firsts = [list(side) for side in answers]
        _check_answers(model, firsts, len(rows))
    kept = [i for i, (a, b) in enumerate(zip(*firsts, strict=True)) if a != b]
    if not kept:
        raise BadInput(
            f"the answers to both prompts are the same token in all {len(rows)} pairs; there is no difference to carry"
        )
    lengths = [len(b) for _, b in rows]
    kept.sort(key=lambda i: lengths[i])
    batches: list[Batch] = []
    for part in (kept[i : i + batch] for i in range(0, len(kept), batch)):
        chosen = torch.tensor([[firsts[0][i], firsts[1][i]] for i in part], device=model.device)
        batches.append(_run_pairs(model, [rows[i] for i in part], chosen, sites, position))
    pairs = Pairs(model, tuple(batches), tuple(sites))
    high, low = pairs.gap
    if not abs(high - low) > 1e-6 * max(abs(high), abs(low), 1e-6):
        raise BadInput("clean and corrupted prompts have the same logit difference; there is nothing to recover")
    return pairs


def patched(pairs: Pairs, site: Site, basis: Float[Tensor, "rank d_model"] | None) -> Float[Tensor, " pair"]:
    """Logit differences with the clean prompts' component in a subspace patched in; the whole activation where `None`.

    Differentiable in `basis`. Raises `BadInput` for a Site that was not prepared or a basis
    of another width.
    """
    return torch.cat([finished(b, site, basis) for b in pairs.batches])


def finished(batch: Batch, site: Site, basis: Float[Tensor, "rank d_model"] | None) -> Float[Tensor, " pair"]:
    """`patched` of one batch."""
    held = batch.ready.held
    if site not in held:
        raise BadInput(f"Site {site} was not prepared; expected one of {', '.join(map(str, held))}")
    if basis is not None and basis.shape[1] != held[site].shape[-1]:
        raise BadInput(f"a basis of width {basis.shape[1]} at {site}; the model's is {held[site].shape[-1]}")
    merge = whole if basis is None else subspace_of(basis.to(held[site].device, torch.float32))
    return _difference(batch.ready.patched({site: merge})[:, -1], batch.answers)


@torch.no_grad()
def sweep(pairs: Pairs, directions: Mapping[Site, Mapping[str, Direction]]) -> dict[Site, dict[str, float]]:
    """The share recovered by every direction at every Site; directions must be in the residual space.

    Raises `BadInput` as `patched` does, and for a direction in feature space, which must be decoded first.
    """

    def carried(site: Site, vector: Tensor) -> float:
        return pairs.recovered(patched(pairs, site, vector))

    total = sum(map(len, directions.values()))
    found: dict[Site, dict[str, float]] = {}
    for done, (site, name, direction) in enumerate(_each(directions), 1):
        if direction.space != "residual":
            raise BadInput(f"direction {name!r} at {site} is in feature space; decode it first (`fit.decoded`)")
        found.setdefault(site, {})[name] = kept(carried, site, direction.vector)
        progress("directional patching", done, total)
    return found


def _each(directions: Mapping[Site, Mapping[str, Direction]]) -> Iterator[tuple[Site, str, Direction]]:
    return ((site, name, d) for site, named in directions.items() for name, d in named.items())


def _run_pairs(
    model: LoadedModel,
    pairs: Sequence[tuple[list[int], list[int]]],
    answers: Int[Tensor, "pair 2"],
    sites: Sequence[Site],
    position: PatchPosition,
) -> Batch:
    """Run a batch of pairs, and keep the activations and caches that patching needs."""
    tail = _tail(pairs, position)
    sides = [Side(model, whole_rows(model, [pair[i] for pair in pairs], [])) for i in (0, 1)]
    starts = [max(s.rows.ids.shape[1] - tail, 0) if splits(model.network, s.rows.ids.shape[1]) else 0 for s in sides]
    mask = sides[1].rows.mask[:, -tail:]
    columns = torch.arange(mask.shape[1], device=mask.device)
    where = mask if position == "all" else (columns == 0).expand(mask.shape)
    clean, corrupted = (side.up_to(start) for side, start in zip(sides, starts, strict=True))
    ready = run_sides(clean, corrupted, sites, where, starts[1])
    return Batch(ready, answers, *(_difference(logits[:, -1], answers) for logits in ready.clean))


def _tail(pairs: Sequence[tuple[list[int], list[int]]], position: PatchPosition) -> int:
    """Number of last columns that a patch affects."""
    shortest = min(len(row) for pair in pairs for row in pair)
    if position == "all":
        if unequal := [pair for pair in pairs if len(pair[0]) != len(pair[1])]:
            clean, corrupted = unequal[0]
            raise BadInput(
                f"a pair has {len(clean)} and {len(corrupted)} tokens; to patch all tokens, pairs must be of equal "
                "length. Patch the last token, or write prompts of one length"
            )
        return max(len(row) for pair in pairs for row in pair)
    at = -1 if position == "last" else position
    if not -shortest <= at <= -1:
        raise BadInput(f"position {at} cannot be patched; expected -1 (the last token) to -{shortest}")
    return -at


def _difference(logits: Float[Tensor, "pair vocabulary"], answers: Int[Tensor, "pair 2"]) -> Float[Tensor, " pair"]:
    both = logits.float().gather(1, answers)
    return both[:, 0] - both[:, 1]


def _next_tokens(model: LoadedModel, rows: Sequence[Sequence[int]], batch: int) -> list[int]:
    """The most likely next token of every row."""
    found: list[int] = []
    for i in range(0, len(rows), batch):
        logits = run(model.network, whole_rows(model, rows[i : i + batch], []), 1)[:, -1]
        found += logits.float().argmax(-1).tolist()
    return found


def _check_answers(model: LoadedModel, answers: Sequence[Sequence[int]], n: int) -> None:
    size = len(embedding(model.network))
    for side in answers:
        if len(side) != n:
            raise BadInput(f"{len(side)} answers for {n} prompts; expected one each")
        if wrong := [token for token in side if not 0 <= token < size]:
            raise BadInput(f"answer token {wrong[0]} is not in the vocabulary; expected 0 to {size - 1}")
