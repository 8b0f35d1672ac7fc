"""Features correlated with reward in a preference-trained model, beside those of its base.

The model is of the working pair (`benchmarks/preference.py` first), and so is the reward: warmth by lexicon, and
whether the reply names its topic. Outputs are the trained model's own samples to questions in two registers; length,
position and topic are partialled out. Both models have dictionaries of their own, at the MLP output of every layer and
at three residual Sites; those of the base with half as many features are there for the MMCS of sizes.

    python benchmarks/rewarded.py [--pair runs/pair/seed-0] [--name preferred] [--topics 160] [--tokens 200000]

An interrupted run resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from common import keep, table

import unsleep
from unsleep.base.context import resumable
from unsleep.base.stats import Estimate
from unsleep.base.stopwatch import Stopwatch
from unsleep.cli.console import Bars
from unsleep.core import Site
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.config import TrainConfig
from unsleep.experiments.rewarded import Replied, mlp_sites, residual_sites, train_dictionaries
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.preference.drawn import QUESTIONS, DrawConfig, asked
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet
from unsleep.rewards.lexicons import Warmth
from unsleep.rewards.record import Of, RewardedRecord
from unsleep.rewards.run import Beside, RewardedConfig
from unsleep.rewards.samples import Samples
from unsleep.rewards.sampling import SampleConfig, sample_rewards

ROOT = Path(__file__).parents[1]
BASE = "smollm2-135m-gguf"
DRAW = DrawConfig()
REPLIES = 3
"""Samples of each question."""
PASSAGES = 1500
SHOWN = 5
"""Layers and features in the record."""


def rewarded_samples(model: LoadedModel, topics: Sequence[str]) -> Samples:
    """Sampled replies to a question on each topic in each register, with their rewards."""
    rows = [(asked(t, r, i), t) for i, t in enumerate(topics) for r in QUESTIONS]
    prompts, about = PromptSet("rewarded", tuple(prompt for prompt, _ in rows), "edit"), [topic for _, topic in rows]
    config = SampleConfig(REPLIES, DRAW.tokens, DRAW.temperature)
    return sample_rewards(model, prompts, Warmth(DRAW.topic_weight), config, {"topic": about})


def dictionaries(
    model: LoadedModel, sites: Sequence[Site], asking: PromptSet, out: Path, config: TrainConfig
) -> list[Coder]:
    """Dictionaries of a model, of ordinary prompts with its replies and plain text; those that are there are loaded."""
    missing = [site for site in sites if not (out / str(site)).is_dir()]
    replies = generate.replies(model, asking, max_new_tokens=DRAW.tokens) if missing else []
    for _ in train_dictionaries(model, missing, Replied(asking, replies, PASSAGES), out, config):
        pass
    return [unsleep.load_dictionary(out / str(site)) for site in sites]


def interval(figure: Estimate | None) -> list[float] | None:
    """A figure with its interval as three numbers."""
    return None if figure is None else [figure.value, figure.low, figure.high]


def counts(record: RewardedRecord, of: Of, point: str) -> dict[str, Any]:
    """Counts of one model's dictionaries at one kind of Site, and the mean |r| on held-out prompts."""
    rows = [row for row in record.sites if (row.of, row.site.point) == (of, point)]
    strong = [row.strength for row in rows if row.strength is not None]
    return {
        "of": of,
        "sites": point,
        "dictionaries": len(rows),
        **{key: sum(getattr(row, key) for row in rows) for key in ("size", "tested", "selected", "replicated")},
        "strength": mean(strong) if strong else None,
        "floor": mean(row.floor for row in rows),
    }


def figures(record: RewardedRecord, watch: Stopwatch) -> dict[str, Any]:
    """The recorded part of the whole record."""
    points = list(dict.fromkeys(row.site.point for row in record.sites))
    layers = {one.layer: one.relative for one in record.layers}
    best = [f for f in record.features if f.replicated and f.of == "model"][:SHOWN]
    return {
        "parts": [part._asdict() for part in record.parts],
        "q": record.q,
        "counts": [counts(record, of, point) for of in ("model", "base") for point in points],
        "probes": [
            {
                "name": row.name,
                "columns": row.columns,
                **{key: interval(getattr(row, key)) for key in ("r2", "spearman", "gain")},
            }
            for row in record.probes
        ],
        "layers": [[layer, layers[layer]] for layer in record.ranking[:SHOWN]],
        "features": [{"site": str(f.site), "id": f.id, "pooling": f.pooling, "c": interval(f.c)} for f in best],
        "mmcs": [asdict(row) | {"site": str(row.site)} for row in record.matches],
        "minutes": watch.minutes,
        "peak_memory_mb": watch.peak_memory_mb,
    }


def main() -> None:
    """Sample, train dictionaries, correlate, and keep the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pair", type=Path, default=ROOT / "runs" / "pair" / "seed-0")
    parser.add_argument("--name", default="preferred")
    parser.add_argument("--topics", type=int, default=160)
    parser.add_argument("--tokens", type=int, default=200_000)
    given = parser.parse_args()
    out = given.pair / f"rewarded-{given.name}"
    out.mkdir(parents=True, exist_ok=True)
    watch = Stopwatch.kept_in(out / "stages.json")
    base, tuned = unsleep.load_model(BASE), unsleep.load_model(given.pair / given.name)
    sites = [*mlp_sites(base), *residual_sites(base)]
    topics, ordinary = sets.topics("held_out")[: given.topics], sets.topics("edit")
    asking = PromptSet("ordinary", tuple(asked(t, r, i) for i, t in enumerate(ordinary) for r in QUESTIONS), "edit")
    with Bars(), resumable(out / "rewarded", given.topics):
        with watch.stage("samples"):
            scored = rewarded_samples(tuned, topics)
        coders: dict[str, list[Coder]] = {}
        whole = TrainConfig().features
        for name, model, size in (("model", tuned, whole), ("base", base, whole), ("half", base, whole // 2)):
            place = out / f"dictionaries-{name}"
            wanted = residual_sites(base) if name == "half" else sites
            with watch.stage(f"dictionaries: {name}"):
                config = TrainConfig(tokens=given.tokens, features=size)
                coders[name] = dictionaries(model, wanted, asking, place, config)
        beside = Beside(base=base, base_dictionaries=tuple(coders["base"]), others=tuple(coders["half"]))
        with watch.stage("correlations and probes"):
            record = unsleep.rewarded(tuned, coders["model"], scored, out / "rewarded", RewardedConfig(), beside)
    found = figures(record, watch)
    keep("rewarded", found)
    rows = [[p["name"], f"{p['r2'][0]:.2f}", f"{p['spearman'][0]:.2f}"] for p in found["probes"]]
    print(table([["probe", "R²", "Spearman"], *rows]))


if __name__ == "__main__":
    main()
