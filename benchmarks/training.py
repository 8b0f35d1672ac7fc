"""Tokens a second of dictionary training against a bound: the encoder's matrix product of the same batches alone.

Every training must multiply its batch by the encoder, whatever else it does. Activations are random, of a low rank;
each size is trained for `STEPS` steps in each round.

    python benchmarks/training.py [--small]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from common import alternating, keep, ratio, table

from unsleep.base.machine import compute_dtype, device_of
from unsleep.dictionaries.config import Architecture, TrainConfig
from unsleep.dictionaries.trainer import Trainer

SIZES = ((576, 4608, 32, 4096), (2048, 16384, 64, 8192), (4096, 32768, 64, 8192))
"""Width, features, k, and tokens a batch."""
ARCHITECTURES: tuple[Architecture, ...] = ("topk", "batchtopk", "jumprelu", "standard")
RANK, STEPS, ROUNDS = 64, 20, 3


def main() -> None:
    """Time every architecture at every size, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="the smallest size alone")
    sizes = SIZES[:1] if parser.parse_args().small else SIZES
    device, rows, found = device_of("auto"), [["size", "architecture", "tokens/s", "of the bound"]], []
    dtype = compute_dtype(torch.bfloat16, device)
    for width, features, k, batch in sizes:
        torch.manual_seed(0)
        x = (torch.randn(batch, RANK) @ torch.randn(RANK, width) + 0.1 * torch.randn(batch, width)).to(device)
        encoder, half = torch.randn(width, features, device=device, dtype=dtype), x.to(dtype)

        def bound(half: torch.Tensor = half, encoder: torch.Tensor = encoder) -> None:
            for _ in range(STEPS):
                half @ encoder

        ways: dict[str, Callable[[], object]] = {"bound": bound}
        for name in ARCHITECTURES:
            config = TrainConfig(architecture=name, features=features, k=k, batch=batch, tokens=batch * STEPS * 10)
            trainer = Trainer(x.cpu(), config, None, device)

            def steps(trainer: Trainer = trainer, x: torch.Tensor = x) -> None:
                for number in range(STEPS):
                    trainer.step(x, number)

            ways[name] = steps
        seconds = alternating(ways, ROUNDS)
        for name in ARCHITECTURES:
            rate, share = batch * STEPS / median(seconds[name]), ratio(seconds["bound"], seconds[name])
            rows.append([f"{width} × {features}", name, f"{rate:,.0f}", f"{share:.2f}"])
            one = {"width": width, "features": features, "k": k, "batch": batch, "architecture": name}
            found.append({**one, "tokens_per_second": rate, "of_bound": share})
    print(table(rows))
    print(keep("training", {"dtype": str(dtype), "steps": STEPS, "sizes": found}))


if __name__ == "__main__":
    main()
