"""The tables of docs/planning.md, from `unsleep plan` itself: what an 8B model needs by task, and on which GPU it fits.

python benchmarks/plan_question.py
"""

from __future__ import annotations

import tempfile

from transformers import AutoConfig

from unsleep.pages.plan import TASKS
from unsleep.planning.config import PlanConfig
from unsleep.planning.gpus import GIB, known
from unsleep.planning.record import Cell, PlanRecord
from unsleep.planning.run import plan

LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
"""The shape of Llama 3 8B (Grattafiori et al. 2024, arXiv:2407.21783, table 3)."""

GPUS = ("T4", "A10", "A40", "A100")

SHAPE = PlanConfig(lengths=(512,), batches=(4,), checkpointing="on", optimizer="adamw-fused")

PACKED = PlanConfig(tasks=("harvest", "audit"), lengths=(512,), batches=(4,), quantize="4bit")

MARKS = {"fits": "fits", "close": "close", "no": "no"}


def planned(config: PlanConfig) -> PlanRecord:
    """The plan of a model of 8 billion parameters."""
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model("llama", **LLAMA_8B, dtype="bfloat16").save_pretrained(folder)
        return plan(folder, GPUS, config=config)


def question() -> list[str]:
    """Every task, with its bytes per parameter and its fit."""
    whole, packed = planned(SHAPE), planned(PACKED)
    named = [(TASKS[cell.task][0], cell) for cell in whole.cells]
    named += [(f"{TASKS[cell.task][0]}, 4-bit", cell) for cell in packed.cells]
    head = ["task", "weights", "gradients", "optimizer", "bytes per parameter", "peak", *GPUS]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(line(name, cell, whole.model.parameters) for name, cell in named)]


def line(name: str, cell: Cell, parameters: int) -> str:
    """A row: GiB held, bytes per parameter of the model, peak, and the verdict on every GPU."""
    memory = cell.memory
    held = memory.weights + memory.gradients + memory.optimizer
    parts = [f"{part / GIB:.1f}" for part in (memory.weights, memory.gradients, memory.optimizer)]
    share = "–" if cell.task == "dictionary" else f"{held / parameters:.1f}"
    fits = [verdict(cell, gpu) for gpu in GPUS]
    return f"| {' | '.join([name, *parts, share, f'{memory.peak / GIB:.1f}', *fits])} |"


def verdict(cell: Cell, gpu: str) -> str:
    """The verdict, or the number of GPUs that would hold the task together."""
    fit = cell.fits[gpu]
    return f"{fit.gpus} of them" if fit.verdict == "no" else MARKS[fit.verdict]


def gpus() -> list[str]:
    """The table of GPUs."""
    head = ["GPU", "GiB", "GB/s", "16-bit TFLOPS", "float32 TFLOPS", "sources"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, gpu in known().items():
        half = f"{gpu.half:g}{'' if gpu.bfloat16 else ' (float16)'}"
        sources = f"[data sheet]({gpu.datasheet}), [memory]({gpu.capacity})"
        lines.append(f"| {name} | {gpu.memory:.2f} | {gpu.bandwidth:g} | {half} | {gpu.single:g} | {sources} |")
    return lines


if __name__ == "__main__":
    print("\n".join([*question(), "", *gpus()]))
