"""Tokens a second of a harvest against the bare forward pass.

Both run the same rows in the same batches behind the same shared prefix, up to the deepest Site. The
bare pass does nothing else; a harvest also tokenizes, copies three Sites, leaves out padding and sinks,
checks, writes and hashes shards.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import alternating, keep, ratio, table

from unsleep import LoadConfig, Site, harvest, load_model
from unsleep.activations.harvest import token_rows
from unsleep.base.store import read_json
from unsleep.models import generate
from unsleep.models.forward import Rows, pad_left, prefix_cache, repeat_cache
from unsleep.models.model import LoadedModel
from unsleep.models.streams import truncated
from unsleep.prompts.sets import questions

MODEL, SITES, PROMPTS, REPLY_TOKENS, ROUNDS, TARGET = "smollm2-135m", (8, 12, 16), 200, 12, 7, 0.9


@torch.no_grad()
def bare(model: LoadedModel, prefix: torch.Tensor, batches: list[Rows]) -> None:
    """The blocks up to the deepest Site, and nothing else."""
    network: Any = model.network
    with truncated(network, max(SITES)):
        cache = prefix_cache(network, prefix)
        for rows in batches:
            network.base_model(
                input_ids=rows.ids,
                attention_mask=rows.full_mask.long(),
                position_ids=rows.positions,
                past_key_values=repeat_cache(network, cache, len(rows.ids)),
                use_cache=True,
            )


def main() -> None:
    model = load_model(MODEL, LoadConfig(dtype="bfloat16"))
    prompts = questions("edit", PROMPTS)
    replies = generate.replies(model, prompts.texts, max_new_tokens=REPLY_TOKENS)
    sites = [Site(layer) for layer in SITES]
    with tempfile.TemporaryDirectory() as scratch:
        first = harvest(model, prompts, sites, Path(scratch) / "first", replies=replies)
        plan = read_json(first.folder / "plan.json")
        token_ids, shared = token_rows(model, prompts, replies), plan["shared"]
        prefix = torch.tensor(token_ids[0][:shared], device=model.device)
        batches: list[Rows] = []
        for picked in (batch for shard in plan["shards"] for batch in shard):
            ids, mask = pad_left([token_ids[i][shared:] for i in picked], model.pad_id, model.device)
            batches.append(Rows(prefix, ids, mask, mask[:, :0]))

        def whole() -> None:
            with tempfile.TemporaryDirectory(dir=scratch) as out:
                harvest(model, prompts, sites, Path(out) / "h", replies=replies)

        seconds = alternating({"bare": lambda: bare(model, prefix, batches), "harvest": whole}, ROUNDS)
    tokens, share = first.tokens, ratio(seconds["bare"], seconds["harvest"])
    rates = {name: tokens / median(times) for name, times in seconds.items()}
    rows = [["", "median s", "tokens/s"]]
    rows += [[name, f"{median(seconds[name]):.3f}", f"{rates[name]:,.0f}"] for name in seconds]
    print(table(rows))
    print(f"harvest / bare: {share:.3f} (target: at least {TARGET})")
    setting = {
        "model": MODEL,
        "dtype": "bfloat16",
        "prompts": PROMPTS,
        "sites": list(map(str, sites)),
        "tokens": tokens,
    }
    figures = {"setting": setting, "seconds": seconds, "tokens_per_second": rates, "ratio": share, "target": TARGET}
    print(keep("harvest", figures))


if __name__ == "__main__":
    main()
