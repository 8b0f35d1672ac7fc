"""Statistics and explanations of a dictionary of 4,608 features on real text: their cost and what explanations score.

Timed in turn in one process: the encode (forward pass up to the Site and sparse codes of all tokens), and the same with
statistics of every feature. The second part explains random features and scores them beside the four baselines.

    python benchmarks/explanations.py --tokens 1000000 --features 520
    python benchmarks/explanations.py --tokens 100000 --features 0 --name explanations_100k
    python benchmarks/explanations.py --small        # a random model, a few seconds: to see that it runs
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from common import alternating, keep, ratio, table
from transformers import AutoConfig, AutoModelForCausalLM

import unsleep
from unsleep import LoadConfig, LoadedModel, PromptSet, Site
from unsleep.base.machine import peak_memory_mb
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.train import TrainConfig
from unsleep.explanations.explained import ExplainConfig
from unsleep.explanations.scoring import METRICS
from unsleep.explanations.streaming import StatisticsConfig, pieces, tallied
from unsleep.explanations.tally import Tally
from unsleep.explanations.text import Read, Source, read_text
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt

FEATURES, K, TARGET = 4608, 32, 1.5
METHODS = ("predicate", "frequent token", "shuffled", "random dictionary", "random model")


def passages(model: LoadedModel, tokens: int, *, repeated: bool = True) -> Source:
    """Plain paragraphs of about that many tokens; repeated with another beginning where there are not as many.

    Without `repeated` there are fewer: explanations must not be scored on repetitions of what they were learned on.
    """
    paragraphs = [*sets.plain_text("train"), *sets.plain_text("held_out")]
    lengths = [len(row) for row in model.token_ids(paragraphs)]
    texts: list[str] = []
    seen, turn = 0, 0
    while seen < tokens and (repeated or not turn):
        for text, length in zip(paragraphs, lengths, strict=True):
            if seen >= tokens:
                break
            texts.append(text if not turn else f"{turn}. {text}")
            seen += length
        turn += 1
    return Source(PromptSet("passages", tuple(Prompt(text) for text in texts)), plain=True)


def dictionary(model: LoadedModel, site: Site, folder: Path | None, source: Source, tokens: int) -> Coder:
    """The dictionary in a folder, or one trained on the first of the text."""
    if folder is not None:
        return unsleep.load_dictionary(folder)
    with tempfile.TemporaryDirectory() as scratch:
        some = source.prompts.head(max(2, round(len(source.prompts) * min(1.0, 100_000 / tokens))))
        harvest = unsleep.harvest(model, some, [site], Path(scratch) / "h", plain=True)
        return unsleep.train(harvest.load(site), TrainConfig(tokens=400_000, features=FEATURES, k=K))


def small() -> tuple[LoadedModel, Coder]:
    """A random model and dictionary, with the tokenizer of the packaged base."""
    tokenizer = unsleep.load_model("smollm2-135m").tokenizer
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2)
    network = AutoModelForCausalLM.from_config(config).eval()
    model = LoadedModel(network, tokenizer, "random")
    rows = torch.nn.functional.normalize(torch.randn(256, 64), dim=1)
    return model, TopK(Site(1), model.fingerprint, rows.T.contiguous(), torch.zeros(256), rows, torch.zeros(64), k=8)


def encode(model: LoadedModel, d: Coder, read: Read, config: StatisticsConfig) -> None:
    """The sparse codes of all tokens, which are dropped."""
    coder = d.to(d.decoder.dtype, model.device)
    with torch.no_grad():
        for piece in pieces(model, read, [d.site], config.batch_tokens, read.text.chosen(config.sample, config.seed)):
            coder.encode_sparse(piece.activations[d.site].to(coder.decoder))
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def statistics(model: LoadedModel, d: Coder, read: Read, config: StatisticsConfig) -> list[Tally]:
    """The encode with statistics."""
    found = tallied(model, [d], read, config)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return found


def scores(model: LoadedModel, d: Coder, source: Source, features: int) -> dict[str, object]:
    """Mean scores of random features' explanations beside the baselines."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        record = unsleep.explain(model, [d], [source], Path(scratch) / "e", config=ExplainConfig(controls=features))
    [row] = record.sites
    found = {(c.metric, c.method): c for c in row.compared}
    lines = [["", *METHODS]]
    for metric in METRICS:
        cells = [found.get((metric, method)) for method in METHODS]
        shown = ["–" if c is None else f"{c.value.value:.3f} [{c.value.low:.3f}, {c.value.high:.3f}]" for c in cells]
        lines.append([metric, *shown])
    print(table(lines))
    compared = [{"method": c.method, "metric": c.metric, "features": c.features, **vars(c.value)} for c in row.compared]
    seconds = round(time.perf_counter() - began, 1)
    sizes = {"explained": row.explained, "dead": row.dead, "tokens_of_explain": record.tokens}
    return {**sizes, "compared": compared, "seconds_of_explain": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--site", default="resid.16")
    parser.add_argument("--dictionary", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=520, help="some fire too rarely to be explained")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=StatisticsConfig().batch_tokens)
    parser.add_argument("--name", default="explanations")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args(arguments)
    tokens = min(given.tokens, 20_000) if given.small else given.tokens
    if given.small:
        model, d = small()
        source = passages(model, tokens)
    else:
        model = unsleep.load_model(given.model, LoadConfig(dtype=given.dtype, device=given.device))
        source = passages(model, tokens)
        d = dictionary(model, Site.parse(given.site), given.dictionary, source, tokens)
        d = d.to(model.network.dtype, model.device)
    config = StatisticsConfig(batch_tokens=given.batch_tokens)
    read = read_text(model, [source])
    ways = {
        "encode": lambda: encode(model, d, read, config),
        "statistics": lambda: statistics(model, d, read, config),
    }
    seconds = alternating(ways, given.rounds)
    cost = ratio(seconds["statistics"], seconds["encode"])
    rows = [["", "median s", "tokens/s"]]
    rows += [[name, f"{median(s):.1f}", f"{read.text.tokens / median(s):,.0f}"] for name, s in seconds.items()]
    print(table(rows))
    print(f"statistics / encode: {cost:.3f} (target: at most {TARGET})")
    setting = {"model": model.name, "dtype": str(model.network.dtype), "device": str(model.device), "site": str(d.site)}
    setting |= {"tokens": read.text.tokens, "features": d.n_features, "batch_tokens": config.batch_tokens}
    figures = {"setting": setting, "seconds": seconds, "ratio": cost, "target": TARGET}
    if given.features:
        figures |= scores(model, d, passages(model, tokens, repeated=False), given.features)
    if not given.small:
        print(keep(given.name, {**figures, "peak_memory_mb": peak_memory_mb()}))


if __name__ == "__main__":
    main()
