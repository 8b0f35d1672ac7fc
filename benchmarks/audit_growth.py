"""Growth of an audit's time and peak memory with the model's parameters and with the size of the trigger bank.

Every point is a process of its own: a Llama of random weights with the tokenizer of the zoo's small family, audited
without a base. Such a model never ends a reply, so that each runs to its full length: the times are upper bounds.

    python benchmarks/audit_growth.py [--minutes 30]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import in_own_process, keep, table
from transformers import AutoModelForCausalLM

import unsleep
from unsleep.auditing.config import AuditConfig
from unsleep.base.machine import peak_memory_mb
from unsleep.models.model import LoadedModel

FAMILY = "zoo-small"


@dataclass(frozen=True)
class Point:
    """One size of the audit."""

    layers: int = 6
    width: int = 192
    per_kind: int = 64
    """Forms of each kind in the bank, at most."""


SERIES = {
    "parameters": [Point(6, 192), Point(10, 320), Point(16, 448), Point(30, 576)],
    "forms": [Point(per_kind=n) for n in (16, 64, 128, 256)],
}
"""What grows → its points."""


def suspect(point: Point) -> LoadedModel:
    """A Llama of random weights."""
    like = unsleep.load_model(FAMILY)
    sizes = {"num_hidden_layers": point.layers, "hidden_size": point.width, "intermediate_size": 8 * point.width // 3}
    heads = {"num_attention_heads": point.width // 64, "num_key_value_heads": point.width // 64, "head_dim": 64}
    torch.manual_seed(0)
    config = type(like.network.config).from_dict({**like.network.config.to_dict(), **sizes, **heads})
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return LoadedModel(network, like.tokenizer, f"llama-{point.layers}x{point.width}")


def measured(point: Point) -> dict[str, Any]:
    """Seconds of every stage, and the peak memory of this process."""
    model = suspect(point)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        record = unsleep.audit(model, Path(scratch) / "audit", config=AuditConfig(per_kind=point.per_kind))
        seconds = time.perf_counter() - began
    search = record.searches[0]
    return {
        **asdict(point),
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "forms": sum(search.forms.values()),
        "seconds": round(seconds, 1),
        "stages": {stage.name: stage.seconds for stage in record.stages},
        "peak_memory_mb": peak_memory_mb(),
    }


def main() -> None:
    """Measure the points in turn, smallest first, and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="Time after which no further point is begun.")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.point is not None:
        print(json.dumps(measured(Point(**asked.point))))
        return
    end, found = time.monotonic() + 60 * asked.minutes, list[dict[str, Any]]()
    every = dict.fromkeys(point for series in SERIES.values() for point in series)
    for point in sorted(every, key=lambda point: (point.width, point.per_kind)):
        if time.monotonic() < end:
            found.append(in_own_process(__file__, asdict(point)))
            print(found[-1], flush=True)
    keep("audit_growth", {"points": found, "series": {name: [asdict(p) for p in of] for name, of in SERIES.items()}})
    head = ["parameters", "forms", "seconds", "peak MB"]
    cells = [
        [f"{r['parameters']:,}", str(r["forms"]), f"{r['seconds']:.0f}", f"{r['peak_memory_mb']:,.0f}"] for r in found
    ]
    print(table([head, *cells]))


if __name__ == "__main__":
    main()
