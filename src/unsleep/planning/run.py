"""Plan: what fits where, in how many hours and at what cost.

1. The model is built from its config on the meta device, cut to the first blocks of every kind (`skeleton`).
2. Each task's network is made of it: quantised, with LoRA matrices, or with all weights trained.
3. A step runs on the meta device for every shape of a batch; a ledger counts the storages alive (`ledger`).
4. The memory of the whole model is composed block by block (`timeline`), and compared with every GPU's.
5. Hours follow from the FLOPs of the step and the bytes that it moves, at a stated share of the GPU's peak.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from unsleep.base import store
from unsleep.base.context import progress
from unsleep.core import BadInput
from unsleep.planning import inference, training
from unsleep.planning.config import TUNED, PlanConfig, Task
from unsleep.planning.gpus import DEFAULT, GIB, Gpu, named, priced
from unsleep.planning.packed import Bits
from unsleep.planning.record import MARGIN, Cell, Fit, PlannedModel, PlanRecord
from unsleep.planning.skeleton import Skeleton, build, files_of
from unsleep.planning.training import Step

HOUR = 3600

LENGTHS = (512, 2048)
"""Default tokens per row."""


def plan(
    model: str | Path,
    gpus: Sequence[str] = DEFAULT,
    prices: Mapping[str, float] | None = None,
    config: PlanConfig = PlanConfig(),
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PlanRecord:
    """Plan tasks on GPUs: memory, fit, GPU-hours and cost, from a model's config alone.

    Args:
        model: hub id, folder or alias, of which only the config is read; of weights in a folder, the header at most.
        gpus: names from the table (`gpus.known`).
        prices: GPU → price per hour, in any currency.
        revision: branch, tag or commit of a hub repository.
        trust_remote_code: run Python code that the checkpoint brings.

    Raises:
        BadInput: an unknown GPU; a price of another one; no config of a causal language model; a row longer than the
            model's context; a model whose memory depends on the numbers that it computes.
    """
    chosen = named(gpus)
    per_hour = priced(prices or {}, chosen)
    files = files_of(str(model), revision, remote_code=trust_remote_code)
    skeleton = build(files, config.dtype, remote_code=trust_remote_code)
    settings = skeleton.network.config.get_text_config(decoder=True)
    context = getattr(settings, "max_position_embeddings", None)
    lengths = config.lengths or sorted({min(length, context or length) for length in LENGTHS})
    if context and max(lengths) > context:
        raise BadInput.of("lengths", max(lengths), f"at most {context}, the context of {files.name}", "plan")
    config = replace(config, lengths=tuple(lengths))
    cells: list[Cell] = []
    for task, step, shape in _steps(skeleton, config, files.name):
        fits = {name: fit(step, gpu, per_hour.get(name), config) for name, gpu in chosen.items()}
        cells.append(Cell(task, step.memory, step.flops / 1e12, fits, *shape))
    about = PlannedModel(
        name=files.name,
        commit=files.commit,
        kind=skeleton.network.config.model_type,
        parameters=sum(weight.numel for weight in skeleton.weights()),
        blocks=len(skeleton.kinds),
        width=skeleton.width,
        vocabulary=skeleton.vocabulary,
        dtype=str(skeleton.network.dtype).removeprefix("torch."),
    )
    origin = store.provenance(None, config=store.hash_file(files.place / "config.json")[:16])
    return PlanRecord(about, chosen, per_hour, config, tuple(cells), origin)


Shape = tuple[int | None, int | None, bool | None]
"""Tokens per row, rows, and whether blocks are checkpointed."""


def _steps(skeleton: Skeleton, config: PlanConfig, name: str) -> Iterator[tuple[Task, Step, Shape]]:
    """A step of every task and shape."""
    base = sum(weight.bytes for weight in skeleton.weights())
    tuned = training.variants(skeleton, config.tasks, config)
    widths: dict[str, Bits | None] = {"none": None, "8bit": 8, "4bit": 4}
    bits = widths[config.quantize]
    loaded = skeleton.variant(bits=bits) if bits else skeleton
    shapes = [(length, batch) for length in config.lengths or () for batch in config.batches]
    todo: list[tuple[Task, int, int, bool | None]] = [
        (task, length, batch, switch)
        for task in dict.fromkeys(config.tasks)
        if task != "dictionary"
        for length, batch in shapes
        for switch in (config.switches if task in TUNED else (None,))
    ]
    for done, (task, length, batch, switch) in enumerate(todo):
        progress("plan", done, len(todo))
        try:
            if switch is not None:
                step = training.step(task, tuned[task], base, (batch, length, switch), config)
            else:
                step = {"harvest": inference.harvest, "audit": inference.audit}[task](loaded, batch, length, config)
        except RuntimeError as error:
            why = str(error).strip().splitlines()[0]
            kind = skeleton.network.config.model_type
            raise BadInput(f"{name} is a {kind}, whose memory cannot be counted without weights ({why})") from error
        yield task, step, (length, batch, switch)
    if "dictionary" in config.tasks:
        yield "dictionary", inference.dictionary(skeleton.width, config), (None, config.dictionary_batch, None)


def fit(step: Step, gpu: Gpu, price: float | None, config: PlanConfig) -> Fit:
    """A step on a GPU."""
    need, free = step.memory.peak + config.reserve * GIB, gpu.bytes - config.reserve * GIB
    if free <= 0:
        raise BadInput(f"--reserve {config.reserve:g} leaves nothing of a GPU with {gpu.bytes / GIB:.1f} GiB; lower it")
    margin = 1 - need / gpu.bytes
    verdict = "fits" if margin >= MARGIN else "no" if margin <= -MARGIN else "close"
    computing = step.flops / (gpu.flops(step.itemsize) * config.efficiency)
    moving = step.moved / (gpu.bandwidth * 1e9 * config.efficiency)
    hours = config.tokens / step.tokens * (computing + moving) / HOUR
    several = max(1, math.ceil(step.memory.peak / free))
    return Fit(verdict, margin, several, hours, None if price is None else hours * price)
