"""Statistics of features that fire by a rule, with no model run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from support.dictionaries import D
from unsleep.core import Encoded, Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.dictionaries.coders import Coder
from unsleep.explanations.predicates import Predicate
from unsleep.explanations.statistics import FeatureStatistics, StatisticsConfig, summarised
from unsleep.explanations.tally import Tally, batch_of
from unsleep.explanations.text import Source, Text, read_text
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Prompt, PromptSet

WORDS = ("sun", "moon", "star", "bird", "tree", "lake", "song", "hill", "hate", "love", "I", "we")


def passages(n: int = 40, seed: int = 0, words: int = 12, name: str = "passages") -> PromptSet:
    """Random sentences, no two of which begin alike for long."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, words)) for _ in range(n)]
    return PromptSet(name, tuple(Prompt(text) for text in texts))


def plain_text(model: LoadedModel, n: int = 40, seed: int = 0) -> Text:
    return read_text(model, [Source(passages(n, seed), plain=True)]).text


def firing(text: Text, rules: Sequence[str]) -> np.ndarray:
    """Activations `[token, rule]`: 1 and a little more where each rule holds."""
    holds = np.stack([Predicate.parse(rule).holds(text) for rule in rules], 1)
    return (holds * (1 + np.arange(len(text.ids))[:, None] % 7 / 10)).astype(np.float32)


def statistics_of(
    model: LoadedModel,
    text: Text,
    activations: np.ndarray,
    config: StatisticsConfig = StatisticsConfig(),
    d: Coder | None = None,
) -> FeatureStatistics:
    """Statistics of activations `[token, feature]` over a text, of a random dictionary or a given one."""
    n = activations.shape[1]
    if d is None:
        rows = torch.nn.functional.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(0)), dim=1)
        d = TopK(Site(1), model.fingerprint, rows.T.contiguous(), torch.zeros(n), rows, torch.zeros(D), k=n)
    row = torch.from_numpy(text.row)
    starts = torch.from_numpy(text.starts)
    token = torch.arange(len(text.ids))
    sampled = torch.from_numpy(text.chosen(config.sample, config.seed))[row]
    lengths = (starts[1:] - starts[:-1])[row]
    batch = batch_of(token, token - starts[row], row, lengths, 0, sampled, torch.device("cpu"))
    tally = Tally(n, config.top, config.drawn, config.seed, torch.device("cpu"))
    ids = torch.arange(n).expand(len(token), n)
    tally.add(Encoded(torch.from_numpy(activations), ids), batch)
    return summarised(model, d, tally, text, config)
