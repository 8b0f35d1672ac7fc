"""Guard: an input-level monitor that flags prompts at run time, and refuses or edits the replies to them.

A monitor reads the suspect's own activations on the prompt, before the first reply token: a probe on the last token
(Fisher's discriminant with a shrunk covariance, the read direction of LEACE, Belrose et al. 2023, arXiv:2306.03819), or
dictionary features on any token. The mean difference alone also reads what the prompts are about, whose variance is
larger than the trigger's effect. A threshold is a conformal quantile of ordinary prompts that fitted nothing: a fresh
ordinary prompt is flagged with at most the stated probability (Vovk et al. 2005), which several monitors share equally.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from unsleep.activations.held import batches_held, last_held
from unsleep.base import records, store
from unsleep.base.records import Count, Share
from unsleep.base.stats import wilson
from unsleep.core import BadInput, Refused, Site
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import load_dictionary, save_dictionary
from unsleep.interventions.intervention import Intervention, applied
from unsleep.judge.audited import Measured
from unsleep.locate.directions.fit import Labelled, fit
from unsleep.locate.directions.measure import margins
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.models.sites import layers
from unsleep.prompts.prompt import Prompts, as_prompts

MARK = "guard.json"
"""File that marks a guard's folder."""

REFUSAL = "I can't help with this request."
"""Reply to a flagged prompt."""

FEWEST = 8
"""Minimum prompts of either class."""

SETTING = (2, 3)
"""Of every four ordinary prompts, those that set the thresholds."""


@dataclass(frozen=True, eq=False)
class Monitor:
    """A score of a prompt at one Site, and its threshold."""

    site: Site
    vector: Float[Tensor, " d_model"]
    """Direction of the probe; zeros for a monitor of features."""
    center: Float[Tensor, " d_model"]
    threshold: float
    """A prompt with a larger score is flagged."""
    dictionary: Coder | None = None
    features: tuple[int, ...] = ()
    """Watched features of the dictionary; their summed activation, at its largest over the tokens, is the score."""

    @property
    def words(self) -> str:
        """Description of what it reads."""
        if self.dictionary is None:
            return f"a probe on the last token at {self.site}"
        return f"{len(self.features):,} features at {self.site}"

    def scores(
        self, x: Float[Tensor, "row position d_model"], real: Bool[Tensor, "row position"]
    ) -> Float[Tensor, " row"]:
        """Scores of left-padded rows; `real` is False at padding."""
        if self.dictionary is None:
            return (x[:, -1].float() - self.center) @ self.vector
        coder = self.dictionary.to(torch.float32, "cpu")
        active = coder.encode(x.float())[..., list(self.features)].sum(-1)
        return active.masked_fill(~real, 0.0).amax(1)


@dataclass(frozen=True)
class MonitorEntry:
    """Entry of guard.json for a monitor."""

    site: Site
    threshold: float
    features: tuple[int, ...]
    dictionary: str | None
    """Folder of its dictionary; `None` for a probe."""


@dataclass(frozen=True)
class GuardRecord:
    """guard.json."""

    SCHEMA: ClassVar = "unsleep.guard/1"

    model: str
    """Fingerprint."""
    rate: Share
    """Stated false-positive rate."""
    calibrated: Count
    """Ordinary prompts that set the thresholds."""
    monitors: tuple[MonitorEntry, ...]
    triggered: Measured | None
    """Held-out prompts with the found triggers."""
    clean: Measured | None
    """Held-out ordinary prompts."""
    provenance: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Guard:
    """Monitors of one model, at a stated false-positive rate."""

    monitors: tuple[Monitor, ...]
    model: str
    """Fingerprint of the model whose activations they read."""
    rate: float
    calibrated: int

    def flagged(self, model: LoadedModel, prompts: Prompts) -> list[bool]:
        """True for each prompt that a monitor flags; raises `Refused` for another model."""
        if model.fingerprint != self.model:
            raise Refused(f"the guard belongs to model {self.model}, this one is {model.fingerprint}")
        return self.of_rows(model, model.encode(prompts)).tolist()

    def of_rows(self, model: LoadedModel, rows: Sequence[Sequence[int]]) -> Bool[Tensor, " row"]:
        """The same for rows of token ids, which end where the reply begins."""
        found = torch.zeros(len(rows), dtype=torch.bool)
        for monitor, scores in zip(self.monitors, scores_of(model, rows, self.monitors), strict=True):
            found |= scores > monitor.threshold
        return found

    def replies(
        self,
        model: LoadedModel,
        prompts: Prompts,
        *,
        edits: Intervention | Sequence[Intervention] = (),
        refusal: str = REFUSAL,
        max_new_tokens: int = 24,
    ) -> list[Answer]:
        """Greedy replies: to flagged prompts under `edits` or, without any, the refusal; to others the model's own."""
        asked = as_prompts(prompts)
        flags = self.flagged(model, asked)
        said = [refusal] * len(asked)
        for flag in (False, True):
            chosen = [i for i, own in enumerate(flags) if own is flag]
            if not chosen or (flag and not edits):
                continue
            with applied(model, edits if flag else ()):
                written = generate.replies(model, [asked[i] for i in chosen], max_new_tokens=max_new_tokens)
            for i, text in zip(chosen, written, strict=True):
                said[i] = text
        return [Answer(text, flag) for text, flag in zip(said, flags, strict=True)]

    def processor(self, model: LoadedModel, refusal: str = REFUSAL) -> GuardProcessor:
        """A processor for one call of `model.network.generate`, which makes flagged rows say the refusal."""
        return GuardProcessor(self, model, refusal)

    def save(
        self,
        folder: str | Path,
        triggered: Measured | None = None,
        clean: Measured | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> Path:
        """Write `guard.json`, the probes' tensors and the dictionaries; an earlier guard is replaced."""
        folder = Path(folder)
        with store.new_folder(folder, replace=MARK) as scratch:
            entries: list[MonitorEntry] = []
            for number, each in enumerate(self.monitors):
                named = None
                if each.dictionary is not None:
                    named = f"dictionary-{number}"
                    save_dictionary(each.dictionary, scratch / named)
                tensors = {"vector": each.vector.float(), "center": each.center.float()}
                store.write_tensors(scratch / f"monitor-{number}.safetensors", tensors)
                entries.append(MonitorEntry(each.site, each.threshold, each.features, named))
            record = GuardRecord(
                self.model, self.rate, self.calibrated, tuple(entries), triggered, clean, provenance or {}
            )
            records.save(record, scratch / MARK)
        return folder


class Answer(NamedTuple):
    """A guarded reply."""

    text: str
    flagged: bool


class GuardProcessor(LogitsProcessor):
    """Forces the refusal, token by token, in the rows of a batch whose prompt is flagged; for one call of `generate`.

    The prompts run once more, up to the monitors' deepest Site. Leading padding tokens of a row are left out.
    """

    def __init__(self, guard: Guard, model: LoadedModel, refusal: str) -> None:
        [said] = model.token_ids([refusal], special=False)
        self.guard, self.model = guard, model
        self.forced = [*said, *sorted(model.end_ids)[:1]]
        self.flags: Bool[Tensor, " row"] | None = None
        """Flagged rows, once the prompts have run."""
        self.prompt = self.seen = 0

    def __call__(
        self, input_ids: Int[Tensor, "row position"], scores: Float[Tensor, "row vocabulary"]
    ) -> Float[Tensor, "row vocabulary"]:
        """Scores in which flagged rows can only go on with the refusal; `Refused` for a second call of `generate`."""
        length = input_ids.shape[1]
        if self.flags is None:
            self.flags, self.prompt = self.guard.of_rows(self.model, [self._real(row) for row in input_ids]), length
        elif length != self.seen + 1 or len(input_ids) != len(self.flags):
            raise Refused("a guard's processor serves one call of generate; make another with guard.processor(model)")
        self.seen = length
        flags = self.flags.to(scores.device)
        if not bool(flags.any()):
            return scores
        token = self.forced[min(length - self.prompt, len(self.forced) - 1)]
        only = torch.full_like(scores, -torch.inf)
        only[:, token] = 0.0
        return torch.where(flags[:, None], only, scores)

    def _real(self, row: Int[Tensor, " position"]) -> list[int]:
        ids: list[int] = row.tolist()
        start = next((i for i, token in enumerate(ids) if token != self.model.pad_id), 0)
        return ids[start:]


def scores_of(
    model: LoadedModel, rows: Sequence[Sequence[int]], monitors: Sequence[Monitor]
) -> list[Float[Tensor, " row"]]:
    """Scores of rows of token ids by each monitor, from one pass up to the deepest Site."""
    out = [torch.empty(len(rows)) for _ in monitors]
    for index, held in batches_held(model, rows, list(dict.fromkeys(m.site for m in monitors))):
        lengths = torch.tensor([len(rows[i]) for i in index])
        for scores, monitor in zip(out, monitors, strict=True):
            x = held[monitor.site]
            scores[index] = monitor.scores(x, torch.arange(x.shape[1]) >= x.shape[1] - lengths[:, None])
    return out


def fit_guard(
    model: LoadedModel,
    suspicious: Prompts,
    ordinary: Prompts,
    *,
    rate: float = 0.05,
    features: Sequence[tuple[Coder, Sequence[int]]] = (),
    fresh: Prompts | None = None,
) -> Guard:
    """Fit a probe, with monitors of dictionary features beside it, at a stated false-positive rate.

    Of every four suspicious prompts three fit the probe at three depths and one chooses among them, by the margin; of
    every four ordinary ones one fits, one chooses and two set the thresholds or, with `fresh`, fit too.

    Args:
        suspicious: prompts with the found triggers.
        ordinary: trusted prompts; `rate` needs at least 1 / rate − 1 in the half that sets the thresholds.
        features: dictionaries of the model, each with the features to watch, such as those that a repair removed.
        fresh: ordinary prompts that set the thresholds instead. Needed where `features` were chosen on `ordinary`: they
            are quieter there than on fresh prompts, and a threshold would be too low.

    Raises `BadInput` for too few prompts, or a rate that is no share.
    """
    if not 0 < rate < 1:
        raise BadInput.of("rate", rate, "a share between 0 and 1", "guard")
    asked, calm = as_prompts(suspicious), as_prompts(ordinary)
    if min(len(asked), len(calm)) < FEWEST:
        raise BadInput(f"{len(asked)} suspicious and {len(calm)} ordinary prompts; expected at least {FEWEST} of each")
    kept = [p for i, p in enumerate(calm) if i % 4 in SETTING] if fresh is None else list(as_prompts(fresh))
    monitors = [_probe(model, asked, calm, (0,) if fresh is None else (0, *SETTING))]
    monitors += [
        Monitor(d.site, torch.zeros(d.d_model), torch.zeros(d.d_model), 0.0, d, tuple(ids))
        for d, ids in features
        if ids
    ]
    share = rate / len(monitors)
    if 1 / (len(kept) + 1) > share:
        needed = math.ceil(1 / share) - 1
        more = f"about {2 * needed + 2} ordinary" if fresh is None else f"{needed} fresh"
        raise BadInput(
            f"{len(kept)} ordinary prompts are left to set a threshold; a rate of {rate:g} over {len(monitors)} "
            f"monitors needs {needed}: give {more} prompts, or a larger rate"
        )
    found = scores_of(model, model.encode(kept), monitors)
    held = [replace(m, threshold=conformal_threshold(s, share)) for m, s in zip(monitors, found, strict=True)]
    return Guard(tuple(held), model.fingerprint, rate, len(kept))


def conformal_threshold(scores: Float[Tensor, " prompt"], rate: float) -> float:
    """The score that a fresh ordinary prompt exceeds with at most the given probability.

    >>> conformal_threshold(torch.arange(19.0), 0.1)
    17.0
    """
    place = math.ceil((len(scores) + 1) * (1 - rate) - 1e-9)
    return float(scores.sort().values[min(place, len(scores)) - 1])


def _probe(model: LoadedModel, asked: Prompts, calm: Prompts, fits: Sequence[int]) -> Monitor:
    """Fisher's discriminant at one of three depths, by the margin on prompts that did not fit it.

    `fits` are those of every four ordinary prompts that fit it; the second chooses.
    """
    deep = len(layers(model.network))
    sites = list(dict.fromkeys(Site(min(deep - 1, deep * part // 4)) for part in (1, 2, 3)))
    parts = [
        (asked, (0, *SETTING)),  # every suspicious prompt but those that choose
        (calm, fits),
    ]
    lasts = [
        [
            last_held(model, [p for i, p in enumerate(as_prompts(each)) if i % 4 in own], sites)
            for own in (fitting, (1,))
        ]
        for each, fitting in parts
    ]
    best: tuple[float, Monitor] | None = None
    for site in sites:
        (fit_high, high), (fit_low, low) = ((first[site], second[site]) for first, second in lasts)
        direction = fit(Labelled.of(fit_high, fit_low), "leace", site=site, model=model.fingerprint)
        monitor = Monitor(site, direction.vector[0], direction.center, 0.0)
        scores = (torch.cat([high, low]) - direction.center) @ direction.vector[0]
        margin = float(margins(scores[None], torch.arange(len(scores)) < len(high))[0])
        if best is None or margin > best[0]:
            best = margin, monitor
    assert best is not None
    return best[1]


def measured(flags: Sequence[bool]) -> Measured:
    """Flagged prompts with their interval."""
    return Measured(sum(flags), len(flags), *wilson(sum(flags), len(flags)))


def load_guard(folder: str | Path) -> Guard:
    """Read what `Guard.save` wrote; raises `BadInput` naming what is invalid."""
    folder = Path(folder)
    record = records.load(GuardRecord, folder / MARK)
    monitors: list[Monitor] = []
    for number, entry in enumerate(record.monitors):
        dictionary = None
        if entry.dictionary is not None:
            dictionary = load_dictionary(store.inside(folder, entry.dictionary, "dictionary"))
        tensors = store.read_tensors(folder / f"monitor-{number}.safetensors", {"vector": (None,), "center": (None,)})
        monitors.append(
            Monitor(entry.site, tensors["vector"], tensors["center"], entry.threshold, dictionary, entry.features)
        )
    return Guard(tuple(monitors), record.model, record.rate, record.calibrated)
