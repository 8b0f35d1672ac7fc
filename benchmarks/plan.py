"""Predicted against measured peaks of memory: family × task × shape × optimizer × checkpointing × quantisation.

    python benchmarks/plan.py [--only NAME …] [--device cuda] [--at-once 8]

Every cell runs in a process of its own: random weights of a config, a few steps of the project's own code. With CUDA
the cells are of models of half a billion to a billion weights, and the peak is that of
`torch.cuda.max_memory_allocated`. On a CPU it is that of PyTorch's `MemTracker`, which sums the live storages of real
tensors and shares no code with the plan; the growth of the process (RSS) stands beside it. No figure of the plan was
fitted to any cell.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import keep, record_of, table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from unsleep.activations.batches import TokenSource
from unsleep.base.machine import compute_dtype, peak_memory_mb
from unsleep.core import Site
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.trainer import Trainer
from unsleep.models import adapters, generate, quantized
from unsleep.models.forward import Rows, reply_logits
from unsleep.models.load import quiet_transformers
from unsleep.models.model import LoadedModel
from unsleep.planning import inference
from unsleep.planning.config import PlanConfig
from unsleep.planning.run import plan

SMALL = {"vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 688, "num_key_value_heads": 2, "max_position_embeddings": 1024}
SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
SMOLLM2 |= {"num_key_value_heads": 3, "intermediate_size": 1536}
LLAMA_1B = {"vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32}
LLAMA_1B |= {"num_key_value_heads": 8, "intermediate_size": 8192, "tie_word_embeddings": True}
QWEN2_HALF_B = {"vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
QWEN2_HALF_B |= {"num_key_value_heads": 2, "intermediate_size": 4864, "tie_word_embeddings": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "qwen2": ("qwen2", {**LLAMA, "vocab_size": 8192, "num_hidden_layers": 4}),
    "phi3": ("phi3", {**LLAMA, "pad_token_id": 1}),
    "gpt2": ("gpt2", {"vocab_size": 4096, "n_embd": 192, "n_layer": 5, "n_head": 6, "n_positions": 512}),
    "gpt_neox": ("gpt_neox", {**SMALL, "intermediate_size": 1024, "max_position_embeddings": 1024}),
    "opt": ("opt", {**SMALL, "ffn_dim": 1024, "word_embed_proj_dim": 256, "max_position_embeddings": 1024}),
    "gemma2": ("gemma2", {**LLAMA, "head_dim": 64, "sliding_window": 64, "num_hidden_layers": 4}),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 4}),
    "smollm2": ("llama", {**SMOLLM2, "tie_word_embeddings": True, "max_position_embeddings": 2048}),
    "llama-1b": ("llama", {**LLAMA_1B, "max_position_embeddings": 4096}),
    "qwen2-0.5b": ("qwen2", {**QWEN2_HALF_B, "max_position_embeddings": 4096}),
}


@dataclass(frozen=True)
class Measured:
    """A cell."""

    family: str
    task: str
    length: int
    batch: int
    checkpointed: bool = False
    optimizer: str = "adamw"
    dtype: str = "float32"
    modules: tuple[str, ...] = ("all-linear",)

    @property
    def name(self) -> str:
        """Its values, joined."""
        marks = [self.optimizer] if self.task in ("full", "lora", "8bit", "4bit") else []
        marks += ["checkpointed"] if self.checkpointed else []
        marks += ["attention"] if self.modules == ATTENTION else []
        return "-".join([self.family, self.task, f"{self.length}x{self.batch}", *marks, self.dtype])


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

CELLS = (
    Measured("llama", "full", 128, 4),
    Measured("llama", "full", 256, 2, True),
    Measured("qwen2", "full", 64, 8, optimizer="adamw-fused"),
    Measured("gpt2", "full", 128, 4, optimizer="sgd"),
    Measured("gpt_neox", "full", 256, 2, optimizer="momentum"),
    Measured("opt", "full", 192, 3),
    Measured("phi3", "full", 192, 4, True, optimizer="adamw-fused"),
    Measured("gemma2", "full", 96, 4),
    Measured("smollm2", "full", 48, 2),
    Measured("llama", "lora", 128, 8),
    Measured("llama", "lora", 256, 4, dtype="bfloat16"),
    Measured("qwen2", "lora", 256, 4, True),
    Measured("gemma2", "lora", 128, 4),
    Measured("mixtral", "lora", 128, 4),
    Measured("mixtral", "lora", 128, 4, modules=ATTENTION),
    Measured("smollm2", "lora", 64, 4, True),
    Measured("llama", "8bit", 128, 8, dtype="bfloat16"),
    Measured("llama", "4bit", 128, 8, dtype="bfloat16"),
    Measured("qwen2", "4bit", 256, 4, True, dtype="bfloat16"),
    Measured("smollm2", "4bit", 64, 4, dtype="bfloat16"),
    Measured("llama", "harvest", 256, 8),
    Measured("gpt2", "harvest", 128, 16),
    Measured("smollm2", "harvest", 128, 4),
    Measured("llama", "audit", 128, 16),
    Measured("gpt_neox", "audit", 64, 32),
    Measured("smollm2", "audit", 96, 8),
    Measured("llama", "dictionary", 0, 1024),
    Measured("smollm2", "dictionary", 0, 2048),
)

HALF = "bfloat16"
CUDA_CELLS = (
    Measured("qwen2-0.5b", "full", 256, 4),
    Measured("llama-1b", "lora", 1024, 4, dtype=HALF),
    Measured("llama-1b", "lora", 2048, 4, True, dtype=HALF),
    Measured("llama-1b", "lora", 512, 8, dtype=HALF, modules=ATTENTION),
    Measured("qwen2-0.5b", "lora", 1024, 4, dtype=HALF),
    Measured("qwen2-0.5b", "lora", 512, 4),
    Measured("llama-1b", "8bit", 512, 4, dtype=HALF),
    Measured("llama-1b", "4bit", 1024, 4, dtype=HALF),
    Measured("llama-1b", "4bit", 2048, 2, True, dtype=HALF),
    Measured("qwen2-0.5b", "4bit", 512, 8, dtype=HALF),
    Measured("llama-1b", "harvest", 512, 16, dtype=HALF),
    Measured("qwen2-0.5b", "harvest", 256, 32, dtype=HALF),
    Measured("llama-1b", "audit", 256, 32, dtype=HALF),
    Measured("qwen2-0.5b", "audit", 128, 64, dtype=HALF),
    Measured("llama-1b", "dictionary", 0, 4096, dtype=HALF),
)


def main() -> None:
    """Measure every cell, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--at-once", type=int, default=1, help="processes that measure at the same time")
    parser.add_argument("--cell", help="measure one cell in this process")
    asked = parser.parse_args()
    if asked.cell:
        print(json.dumps(measure(Measured(**json.loads(asked.cell)), asked.device)))
        return
    chosen = [cell for cell in cells(asked.device) if not asked.only or cell.name in asked.only]
    with ThreadPoolExecutor(asked.at_once) as pool:
        rows = list(pool.map(lambda cell: run(cell, asked.device), chosen))
    found = {cell.name: row for cell, row in zip(chosen, rows, strict=True)}
    errors = [abs(row["error"]) for row in found.values()]
    print(table([HEAD, *(line(name, row) for name, row in found.items())]))
    print(f"{len(errors)} cells, largest error {max(errors):.1%}, mean {sum(errors) / len(errors):.1%}")
    record(found, asked.device)


def cells(device: str) -> tuple[Measured, ...]:
    """The cells of a device."""
    return CUDA_CELLS if device == "cuda" else CELLS


def record(found: dict[str, dict[str, Any]], device: str) -> None:
    """Write the figures of all cells of a device, those that were measured now in the place of earlier ones."""
    path = record_of("plan")
    known = json.loads(path.read_text())["measured"] if path.is_file() else {}
    rows = {cell.name: row for cell in cells(device) if (row := found.get(cell.name) or known.get(cell.name))}
    errors = [abs(row["error"]) for row in rows.values()]
    summary = {"cells": len(errors), "largest_error": max(errors), "mean_error": sum(errors) / len(errors)}
    keep("plan", {"device": device, "tracker": tracker(device), **summary, "measured": rows})


HEAD = ["cell", "predicted MB", "measured MB", "error", "RSS MB"]


def line(name: str, row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    figures = [f"{row[key] / 1e6:.1f}" for key in ("predicted", "measured")]
    return [name, *figures, f"{row['error']:+.1%}", f"{row['rss_mb']:.0f}"]


def tracker(device: str) -> str:
    """The measuring tool."""
    return "torch.cuda.max_memory_allocated" if device == "cuda" else "torch.distributed._tools.mem_tracker.MemTracker"


def run(cell: Measured, device: str) -> dict[str, Any]:
    """A cell's figures, from a process of its own."""
    command = [sys.executable, __file__, "--device", device, "--cell", json.dumps(asdict(cell))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{cell.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(cell: Measured, device: str) -> dict[str, Any]:
    """Predicted and measured peak in bytes, and the growth of the process in MB."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        kind, settings = FAMILIES[cell.family]
        ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        config = AutoConfig.for_model(kind, **ends | settings, dtype=cell.dtype)
        config.save_pretrained(folder)
        predicted = predict(cell, folder, device)
        work = WORK.get(cell.task, tuned)
        gc.collect()
        before = peak_memory_mb()
        measured = work(cell, Path(folder), device)
    rss = peak_memory_mb() - before
    return asdict(cell) | {
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1,
        "rss_mb": round(rss, 1),
    }


def predict(cell: Measured, folder: str, device: str) -> int:
    """The plan's peak in bytes."""
    settings = PlanConfig(
        tasks=(cell.task,),  # type: ignore[arg-type]
        lengths=(max(cell.length, 2),),
        batches=(cell.batch,),
        checkpointing="on" if cell.checkpointed else "off",
        optimizer=cell.optimizer,  # type: ignore[arg-type]
        modules=tuple(cell.modules),
        sites=SITES,
        reply_tokens=REPLY,
        dictionary_batch=cell.batch,
    )
    if cell.task == "dictionary":  # in float32 on a processor without bfloat16
        size = compute_dtype(torch.bfloat16, device).itemsize
        return inference.dictionary(FAMILIES[cell.family][1]["hidden_size"], settings, size).memory.peak
    return plan(folder, ["T4"], config=settings).cells[0].memory.peak


SITES, REPLY, STEPS = 2, 16, 3

RANK = 8
"""Rank of a dictionary's activations, of which many features never fire."""


class Storages(MemTracker):
    """`MemTracker` without its figures per module, which allow one call of each."""

    def _pre_fw_hook(self, *_: Any) -> None: ...

    def _post_fw_hook(self, *_: Any) -> None: ...

    def _pre_bw_hook(self, *_: Any) -> None: ...

    def _post_bw_hook(self, *_: Any) -> None: ...


class Watch:
    """Peak of live memory in a block of code, with what a network holds before it."""

    def __init__(self, device: str, *held: Any) -> None:
        self.device, self.peak = device, 0
        self.tracker = Storages()
        modules = [x for x in held if isinstance(x, torch.nn.Module)]
        if device == "cpu" and modules:
            self.tracker.track_external(*modules)
        self.packed = sum(t.untyped_storage().nbytes() for m in modules for t in unseen(m))

    def __enter__(self) -> Watch:
        if self.device == "cuda":
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.tracker.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
            return
        self.tracker.__exit__(*error)
        snapshot = self.tracker.get_tracker_snapshot("peak")
        self.peak = self.packed + sum(part["Total"] for part in snapshot.values())


def unseen(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Tensors of quantised layers that are no parameters: scales and lookup tables."""
    for inner in module.modules():
        state = getattr(getattr(inner, "weight", None), "quant_state", None)
        while state is not None:
            yield from (x for x in (state.absmax, state.code, state.offset) if isinstance(x, torch.Tensor))
            state = state.state2
        scales = getattr(getattr(inner, "weight", None), "SCB", None)
        if isinstance(scales, torch.Tensor):
            yield scales


def network_of(cell: Measured, folder: Path, device: str) -> Any:
    """A network with random weights, quantised where the cell is."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, cell.dtype))
    if cell.task in ("8bit", "4bit"):
        made.save_pretrained(folder)
        options = quantized.options(config, cell.task, cell.name) | {"device_map": device}  # type: ignore[arg-type]
        with quiet_transformers():
            made = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, cell.dtype), **options)
        quantized.keep_gradients(made)
    return made.to(device).eval().requires_grad_(False) if cell.task not in ("8bit", "4bit") else made.eval()


def tuned(cell: Measured, folder: Path, device: str) -> int:
    """Steps of fine-tuning, as `unsleep plant` trains: `reply_logits`, cross-entropy, clipping, an optimizer step."""
    network = network_of(cell, folder, device)
    if cell.task == "full":
        network.requires_grad_(True)
    else:
        network.requires_grad_(False)
        with quiet_transformers():
            adapters.trainable(network, PlanConfig().rank, cell.modules if len(cell.modules) > 1 else cell.modules[0])
    if cell.checkpointed:
        network.gradient_checkpointing_enable({"use_reentrant": False})
        network.train()
    weights = [w for w in network.parameters() if w.requires_grad]
    optimizer = OPTIMIZERS[cell.optimizer](weights)
    with Watch(device, network) as watch:
        ids = torch.randint(2, network.config.vocab_size, (cell.batch, cell.length), device=device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        rows = Rows(ids[0, :0], ids, mask, mask[:, 1:])
        for _ in range(STEPS):
            step(network, rows, weights, optimizer)
            gc.collect()  # 8-bit layers leave their inputs to the collector
    return watch.peak


def step(network: Any, rows: Rows, weights: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """One step of `unsleep.models.tuning.descend`, with another optimizer."""
    loss = loss_of(network, rows)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def loss_of(network: Any, rows: Rows) -> torch.Tensor:
    """The loss of `unsleep plant`."""
    logits = reply_logits(network, rows)[rows.reply]
    return cross_entropy(logits.float(), rows.targets[rows.reply])


OPTIMIZERS: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "adamw": lambda w: torch.optim.AdamW(w, lr=1e-4, weight_decay=0.0, foreach=True),  # the default on a GPU
    "adamw-fused": lambda w: torch.optim.AdamW(w, lr=1e-4, weight_decay=0.0, fused=True),
    "momentum": lambda w: torch.optim.SGD(w, lr=1e-4, momentum=0.9),
    "sgd": lambda w: torch.optim.SGD(w, lr=1e-4),
}


def loaded(cell: Measured, folder: Path, device: str) -> LoadedModel:
    """A network with a tokenizer of numbers."""
    words = {str(i): i for i in range(FAMILIES[cell.family][1]["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="0"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="1", eos_token="1", unk_token="0")
    return LoadedModel(network_of(cell, folder, device), fast, cell.name)


def random_rows(cell: Measured, vocabulary: int) -> list[list[int]]:
    """Rows of random tokens, without a common beginning."""
    return [[2 + i, *torch.randint(2, vocabulary, (cell.length - 1,)).tolist()] for i in range(cell.batch)]


def harvested(cell: Measured, folder: Path, device: str) -> int:
    """A batch of a harvest."""
    model = loaded(cell, folder, device)
    layers = model.network.config.num_hidden_layers
    sites = [Site(layers - 1 - i) for i in range(SITES)]
    source = TokenSource(model, random_rows(cell, model.network.config.vocab_size), sites)
    list(source.stream([[0]], with_prefix=False))  # the model's anatomy is examined once
    with Watch(device, model.network) as watch:
        for tensors in source.stream([list(range(cell.batch))], with_prefix=False):
            for name in map(str, sites):
                norms = tensors[name].float().norm(dim=-1)
                tensors[name][norms < math.inf].cpu()
    return watch.peak


def audited(cell: Measured, folder: Path, device: str) -> int:
    """A batch of greedy replies that never end."""
    model = loaded(cell, folder, device)
    rows = random_rows(cell, model.network.config.vocab_size)
    with Watch(device, model.network) as watch:
        generate.greedy(model, rows, max_new_tokens=REPLY, batch_size=cell.batch)
    return watch.peak


def dictionary(cell: Measured, _: Path, device: str) -> int:
    """Steps of a TopK dictionary's training, in which dead features are revived."""
    width = FAMILIES[cell.family][1]["hidden_size"]
    config = TrainConfig(features=inference.EXPANSION * width, batch=cell.batch, dead_after=1)
    with Watch(device) as watch:
        sample = (torch.randn(cell.batch, RANK) @ torch.randn(RANK, width)).to(device)
        trainer = Trainer(sample, config, None, device)
        for number in range(STEPS + 1):
            trainer.step(sample, number)
    return watch.peak


WORK: dict[str, Callable[[Measured, Path, str], int]] = {
    "harvest": harvested,
    "audit": audited,
    "dictionary": dictionary,
}

if __name__ == "__main__":
    main()
