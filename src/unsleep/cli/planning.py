"""Command that plans what fits on which GPU, in what time and at what cost: plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tyro.conf import OmitArgPrefixes

import unsleep
from unsleep.base import store
from unsleep.cli.console import Bars, say
from unsleep.cli.shared import Model, Out
from unsleep.core import BadInput
from unsleep.pages import report
from unsleep.planning.config import PlanConfig
from unsleep.planning.gpus import DEFAULT, GIB
from unsleep.planning.record import Cell, Fit, PlanRecord

RECORD = "plan.json"

MARKS = {"fits": "✓", "close": "~", "no": "✗"}


def plan(
    model: Model,
    gpu: tuple[str, ...] = DEFAULT,
    price: tuple[str, ...] = (),
    out: Out | None = None,
    config: OmitArgPrefixes[PlanConfig] = PlanConfig(),
    revision: str | None = None,
    trust_remote_code: bool = False,
    json: bool = False,
) -> int:
    """Plan what fits where and what it costs: memory, fit, GPU-hours and price, from a model's config alone.

    Args:
        model: Hub id, folder or alias; its weights are not needed.
        gpu: Names of GPUs, such as T4,A10,A40,A100,H100.
        price: Prices per hour, such as A100=1.8,T4=0.35.
        out: Folder for plan.json and plan.html.
        revision: Branch, tag or commit of the hub repository.
        trust_remote_code: Run Python code that the checkpoint brings. Only for authors that you trust.
        json: Print the record as JSON.
    """
    if out is not None:
        store.check_place(out, RECORD)
    gpus, prices = list(_split(gpu)), dict(map(_priced, _split(price)))
    with Bars():
        record = unsleep.plan(model, gpus, prices, config, revision=revision, trust_remote_code=trust_remote_code)
    lines = _lines(record)
    if out is not None:
        with store.writing(out):
            out.mkdir(parents=True, exist_ok=True)
        page: Path = report(out, record)
        lines.append(f"Saved in {out}; page: {page}")
    say(record, json, "\n".join(lines))
    return 0


def _split(texts: Iterable[str]) -> Iterator[str]:
    """Values that are separated by commas or spaces."""
    return (part for text in texts for part in text.replace(",", " ").split())


def _priced(text: str) -> tuple[str, float]:
    """A GPU and its price per hour."""
    name, equals, amount = text.partition("=")
    try:
        if equals:
            return name, float(amount)
    except ValueError:
        pass
    raise BadInput(f"--price is {text!r}; expected a GPU and its price per hour, such as A100=1.8")


def _lines(record: PlanRecord) -> list[str]:
    """The plan as a text table: a line per task and shape, a column per GPU."""
    model, settings = record.model, record.settings
    rows = [["task", "tokens × rows", "", "peak", *record.gpus]]
    rows += [
        [*_shape(cell), f"{cell.memory.peak / GIB:.1f} GiB", *map(_fit, cell.fits.values())] for cell in record.cells
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    priced = " and their price" if record.prices else ""
    return [
        f"{model.name}: {model.parameters:,} parameters in {model.blocks} blocks, {model.dtype}",
        "",
        *table,
        "",
        f"✓ fits, ~ within a tenth of the GPU's memory, ✗ does not fit, with {settings.reserve:g} GiB set aside;",
        f"behind it GPU-hours{priced} for {settings.tokens:,} tokens at {settings.efficiency:.0%} of the GPU's peak",
    ]


def _shape(cell: Cell) -> list[str]:
    """Task, shape and checkpointing."""
    shape = f"{cell.length} × {cell.batch}" if cell.length is not None else f"{cell.batch} tokens"
    return [cell.task, shape, "checkpointed" if cell.checkpointed else ""]


def _fit(fit: Fit) -> str:
    """Verdict, hours and price."""
    hours = f"{fit.hours:.2f} h" if fit.hours < 100 else f"{fit.hours:,.0f} h"
    return f"{MARKS[fit.verdict]} {hours}{'' if fit.cost is None else f' {fit.cost:,.2f}'}"
