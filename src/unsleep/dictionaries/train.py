"""Trains sparse autoencoders and transcoders on activations, in seconds to minutes.

1. Activations are scaled to a mean norm of √d; the scale is folded into the weights on save.
2. Each step encodes a batch in bf16 and runs hand-written forward and backward passes (`losses`).
3. Adam on float32 master weights; unit decoder rows; dead features revived by an auxiliary loss.

All randomness derives from `seed` and the step, so that a run resumed from
its checkpoint gives the same bits as an uninterrupted one. Several dictionaries can be trained in one
pass over the activations. Under torchrun the processes share every batch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base import records, store
from unsleep.base.context import progress
from unsleep.base.records import Count
from unsleep.core import Activations, ActivationStream, BadInput
from unsleep.dictionaries import parallel
from unsleep.dictionaries.buffer import batches, streamed
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.trainer import Step, Trainer

Source = Activations | ActivationStream
Watch = Callable[[int, Sequence[Step]], None]
"""Callback after every step with its number and each dictionary's metrics; for example a tracker."""

SMOOTH = 0.3
"""Weight of the current step in the running FVU, which lags about three steps."""

SECONDS = 30.0
"""Maximum seconds between checkpoints, if `checkpoint_every` steps take longer."""


@dataclass(frozen=True)
class Checkpoint:
    """checkpoint.json: how far a training has come."""

    step: Count
    fvu: tuple[float, ...]
    identity: dict[str, Any]
    """Training data and settings."""


def train(
    activations: Source,
    config: TrainConfig = TrainConfig(),
    *,
    target: Source | None = None,
    start: Coder | None = None,
    checkpoint: str | Path | None = None,
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
) -> Coder:
    """Train a dictionary on the activations of one Site.

    Args:
        activations: in memory `[token, d_in]`, or in shards on disk that are read on demand.
        target: reconstruction target of a transcoder at another Site, aligned by token, `[token, d_out]`.
        start: a dictionary for a warm start instead of random weights, of the config's architecture and size
            (`config_for`); feature indices are kept, so that `compare.rotation` can compare before and after.
        checkpoint: a folder; an interrupted run with the same activations and config resumes from it.
        device: such as `cuda`.

    Raises:
        BadInput: too few activations, constant or non-finite ones, a target or start that does not match, or
            a checkpoint of another run.
    """
    [dictionary] = train_many(
        activations, [config], target=target, start=start, checkpoint=checkpoint, device=device, watch=watch
    )
    return dictionary


def train_many(
    activations: Source,
    configs: Sequence[TrainConfig],
    *,
    target: Source | None = None,
    start: Coder | None = None,
    checkpoint: str | Path | None = None,
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
) -> list[Coder]:
    """Train several dictionaries (seeds, widths, architectures) in one pass over the activations.

    As `train`, one result per config. The configs must agree in tokens and batch; the order of
    batches follows the first config's seed.
    """
    source, aim = streamed(activations), streamed(target) if target is not None else None
    identity = _check(source, aim, configs) | ({} if start is None else {"start": start.hash})
    data = _Data(source, aim)
    inputs, targets = data.sample()
    if start is None:
        trainers = [Trainer(inputs, c, targets, device) for c in configs]
    else:
        trainers = [Trainer.from_dictionary(start, inputs, c, targets, device) for c in configs]
    folder = Path(checkpoint) if checkpoint is not None else None
    done, seen = _resume(folder, trainers, identity) if folder is not None else (0, [])
    first, saved = configs[0], time.monotonic()
    for step, (x, y) in enumerate(data.batches(first, done), done):
        results = [trainer.step(x, step, y) for trainer in trainers]
        seen = seen or [r.fvu for r in results]
        seen = [s + SMOOTH * (r.fvu - s) for s, r in zip(seen, results, strict=True)]
        if watch:
            watch(step, results)
        if step % 10 == 9 or step + 1 == first.steps:
            spread = f"{min(seen):.3f}" if len(seen) == 1 else f"{min(seen):.3f} to {max(seen):.3f}"
            progress(f"dictionary {source.site}, FVU {spread}", step + 1, first.steps)
        due = (step + 1) % first.checkpoint_every == 0 or time.monotonic() - saved > SECONDS
        if folder is not None and due:
            _save(folder, trainers, step + 1, seen, identity)
            saved = time.monotonic()
    return [
        trainer.dictionary(
            source, {"training": asdict(c), "training_fvu": fvu, "activations": identity}, aim and aim.site
        )
        for trainer, c, fvu in zip(trainers, configs, seen, strict=True)
    ]


class _Data:
    """Inputs and, for a transcoder, targets of the same tokens."""

    def __init__(self, source: ActivationStream, aim: ActivationStream | None) -> None:
        if aim is None:
            self.stream, self.width = source, None
            return
        self.width = source.piece(0).shape[1]

        def both(i: int) -> Float[Tensor, "token d_in_and_out"]:
            return torch.cat([source.piece(i), aim.piece(i).to(source.piece(i).dtype)], dim=1)

        self.stream = ActivationStream(source.sizes, both, source.site, source.model, source.prompts)

    def sample(self) -> tuple[Tensor, Tensor | None]:
        """A sample of the tokens."""
        return self._apart(self.stream.sample())

    def batches(self, config: TrainConfig, start: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches from step `start` on."""
        for batch in batches(self.stream, config.batch, config.steps, seed=config.seed, start=start):
            yield self._apart(batch)

    def _apart(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return (x, None) if self.width is None else (x[:, : self.width], x[:, self.width :])


def _check(source: ActivationStream, aim: ActivationStream | None, configs: Sequence[TrainConfig]) -> dict[str, Any]:
    """Raise `BadInput` for invalid training data; returns the run's identity."""
    if not configs or len({(c.tokens, c.batch) for c in configs}) != 1:
        raise BadInput(f"{len(configs)} training configs; expected at least one, all with the same tokens and batch")
    if source.tokens < 2:
        raise BadInput(f"{source.tokens} activations at {source.site}; expected at least 2 tokens")
    if aim is not None and (aim.sizes, aim.model, aim.prompts) != (source.sizes, source.model, source.prompts):
        raise BadInput(
            f"the target at {aim.site} has {aim.tokens} tokens of model {aim.model}, the input at {source.site} "
            f"{source.tokens} of {source.model}; expected the same tokens of the same model"
        )
    identity = {"config": [asdict(c) for c in configs], "site": str(source.site), "model": source.model}
    identity |= {"prompts": source.prompts, "tokens": source.tokens, "target": str(aim.site) if aim else None}
    return json.loads(json.dumps(identity))


def _save(folder: Path, trainers: Sequence[Trainer], step: int, fvu: list[float], identity: dict[str, Any]) -> None:
    """Write a checkpoint atomically. Under torchrun the first process writes."""
    if parallel.place()[0] != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for i, trainer in enumerate(trainers):
        store.write_tensors(folder / f"step-{step}-{i}.safetensors", trainer.state())
    records.save(Checkpoint(step, tuple(fvu), identity), folder / "checkpoint.json")
    for old in folder.glob("step-*.safetensors"):
        if not old.name.startswith(f"step-{step}-"):
            old.unlink()


def _resume(folder: Path, trainers: Sequence[Trainer], identity: dict[str, Any]) -> tuple[int, list[float]]:
    """Load a checkpoint if there is one; returns the step to resume at and the FVUs so far."""
    path = folder / "checkpoint.json"
    if not path.is_file():
        return 0, []
    found = records.load(Checkpoint, path)
    if found.identity != identity:
        raise BadInput(
            f"{folder} holds a checkpoint of another run (activations or settings differ); choose another folder"
        )
    for i, trainer in enumerate(trainers):
        trainer.load_state(folder / f"step-{found.step}-{i}.safetensors")
    return found.step, list(found.fvu)
