"""The whole of `unsleep explain`: statistics of all Sites in one pass, explanations, scores, baselines; resumable.

out/explain.json          a row per Site
out/resid.12/…            statistics.json, statistics.safetensors and explanations.json of each Site
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from unsleep.base import records, store
from unsleep.base.context import resumable
from unsleep.base.records import Count
from unsleep.core import Site
from unsleep.dictionaries.coders import Coder
from unsleep.explanations.controls import calibration, densities, frozen, matched, randomised
from unsleep.explanations.explained import Compared, ExplainConfig, Explanations, as_control, explained
from unsleep.explanations.outputs import with_changes
from unsleep.explanations.statistics import FeatureStatistics, check_enough, check_own, summarised
from unsleep.explanations.streaming import StatisticsConfig, tallied
from unsleep.explanations.text import Read, Source, read_text
from unsleep.models.model import LoadedModel, Named
from unsleep.prompts.prompt import PromptSet

MARK = "explain.json"
"""File that marks a folder of explanations."""

DRIVEN = 24
"""Tokens of each random text of TokenChange."""


@dataclass(frozen=True)
class ExplainedSite:
    """A Site's row of explain.json."""

    site: Site
    dictionary: str
    features: Count
    dead: Count
    """Features that never fired."""
    explained: Count
    compared: tuple[Compared, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExplainRecord:
    """explain.json."""

    SCHEMA: ClassVar = "unsleep.explain/1"

    model: Named
    texts: tuple[str, ...]
    """Names of prompt sets."""
    tokens: Count
    sites: tuple[ExplainedSite, ...]
    provenance: dict[str, Any]


class _Beside(NamedTuple):
    """Dictionaries of one Site for baselines."""

    chosen: list[int]
    """Features that are compared; each dictionary has one as dense as each of them."""
    frozen: Coder
    """Random directions, in the model."""
    noise: Coder
    """The features' own directions, in a model of random weights."""


class _Made(NamedTuple):
    """Statistics of one Site."""

    dictionary: Coder
    statistics: FeatureStatistics
    chosen: list[int]
    controls: dict[str, FeatureStatistics]
    """Statistics of each baseline."""


def explain(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    texts: Sequence[Source | PromptSet],
    out: str | Path,
    statistics: StatisticsConfig = StatisticsConfig(),
    config: ExplainConfig = ExplainConfig(),
) -> ExplainRecord:
    """Explain the features of dictionaries, one per Site, by predicates learned on half of the texts.

    Writes a folder per Site into `out`, with `FeatureStatistics` and `Explanations`. The scores of explanations are
    those on the other half, beside four baselines: the most frequent token, other features' explanations, random
    directions, and a model with random weights, both with features of the same densities.

    Args:
        texts: prompt sets, taken under the chat template, and Sources, as they say.
        out: a folder; an interrupted run of the same inputs goes on where it was.

    Raises:
        BadInput: as `feature_statistics` does, where `out` holds something else, and where no feature can be explained.
        Refused: a dictionary of another model.
    """
    out = Path(out)
    store.check_place(out, MARK)
    check_own(model, dictionaries)
    sources = [t if isinstance(t, Source) else Source(t) for t in texts]
    made_from = (model, list(dictionaries), sources, statistics, config)
    with resumable(out, *made_from), store.new_folder(out, replace=MARK) as folder:
        read = read_text(model, sources)
        check_enough(read.text)
        rows: list[ExplainedSite] = []
        for d, own, chosen, controls in _statistics(model, dictionaries, sources, read, statistics, config):
            found = explained(own, config, compare_on=chosen)
            for method, other in controls.items():
                found = found.with_compared(as_control(method, other, config))
            if config.changes:
                own = with_changes(
                    model, d, own, _short(read, config.changes, statistics.seed), list(found.explanations)
                )
            own.save(folder / str(d.site))
            found.save(folder / str(d.site))
            rows.append(_row(own, found))
        names = read.text.names
        made = store.provenance(statistics.seed, origin=model.origin)
        record = ExplainRecord(model.named, names, read.text.tokens, tuple(rows), made)
        records.save(record, folder / MARK)
    return record


def _row(statistics: FeatureStatistics, found: Explanations) -> ExplainedSite:
    dead = int((statistics.figures.fires == 0).sum())
    size, explained = statistics.size, len(found.explanations)
    notes = statistics.record.notes
    return ExplainedSite(statistics.site, statistics.dictionary, size, dead, explained, found.compared, notes)


def _statistics(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    sources: Sequence[Source],
    read: Read,
    config: StatisticsConfig,
    explain: ExplainConfig,
) -> list[_Made]:
    """The statistics of every dictionary and of its baselines: one pass of the model, one of a random one."""
    other = randomised(model, config.seed) if explain.controls else None
    beside = _beside(model, other, dictionaries, sources, config, explain.controls) if other else {}
    frozen_ones = [each.frozen for each in beside.values()]
    tallies = tallied(model, [*dictionaries, *frozen_ones], read, config)
    controls: dict[Site, dict[str, FeatureStatistics]] = {d.site: {} for d in dictionaries}
    for d, tally in zip(frozen_ones, tallies[len(dictionaries) :], strict=True):
        controls[d.site]["random dictionary"] = summarised(model, d, tally, read.text, config, writes=False)
    if other and beside:
        noise = [each.noise for each in beside.values()]
        for d, tally in zip(noise, tallied(other, noise, read, config, "statistics of a random model"), strict=True):
            controls[d.site]["random model"] = summarised(other, d, tally, read.text, config, writes=False)
    made: list[_Made] = []
    for d, tally in zip(dictionaries, tallies, strict=False):
        chosen = beside[d.site].chosen if d.site in beside else []
        made.append(_Made(d, summarised(model, d, tally, read.text, config), chosen, controls[d.site]))
    return made


def _beside(
    model: LoadedModel,
    other: LoadedModel,
    dictionaries: Sequence[Coder],
    sources: Sequence[Source],
    config: StatisticsConfig,
    count: int,
) -> dict[Site, _Beside]:
    """Dictionaries for the baselines of each Site, none where no feature fires on the text of the calibration."""
    x, noise = (calibration(m, sources, [d.site for d in dictionaries], config) for m in (model, other))
    found: dict[Site, _Beside] = {}
    for d in dictionaries:
        fires = densities(d, x[d.site]).cpu()
        some = np.random.default_rng(config.seed).permutation(fires.nonzero()[:, 0].numpy())[:count]
        if len(some):
            index = torch.from_numpy(some)
            rows = d.W_enc.T[index.to(d.W_enc.device)]
            random = matched(d, rows, fires[index], noise[d.site], other.fingerprint)
            found[d.site] = _Beside(some.tolist(), frozen(d, index, x[d.site], config.seed), random)
    return found


def _short(read: Read, count: int, seed: int) -> list[list[int]]:
    """The beginnings of random texts, as token ids."""
    every = [row for each in read.rows for row in each]
    order = np.random.default_rng(seed).permutation(len(every))[:count]
    return [every[i][:DRIVEN] for i in order]
