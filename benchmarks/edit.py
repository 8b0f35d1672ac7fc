"""What an edit costs while a model generates: the same replies with it applied and without.

The edit removes 20 features at each of three layers, through TopK dictionaries of the size that the demo
trains. They are random: what an edit costs does not depend on what its features mean. No reply ends
early, so that both generate the same number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch
from common import alternating, keep, ratio, table

from unsleep import Edit, LoadConfig, Site, applied, load_model
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.models.sites import width
from unsleep.prompts.sets import questions

MODEL, LAYERS, REMOVED, NEW_TOKENS, ROUNDS, TARGET = "smollm2-135m", (8, 12, 16), 20, 32, 5, 1.25
FEATURES, K, SINK_NORM = 4608, 32, 1000.0
BATCHES = {1: 6, 32: 32}
"""Batch size → prompts."""


@dataclass(frozen=True)
class Endless(LoadedModel):
    """A model whose replies do not end."""

    @property
    def end_ids(self) -> set[int]:
        return set()


def random_edit(model: LoadedModel, layer: int) -> Edit:
    random = torch.Generator().manual_seed(layer)
    d_model = width(model.network)
    rows = torch.nn.functional.normalize(torch.randn(FEATURES, d_model, generator=random), dim=1)
    weights = (rows.T.contiguous(), torch.zeros(FEATURES), rows, torch.zeros(d_model))
    dictionary = TopK(Site(layer), model.fingerprint, *weights, sink_norm=SINK_NORM, k=K).to(
        model.network.dtype, model.device
    )
    return Edit(Site(layer), dictionary, tuple(torch.randperm(FEATURES, generator=random)[:REMOVED].tolist()))


def main() -> None:
    loaded = load_model(MODEL, LoadConfig(dtype="bfloat16"))
    model = Endless(loaded.network, loaded.tokenizer, loaded.name)
    edits = [random_edit(model, layer) for layer in LAYERS]
    results: dict[str, dict[str, object]] = {}
    rows = [["batch", "bare, tokens/s", "edited, tokens/s", "edited / bare, time"]]
    for batch, prompts in BATCHES.items():
        texts = questions("edit", prompts).texts

        def bare(texts: list[str] = texts, batch: int = batch) -> None:
            generate.replies(model, texts, max_new_tokens=NEW_TOKENS, batch_size=batch)

        def edited() -> None:
            with applied(model, edits):
                bare()

        seconds = alternating({"bare": bare, "edited": edited}, ROUNDS)
        overhead, tokens = ratio(seconds["edited"], seconds["bare"]), prompts * NEW_TOKENS
        rates = {name: tokens / median(times) for name, times in seconds.items()}
        rows.append([str(batch), *(f"{rates[name]:,.1f}" for name in ("bare", "edited")), f"{overhead:.3f}"])
        results[str(batch)] = {"prompts": prompts, "seconds": seconds, "tokens_per_second": rates, "ratio": overhead}
    print(table(rows))
    print(f"target: at most {TARGET}")
    setting = {"model": MODEL, "dtype": "bfloat16", "layers": list(LAYERS), "removed": REMOVED, "features": FEATURES}
    setting |= {"k": K, "new_tokens": NEW_TOKENS}
    print(keep("edit", {"setting": setting, "batch": results, "target": TARGET}))


if __name__ == "__main__":
    main()
