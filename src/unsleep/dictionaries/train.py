"""Activations → Dictionary: trains sparse autoencoders and transcoders in seconds to minutes.

1. Activations are scaled so that their mean norm is √d; the scale is folded into the weights on save.
2. Each step encodes a batch in bf16 and goes forward and backward by hand (`losses`).
3. Adam on float32 masters; decoder rows of norm 1; dead features revived by an auxiliary loss.

Everything random comes from `seed` and the step's number, so a run that was killed and resumed from
its checkpoint ends with the same bits as one that was not. Several dictionaries can be trained in one
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
"""Called after every step with its number and what each dictionary measured; a tracker, for example."""

SMOOTH = 0.3
"""Weight of a step in the running FVU: it lags about three steps behind."""

SECONDS = 30.0
"""A checkpoint is written when this time has passed, if `checkpoint_every` has not come before."""


@dataclass(frozen=True)
class Checkpoint:
    """checkpoint.json: how far a training has come."""

    step: Count
    fvu: tuple[float, ...]
    identity: dict[str, Any]
    """What it is trained on, and how."""


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
        activations: in memory, or in shards on disk that are read as they are needed.
        target: what a transcoder rebuilds from them, token for token, at another Site.
        start: a dictionary to go on from instead of random weights, of the config's architecture and size
            (`config_for`); features keep their numbers, so that `compare.rotation` tells what became of each.
        checkpoint: a folder; an interrupted run with the same activations and config goes on from it.
        device: such as `cuda`.

    Raises:
        BadInput: too few activations, constant or non-finite ones, a target or a start that does not match, or
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

    As `train`, one result a config. The configs must agree in tokens and batch; the order of the
    batches is the first one's seed's.
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
    """Inputs and, for a transcoder, targets: the same tokens in the same order."""

    def __init__(self, source: ActivationStream, aim: ActivationStream | None) -> None:
        if aim is None:
            self.stream, self.width = source, None
            return
        self.width = source.piece(0).shape[1]

        def both(i: int) -> Float[Tensor, "token d_in_and_out"]:
            return torch.cat([source.piece(i), aim.piece(i).to(source.piece(i).dtype)], dim=1)

        self.stream = ActivationStream(source.sizes, both, source.site, source.model, source.prompts)

    def sample(self) -> tuple[Tensor, Tensor | None]:
        """Some of the tokens."""
        return self._apart(self.stream.sample())

    def batches(self, config: TrainConfig, start: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The batches from step `start` on."""
        for batch in batches(self.stream, config.batch, config.steps, seed=config.seed, start=start):
            yield self._apart(batch)

    def _apart(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return (x, None) if self.width is None else (x[:, : self.width], x[:, self.width :])


def _check(source: ActivationStream, aim: ActivationStream | None, configs: Sequence[TrainConfig]) -> dict[str, Any]:
    """Refuse what cannot be trained on; returns what identifies the run."""
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
    """Write a checkpoint; the one before stays until this one is whole. Of several processes the first writes."""
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
    """Take up a checkpoint if there is one; returns the step to go on with and the FVUs so far."""
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
