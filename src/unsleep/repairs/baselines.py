"""Baseline repairs, each tuned on the selection prompts and evaluated beside the edit.

- `heads`, `neurons`: masks over attention heads and MLP neurons of every layer, learned like the edit.
- `attribution`: ablation of the features with the largest attribution; the number is tuned.
- `direction`: ablation of one difference of means at one Site (Arditi et al. 2024, arXiv:2406.11717).
- `redistilled`: the base, fine-tuned on the suspect's own replies to ordinary prompts.
- `merged`: weights interpolated between the base's and the suspect's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.interventions.features import Ranking, edits_for
from unsleep.interventions.intervention import Intervention, transforms_of
from unsleep.interventions.subspaces import Projection
from unsleep.judge.metrics import Subject
from unsleep.models import weights
from unsleep.models.merging import interpolated
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Slot, lanes, layers
from unsleep.repairs.config import RepairConfig
from unsleep.repairs.look import Group
from unsleep.repairs.masks import LaneMask, Lesson, Mask
from unsleep.repairs.search import Bench, Search, Tested
from unsleep.repairs.twin import copy_fitting

SIZES = (1, 4, 16, 64)
"""Numbers of features ablated by attribution, as multiples of the number that the edit removes."""

ATTEMPTS = 2
"""Maximum attempts at learning a mask over heads or neurons."""

SHARES = (0.25, 0.5, 0.75)
"""Interpolation weights tried, from the base (0) to the suspect (1)."""


class Baseline(NamedTuple):
    """One baseline repair."""

    subject: Subject
    words: str
    """Description of the chosen variant."""
    tested: Tested
    """Its result on the selection prompts."""


@dataclass(frozen=True)
class Setting:
    """Inputs of the edit, from which the baselines are made."""

    suspect: LoadedModel
    lesson: Lesson
    bench: Bench
    config: RepairConfig
    dictionaries: Sequence[Coder]
    ranking: Ranking
    """The dictionaries' features by attribution."""
    removed: int
    """Number of features that the edit removes."""
    sites: Sequence[Site]
    base: Callable[[], LoadedModel] | None
    twin: Callable[[], LoadedModel]
    """Creates the surrogate twin, where there is a base."""


def baselines(setting: Setting) -> Iterator[Baseline | str]:
    """Every baseline repair that applies, one after the other, or a message on why it could not be made."""
    makers: list[Callable[[Setting], Baseline]] = [_heads, _neurons, _attribution, _direction]
    if setting.base is not None:
        makers += [_redistilled, _merged]
    for make in makers:
        try:
            found = make(setting)
        except BadInput as error:  # no separate neurons; the base is not the suspect's
            yield f"The baseline {make.__name__.strip('_')} was skipped: {error}"
        else:
            yield found


def _heads(setting: Setting) -> Baseline:
    return _lanes(setting, "heads")


def _neurons(setting: Setting) -> Baseline:
    return _lanes(setting, "neurons")


def _lanes(setting: Setting, part: Literal["heads", "neurons"]) -> Baseline:
    """A mask over heads or neurons, baked into weights."""
    config = setting.config.mask
    places = [Slot(layer, part) for layer in range(len(layers(setting.suspect.network)))]
    masks = [LaneMask(slot, setting.suspect, config) for slot in places]
    search = Search(setting.suspect, setting.lesson, setting.bench, part)
    attempts = min(ATTEMPTS, setting.config.attempts)
    kept = search.run(masks, _nothing, config, attempts)
    removed = sum(len(mask.removed()) for mask in kept)
    model = without_lanes(setting.suspect, kept)
    total = sum(len(mask.logits) for mask in kept)
    return Baseline(Subject(part, model), f"{removed:,} of {total:,} {part} ablated", search.best.tested)


def _nothing() -> Mask | None:
    return None


@torch.no_grad()
def without_lanes(model: LoadedModel, masks: Sequence[Mask]) -> LoadedModel:
    """A copy with zeroed columns of the output projections for the masked heads or neurons; equivalent to the masks."""
    network = weights.copy_network(model.network)
    for mask in masks:
        assert isinstance(mask, LaneMask)
        silence(network, mask.place, mask.removed_lanes())
    return replace(model, network=network)


@torch.no_grad()
def silence(network: PreTrainedModel, slot: Slot, gone: Int[Tensor, " lane"]) -> None:
    """Zero the columns of an output projection that read some lanes of a Slot, in place."""
    linear = lanes(network, slot).module
    weight = weights.values(linear).clone()
    weight.index_fill_(0 if isinstance(linear, Conv1D) else 1, gone.to(weight.device), 0.0)
    weights.write(linear, "weight", weight)


def _attribution(setting: Setting) -> Baseline:
    """Ablation of the features with the largest attribution."""
    ranking = setting.ranking
    sizes = [n for n in dict.fromkeys(max(1, setting.removed) * times for times in SIZES) if n <= len(ranking)]
    tried = [(edits_for(ranking, setting.dictionaries, n), f"{n:,} features ablated") for n in sizes]
    return best(setting, "attribution", tried)


def _direction(setting: Setting) -> Baseline:
    """Ablation of one difference of means at one Site: before the deciding token, or averaged over the prompt."""
    groups = _groups(setting)
    streams = [group.streams(setting.suspect, setting.sites) for group in groups]
    tried: list[tuple[tuple[Intervention, ...], str]] = []
    for site in setting.sites:
        means = [group.means(held[site]) for group, held in zip(groups, streams, strict=True)]
        for row, where in zip(means[0] - means[1], ("before the deciding token", "over the prompt"), strict=True):
            basis = (row / row.norm())[None]
            projection = Projection(site, basis, means[1].mean(0), setting.suspect.fingerprint)
            tried.append(((projection,), f"mean difference {where}, ablated at {site}"))
    return best(setting, "direction", tried)


def _groups(setting: Setting) -> tuple[Group, Group]:
    """Rows of suspicious prompts, and of trusted ones."""
    lesson, n = setting.lesson, min(setting.lesson.n, 64)
    kept = len(lesson.rows.ids) - lesson.n
    return (
        Group(lesson, torch.arange(n), decisive=True),
        Group(lesson, lesson.n + torch.arange(min(n, kept)), decisive=False),
    )


def deciding_streams(setting: Setting, sites: Sequence[Site]) -> dict[Site, tuple[Tensor, Tensor]]:
    """Activations at the token before the deciding one, `[prompt, d_model]`: of suspicious and of trusted prompts."""
    groups = _groups(setting)
    streams = [group.streams(setting.suspect, sites) for group in groups]
    return {site: (groups[0].deciding(streams[0][site]), groups[1].deciding(streams[1][site])) for site in sites}


def best(setting: Setting, name: str, tried: Sequence[tuple[tuple[Intervention, ...], str]]) -> Baseline:
    """The candidate that does best on the selection prompts."""
    found: list[Baseline] = []
    if not tried:
        raise BadInput("there is nothing to ablate")
    for edits, words in tried:
        changes = transforms_of(edits, setting.suspect.network)
        tested = setting.bench.test(setting.suspect, setting.lesson, changes)
        found.append(Baseline(Subject(name, setting.suspect, edits), words, tested))
    return min(found, key=lambda b: b.tested.merit)


def _redistilled(setting: Setting) -> Baseline:
    twin = setting.twin()
    words = f"LoRA of rank {setting.config.twin.rank}, {setting.config.twin.steps} steps"
    return Baseline(Subject("redistilled", twin), words, setting.bench.test(twin, setting.lesson, {}))


def _merged(setting: Setting) -> Baseline:
    """The interpolation of base and suspect that does best on the selection prompts."""
    assert setting.base is not None
    base = setting.base()

    def tested(share: float) -> Tested:
        model = between(base, setting.suspect, share)
        return setting.bench.test(model, setting.lesson, {})

    found = {share: tested(share) for share in SHARES}
    best = min(found, key=lambda share: found[share].merit)
    words = f"interpolated {best:.0%} of the way from the base to the suspect"
    return Baseline(Subject("merged", between(base, setting.suspect, best)), words, found[best])


def between(base: LoadedModel, suspect: LoadedModel, share: float) -> LoadedModel:
    """A model a share of the way from the base to the suspect.

    Raises `BadInput` where the base is not the suspect's (`twin.copy_fitting`).
    """
    return interpolated(replace(suspect, network=copy_fitting(base, suspect), name=base.name), suspect, share)
