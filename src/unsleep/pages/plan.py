"""Page of a plan: the share of every GPU's memory that is left, task by task, with memory, hours and cost.

plan.json -> check -> make text visible -> view of each section -> plan.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unsleep.pages import text
from unsleep.pages.blocks import Block, Table
from unsleep.pages.comparing import paper_of, short, whole_page
from unsleep.pages.heatmap import heatmap
from unsleep.pages.page import LABEL_LIMIT, tree
from unsleep.pages.registry import Page
from unsleep.pages.verdict import Tile
from unsleep.planning.gpus import GIB
from unsleep.planning.record import PlanRecord

Record = Mapping[str, Any]

TASKS = {
    "full": ("Full fine-tune", "All weights are trained: weights, gradients and optimizer state of every parameter."),
    "lora": ("LoRA", "Low-rank matrices are trained over frozen weights."),
    "8bit": ("LoRA, 8-bit", "Low-rank matrices over weights of 8 bits; embeddings and unembedding are whole."),
    "4bit": ("LoRA, 4-bit", "Low-rank matrices over weights of 4 bits; embeddings and unembedding are whole."),
    "ppo": (
        "PPO",
        "Four models: all weights of a policy and a value model are trained; a reference and a reward model are held. "
        "Hours are without the generation of replies.",
    ),
    "harvest": ("Harvest", "The forward pass of a batch, and its activations at the Sites."),
    "dictionary": ("Dictionary", "Training of a dictionary of one Site, in float32, on activations in main memory."),
    "audit": ("Audit", "Greedy replies to a batch of prompts: prompts at once, then token by token with a KV cache."),
}
"""Task → name and lead."""

VERDICTS = {"fits": "fits", "close": "close: within a tenth", "no": "does not fit"}

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "cache")


def view_of(record: Record) -> dict[str, Any]:
    """The template's view of a plan."""
    model, settings, cells = record["model"], record["settings"], record["cells"]
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    return {
        "eyebrow": "Plan",
        "title": f"Memory, time and cost of {short(model['name'])}",
        "lead": "Memory was counted on the meta device: storages alive during a step, block by block. Parts are not "
        "all alive at once, so that their sum is above the peak. Within a tenth of a GPU's memory, in either "
        "direction, a plan does not say whether a task fits. Time is that of the FLOPs of a step, and of the bytes "
        "that optimizers and generation move, at the stated share of the GPU's peak.",
        "tiles": [
            Tile("Parameters", "", f"{model['parameters']:,}", f"{model['blocks']} blocks, {model['dtype']}"),
            *(tile_of(task, cells, list(record["gpus"])) for task in tasks),
        ],
        "facts": [
            ("Model", text.clip(f"{model['name']} ({model['kind']})", LABEL_LIMIT)),
            ("Optimizer", f"{settings['optimizer']}, {settings['precision']}"),
            ("Share of peak", text.percent(settings["efficiency"])),
            ("Set aside", f"{text.number(settings['reserve'])} GiB"),
            ("Tokens", f"{settings['tokens']:,}"),
        ],
        "blocks": [*(task_block(task, record) for task in tasks), gpu_block(record)],
        "provenance": tree(record["provenance"]),
    }


def tile_of(task: str, cells: Sequence[Record], gpus: Sequence[str]) -> Tile:
    """The first GPU on which a task fits, in its leanest shape."""
    lean = min((cell for cell in cells if cell["task"] == task), key=lambda cell: cell["memory"]["peak"])
    fitting = [name for name in gpus if lean["fits"][name]["verdict"] == "fits"]
    note = f"{gib(lean['memory']['peak'])} GiB, {shape_of(lean)}"
    return Tile(TASKS[task][0], "", fitting[0] if fitting else "none fits", note)


def task_block(task: str, record: Record) -> Block:
    """The map of one task, and its memory, hours and costs as tables."""
    cells = [cell for cell in record["cells"] if cell["task"] == task]
    gpus: list[str] = list(record["gpus"])
    name, lead = TASKS[task]
    rows = [shape_of(cell) for cell in cells]
    drawn = heatmap(
        rows,
        gpus,
        [[round(100 * cell["fits"][gpu]["margin"], 1) for gpu in gpus] for cell in cells],
        title=f"{name}: memory left",
        name=f"map-{task}",
        unit="%",
        ends=(-100.0, 100.0),
        middle=0.0,
        notes=[[note_of(cell, cell["fits"][gpu]) for gpu in gpus] for cell in cells],
    )
    parts = [part for part in PARTS if any(cell["memory"][part] for cell in cells)]
    head = ["Tokens × rows", "Peak at", "Peak", *(part.capitalize() for part in parts)]
    memory = [
        [shape_of(cell), cell["memory"]["phase"], *(gib(cell["memory"][part]) for part in ("peak", *parts))]
        for cell in cells
    ]
    times = [[shape_of(cell), *(time_of(cell["fits"][gpu]) for gpu in gpus)] for cell in cells]
    tables = [
        Table(f"{name}: memory, GiB", head, 2, memory),
        Table(f"{name}: GPU-hours{' and price' if record['prices'] else ''}", ["Tokens × rows", *gpus], 1, times),
    ]
    return Block(task, name, lead, maps=[drawn], tables=tables)


def gpu_block(record: Record) -> Block:
    """The GPUs, with prices and sources."""
    prices = record["prices"]
    rows = [
        [
            name,
            gpu["datasheet"],
            gpu["capacity"],
            text.number(gpu["memory"]),
            text.number(gpu["bandwidth"], 4),
            f"{text.number(gpu['half'])}{'' if gpu['bfloat16'] else ' (float16 only)'}",
            text.number(gpu["single"]),
            text.decimals(prices[name], 2) if name in prices else "–",
        ]
        for name, gpu in record["gpus"].items()
    ]
    head = ["GPU", "Data sheet", "Source of memory", "GiB", "GB/s", "16-bit TFLOPS", "float32 TFLOPS", "Price per hour"]
    lead = "Memory is what PyTorch reports as the total capacity; throughput is that of the data sheet, dense."
    return Block("gpus", "GPUs", lead, tables=[Table("GPUs", head, 3, rows)])


def shape_of(cell: Record) -> str:
    """A cell's shape in words."""
    if cell.get("length") is None:
        return f"{cell['batch']:,} tokens"
    return f"{cell['length']:,} × {cell['batch']:,}{', checkpointed' if cell.get('checkpointed') else ''}"


def note_of(cell: Record, fit: Record) -> str:
    """Verdict and peak."""
    several = f", {fit['gpus']} would hold it" if fit["verdict"] == "no" else ""
    return f"({VERDICTS[fit['verdict']]}; {gib(cell['memory']['peak'])} GiB{several})"


def time_of(fit: Record) -> str:
    """Hours and price."""
    price = "" if fit.get("cost") is None else f" · {text.decimals(fit['cost'], 2)}"
    return f"{text.decimals(fit['hours'], 2)}{price}"


def gib(size: int) -> str:
    """Bytes in GiB."""
    return text.decimals(size / GIB, 1)


def draw(record: dict[str, Any]) -> str:
    """HTML page of a plan."""
    return whole_page(view_of(record))


PAGE = Page("plan", "Plan", PlanRecord, draw, paper=lambda record: paper_of(view_of(record)))
