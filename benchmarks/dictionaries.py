"""Dictionary training against SAELens, dictionary_learning and sparsify: tokens a second, FVU, memory.

Every side runs in a process of its own (`workers/`), on the same float32 activations in the same batches,
with the same number of threads, one at a time and in turn. Writes `results/dictionaries.json` and `.md`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from common import RESULTS
from torch import Tensor

from unsleep import LoadConfig, Site, harvest, load_model
from unsleep.activations.harvest import Harvest, pooled
from unsleep.base import store
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Prompt, PromptSet, Split
from unsleep.prompts.sets import plain_text, questions

HERE = Path(__file__).parent
SCRATCH = HERE.parent / "runs" / "bench"
PEERS_PYTHON = HERE.parent / ".venv-interop" / "bin" / "python"
K, BATCH, THREADS, ROUNDS, SEED = 32, 2048, 2, 2, 0
MODEL, SITE, QUESTIONS, REPLY_TOKENS = "smollm2-135m", Site(15), 300, 12
DIRECTIONS, ACTIVE, NOISE = 16_384, 20, 0.1
TRAIN, HELD_OUT = 65_536, 8_192
OURS = "unsleep"
WORKERS = {
    OURS: "unsleep_train.py",
    "sae-lens": "sae_lens_train.py",
    "dictionary-learning": "dictionary_learning_train.py",
    "sparsify": "sparsify_train.py",
}
PEERS = [side for side in WORKERS if side != OURS]
ONLY_TOPK = "sparsify"
Figures = dict[str, Any]


TEXT = """# Dictionary training against other libraries

Made by `make bench-dictionaries`, {created}. Machine: {machine}. Versions: {versions}.

Every run is a process of its own with 2 threads, one at a time and in turn. All sides get the same float32
activations in the same batches of 2,048 tokens; the first 3 steps are not counted, nor is the reading of a batch.
Width 576: `resid.15` of SmolLM2-135M on plain text and on questions with their replies. Width 768: planted data,
20 of 16,384 unit directions a token on average with noise. k = 32 for TopK and BatchTopK.

## Speed and memory

Medians over the rounds. "Bound share" is the time of the encoder's matrix product at the rate that this machine
reaches in bf16, as a share of unsleep's step. Peak memory is the whole process's, libraries and activations
included; the peers' in the order of the columns.

{speed}

Over the longer runs below, which reach the steps where dead features are trained: {long} tokens/s.

## Fit

On held-out tokens after the same number of steps; FVU is 1 − explained variance over all tokens. TopK and
BatchTopK are rebuilt as in training, with k features a token on average, on every side. L1 and L0 costs are each
library's default, so Standard and JumpReLU end at different L0 and their FVUs do not compare. Learning rates are
the defaults too: some are meant for far longer runs.

{fit}
"""


@dataclass(frozen=True)
class Case:
    """One dictionary to train."""

    architecture: Literal["topk", "batchtopk", "standard", "jumprelu"]
    d: int
    features: int
    steps: int
    rounds: int = ROUNDS

    @property
    def sides(self) -> list[str]:
        """The libraries that have the architecture."""
        return [name for name in WORKERS if self.architecture == "topk" or name != ONLY_TOPK]

    @property
    def k(self) -> int | None:
        return K if self.architecture in ("topk", "batchtopk") else None

    def __str__(self) -> str:
        return f"{self.architecture}-{self.d}-{self.features}"


CASES = [
    Case("topk", 576, 4608, 23),
    Case("batchtopk", 576, 4608, 23),
    Case("standard", 576, 4608, 23),
    Case("jumprelu", 576, 4608, 23),
    Case("topk", 768, 6144, 18),
    Case("batchtopk", 768, 6144, 18),
    Case("topk", 768, 24576, 9, rounds=1),
    Case("batchtopk", 768, 24576, 9, rounds=1),
]
LONGER = [Case("topk", 576, 4608, 240, rounds=1), Case("batchtopk", 576, 4608, 240, rounds=1)]


def real_activations(path: Path) -> None:
    """Residual activations of a small model on plain text and on questions with their replies."""
    model = load_model(MODEL, LoadConfig(dtype="bfloat16"))
    parts: dict[str, Tensor] = {}
    for name, split, asked in (("train", "edit", QUESTIONS), ("held_out", "held_out", QUESTIONS // 5)):
        text, chats = harvests(model, name, split, asked)
        x = pooled([text, chats], SITE).tensor.float()
        size = min(len(x), TRAIN if name == "train" else HELD_OUT)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))
        parts[name] = x[order[:size]]
    store.write_tensors(path, parts)


def harvests(model: LoadedModel, name: str, split: Split, asked: int) -> tuple[Harvest, Harvest]:
    paragraphs = tuple(Prompt(text) for text in plain_text(split))
    text = harvest(model, PromptSet(name, paragraphs, split), [SITE], SCRATCH / f"text-{name}", plain=True)
    chats = questions(split, asked)
    replies = generate.replies(model, chats.texts, max_new_tokens=REPLY_TOKENS)
    return text, harvest(model, chats, [SITE], SCRATCH / f"chats-{name}", replies=replies)


def planted_activations(path: Path) -> None:
    """Sums of unit directions: `ACTIVE` of `DIRECTIONS` fire on a token on average, rates falling as rank ** -0.75.

    Strengths are uniform between 0.5 and 1.5; Gaussian noise of `NOISE` times the signal's size is added.
    """
    random = torch.Generator().manual_seed(SEED)
    d = 768
    directions = torch.nn.functional.normalize(torch.randn(DIRECTIONS, d, generator=random), dim=1)
    rates = torch.arange(1, DIRECTIONS + 1) ** -0.75
    rates *= ACTIVE / rates.sum()
    pieces: list[Tensor] = []
    for _ in range((TRAIN + HELD_OUT) // BATCH):
        fires = torch.rand(BATCH, DIRECTIONS, generator=random) < rates
        strengths = torch.rand(BATCH, DIRECTIONS, generator=random) + 0.5
        pieces.append((fires * strengths) @ directions)
    x = torch.cat(pieces)
    x += NOISE * float(x.square().mean().sqrt()) * torch.randn(x.shape, generator=random)
    store.write_tensors(path, {"train": x[:TRAIN], "held_out": x[TRAIN:]})


def data(d: int) -> Path:
    """The activations of that width, made once."""
    path = SCRATCH / f"activations-{d}.safetensors"
    if not path.is_file():
        SCRATCH.mkdir(parents=True, exist_ok=True)
        real_activations(path) if d == 576 else planted_activations(path)
    return path


def measure(case: Case, side: str) -> Figures:
    """Train once in a fresh process; returns what the worker printed."""
    task = {
        "data": str(data(case.d)),
        "architecture": case.architecture,
        "d": case.d,
        "features": case.features,
        "k": K,
        "batch": BATCH,
        "steps": case.steps,
        "seed": SEED,
        "threads": THREADS,
    }
    python = sys.executable if side == OURS else str(PEERS_PYTHON)
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(
        [python, str(HERE / "workers" / WORKERS[side]), json.dumps(task)],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{side} failed on {case}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(case: Case) -> dict[str, Figures]:
    """Every side's medians over the rounds, in which they take turns."""
    runs: dict[str, list[Figures]] = {side: [] for side in case.sides}
    for number in range(case.rounds):
        for side in case.sides:
            start = time.perf_counter()
            runs[side].append(measure(case, side))
            seconds = time.perf_counter() - start
            print(f"{case}, round {number + 1}, {side}, {seconds:.0f} s: {described(runs[side][-1])}", flush=True)
    names = ("tokens_per_s", "step_seconds", "fvu", "l0", "peak_mb", "before_mb", "others")
    return {
        side: {
            **{name: median(run[name] for run in found) for name in names},
            "rounds": [run["tokens_per_s"] for run in found],
            "steps": case.steps,
            "versions": found[0]["versions"],
        }
        for side, found in runs.items()
    }


def described(found: Figures) -> str:
    """A run in a line."""
    return (
        f"{found['tokens_per_s']:,.0f} tokens/s, FVU {found['fvu']:.3f}, L0 {found['l0']:.0f}, "
        f"{found['peak_mb']:,.0f} MB; other processes kept {found['others']:.2f} cores busy"
    )


def gemm_rate(case: Case) -> float:
    """FLOP a second of bf16 matrix products: the better of the encoder's shape and a large square."""
    torch.set_num_threads(THREADS)
    best = 0.0
    for rows, inner, columns in ((BATCH, case.d, case.features), (4096, 4096, 4096)):
        a = torch.randn(rows, inner).bfloat16()
        b = torch.randn(columns, inner).bfloat16()
        for _ in range(8):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - start))
    return best


def record(case: Case, found: dict[str, Figures], longer: dict[str, Figures] | None) -> Figures:
    """One case of the results; FVUs and L0s are those of the longer run, where there is one."""
    peers = [side for side in found if side != OURS]
    fit = longer or found
    best = min(peers, key=lambda side: fit[side]["fvu"])
    ours = found[OURS]
    return {
        "architecture": case.architecture,
        "d": case.d,
        "F": case.features,
        "k": case.k,
        "batch": BATCH,
        "unsleep_tokens_per_s": ours["tokens_per_s"],
        "peers": {side: found[side]["tokens_per_s"] for side in peers},
        "ratio_to_best": ours["tokens_per_s"] / max(found[side]["tokens_per_s"] for side in peers),
        "unsleep_fvu": fit[OURS]["fvu"],
        "peer_fvu": fit[best]["fvu"],
        "unsleep_l0": fit[OURS]["l0"],
        "peer_l0": fit[best]["l0"],
        "fvu_steps": fit[OURS]["steps"],
        "peak_mb": ours["peak_mb"],
        "peer_peak_mb": min(found[side]["peak_mb"] for side in peers),
        "bound_share": 2 * BATCH * case.d * case.features / gemm_rate(case) / ours["step_seconds"],
        "sides": found,
        "longer_run": longer,
    }


def report(entries: list[Figures]) -> str:
    """The results as Markdown."""
    speed = [["architecture", "d", "F", "tokens/s", *PEERS, "times the best peer", "bound share", "peak MB", "peers"]]
    fit = [["architecture", "d", "F", "steps", *(f"{side}, FVU (L0)" for side in WORKERS)]]
    for entry in entries:
        name = [entry["architecture"], str(entry["d"]), f"{entry['F']:,}"]
        peers = [f"{entry['peers'][side]:,.0f}" if side in entry["peers"] else "–" for side in PEERS]
        memory = " / ".join(f"{found['peak_mb']:,.0f}" for side, found in entry["sides"].items() if side != OURS)
        rates = [f"{entry['ratio_to_best']:.2f}", f"{entry['bound_share']:.0%}"]
        speed.append(
            [*name, f"{entry['unsleep_tokens_per_s']:,.0f}", *peers, *rates, f"{entry['peak_mb']:,.0f}", memory]
        )
        for found in (entry["sides"], entry["longer_run"]):
            if found:
                cells = [f"{found[s]['fvu']:.3f} ({found[s]['l0']:,.0f})" if s in found else "–" for s in WORKERS]
                fit.append([*name, str(found[OURS]["steps"]), *cells])
    origin = store.provenance(SEED)
    versions = {k: v for entry in entries for found in entry["sides"].values() for k, v in found["versions"].items()}
    long = [
        f"{e['architecture']}: " + ", ".join(f"{s} {f['tokens_per_s']:,.0f}" for s, f in e["longer_run"].items())
        for e in entries
        if e["longer_run"]
    ]
    return TEXT.format(
        created=origin["created"],
        machine=json.dumps(origin["machine"]),
        versions=", ".join(f"{name} {number}" for name, number in sorted((origin["versions"] | versions).items())),
        speed=markdown(speed),
        fit=markdown(fit),
        long="; ".join(long),
    )


def markdown(rows: list[list[str]]) -> str:
    """Rows with a head as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="cases such as topk-576-4608; prints them and writes nothing")
    parser.add_argument("--no-longer", action="store_true", help="leave out the longer runs; writes nothing")
    asked = parser.parse_args()
    if not PEERS_PYTHON.is_file():
        raise SystemExit(f"{PEERS_PYTHON} does not exist; run make interop first")
    start = time.perf_counter()
    longer = {} if asked.no_longer else {(c.architecture, c.features): c for c in LONGER}
    entries: list[Figures] = []
    for case in CASES:
        if not asked.only or str(case) in asked.only:
            long = longer.get((case.architecture, case.features))
            entries.append(record(case, measured(case), measured(long) if long else None))
    text = report(entries)
    print(text)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
    if not asked.only and not asked.no_longer:
        store.write_json(RESULTS / "dictionaries.json", entries)
        store.write_text(RESULTS / "dictionaries.md", text)


if __name__ == "__main__":
    main()
