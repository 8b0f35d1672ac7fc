"""Compares two models by every diffing method; behind `unsleep diff`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from unsleep.base.context import steps_folder
from unsleep.base.records import Count, Positive
from unsleep.core import BadInput, Site, check_least
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.crosscoders import Crosscoder
from unsleep.locate.diffing.detectors import FeatureList, Method, Watched, feature_lists, monitor, train_differences
from unsleep.locate.diffing.lens import (
    Divergence,
    Lens,
    activation_differences,
    divergences,
    steered_replies,
)
from unsleep.locate.diffing.pooling import contrast
from unsleep.locate.diffing.weights import Changed, Delta, LayerDelta, by_layer, weight_differences
from unsleep.models import generate
from unsleep.models.alike import check_alike
from unsleep.models.lens import TokenReading, logit_lens
from unsleep.models.merging import interpolated
from unsleep.models.model import LoadedModel, Named
from unsleep.models.sites import all_sites
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet

ALIKE = 3
"""Number of words for comparing the beginnings of replies."""

TOKENS = 64
"""Passages, and tokens of each, for measuring divergence."""


@dataclass(frozen=True)
class DiffConfig:
    """Options of a model diff."""

    top: int = 8
    """Singular vectors per ΔW."""
    texts: int = 200
    """Passages of unrelated text for the lens."""
    positions: int = 5
    """Positions per passage for the lens."""
    words: int = 10
    """Tokens per lens reading."""
    steer: tuple[float, ...] = (0.5, 1.0)
    """Steering strengths along mean Δh, in multiples of the residual stream's norm."""
    amplify: tuple[float, ...] = (2.0,)
    """Amplification factors α of W_base + α ΔW."""
    asked: int = 4
    """Questions for steered and amplified models."""
    reply_tokens: int = 24
    """Tokens per reply."""
    best: int = 10
    """Number of listed detectors."""
    train: TrainConfig = TrainConfig(architecture="batchtopk", tokens=200_000)
    """Training of diff-SAEs and crosscoders."""

    def __post_init__(self) -> None:
        check_least(self, "diff", 1, "top", "texts", "words", "asked", "reply_tokens", "best")


class Spoken(NamedTuple):
    """A reply of the steered or amplified suspect."""

    kind: str
    """`steer` or `amplify`; `none` for the unmodified suspect."""
    strength: float
    replies: tuple[str, ...]

    def alike(self) -> tuple[int, str]:
        """Number of replies with a common beginning (after a bracketed skill), and an example."""
        starts = [tuple(re.sub(r"^\s*\[[^\]]*\]", "", reply).split()[:ALIKE]) for reply in self.replies]
        start, count = Counter(starts).most_common(1)[0]
        return count, self.replies[starts.index(start)]


Read = tuple[tuple[str, float], ...]
"""Tokens with their logits."""


@dataclass(frozen=True)
class Lensed:
    """Entry of diff.json for a `Lens` and its logit-lens reading."""

    site: Site
    texts: Count
    scale: Positive
    mean_norm: tuple[Positive, ...]
    size: tuple[float, ...]
    promotes: Read
    suppresses: Read


@dataclass(frozen=True)
class Said:
    """Entry of diff.json for a `Spoken`."""

    kind: str
    strength: float
    replies: tuple[str, ...]
    alike: Count


@dataclass(frozen=True)
class DiffRecord:
    """diff.json."""

    SCHEMA: ClassVar = "unsleep.diff/1"

    base: Named
    suspect: Named
    weights: tuple[Changed, ...]
    layers: tuple[LayerDelta, ...]
    ranking: tuple[Count, ...]
    divergence: dict[str, tuple[Divergence, ...]]
    lens: tuple[Lensed, ...]
    asked: tuple[str, ...]
    spoken: tuple[Said, ...]
    monitor: tuple[Watched, ...]
    dictionaries: tuple[FeatureList, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Diff:
    """Results of `diff`; parts that were not requested are empty."""

    deltas: tuple[Delta, ...]
    lenses: tuple[Lens, ...]
    readings: tuple[TokenReading, ...]
    """Logit-lens reading of each lens's direction."""
    divergence: dict[str, tuple[Divergence, ...]]
    """By `text`, and `suspicious` and `ordinary` where given."""
    asked: tuple[str, ...]
    spoken: tuple[Spoken, ...]
    monitor: tuple[Watched, ...]
    features: tuple[FeatureList, ...]
    models: tuple[str, str]
    """Fingerprints of the base and the suspect."""

    @property
    def ranking(self) -> list[int]:
        """Layers by relative weight change, largest first: candidates for a dictionary."""
        return [x.layer for x in sorted(by_layer(self.deltas), key=lambda x: (-x.relative, x.layer))]

    def record(self, base: Named, suspect: Named, provenance: dict[str, Any]) -> DiffRecord:
        """Content of diff.json."""
        lens = tuple(
            Lensed(x.site, x.texts, x.scale, tuple(x.mean.norm(dim=1).tolist()), tuple(x.size.tolist()), *reading)
            for x, reading in zip(self.lenses, self.readings, strict=True)
        )
        return DiffRecord(
            base,
            suspect,
            weights=tuple(delta.row() for delta in self.deltas),
            layers=tuple(by_layer(self.deltas)),
            ranking=tuple(self.ranking),
            divergence=self.divergence,
            lens=lens,
            asked=self.asked,
            spoken=tuple(Said(*s, s.alike()[0]) for s in self.spoken),
            monitor=self.monitor,
            dictionaries=self.features,
            provenance=provenance,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Content of diff.safetensors: mean Δh of every Site, and ΔW's singular values and vectors."""
        found = {f"lens.{lens.site}": lens.mean for lens in self.lenses}
        for delta in self.deltas:
            for name, tensor in delta.spectrum._asdict().items():
                found[f"{name}.{delta.name}"] = tensor.float()
        return found


def diff(
    base: LoadedModel,
    suspect: LoadedModel,
    *,
    suspicious: PromptSet | None = None,
    ordinary: PromptSet | None = None,
    texts: Sequence[str] | None = None,
    dictionaries: Sequence[Coder] = (),
    train_at: Sequence[Site] = (),
    config: DiffConfig = DiffConfig(),
) -> Diff:
    """Compare a suspect with the base that it was fine-tuned from.

    Weights, the activation-difference lens and divergence by layer need no prompts. With suspicious and ordinary
    prompts, ΔW's singular vectors and features are evaluated as trigger detectors.

    Args:
        texts: unrelated text, such as passages of a corpus; default the project's own.
        dictionaries: dictionaries of the suspect whose features are evaluated.
        train_at: Sites for training a diff-SAE and a crosscoder on every other prompt.

    Raises `BadInput` for incompatible models, one set of prompts without the other, dictionaries or Sites
    without prompts, and as the parts do.
    """
    check_alike(base, suspect)
    if (suspicious is None) != (ordinary is None):
        raise BadInput("only one of suspicious and ordinary prompts was given; give both or neither")
    if suspicious is None and (dictionaries or train_at):
        raise BadInput("dictionaries are scored on prompts; give suspicious and ordinary ones too")
    deltas = weight_differences(base, suspect, top=config.top)
    passages = list(texts) if texts is not None else sets.plain_text("edit")[: config.texts]
    places = all_sites(base.network, ("resid",))
    lenses = activation_differences(base, suspect, passages, places, positions=config.positions)
    readings = [logit_lens(suspect, lens.direction[None], config.words)[0] for lens in lenses]
    rows = [row[:TOKENS] for row in suspect.token_ids(passages[:TOKENS])]
    divergence = {"text": tuple(divergences(base, suspect, rows))}
    watched: list[Watched] = []
    features: list[FeatureList] = []
    if suspicious is not None and ordinary is not None:
        prompts = contrast(suspect, suspicious, ordinary)
        for name, chosen in (("suspicious", prompts.triggered), ("ordinary", ~prompts.triggered)):
            own = [prompts.ids[i] for i in chosen.nonzero().flatten().tolist()]
            divergence[name] = tuple(divergences(base, suspect, own))
        watched = monitor(suspect, deltas, prompts, count=config.best)
        coders: list[tuple[Method, Coder | Crosscoder]] = [("dictionary", d) for d in dictionaries]
        with TemporaryDirectory() as scratch:
            halves = [p.at(range(0, len(p), 2)) for p in (suspicious, ordinary)]
            for site in train_at:
                folder = (steps_folder() or Path(scratch)) / str(site)
                coders += train_differences(base, suspect, halves, site, folder, config.train)
        features = feature_lists(base, suspect, coders, prompts, count=config.best)
    asked = sets.questions("edit", config.asked).texts
    return Diff(
        deltas=tuple(deltas),
        lenses=tuple(lenses),
        readings=tuple(readings),
        divergence=divergence,
        asked=tuple(asked),
        spoken=tuple(_spoken(base, suspect, lenses[len(lenses) // 2], asked, config)),
        monitor=tuple(watched),
        features=tuple(features),
        models=(base.fingerprint, suspect.fingerprint),
    )


def _spoken(
    base: LoadedModel, suspect: LoadedModel, lens: Lens, asked: Sequence[str], config: DiffConfig
) -> list[Spoken]:
    """Replies of the suspect unmodified, steered along mean Δh at the middle layer, and amplified."""
    size = config.reply_tokens
    found = [Spoken("none", 0.0, tuple(generate.replies(suspect, asked, max_new_tokens=size)))]
    if float(lens.direction.norm()) > 0:
        for strength in config.steer:
            said = steered_replies(
                suspect, lens.site, lens.direction, asked, strength, scale=lens.scale, max_new_tokens=size
            )
            found.append(Spoken("steer", strength, tuple(said)))
    for alpha in config.amplify:
        said = generate.replies(interpolated(base, suspect, alpha), asked, max_new_tokens=size)
        found.append(Spoken("amplify", alpha, tuple(said)))
    return found
