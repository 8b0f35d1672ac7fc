"""Directions between two groups of prompts, evaluated by detection, patching and ablation cost.

1. Both groups run once; a share of the prompts is held out.
2. Every method is fitted at every Site, in the residual stream and, with a dictionary, in feature space, and
   evaluated on held-out prompts against the best of many random directions.
3. DAS is trained at a few Sites. Every direction is patched from held-out suspicious into ordinary prompts.
4. At the Site with the largest patching effect, directions are compared, and ablated on plain text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from unsleep.activations.collect import Position, collect
from unsleep.base.context import kept, progress
from unsleep.core import BadInput, Dictionary, Site, check_least
from unsleep.interventions.subspaces import Projection
from unsleep.locate.directions import cost, das, files, fit, measure, patching
from unsleep.locate.directions.erase import Removed, sink_norm_at, spanned
from unsleep.locate.directions.fit import Direction, Labelled, Space
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.models.sites import tap
from unsleep.prompts.pairs import check_pairs
from unsleep.prompts.prompt import PromptSet

DAS = {"das-1": 1, "das-2": 2, "das-3": 3}
"""Methods trained on the model's answer → their rank."""

UNPAIRED = "With --pairs 0 nothing is patched, and DAS is left out"
"""Hint in errors for groups that are not paired."""

DEFAULT = (
    "mean_difference",
    "kmeans",
    "logistic",
    "pca",
    "lat",
    "cluster_mean",
    *fit.ONE_SIDED,
    "leace",
    "das-1",
    "random",
)


@dataclass(frozen=True)
class StudyConfig:
    """Options of the direction study."""

    methods: tuple[str, ...] = DEFAULT
    """Methods of `fit`, and das-1, das-2, das-3. One-sided ones are skipped without neutral prompts."""
    position: str = "last"
    """Tokens: last, all, reply, or a number counted from 0 or from -1."""
    plain: bool = False
    """Take texts without the chat template."""
    kept: int = 3
    """Every n-th prompt is held out."""
    randoms: int = 1000
    """Random directions; the best is the detection floor."""
    pairs: int = 48
    """Held-out pairs for patching, and training pairs for DAS; 0 skips both."""
    das_sites: int = 3
    """Evenly spaced Sites for DAS."""
    das_epochs: int = 24
    cost_passages: int = 32
    """Plain passages for ablation costs; 0 skips them."""
    cost_randoms: int = 8
    """Random subspaces per rank for comparison."""
    reply_tokens: int = 8
    """Tokens of the model's own replies at position reply."""
    batch: int = 64
    """Prompts per forward pass."""
    seed: int = 0

    def __post_init__(self) -> None:
        known = (*fit.METHODS, *DAS)
        for method in self.methods:
            if method not in known:
                raise BadInput(f"method {method!r} is unknown; expected one of {', '.join(known)}")
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise BadInput.of("methods", self.methods, "at least one, and none twice")
        check_least(self, "", 2, "kept")
        check_least(self, "", 1, "randoms", "das_epochs", "batch", "cost_randoms", "reply_tokens")
        check_least(self, "", 0, "pairs", "das_sites", "cost_passages")
        _ = self.where

    @property
    def where(self) -> Position:
        """The position in the form of `collect`."""
        if self.position in ("last", "all", "reply"):
            return self.position
        if self.position.removeprefix("-").isdecimal() and len(self.position) < 8:
            return int(self.position)
        raise BadInput(f"position is {self.position[:40]!r}; expected last, all, reply or a whole number")


class Found(NamedTuple):
    """A direction with its held-out metrics."""

    direction: Direction
    figures: measure.HeldOut


@dataclass(frozen=True, eq=False)
class Study:
    """Results of the study."""

    model: str
    """Fingerprint of the model."""
    config: StudyConfig
    found: tuple[Found, ...]
    floors: Mapping[tuple[Site, Space], measure.Floor]
    stream: Mapping[Site, Mapping[str, Direction]]
    """Every direction in the residual stream; decoded feature directions have prefixed names."""
    ordinary: Mapping[Site, tuple[Tensor, float]]
    """Mean of the ordinary training tokens, `Float[Tensor, " d_model"]`, and the attention-sink norm."""
    carried: Mapping[Site, Mapping[str, float]]
    """Share recovered by each direction from suspicious to ordinary prompts; empty without pairs."""
    pairs: int
    """Number of patched pairs."""
    best: Site
    """Site at which directions are compared and ablated."""
    costs: Mapping[str, cost.Cost]
    """Ablation → its costs at the best Site; empty where skipped."""

    @property
    def beats_chance(self) -> bool:
        """True if a fitted direction detects better than the best random one at its Site."""
        judged = [f for f in self.found if f.direction.method != "random"]
        return any(f.figures.auroc > self.floors[f.direction.site, f.direction.space].best for f in judged)

    def projections(self, rank: int, sites: Sequence[Site]) -> list[Projection]:
        """Projections that ablate the found subspace of a rank at Sites, replacing it by the ordinary prompts' mean.

        Its rows are the methods' directions in order, orthogonalised; random and feature
        directions are excluded. Raises `BadInput` where the methods span fewer dimensions.
        """
        made: list[Projection] = []
        for site in sites:
            if site not in self.stream:
                raise BadInput(f"{site} was not studied; expected one of {', '.join(map(str, self.stream))}")
            named = {k: d for k, d in self.stream[site].items() if k != "random" and not k.startswith(FEATURES)}
            rows = torch.cat([d.vector for d in named.values()]) if named else torch.empty(0, 1)
            basis = spanned(rows, rank)
            if len(basis) < rank:
                raise BadInput(
                    f"a subspace of rank {rank} was asked for at {site}; the methods {', '.join(named)} span "
                    f"{len(basis)} dimensions. Ask for less, or give more methods"
                )
            center, limit = self.ordinary[site]
            made.append(Projection(site, basis, center, self.model, sink_norm=limit))
        return made

    def everywhere(self, rank: int, sites: Sequence[Site]) -> list[Projection]:
        """Projections that ablate the best Site's subspace from the whole residual stream (`models.sites.everywhere`).

        There is no replacement, and attention sinks are included, so that weights can carry it exactly. Raises
        `BadInput` as `projections` does.
        """
        [found] = self.projections(rank, [self.best])
        return [Projection(site, found.basis, None, self.model) for site in sites]

    def record(
        self, provenance: dict[str, Any], directions: tuple[files.Entry, ...] = (), erased: Removed | None = None
    ) -> files.DirectionsRecord:
        """Content of directions.json."""
        names = list(self.stream[self.best])
        cosines = measure.cosines([self.stream[self.best][n] for n in names])
        return files.DirectionsRecord(
            self.model,
            self.config.position,
            self.best,
            self.beats_chance,
            figures=tuple(
                files.Figure(d.site, d.method, d.space, d.rank, f.auroc, f.accuracy, f.margin, f.n)
                for d, f in self.found
            ),
            floors=tuple(files.Floor(*key, *floor) for key, floor in self.floors.items()),
            cosines=files.Cosines(tuple(names), tuple(map(tuple, cosines.tolist()))),
            patching=files.Carried(self.pairs, {site: dict(shares) for site, shares in self.carried.items()}),
            costs=dict(self.costs),
            provenance=provenance,
            directions=directions,
            erased=erased,
        )


FEATURES = "features: "
"""Name prefix of decoded feature directions."""


def study(
    model: LoadedModel,
    suspicious: PromptSet,
    ordinary: PromptSet,
    sites: Sequence[Site],
    config: StudyConfig = StudyConfig(),
    *,
    neutral: PromptSet | None = None,
    dictionaries: Sequence[Dictionary] = (),
    texts: Sequence[str] = (),
) -> Study:
    """Fit and evaluate directions between two groups of prompts.

    Args:
        sites: Sites at which directions are fitted.
        neutral: prompts of neither group, for the one-sided methods.
        dictionaries: at some of the Sites; directions are also fitted in their feature space.
        texts: plain passages for ablation costs.

    Raises:
        BadInput: fewer than two training or held-out prompts in a group, unpaired groups where pairs are
            patched, a dictionary at a Site outside `sites` or of another width, and as the parts do.
    """
    sites = sorted(set(sites))
    for site in sites:
        tap(model.network, site)
    _check(suspicious, ordinary, sites, config, dictionaries)
    fitting, judging = (_pairs(model, (suspicious, ordinary), sites, config, kept=kept) for kept in (False, True))
    classes = _Classes(model, (suspicious, ordinary, neutral), sites, config)
    found: list[Found] = []
    floors: dict[tuple[Site, Space], measure.Floor] = {}
    stream: dict[Site, dict[str, Direction]] = {site: {} for site in sites}
    trained = _spread(sites, config.das_sites) if fitting else []
    for done, site in enumerate(sites, 1):
        own = [d for d in dictionaries if d.site == site]
        for dictionary in (None, *own):
            space: Space = "residual" if dictionary is None else "features"
            train, test = classes.at(site, dictionary)
            made = _fitted(train, site, model.fingerprint, config, space, has_neutral=neutral is not None)
            if fitting and dictionary is None and site in trained:
                made += _das(fitting, site, train, config)
            found += [Found(d, measure.held_out(d, train, test)) for d in made]
            floors[site, space] = measure.random_floor(train, test, config.randoms, config.seed)
            for d in made:
                stream[site][d.method if dictionary is None else f"{FEATURES}{d.method}"] = (
                    d if dictionary is None else fit.decoded(d, dictionary)
                )
        progress("directions", done, len(sites))
    carried = patching.sweep(judging, stream) if judging else {}
    best = best_site(sites, found, carried)
    costs = {
        ablation: cost.ablation_cost(
            model,
            stream[best],
            list(texts)[: config.cost_passages],
            ablation=ablation,
            randoms=config.cost_randoms,
            seed=config.seed,
        )
        for ablation in (("mean", "resample") if config.cost_passages and texts else ())
    }
    means = {site: classes.ordinary(site) for site in sites}
    count = len(judging) if judging else 0
    return Study(model.fingerprint, config, tuple(found), floors, stream, means, carried, count, best, costs)


def _check(
    suspicious: PromptSet,
    ordinary: PromptSet,
    sites: Sequence[Site],
    config: StudyConfig,
    dictionaries: Sequence[Dictionary],
) -> None:
    if lacking := [d.site for d in dictionaries if d.site not in sites]:
        raise BadInput(f"a dictionary is at {lacking[0]}, which is not among the Sites; name that Site too")
    for group in (suspicious, ordinary):
        if min(len(group) // config.kept, len(group) - len(group) // config.kept) < 2:
            raise BadInput(
                f"{group.name!r} has {len(group)} prompts, of which one in {config.kept} is held out; "
                f"expected at least {2 * config.kept}"
            )
    if config.pairs:
        try:
            check_pairs(suspicious, ordinary)
        except BadInput as error:
            raise BadInput(f"{error}. {UNPAIRED}") from None


class _Classes:
    """Activations of all groups, split into training and held-out."""

    def __init__(
        self,
        model: LoadedModel,
        groups: tuple[PromptSet, PromptSet, PromptSet | None],
        sites: Sequence[Site],
        config: StudyConfig,
    ) -> None:
        own = [g for g in groups if g is not None]
        together = PromptSet("all groups", tuple(p for g in own for p in g), "edit")
        replies = None
        if config.where == "reply":
            replies = generate.replies(model, together, max_new_tokens=config.reply_tokens, stage="replies")
        self.acts = collect(
            model, together, sites, position=config.where, replies=replies, plain=config.plain, batch=config.batch
        )
        sizes = [len(g) for g in own]
        group = torch.repeat_interleave(torch.arange(len(own)), torch.tensor(sizes))
        self.group = group
        place = torch.cat([torch.arange(size) for size in sizes])
        self.kept = place % config.kept == config.kept - 1

    def at(self, site: Site, dictionary: Dictionary | None) -> tuple[Labelled, Labelled]:
        """Labelled training and held-out tokens."""
        x = self.acts[site].tensor
        if dictionary is not None:
            x = dictionary.encode(x.to(dictionary.decoder))
        x = x.float()
        of = self.acts[site].prompt_index.long()
        group, kept = self.group[of], self.kept[of]
        neutral = x[group == 2] if bool((self.group == 2).any()) else None

        def labelled(mask: Bool[Tensor, " token"], beside: Tensor | None) -> Labelled:
            mask = mask & (group < 2)
            return Labelled(x[mask], group[mask] == 0, beside)

        return labelled(~kept, neutral), labelled(kept, None)

    def ordinary(self, site: Site) -> tuple[Tensor, float]:
        """Mean of the ordinary training tokens, and the attention-sink norm."""
        acts = self.acts[site]
        of = acts.prompt_index.long()
        x = acts.tensor[(self.group[of] == 1) & ~self.kept[of]].float()
        return x.mean(0), sink_norm_at(site, x)


def _pairs(
    model: LoadedModel,
    groups: tuple[PromptSet, PromptSet],
    sites: Sequence[Site],
    config: StudyConfig,
    *,
    kept: bool,
) -> patching.Pairs | None:
    """Pairs of suspicious and ordinary prompts, held-out or training."""
    if not config.pairs or (not kept and not any(m in DAS for m in config.methods)):
        return None
    size = min(map(len, groups))
    places = [i for i in range(size) if (i % config.kept == config.kept - 1) == kept][: config.pairs]
    clean, corrupted = (group.at(places) for group in groups)
    try:
        return patching.prepare(model, clean, corrupted, sites, plain=config.plain, batch=min(config.batch, 32))
    except BadInput as error:
        raise BadInput(f"{error}. {UNPAIRED}") from None


def _fitted(
    train: Labelled, site: Site, model: str, config: StudyConfig, space: Space, *, has_neutral: bool
) -> list[Direction]:
    """Directions of every method except DAS at one Site."""
    usable = [m for m in config.methods if m not in DAS and (has_neutral or m not in fit.ONE_SIDED)]
    return [fit.fit(train, m, site=site, model=model, seed=config.seed, space=space) for m in usable]


def _das(pairs: patching.Pairs, site: Site, train: Labelled, config: StudyConfig) -> list[Direction]:
    """DAS of every requested rank, initialised with the mean difference."""
    made: list[Direction] = []
    for method, rank in DAS.items():
        if method in config.methods:
            settings = das.DasConfig(rank=rank, epochs=config.das_epochs, seed=config.seed)
            start = torch.nn.functional.normalize(train.gap, dim=0)[None]

            def trained(settings: das.DasConfig, start: Tensor) -> dict[str, Tensor]:
                return {"vector": das.das(pairs, site, train, settings, start=start).vector}

            vector = kept(trained, settings, start, made_from=(pairs, site))["vector"]
            made.append(Direction(vector, site, method, pairs.model.fingerprint, "residual", train.x.mean(0)))
    return made


def _spread(sites: Sequence[Site], n: int) -> list[Site]:
    """`n` of the Sites, evenly spaced from a quarter to three quarters of the depth."""
    if n >= len(sites):
        return list(sites)
    return [sites[round((i + 1) * (len(sites) - 1) / (n + 1))] for i in range(n)]


def best_site(sites: Sequence[Site], found: Sequence[Found], carried: Mapping[Site, Mapping[str, float]]) -> Site:
    """The Site with the largest patching effect of a fitted direction; without patching, the best detector's.

    Ties at perfect AUROC go to the largest margin.
    """
    if carried:
        return max(
            sites, key=lambda s: max((v for k, v in carried[s].items() if not k.endswith("random")), default=0.0)
        )
    figures = {s: [(f.figures.auroc, f.figures.margin) for f in found if f.direction.site == s] for s in sites}
    return max(sites, key=lambda s: max(figures[s], default=(0.0, 0.0)))
