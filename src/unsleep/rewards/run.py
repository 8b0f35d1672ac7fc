"""The whole of `unsleep rewarded`: features correlated with reward, linear rewards, and the dictionaries behind them.

out/rewarded.json           counts by Site, rewarded features, probes, layers by ‖ΔW‖ / ‖W‖, MMCS, classes
out/rewarded.safetensors    correlations and p-values of all features, and the weights of the linear reward
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from unsleep.base import records, store
from unsleep.base.context import kept, progress, resumable
from unsleep.base.linear import rotated
from unsleep.base.stats import Estimate, wilson
from unsleep.core import BadInput, Site, check_choices, check_least
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.compare import Matching, match
from unsleep.explanations.classified import ClassesRecord
from unsleep.explanations.controls import calibration, densities, matched, randomised
from unsleep.explanations.statistics import check_own, refuse_others
from unsleep.explanations.streaming import StatisticsConfig
from unsleep.explanations.text import Source
from unsleep.judge.evaluate import prompt_digests
from unsleep.locate.diffing.weights import layer_differences
from unsleep.models.alike import check_alike
from unsleep.models.model import LoadedModel
from unsleep.rewards.correlated import Correlated, CorrelationConfig, Found, correlated, covariates
from unsleep.rewards.pooling import POOLINGS, pooled, tokens_of
from unsleep.rewards.probes import LinearReward, Probe, bag_of_words, fit_probe, linear_reward, scored
from unsleep.rewards.record import (
    ClassRow,
    MatchRow,
    Of,
    PartSize,
    ProbeRow,
    RewardedFeature,
    RewardedRecord,
    SiteRow,
)
from unsleep.rewards.samples import Parts, Samples
from unsleep.rewards.tables import FILE, tensors_of

MARK = "rewarded.json"
"""File that marks a folder of rewarded features."""


@dataclass(frozen=True)
class RewardedConfig(CorrelationConfig):
    """Options of `unsleep rewarded`."""

    plain: bool = False
    """Take prompts without the chat template."""
    untrained: bool = True
    """Fit a probe on a model of random weights too."""
    matching: Matching = "greedy"
    """Matching of features for the MMCS."""
    batch_tokens: int = 4096
    """Padded tokens per forward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, "reward correlation", matching=Matching)
        check_least(self, "reward correlation", 1, "batch_tokens")


@dataclass(frozen=True)
class Beside:
    """Models and dictionaries that a tuned model is compared with."""

    base: LoadedModel | None = None
    """The model that it was tuned from."""
    base_dictionaries: tuple[Coder, ...] = ()
    """Dictionaries of the base; the tuned model's own are used where there are none."""
    others: tuple[Coder, ...] = ()
    """Further dictionaries for the MMCS, such as of other sizes; any number a Site."""
    classes: Mapping[Site, ClassesRecord] = field(default_factory=dict[Site, ClassesRecord])
    """Classes of the features by Site (`unsleep.classify`)."""


class _Read(NamedTuple):
    """A model's features on the samples."""

    of: Of
    dictionaries: list[Coder]
    pooled: dict[Site, Tensor]
    found: Found


def rewarded(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    samples: Samples,
    out: str | Path,
    config: RewardedConfig = RewardedConfig(),
    beside: Beside = Beside(),
) -> RewardedRecord:
    """Find the features of dictionaries that are correlated with reward, and fit linear rewards on them.

    Features are selected on a part of the prompts, their sign is replicated on a second, and all figures are of a third
    (`correlated`); so are the scores of the linear reward, beside probes on the base, an untrained model and words
    (`probes`). With the base, layers are ranked by ‖ΔW‖ / ‖W‖.

    Args:
        dictionaries: of the model, one per Site, such as of every MLP output and the residual stream.
        samples: outputs with their rewards; `Samples.of` takes prompts, outputs and any sequence of rewards.
        out: a folder for `rewarded.json` and `rewarded.safetensors`; an interrupted run is resumed.

    Raises:
        BadInput: too few prompts or samples, rewards that are constant in a part, a dictionary of another width, two
            of one Site, a base of another shape, or an `out` that holds something else.
        Refused: dictionaries or classes of another model.
    """
    out = Path(out)
    store.check_place(out, MARK)
    check_own(model, dictionaries)
    samples.parts(config.shares, config.seed)  # refuses too few prompts before any work
    base, given = beside.base, beside.base_dictionaries
    theirs = _check_beside(model, dictionaries, beside, config)
    made_from = (model, list(dictionaries), samples, config, base, list(given), list(beside.others))
    with resumable(out, *made_from), store.new_folder(out, replace=MARK) as folder:
        reads = [_read("model", model, list(dictionaries), samples, config)]
        if base is not None:
            reads.append(_read("base", base, theirs, samples, config))
        probes, reward = _probes(model, reads, samples, config)
        record = _record(model, reads, samples, beside, config, probes)
        tables: dict[tuple[Of, Site], Correlated] = {(r.of, s): x for r in reads for s, x in r.found.sites.items()}
        store.write_tensors(folder / FILE, tensors_of(tables, reward))
        records.save(record, folder / MARK)
    return record


def _check_beside(
    model: LoadedModel, dictionaries: Sequence[Coder], beside: Beside, config: RewardedConfig
) -> list[Coder]:
    """The base's dictionaries, or the tuned model's applied to it; raises for what does not fit the model."""
    hashes = {d.site: d.hash for d in dictionaries}
    for site, record in beside.classes.items():
        told = (record.model.fingerprint, record.dictionary, site)
        refuse_others(f"the classes of {site}", told, (model.fingerprint, hashes.get(site), None))
    if beside.base is None:
        if beside.base_dictionaries:
            raise BadInput("there are dictionaries of the base and no base; give the base too, with --against")
        return []
    base = beside.base
    check_alike(base, model, chats=not config.plain)
    theirs = list(beside.base_dictionaries) or [replace(d, model=base.fingerprint) for d in dictionaries]
    check_own(base, theirs)
    return theirs


def _record(
    model: LoadedModel,
    reads: Sequence[_Read],
    samples: Samples,
    beside: Beside,
    config: RewardedConfig,
    probes: tuple[ProbeRow, ...],
) -> RewardedRecord:
    parts = samples.parts(config.shares, config.seed)
    sizes = {name: (len(samples.owner[places].unique()), len(places)) for name, places in parts._asdict().items()}
    layers = [] if beside.base is None else layer_differences(beside.base, model)
    return RewardedRecord(
        model=model.named,
        base=None if beside.base is None else beside.base.named,
        samples=samples.hash,
        parts=tuple(PartSize(name, *size) for name, size in sizes.items()),
        partialled=reads[0].found.partialled,
        q=config.q,
        sites=tuple(row for read in reads for row in _sites(read)),
        features=tuple(_features(reads, beside.classes)),
        probes=probes,
        layers=tuple(layers),
        ranking=tuple(x.layer for x in sorted(layers, key=lambda x: (-x.relative, x.layer))),
        matches=tuple(_matches(reads[0].dictionaries, beside, config)),
        classes=tuple(_classes(reads[0], beside.classes)),
        chosen_on=_digests(samples, parts),
        notes=tuple(_notes(reads, samples, beside, config)),
        provenance=store.provenance(config.seed, config=asdict(config), origin=model.origin),
    )


def _pooled(
    model: LoadedModel, coders: list[Coder], samples: Samples, plain: bool, batch_tokens: int
) -> dict[str, Tensor]:
    """Pooled features by the name of the Site; a resumable step."""
    found = pooled(model, coders, tokens_of(model, samples, plain=plain), batch_tokens)
    return {str(site): x for site, x in found.items()}


def _read(of: Of, model: LoadedModel, coders: list[Coder], samples: Samples, config: RewardedConfig) -> _Read:
    tokens = tokens_of(model, samples, plain=config.plain)
    named = kept(_pooled, model, coders, samples, config.plain, config.batch_tokens)
    held = {Site.parse(site): x for site, x in named.items()}
    return _Read(of, coders, held, correlated(held, samples, tokens, config))


def _untrained(
    model: LoadedModel, coders: Sequence[Coder], samples: Samples, config: RewardedConfig
) -> dict[str, Tensor]:
    """Pooled features of the dictionaries' own directions in a model of random weights; a resumable step."""
    try:
        other = randomised(model, config.seed)
    except BadInput as error:
        raise BadInput(f"{error} (--no-untrained leaves the untrained model out)") from None
    sources = [Source(samples.prompt_set(), config.plain, samples.outputs)]
    sites, sizes = [c.site for c in coders], StatisticsConfig(batch_tokens=config.batch_tokens, seed=config.seed)
    x, noise = (calibration(m, sources, sites, sizes) for m in (model, other))
    made = [matched(c, c.W_enc.T, densities(c, x[c.site]), noise[c.site], other.fingerprint) for c in coders]
    return _pooled(other, list(made), samples, config.plain, config.batch_tokens)


def _probes(
    model: LoadedModel, reads: Sequence[_Read], samples: Samples, config: RewardedConfig
) -> tuple[tuple[ProbeRow, ...], LinearReward]:
    """Rows of all probes, that on features first, and the linear reward."""
    parts = samples.parts(config.shares, config.seed)
    fit = torch.ones(len(samples), dtype=torch.bool)
    fit[parts.C] = False
    tokens = tokens_of(model, samples, plain=config.plain)
    everyone = torch.arange(len(samples))
    known = covariates(samples, tokens, everyone, config.partial)
    inputs: dict[str, list[Tensor]] = {"features": [x for site in reads[0].pooled.values() for x in site]}
    if len(reads) > 1:
        inputs["base"] = [x for site in reads[1].pooled.values() for x in site]
    if config.untrained:
        untrained = kept(_untrained, model, reads[0].dictionaries, samples, config)
        inputs["untrained"] = [x for site in untrained.values() for x in site]
    inputs["bag of words"] = [bag_of_words(samples.outputs, fit)]
    if known:
        inputs[", ".join(name for name, _ in known)] = [rows.T for _, rows in known]
    rewards = torch.tensor(samples.rewards, dtype=torch.float64)
    fitted: dict[str, Probe] = {}
    for done, (name, blocks) in enumerate(inputs.items(), 1):
        fitted[name] = fit_probe(blocks, rewards, fit, samples.owner, config.seed)
        progress("linear rewards", done, len(inputs))
    found = scored(fitted, samples, parts.C, config.resamples, config.seed)
    rows = tuple(ProbeRow(name, probe.columns, probe.penalty, *found[name]) for name, probe in fitted.items())
    return rows, linear_reward(fitted["features"], reads[0].pooled, fit)


def _sites(read: _Read) -> list[SiteRow]:
    """Counts of each dictionary's features."""
    rows: list[SiteRow] = []
    for d in read.dictionaries:
        each = read.found.sites[d.site]
        size = each.in_pooling(2).abs()
        strength = float(size[each.replicated].mean()) if bool(each.replicated.any()) else None
        floor = float(size[each.tested].mean()) if bool(each.tested.any()) else 0.0
        tested, selected, replicated = (int(which.sum()) for which in (each.tested, each.selected, each.replicated))
        counts = (tested, selected, replicated)
        rows.append(SiteRow(read.of, d.site, d.hash, d.n_features, *counts, strength, floor))
    return rows


def _features(reads: Sequence[_Read], classes: Mapping[Site, ClassesRecord]) -> list[RewardedFeature]:
    """All selected features, replicated ones first, then by |r| on B."""
    rows = [
        _feature(read.of, site, each, i, classes.get(site) if read.of == "model" else None)
        for read in reads
        for site, each in read.found.sites.items()
        for i in each.selected.nonzero()[:, 0].tolist()
    ]
    return sorted(rows, key=lambda f: (f.of != "model", not f.replicated, -abs(f.b), f.site, f.id))


def _feature(of: Of, site: Site, each: Correlated, i: int, classes: ClassesRecord | None) -> RewardedFeature:
    labelled = classes.features.get(i) if classes else None
    return RewardedFeature(
        of,
        site,
        i,
        POOLINGS[int(each.pooling[i])],
        active=int(each.active[i]),
        a=float(each.in_pooling(0)[i]),
        p=float(each.p[i]),
        adjusted=float(each.adjusted[i]),
        b=float(each.in_pooling(1)[i]),
        replication=float(each.replication[i]),
        replicated=bool(each.replicated[i]),
        c=Estimate(*each.scored[i].tolist()),
        classes=tuple(c.name for c in labelled.classes) if labelled else (),
    )


def _matches(dictionaries: Sequence[Coder], beside: Beside, config: RewardedConfig) -> list[MatchRow]:
    """MMCS of every two dictionaries of one Site and width, between models and between sizes."""
    named = [("model", d) for d in dictionaries] + [("base", d) for d in beside.base_dictionaries]
    named += [("other", d) for d in beside.others]
    pairs = [(a, b) for i, a in enumerate(named) for b in named[i + 1 :] if a[1].site == b[1].site]
    rows: list[MatchRow] = []
    for done, ((one, a), (other, b)) in enumerate(pairs, 1):
        d = a.decoder.shape[1]
        turn = rotated(torch.randn(d, d, generator=torch.Generator().manual_seed(config.seed), dtype=torch.float64))
        less, more = sorted((a, b), key=lambda c: c.n_features)
        turned = replace(less, W_dec=(less.W_dec.double().cpu() @ turn).to(less.W_dec))
        found, chance = (match(each, more, config.matching).mmcs for each in (less, turned))
        sizes = (f"{one}, {a.n_features:,}", f"{other}, {b.n_features:,}")
        rows.append(MatchRow(a.site, *sizes, found, chance))
        progress("MMCS", done, len(pairs))
    return rows


def _classes(read: _Read, classes: Mapping[Site, ClassesRecord]) -> list[ClassRow]:
    """Each class among replicated features and among the others that were judged."""
    counts: dict[str, list[int]] = {}
    total = [0, 0]
    for site, record in classes.items():
        replicated = set(read.found.sites[site].replicated.nonzero()[:, 0].tolist())
        for feature, labelled in record.features.items():
            other = feature not in replicated
            total[other] += 1
            for each in labelled.classes:
                counts.setdefault(each.name, [0, 0])[other] += 1
    return [
        ClassRow(name, own, total[0], _share(own, total[0]), others, total[1], _share(others, total[1]))
        for name, (own, others) in sorted(counts.items(), key=lambda item: (-item[1][0], item[0]))
    ]


def _share(hits: int, n: int) -> Estimate:
    return Estimate(hits / n, *wilson(hits, n)) if n else Estimate(0.0, 0.0, 1.0)


def _digests(samples: Samples, parts: Parts) -> tuple[str, ...]:
    """Digests of the prompts of A and B."""
    used = samples.prompt_set(torch.cat([parts.A, parts.B]).tolist())
    return tuple(sorted(prompt_digests(used)))


def _notes(reads: Sequence[_Read], samples: Samples, beside: Beside, config: RewardedConfig) -> list[str]:
    """Limits of this run that a reader of its figures should know."""
    found: list[str] = []
    for read in reads:
        m = sum(int(each.tested.sum()) for each in read.found.sites.values())
        least = m / config.q / (read.found.limit + 1)
        if least > 1:
            found.append(
                f"{m:,} features of the {read.of} were tested with {read.found.limit:,} permutations: fewer than "
                f"{round(least + 0.5):,} rewarded features cannot be selected"
            )
    if "topic" in config.partial and samples.topics is None:
        found.append("the samples have no topics; what depends on the topic is not partialled out")
    if beside.base is not None and not beside.base_dictionaries:
        found.append("the base has no dictionaries of its own; the tuned model's were applied to it")
    return found
