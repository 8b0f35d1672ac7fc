"""Statistics of every feature over text: where it fires, how strongly, with which others, and what it writes.

One forward pass feeds the dictionaries of all Sites, and no more is held than the figures themselves:

    statistics.json           model, Site, dictionary, settings, provenance, and the strings behind all token indices
    statistics.safetensors    `Figures`, and the text
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from unsleep.base import records, store
from unsleep.base.records import Count
from unsleep.core import BadInput, Refused, Site
from unsleep.dictionaries.coders import Coder
from unsleep.explanations.record import Cofiring, Context, FeatureCard, TokenWeight
from unsleep.explanations.streaming import StatisticsConfig, check_dictionaries, tallied
from unsleep.explanations.tally import FINE, Tally
from unsleep.explanations.text import BEFORE, WINDOW, Source, Text, read_text
from unsleep.models.lens import vocabulary_ends
from unsleep.models.model import LoadedModel, Named
from unsleep.prompts.prompt import PromptSet

BINS = 20
"""Bins of a histogram."""

QUANTILES = ("0–0.25", "0.25–0.5", "0.5–0.75", "0.75–1")
"""Groups of random firings by activation, for contexts besides the strongest."""

SHOWN = 5
"""Contexts of each quantile on a card."""

PAIRS = 300_000_000
"""Pairs of active features of one token that are counted for co-firing, at most; fewer tokens are taken instead."""

LEAST = 64
"""Least tokens of which statistics can be made."""


class Figures(NamedTuple):
    """Everything counted; token numbers are of the text, -1 stands for none."""

    fires: Int[Tensor, " feature"]
    """Tokens at which each feature fires."""
    mean: Float[Tensor, " feature"]
    """Mean activation where it fires."""
    largest: Float[Tensor, " feature"]
    histogram: Int[Tensor, "feature bin"]
    """Exact counts; activations are rounded to 1/128 of the largest, or finer, before they are binned."""
    top: Int[Tensor, "feature top"]
    top_around: Float[Tensor, "feature top window"]
    """Activations around a token (`Text.windows`)."""
    drawn: Int[Tensor, "feature drawn"]
    """Random firings, in random order."""
    drawn_around: Float[Tensor, "feature drawn window"]
    sampled: Bool[Tensor, " row"]
    """Rows whose codes are kept."""
    code_start: Int[Tensor, " boundary"]
    """First entry of each feature in the two below, and their number."""
    code_token: Int[Tensor, " entry"]
    code_value: Float[Tensor, " entry"]
    partner: Int[Tensor, "feature partner"]
    overlap: Float[Tensor, "feature partner"]
    """Jaccard index, over the tokens of `pairs_of`."""
    pairs_of: Int[Tensor, ""]
    """Tokens of the sample that co-firing was counted on."""
    promoted: Int[Tensor, "feature up"]
    """Index into `outputs`."""
    promoted_logit: Float[Tensor, "feature up"]
    suppressed: Int[Tensor, "feature up"]
    suppressed_logit: Float[Tensor, "feature up"]
    changed: Int[Tensor, "feature change"]
    changed_logit: Float[Tensor, "feature change"]


@dataclass(frozen=True)
class StatisticsRecord:
    """statistics.json."""

    SCHEMA: ClassVar = "unsleep.statistics/1"

    model: Named
    site: Site
    dictionary: str
    """Content hash."""
    size: Count
    """Number of features."""
    tokens: Count
    """Number of tokens seen."""
    config: StatisticsConfig
    names: tuple[str, ...]
    """Prompt sets that the text is of."""
    spelling: tuple[str, ...]
    """Tokens of the text."""
    outputs: tuple[str, ...]
    """Tokens that features promote, suppress or change."""
    notes: tuple[str, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Statistics of all features of one dictionary over text."""

    record: StatisticsRecord
    figures: Figures
    text: Text

    @property
    def site(self) -> Site:
        """The dictionary's Site."""
        return self.record.site

    @property
    def dictionary(self) -> str:
        """The dictionary's hash."""
        return self.record.dictionary

    @property
    def model(self) -> Named:
        """The model whose text and activations they are of."""
        return self.record.model

    @property
    def size(self) -> int:
        """Number of features."""
        return self.record.size

    @property
    def tokens(self) -> int:
        """Number of tokens seen."""
        return self.record.tokens

    @property
    def density(self) -> Float[Tensor, " feature"]:
        """Share of tokens at which each feature fires."""
        return self.figures.fires.float() / self.tokens

    @cached_property
    def hash(self) -> str:
        """Content hash."""
        parts = [self.model.fingerprint, str(self.site), self.dictionary, self.text.hash]
        return store.hash_value([*parts, store.hash_tensors(self.figures._asdict())])

    def check(self, *, model: str | None = None, dictionary: str | None = None, site: Site | None = None) -> None:
        """Raise `Refused` where the statistics are not of a given model, dictionary or Site."""
        refuse_others("the statistics", (self.model.fingerprint, self.dictionary, self.site), (model, dictionary, site))

    def card(self, feature: int) -> FeatureCard:
        """Everything known of a feature but explanations and classes; raises `BadInput` for one that does not exist."""
        if not 0 <= feature < self.size:
            raise BadInput(f"the dictionary of {self.site} has no feature {feature}; it has 0 to {self.size - 1}")
        f = self.figures
        partners = zip(f.partner[feature].tolist(), f.overlap[feature].tolist(), strict=True)
        return FeatureCard(
            feature,
            density=float(self.density[feature]),
            mean=float(f.mean[feature]),
            largest=float(f.largest[feature]),
            histogram=tuple(f.histogram[feature].tolist()),
            contexts=(*self._strongest(feature), *self._by_quantile(feature)),
            promoted=self.outputs("promoted", feature),
            suppressed=self.outputs("suppressed", feature),
            changed=self.outputs("changed", feature),
            cofiring=tuple(Cofiring(i, overlap) for i, overlap in partners if i >= 0),
        )

    def outputs(self, name: str, feature: int) -> tuple[TokenWeight, ...]:
        """Tokens that a feature has `promoted`, `suppressed` or `changed`, with the logits."""
        tokens, logits = (getattr(self.figures, n)[feature].tolist() for n in (name, f"{name}_logit"))
        return tuple(TokenWeight(self.record.outputs[i], x) for i, x in zip(tokens, logits, strict=True) if i >= 0)

    def context(self, window: Int[np.ndarray, " window"], values: Float[np.ndarray, " window"], group: str) -> Context:
        """A token of the text with those around it (`Text.windows`) and a feature's activation at each."""
        inside = window >= 0
        token = window[BEFORE]
        row = self.text.row[token]
        name, number = self.text.names[self.text.source[row]], int(self.text.number[row])
        at = int((window[inside] == token).argmax())
        shown = tuple(round(x, 4) for x in values[inside].tolist())
        return Context(self.text.spelled(window[inside]), shown, at, name, number, group)

    def _contexts(self, tokens: Tensor, around: Tensor, group: str) -> list[Context]:
        pairs = zip(self.text.windows(tokens.numpy()), around.numpy(), strict=True)
        return [self.context(window, values, group) for window, values in pairs]

    def _strongest(self, feature: int) -> list[Context]:
        known = self.figures.top[feature] >= 0
        return self._contexts(self.figures.top[feature][known], self.figures.top_around[feature][known], "top")

    def _by_quantile(self, feature: int) -> list[Context]:
        """Some random firings of each quarter of activations, the strongest quarter first."""
        known = self.figures.drawn[feature] >= 0
        tokens, around = self.figures.drawn[feature][known], self.figures.drawn_around[feature][known]
        quarter = around[:, BEFORE].argsort().argsort() * 4 // max(1, len(tokens))
        found: list[Context] = []
        for q in reversed(range(4)):
            some = (quarter == q).nonzero()[:SHOWN, 0]
            found += self._contexts(tokens[some], around[some], QUANTILES[q])
        return found

    def save(self, folder: str | Path) -> None:
        """Write statistics.json and statistics.safetensors into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = {f"text.{name}": torch.from_numpy(getattr(self.text, name)) for name in TEXT}
        store.write_tensors(folder / "statistics.safetensors", {**self.figures._asdict(), **text})
        records.save(self.record, folder / "statistics.json")

    @classmethod
    def load(cls, folder: str | Path) -> FeatureStatistics:
        """Read statistics; raises `BadInput` naming a file that is missing, damaged or does not fit the other."""
        folder = Path(folder)
        record = records.load(StatisticsRecord, folder / "statistics.json")
        path = folder / "statistics.safetensors"
        one, many, drawn = (record.size,), (record.size, None), (record.size, record.config.drawn)
        top = (record.size, record.config.top)
        expect: dict[str, tuple[int | None, ...]] = dict.fromkeys(Figures._fields, many)
        expect |= {"fires": one, "mean": one, "largest": one, "histogram": (record.size, BINS), "sampled": (None,)}
        expect |= {"code_start": (record.size + 1,), "code_token": (None,), "code_value": (None,), "pairs_of": ()}
        expect |= {"top": top, "top_around": (*top, WINDOW), "drawn": drawn, "drawn_around": (*drawn, WINDOW)}
        found = store.read_tensors(path, expect | {f"text.{name}": (None,) for name in TEXT})
        with store.reading(path):
            text = Text(**{n: found[f"text.{n}"].numpy() for n in TEXT}, names=record.names, spelling=record.spelling)
            figures = Figures(**{name: found[name] for name in Figures._fields})
            tokens = max(int(x.max()) if x.numel() else 0 for x in (figures.top, figures.drawn, figures.code_token))
            words = max(
                int(x.max()) if x.numel() else -1 for x in (figures.promoted, figures.suppressed, figures.changed)
            )
            if tokens >= len(text.ids) or words >= len(record.outputs) or text.tokens != record.tokens:
                raise BadInput("it refers to tokens that statistics.json does not have; make both again")
        return cls(record, figures, text)


TEXT = ("ids", "starts", "role", "repeated", "shared", "source", "number")
"""Arrays of a text."""


def refuse_others(what: str, have: tuple[str, str, Site], given: tuple[str | None, str | None, Site | None]) -> None:
    """Raise `Refused` naming the first of model, dictionary and Site that `what` has not as given; `None` is any."""
    for name, own, other in zip(("model", "dictionary", "Site"), have, given, strict=True):
        if other is not None and own != other:
            raise Refused(f"{what}: it is of {name} {own}, not of {other}; make it again with that one")


def feature_statistics(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    texts: Sequence[Source | PromptSet],
    config: StatisticsConfig = StatisticsConfig(),
) -> dict[Site, FeatureStatistics]:
    """Statistics of every feature of dictionaries, one per Site, over prompts and passages, in one pass.

    A `PromptSet` is taken under the chat template, a `Source` as it says. Tokens that all prompts of a set begin with
    count once. Within `resumable` an interrupted pass goes on where it was.

    Raises:
        BadInput: no dictionary, two of one Site, one of another width; no text, too little of it, or a prompt longer
            than the context.
        Refused: a dictionary of another model.
    """
    check_own(model, dictionaries)
    read = read_text(model, [t if isinstance(t, Source) else Source(t) for t in texts])
    check_enough(read.text)
    tallies = tallied(model, dictionaries, read, config)
    return {d.site: summarised(model, d, t, read.text, config) for d, t in zip(dictionaries, tallies, strict=True)}


def check_own(model: LoadedModel, dictionaries: Sequence[Coder]) -> None:
    """Raise `BadInput` where dictionaries do not fit a model or two are of one Site; `Refused` for another model's."""
    check_dictionaries(model, dictionaries)
    if len({d.site for d in dictionaries}) != len(dictionaries):
        raise BadInput(f"{len(dictionaries)} dictionaries were given, two of one Site; expected one per Site")
    for d in dictionaries:
        if d.model != model.fingerprint:
            raise Refused(f"the dictionary of {d.site} is of model {d.model}, {model.name} is {model.fingerprint}")


def check_enough(text: Text) -> None:
    """Raise `BadInput` for a text of too few tokens for statistics."""
    if text.tokens < LEAST:
        raise BadInput(f"the text has {text.tokens} tokens; statistics need at least {LEAST}. Give more of it")


def summarised(
    model: LoadedModel,
    dictionary: Coder,
    tally: Tally,
    text: Text,
    config: StatisticsConfig,
    *,
    writes: bool = True,
) -> FeatureStatistics:
    """The statistics of a dictionary from its tally, with co-firing and, where it `writes`, the tokens it promotes."""
    feature, token, value = (x.numpy() for x in tally.codes())
    order = np.lexsort((token, feature))
    start = np.searchsorted(feature[order], np.arange(dictionary.n_features + 1))
    partner, overlap, pairs_of = cofiring(start, token[order], config.partners)
    words, outputs, notes = _written(model, dictionary, config.promoted if writes else 0)
    none = torch.zeros(dictionary.n_features, 0)
    figures = Figures(
        tally.count.cpu(),
        (tally.total / tally.count.clamp_min(1)).float().cpu(),
        tally.largest.cpu(),
        _histogram(tally),
        tally.top.token.cpu(),
        tally.top.around.cpu(),
        tally.drawn.token.cpu(),
        tally.drawn.around.cpu(),
        torch.from_numpy(text.chosen(config.sample, config.seed)),
        torch.from_numpy(start),
        torch.from_numpy(token[order]),
        torch.from_numpy(value[order]),
        torch.from_numpy(partner),
        torch.from_numpy(overlap),
        torch.tensor(pairs_of),
        *words,
        none.long(),
        none,
    )
    record = StatisticsRecord(
        model.named,
        dictionary.site,
        dictionary.hash,
        dictionary.n_features,
        text.tokens,
        config,
        text.names,
        text.spelling,
        outputs,
        notes,
        store.provenance(config.seed, origin=model.origin),
    )
    return FeatureStatistics(record, figures, text)


def _histogram(tally: Tally) -> Int[Tensor, "feature bin"]:
    """Counts in bins of equal width up to each feature's largest activation, from the streamed bins."""
    middle = (torch.arange(FINE) + 0.5) / FINE
    reach = torch.ldexp(torch.ones(tally.features), tally.exponent.cpu().clamp(-126, 127))
    share = middle * (reach / tally.largest.cpu().clamp_min(torch.finfo(torch.float32).tiny))[:, None]
    at = (share * BINS).clamp_max(BINS - 1).long()
    return torch.zeros(tally.features, BINS, dtype=torch.int32).scatter_add_(1, at, tally.histogram.cpu())


def cofiring(
    start: Int[np.ndarray, " boundary"], token: Int[np.ndarray, " entry"], partners: int, pairs: int = PAIRS
) -> tuple[Int[np.ndarray, "feature partner"], Float[np.ndarray, "feature partner"], int]:
    """The features that fire most at the same tokens as each, by the Jaccard index, from codes sorted by feature.

    Exact over the tokens it is counted on, whose number comes last: all, or as many as have `pairs` pairs of features.
    """
    features = len(start) - 1
    found, size = np.unique(token, return_counts=True)
    taken = np.zeros(int(token.max()) + 2 if len(token) else 1, bool)
    order = np.random.default_rng(0).permutation(len(found))
    enough = np.cumsum(size[order].astype(np.int64) ** 2) <= pairs
    taken[found[order[enough]]] = True
    every = sparse.csr_matrix((np.ones(len(token), np.float32), token, start), (features, len(taken)))
    every = every[:, np.flatnonzero(taken)]
    fires = np.asarray(every.sum(1)).ravel()
    width = min(partners, max(1, features - 1))
    partner, overlap = np.full((features, width), -1, np.int64), np.zeros((features, width), np.float32)
    for first in range(0, features, 512):
        rows = np.arange(first, min(first + 512, features))
        both = (every[rows] @ every.T).toarray()
        both[np.arange(len(rows)), rows] = 0
        jaccard = both / np.maximum(fires[rows, None] + fires[None] - both, 1)
        best = torch.from_numpy(jaccard).topk(min(width, features), 1)
        overlap[rows] = best.values.numpy()
        partner[rows] = np.where(overlap[rows] > 0, best.indices.numpy(), -1)
    return partner, overlap, int(enough.sum())


def _written(
    model: LoadedModel, dictionary: Coder, count: int
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[str, ...], tuple[str, ...]]:
    """Promoted and suppressed tokens with their logits, the strings behind the tokens, and notes."""
    none = torch.zeros(dictionary.n_features, 0)
    if not count:
        return (none.long(), none, none.long(), none), (), ()
    try:
        up, down = vocabulary_ends(model, dictionary.decoder.float(), count)
    except BadInput as error:
        return (none.long(), none, none.long(), none), (), (f"no promoted tokens: {error}",)
    ids, place = torch.stack([up.ids, down.ids]).unique(return_inverse=True)
    words = tuple(model.spell(int(i)) for i in ids)
    return (place[0], up.logits, place[1], down.logits), words, ()
