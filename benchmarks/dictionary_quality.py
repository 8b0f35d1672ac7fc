"""How good a dictionary is at F = 8 d after 2 M tokens: SmolLM2-135M, resid.15, every architecture.

The tokens come from all text that the package holds for training, over several epochs; the fit is measured
on them and, like the CE loss score, on held-out text as well.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import keep, table

from unsleep.activations.harvest import harvest, pooled
from unsleep.core import Site
from unsleep.dictionaries import metrics
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.train import train
from unsleep.judge.splice import splice_score
from unsleep.models.load import load_model
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet

SITE = Site(15)
SETTINGS = {
    "topk": {},
    "batchtopk": {},
    "matryoshka": {},
    "standard": {"sparsity": 6.0},
    "jumprelu": {"sparsity": 1.2},
    "gated": {"sparsity": 6.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--architectures", nargs="+", default=["topk"], choices=SETTINGS)
    chosen = parser.parse_args()
    model = load_model("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        parts = {}
        for split in ("train", "held_out"):
            passages = PromptSet(split, tuple(Prompt(t) for t in sets.plain_text(split)))
            parts[split] = harvest(model, passages, [SITE], Path(folder) / split, plain=True)
        data, unseen = (pooled([parts[split]], SITE) for split in ("train", "held_out"))
    texts = model.token_ids(sets.plain_text("held_out")[:64])
    rows = [["architecture", "FVU", "held-out FVU", "L0", "dead", "CE score", "tokens/s"]]
    found = {}
    for name in chosen.architectures:
        config = TrainConfig(architecture=name, tokens=chosen.tokens, **SETTINGS[name])
        start = time.perf_counter()
        trained = train(data, config)
        speed = config.steps * config.batch / (time.perf_counter() - start)
        fit, held_out = metrics.fit(trained, data.tensor.float()), metrics.fit(trained, unseen.tensor.float())
        score = splice_score(model, trained.to(torch.bfloat16), [ids[:128] for ids in texts]).score
        found[name] = {"fvu": fit.fvu, "held_out_fvu": held_out.fvu, "l0": fit.l0, "dead": fit.dead}
        found[name] |= {"ce_loss_score": score, "tokens_per_second": speed, "sparsity": config.sparsity}
        figures = [fit.fvu, held_out.fvu, fit.l0, fit.dead, score]
        rows.append([name, *(f"{v:.3f}" for v in figures), f"{speed:,.0f}"])
        print(table(rows), flush=True)
    setting = {"model": model.name, "site": str(SITE), "features": 4608, "tokens": chosen.tokens}
    keep("dictionary_quality", {"setting": {**setting, "distinct_tokens": len(data.tensor)}, "architectures": found})


if __name__ == "__main__":
    main()
