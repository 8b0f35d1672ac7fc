"""What a merge costs: time against a copy of the same disk, and memory; and how closely it agrees with mergekit.

    python benchmarks/merge.py [--gigabytes 5] [--rounds 3] [--place DIR]

1. Two Llamas of random bfloat16 weights, in several files, are merged in a process of its own, whose anonymous
   memory is read from the system every two milliseconds. In turn with it, `cp` copies the first of them. Each runs
   twice in a row, and the second counts, which nothing that the other left slows down. All files are out of the page
   cache before each, and the clock stops when everything is on the disk. A copy moves each byte twice (read and
   written), a merge three times (two read, one written); bytes moved per second are compared. The bound on memory is
   twice the largest tensor and 500 MB.
2. Small models of three families are merged by unsleep and, from the YAML that it wrote, by mergekit, whose command
   must be on the PATH; in float32, written in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from common import keep, table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from support.merges import agreement
from support.tokenizers import byte_tokenizer
from unsleep import MergeConfig

SIZE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
ROWS, SHARD, BLOCK = 32000, 1 << 30, 1 << 24
SPARE = 500e6
FAMILIES = ("llama", "qwen2", "gemma2")
MERGES = {
    "linear, 0.3": {"alpha": 0.3},
    "linear, 1.7": {"alpha": 1.7},
    "linear, by layer": {"alpha": 0.3, "alpha_layers": "0=0.9,2=0.1"},
    "slerp, 0.3": {"alpha": 0.3, "method": "slerp"},
}

WORKER = """
import json, sys, threading, time
import unsleep
def held():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
peaks, going = [held()], threading.Event()
def watch():
    while not going.wait(0.002):
        peaks.append(held())
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
record = unsleep.merge(*sys.argv[1:4], unsleep.MergeConfig(alpha=0.3))
seconds = time.perf_counter() - start
going.set()
watcher.join()
counts = record.counts
found = {"seconds": seconds, "peak": max(peaks), "changed": counts.changed / counts.elements}
print(json.dumps(found | {"differing": counts.differing / counts.elements}))
"""


def large(first: Path, second: Path, size: float) -> tuple[int, int]:
    """Two random models of about so many bytes each; the bytes of one, and of its largest tensor."""
    layer = 2 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    count = max(1, round((size - 4 * ROWS * 4096) / layer))
    config = LlamaConfig(**SIZE, vocab_size=ROWS, num_hidden_layers=count, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in AutoModelForCausalLM.from_config(config).state_dict().items()}
    random = torch.Generator().manual_seed(0)
    block = torch.randn(BLOCK, generator=random).mul_(0.02)
    near = block + torch.randn(BLOCK, generator=random).mul_(0.0002)
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        if held + 2 * math.prod(shape) > SHARD:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += 2 * math.prod(shape)
    for folder, values in ((first, block.bfloat16()), (second, near.bfloat16())):
        folder.mkdir()
        config.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        files = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            files |= dict.fromkeys(names, file)
            save_file({name: filled(values, shapes[name]) for name in names}, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sizes = [2 * math.prod(shape) for shape in shapes.values()]
    return sum(sizes), max(sizes)


def filled(values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    whole = math.prod(shape)
    return values.repeat(whole // len(values) + 1)[:whole].view(shape)


def uncached(*folders: Path) -> None:
    """Put the files of folders out of the page cache."""
    os.sync()
    for path in (path for folder in folders for path in folder.glob("*.safetensors")):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(source: Path, target: Path) -> float:
    """Seconds of a copy that is on the disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def merged(first: Path, second: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, "-c", WORKER, str(first), str(second), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def costs(place: Path, gigabytes: float, rounds: int) -> dict[str, object]:
    first, second, out = (place / name for name in ("first", "second", "out"))
    size, largest = large(first, second, gigabytes * 1e9)
    copies: list[float] = []
    merges: list[dict[str, float]] = []
    for number in range(rounds):
        for what in ("copy", "merge") if number % 2 else ("merge", "copy"):
            for counts in (False, True):
                uncached(first, second)
                found = copied(first, out) if what == "copy" else merged(first, second, out)
                subprocess.run(["rm", "-r", str(out)], check=True)
                if counts and isinstance(found, float):
                    copies.append(found)
                elif counts and isinstance(found, dict):
                    merges.append(found)
    seconds = [found["seconds"] for found in merges]
    speeds = 2 * size / median(copies), 3 * size / median(seconds)
    peak = max(found["peak"] for found in merges)
    bound = 2 * largest + SPARE
    rows = [["", "seconds", "MB moved / s"]]
    rows += [["cp", f"{median(copies):.1f}", f"{speeds[0] / 1e6:,.0f}"]]
    rows += [["merge", f"{median(seconds):.1f}", f"{speeds[1] / 1e6:,.0f}"]]
    print(table(rows))
    print(f"merge / copy: {speeds[1] / speeds[0]:.2f} of its speed; {median(seconds) / median(copies):.2f} of its time")
    print(f"anonymous memory {peak / 1e6:,.0f} MB; bound {bound / 1e6:,.0f} MB; largest tensor {largest / 1e6:,.0f} MB")
    return {
        "model_bytes": size,
        "largest_tensor": largest,
        "seconds": {"copy": copies, "merge": seconds},
        "bytes_per_second": {"copy": speeds[0], "merge": speeds[1], "ratio": speeds[1] / speeds[0]},
        "time_ratio": median(seconds) / median(copies),
        "memory": {"peak": peak, "bound": bound, "ratio": peak / bound},
        "changed": merges[0]["changed"],
        "differing": merges[0]["differing"],
    }


def agreements(place: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    rows = [["family", "merge", "elements", "identical", "ulps"]]
    for family in FAMILIES:
        for name, options in MERGES.items():
            folder = place / f"{family}-{len(found)}"
            base = str(folder / "base") if options.get("method") == "slerp" else None
            one = agreement(folder, family, MergeConfig(**options, base=base))
            found.append({"family": family, "merge": name, **one._asdict()})
            rows.append([family, name, f"{one.elements:,}", f"{one.identical:.4%}", f"{one.ulps:.0f}"])
    print(table(rows))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--place", type=Path, help="folder on the disk that is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.place) as scratch:
        alike = agreements(Path(scratch))
        figures = costs(Path(scratch), options.gigabytes, options.rounds)
    print(keep("merge", {"mergekit": alike, "cost": figures}))


if __name__ == "__main__":
    main()
