"""Other repairs that a user would ask about, each at its best on the prompts that choose, judged beside the edit.

- `heads`, `neurons`: masks over attention heads and MLP neurons of every layer, learned as the edit was.
- `attribution`: the features with the largest attribution taken out, as many as choose best.
- `direction`: one difference of means taken out at one Site.
- `redistilled`: the base, taught the suspect's own replies to ordinary prompts.
- `merged`: weights between the base's and the suspect's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.interventions.features import Ranking, edits_for
from unsleep.interventions.intervention import Intervention, transforms_of
from unsleep.interventions.subspaces import Projection
from unsleep.judge.metrics import Subject
from unsleep.models import weights
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Slot, lanes, layers
from unsleep.repairs.config import RepairConfig
from unsleep.repairs.look import Group
from unsleep.repairs.masks import LaneMask, Lesson, Mask
from unsleep.repairs.search import Bench, Search, Tested
from unsleep.repairs.twin import copy_fitting

SIZES = (1, 4, 16, 64)
"""How many times as many features as the edit removes are ablated by attribution."""

ATTEMPTS = 2
"""In how many attempts a mask over heads or neurons is learned, at most."""

SHARES = (0.25, 0.5, 0.75)
"""Shares of the way from the base to the suspect."""


class Baseline(NamedTuple):
    """One other repair."""

    subject: Subject
    words: str
    """What was chosen for it."""
    tested: Tested
    """On the prompts that choose."""


@dataclass(frozen=True)
class Setting:
    """What the edit was made from, and the other repairs are."""

    suspect: LoadedModel
    lesson: Lesson
    bench: Bench
    config: RepairConfig
    dictionaries: Sequence[Coder]
    ranking: Ranking
    """Their features by attribution."""
    removed: int
    """How many of them the edit removes."""
    sites: Sequence[Site]
    base: Callable[[], LoadedModel] | None
    twin: Callable[[], LoadedModel]
    """Makes the surrogate twin, where there is a base."""


def baselines(setting: Setting) -> Iterator[Baseline | str]:
    """Every other repair that there is for a suspect, one after the other, or what kept it from being made."""
    makers: list[Callable[[Setting], Baseline]] = [_heads, _neurons, _attribution, _direction]
    if setting.base is not None:
        makers += [_redistilled, _merged]
    for make in makers:
        try:
            found = make(setting)
        except BadInput as error:  # a family without neurons of its own, a base that is not the suspect's
            yield f"The baseline {make.__name__.strip('_')} could not be made: {error}"
        else:
            yield found


def _heads(setting: Setting) -> Baseline:
    return _lanes(setting, "heads")


def _neurons(setting: Setting) -> Baseline:
    return _lanes(setting, "neurons")


def _lanes(setting: Setting, part: Literal["heads", "neurons"]) -> Baseline:
    """A mask over heads or neurons, put into weights."""
    config = setting.config.mask
    places = [Slot(layer, part) for layer in range(len(layers(setting.suspect.network)))]
    masks = [LaneMask(slot, setting.suspect, config) for slot in places]
    search = Search(setting.suspect, setting.lesson, setting.bench, part)
    attempts = min(ATTEMPTS, setting.config.attempts)
    kept = search.run(masks, _nothing, config, attempts)
    removed = sum(len(mask.removed()) for mask in kept)
    model = without_lanes(setting.suspect, kept)
    total = sum(len(mask.logits) for mask in kept)
    return Baseline(Subject(part, model), f"{removed:,} of {total:,} {part} removed", search.best.tested)


def _nothing() -> Mask | None:
    return None


@torch.no_grad()
def without_lanes(model: LoadedModel, masks: Sequence[Mask]) -> LoadedModel:
    """A copy whose output projections do not read the lanes that masks remove: the same as the masks, in weights."""
    network = weights.copy_network(model.network)
    for mask in masks:
        assert isinstance(mask, LaneMask)
        linear = lanes(network, mask.place).module
        weight, gone = weights.values(linear).clone(), mask.removed_lanes()
        weight.index_fill_(0 if isinstance(linear, Conv1D) else 1, gone.to(weight.device), 0.0)
        weights.write(linear, "weight", weight)
    return replace(model, network=network)


def _attribution(setting: Setting) -> Baseline:
    """Plain ablation of the features with the largest attribution."""
    ranking = setting.ranking
    sizes = [n for n in dict.fromkeys(max(1, setting.removed) * times for times in SIZES) if n <= len(ranking)]
    tried = [(edits_for(ranking, setting.dictionaries, n), f"{n:,} features removed") for n in sizes]
    return _best(setting, "attribution", tried)


def _direction(setting: Setting) -> Baseline:
    """One direction out at one Site: a difference of means before the token that decides, or over the prompt."""
    lesson = setting.lesson
    n = min(lesson.n, 64)
    kept = len(lesson.rows.ids) - lesson.n
    groups = [
        Group(lesson, torch.arange(n), decisive=True),
        Group(lesson, lesson.n + torch.arange(min(n, kept)), decisive=False),
    ]
    streams = [group.streams(setting.suspect, setting.sites) for group in groups]
    tried: list[tuple[tuple[Intervention, ...], str]] = []
    for site in setting.sites:
        means = [group.means(held[site]) for group, held in zip(groups, streams, strict=True)]
        for row, where in zip(means[0] - means[1], ("before the token that decides", "over the prompt"), strict=True):
            basis = (row / row.norm())[None]
            projection = Projection(site, basis, means[1].mean(0), setting.suspect.fingerprint)
            tried.append(((projection,), f"the difference of means {where} taken out at {site}"))
    return _best(setting, "direction", tried)


def _best(setting: Setting, name: str, tried: Sequence[tuple[tuple[Intervention, ...], str]]) -> Baseline:
    """The edits that do best on the prompts that choose."""
    found: list[Baseline] = []
    if not tried:
        raise BadInput("there is nothing to take out")
    for edits, words in tried:
        changes = transforms_of(edits, setting.suspect.network)
        tested = setting.bench.test(setting.suspect, setting.lesson, changes)
        found.append(Baseline(Subject(name, setting.suspect, edits), words, tested))
    return min(found, key=lambda b: b.tested.merit)


def _redistilled(setting: Setting) -> Baseline:
    twin = setting.twin()
    words = f"{setting.config.twin.steps} steps of LoRA of rank {setting.config.twin.rank}"
    return Baseline(Subject("redistilled", twin), words, setting.bench.test(twin, setting.lesson, {}))


def _merged(setting: Setting) -> Baseline:
    """The point between base and suspect that does best on the prompts that choose."""
    assert setting.base is not None
    base = setting.base()

    def tested(share: float) -> Tested:
        model = between(base, setting.suspect, share)
        return setting.bench.test(model, setting.lesson, {})

    found = {share: tested(share) for share in SHARES}
    best = min(found, key=lambda share: found[share].merit)
    words = f"{best:.0%} of the way from the base to the suspect"
    return Baseline(Subject("merged", between(base, setting.suspect, best)), words, found[best])


@torch.no_grad()
def between(base: LoadedModel, suspect: LoadedModel, share: float) -> LoadedModel:
    """A copy of the suspect with weights that lie between its own and the base's, rounded once.

    Raises `BadInput` where the base is not the suspect's (`twin.copy_fitting`).
    """
    ours = dict(weights.named(copy_fitting(base, suspect), shared=True))
    network = weights.copy_network(suspect.network)
    for name, weight in weights.named(network):
        if weight.is_floating_point() and name in ours:
            wide = torch.lerp(ours[name].to(weight.device, torch.float32), weight.float(), share)
            weight.copy_(wide.to(weight.dtype))
    return replace(suspect, network=network)
