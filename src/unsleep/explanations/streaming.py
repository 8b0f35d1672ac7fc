"""One pass of a model over text that feeds the tallies of any number of dictionaries; resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from numpy import ndarray
from torch import Tensor

from unsleep.activations.batches import SHARED, TokenSource
from unsleep.base import store
from unsleep.base.context import identified, progress, steps_folder
from unsleep.core import BadInput, Site, check_finite, check_least
from unsleep.dictionaries.coders import Coder
from unsleep.explanations.tally import Batch, Tally, batch_of
from unsleep.explanations.text import Read, Text
from unsleep.models.model import LoadedModel
from unsleep.models.sites import tap, width

CHECKPOINT = 120.0
"""Seconds between checkpoints, where there is a folder for them (`resumable`)."""


SLOW = 20
"""Least time between checkpoints, over the time that one takes."""

ALL = 2**31
"""Number of batches of a finished pass."""


@dataclass(frozen=True)
class StatisticsConfig:
    """Sizes of feature statistics."""

    top: int = 12
    """Strongest contexts per feature, of different texts."""
    drawn: int = 40
    """Random firings per feature, for contexts by quantile and for explanations."""
    sample: int = 65_536
    """Tokens of random texts whose codes are kept whole: for co-firing, hard negatives and natural rates."""
    promoted: int = 10
    """Promoted tokens per feature, and as many suppressed ones."""
    partners: int = 8
    """Co-firing features per feature."""
    batch_tokens: int = 4096
    """Padded tokens per forward pass of the statistics."""
    seed: int = 0
    """Seed of the random firings and texts."""

    def __post_init__(self) -> None:
        check_least(self, "statistics", 1, "top", "drawn", "sample", "promoted", "partners", "batch_tokens")


class Piece(NamedTuple):
    """A batch of tokens with their activations."""

    batch: Batch
    activations: dict[Site, Tensor]
    begins: bool
    """True for the first piece of a source."""
    is_prefix: bool
    """True for the shared prefix of a source."""
    counts: bool
    """False for a prefix that was counted before an interrupt."""
    done: int
    """Batches up to and with this one."""
    seen: int
    """Tokens up to and with this one's."""


def pieces(
    model: LoadedModel, read: Read, sites: Sequence[Site], batch_tokens: int, sample: ndarray, done: int = 0
) -> Iterator[Piece]:
    """The batches of a text behind the first `done`, each source's shared prefix before its own.

    `sample` marks the rows whose codes are kept. Raises `BadInput` for activations that are NaN or infinite.
    """
    first, number, seen = 0, 0, 0
    for rows in read.rows:
        source = TokenSource(model, rows, sites)
        batches = source.batches(batch_tokens)
        skipped = min(len(batches), max(0, done - number))
        seen += sum(len(rows[i]) - source.shared for i in chain(*batches[:skipped])) + source.shared * bool(skipped)
        if skipped < len(batches):
            is_prefix = bool(source.shared)
            behind = number + skipped + (not is_prefix)
            for at, tensors in enumerate(source.stream(batches[skipped:], with_prefix=True)):
                found = {site: tensors[str(site)] for site in sites}
                for site, x in found.items():
                    check_finite(x, f"activations at {site}")
                batch = _batch(read.text, tensors, first, 0 if is_prefix else source.shared, sample, model.device)
                counts = not (is_prefix and skipped)
                seen += counts * len(batch.token)
                yield Piece(batch, found, at == 0, is_prefix, counts, behind + at, seen)
                is_prefix = False
        first, number = first + len(rows), number + len(batches)


def _batch(
    text: Text, tensors: dict[str, Tensor], first: int, prefix: int, sample: ndarray, device: torch.device
) -> Batch:
    """The tokens of a forward pass; a prefix is of its source's first row."""
    owner, position = tensors["prompt_index"], tensors["position"]
    row = first + owner.masked_fill(owner == SHARED, 0)
    starts = torch.from_numpy(text.starts)
    whole = bool((owner == SHARED).any())
    length = torch.full_like(row, len(row)) if whole else (starts[1:] - starts[:-1])[row]
    token = starts[row] + position
    return batch_of(token, position, row, length, prefix, torch.from_numpy(sample)[row], device)


def check_dictionaries(model: LoadedModel, dictionaries: Sequence[Coder]) -> None:
    """Raise `BadInput` without a dictionary, and for one of another model's width or at a Site that it lacks."""
    if not dictionaries:
        raise BadInput("no dictionary was given; expected at least one")
    for d in dictionaries:
        tap(model.network, d.site)
        if d.d_model != width(model.network):
            raise BadInput(
                f"the dictionary of {d.site} has width {d.d_model}; {model.name} has {width(model.network)}. Give one "
                "of this model"
            )


@torch.no_grad()
def tallied(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    read: Read,
    config: StatisticsConfig = StatisticsConfig(),
    stage: str = "statistics",
) -> list[Tally]:
    """The tally of each dictionary over a text; several may be of one Site.

    Within `resumable` an interrupted pass goes on from its last checkpoint. Raises as `check_dictionaries` does.
    """
    check_dictionaries(model, dictionaries)
    coders = [d.to(d.decoder.dtype, model.device) for d in dictionaries]
    tallies = [Tally(d.n_features, config.top, config.drawn, config.seed, model.device) for d in coders]
    hashes = [d.hash for d in dictionaries]
    identity = store.hash_value([identified([model, config]), hashes, read.text.hash])
    done, save = _checkpoint(tallies, identity)
    chosen = read.text.chosen(config.sample, config.seed)
    saved, pause = time.monotonic(), CHECKPOINT
    stage = f"{stage}, resumed" if done else stage
    for piece in pieces(model, read, sorted({d.site for d in coders}), config.batch_tokens, chosen, done):
        for d, tally in zip(coders, tallies, strict=True):
            code = d.encode_sparse(piece.activations[d.site].to(d.decoder))
            if piece.begins:
                tally.begin(code if piece.is_prefix else None)
            if piece.counts:
                tally.add(code, piece.batch)
        progress(stage, piece.seen, read.text.tokens)
        if not piece.is_prefix and (began := time.monotonic()) - saved > pause:
            save(piece.done)
            saved = time.monotonic()
            pause = max(CHECKPOINT, SLOW * (saved - began))
    save(ALL)
    return tallies


def _checkpoint(tallies: Sequence[Tally], name: str) -> tuple[int, Callable[[int], None]]:
    """Number of batches in the tallies, restored from a checkpoint if there is one, and a function that saves one."""
    folder = steps_folder()
    path = folder / f"{name}.safetensors" if folder else None
    done = 0
    if path is not None and path.is_file():
        state = store.read_tensors(path)
        done = int(state["done"])
        for i, tally in enumerate(tallies):
            own = f"{i}."
            tally.restore({key.removeprefix(own): x for key, x in state.items() if key.startswith(own)})

    def save(batches: int) -> None:
        if path is not None:
            state = {f"{i}.{key}": x for i, tally in enumerate(tallies) for key, x in tally.state().items()}
            store.write_tensors(path, {**state, "done": torch.tensor(batches)})

    return done, save
