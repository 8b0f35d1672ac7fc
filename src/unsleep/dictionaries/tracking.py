"""Logs training metrics to an experiment tracker, through accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from unsleep.core import BadInput
from unsleep.dictionaries import parallel
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.train import Watch
from unsleep.dictionaries.trainer import Step

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]

EVERY = 10
"""Steps between logged values."""

RUN_NAMES = {"wandb": "name", "trackio": "name", "mlflow": "run_name"}
"""Argument for a run's name, by tracker; TensorBoard's runs are folders."""


def check_tracker(tracker: Tracker) -> None:
    """Raise `BadInput` where accelerate or the tracker is not installed."""
    try:
        from accelerate.tracking import get_available_trackers
    except ImportError:
        raise BadInput(f"tracker {tracker} needs accelerate, which is not installed; pip install accelerate") from None
    if tracker not in [str(known) for known in get_available_trackers()]:
        raise BadInput(f"tracker {tracker} is not installed; pip install {tracker}")


@contextlib.contextmanager
def tracked(tracker: Tracker, configs: Mapping[str, TrainConfig], *, run: str, folder: Path) -> Generator[Watch | None]:
    """Yield a callback that logs FVU, L0 and dead features to `tracker` until the block ends.

    Args:
        configs: training configs by name; with several, metric names are prefixed with the config's.
        run: name of this run in the project `unsleep`, such as the Site.
        folder: output folder of trackers that write files.

    Under torchrun the first process logs. Raises `BadInput` where accelerate or the tracker is not installed.
    """
    check_tracker(tracker)
    if parallel.place()[0] != 0:
        yield None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=tracker, project_dir=folder)
    options = {tracker: {RUN_NAMES[tracker]: run}} if tracker in RUN_NAMES else {}
    project = "unsleep" if tracker in RUN_NAMES else run
    accelerator.init_trackers(project, config=_flat(configs), init_kwargs=options)

    def send(step: int, measured: Sequence[Step]) -> None:
        if step % EVERY == 0:
            accelerator.log(_named({name: m._asdict() for name, m in zip(configs, measured, strict=True)}), step=step)

    try:
        yield send
    finally:
        # Accelerator.end_training would end the process group too, which the next Site still needs.
        for one in accelerator.trackers:
            one.finish()


def _flat(configs: Mapping[str, TrainConfig]) -> dict[str, Any]:
    """Settings as values that trackers accept: numbers, flags and text."""
    flat = _named({name: asdict(config) for name, config in configs.items()})
    return {key: value if isinstance(value, int | float | str) else str(value) for key, value in flat.items()}


def _named(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All values in one mapping, under `config/name` with several configs."""
    return {f"{config}/{key}" if config else key: v for config, own in values.items() for key, v in own.items()}
