"""What all Sites of a model cost: residual, MLP and attention output of every layer against the last residual alone.

Both run all layers on the same prompts; the harvest of all Sites also copies, checks, writes and hashes 90 times
as much.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import get_args

from common import alternating, keep, ratio, table

from unsleep import LoadConfig, Site, harvest, load_model
from unsleep.core import Point
from unsleep.models import generate
from unsleep.prompts.sets import questions

MODEL, PROMPTS, REPLY_TOKENS, ROUNDS, TARGET = "smollm2-135m", 200, 12, 5, 1.6


def main() -> None:
    model = load_model(MODEL, LoadConfig(dtype="bfloat16"))
    layers = model.network.config.num_hidden_layers
    points = [point for point in get_args(Point) if point != "embed"]
    every = [Site(layer, point) for layer in range(layers) for point in points]
    prompts = questions("edit", PROMPTS)
    replies = generate.replies(model, prompts.texts, max_new_tokens=REPLY_TOKENS)
    tokens: dict[str, int] = {}
    written: dict[str, int] = {}

    def collect(name: str, sites: list[Site]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            done = harvest(model, prompts, sites, Path(scratch) / "h", replies=replies)
            tokens[name] = done.tokens
            written[name] = sum(file.stat().st_size for file in done.folder.iterdir())

    ways = {"last": lambda: collect("last", [Site(layers - 1)]), "all": lambda: collect("all", every)}
    seconds = alternating(ways, ROUNDS)
    cost = ratio(seconds["all"], seconds["last"])
    rates = {name: tokens[name] / median(times) for name, times in seconds.items()}
    rows = [["", "Sites", "median s", "tokens/s", "MB"]]
    for name, sites in (("last", 1), ("all", len(every))):
        figures = (f"{median(seconds[name]):.2f}", f"{rates[name]:,.0f}", f"{written[name] / 1e6:,.0f}")
        rows.append([name, str(sites), *figures])
    print(table(rows))
    print(f"all / last: {cost:.3f} (target: at most {TARGET})")
    setting = {"model": MODEL, "dtype": "bfloat16", "prompts": PROMPTS, "layers": layers, "points": points}
    setting |= {"tokens": tokens["all"], "sites": len(every)}
    figures = {"setting": setting, "seconds": seconds, "tokens_per_second": rates, "bytes": written, "ratio": cost}
    print(keep("harvest_all", {**figures, "target": TARGET}))


if __name__ == "__main__":
    main()
