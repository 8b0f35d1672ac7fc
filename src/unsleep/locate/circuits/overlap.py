"""Overlap of two circuits, such as of one behaviour on prompts and on the same prompts rephrased."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from unsleep.base.records import Share
from unsleep.base.stats import spearman
from unsleep.core import BadInput
from unsleep.locate.circuits.record import CircuitRecord, NodeRow


@dataclass(frozen=True)
class Shared:
    """Two circuits compared, such as of the same behaviour on rephrased prompts."""

    jaccard: Share
    """Nodes that both have, over nodes that one has."""
    features: Share
    """The same for features, whatever their roles."""
    spearman: float | None
    """Rank correlation of the effects of shared nodes; none for fewer than three."""
    core: tuple[str, ...]
    """Shared nodes, as resid.12/trigger/345."""


def shared(one: CircuitRecord, other: CircuitRecord) -> Shared:
    """Compare two circuits of the same model and dictionaries; raises `BadInput` where they are of others."""
    same = {site for site, digest in one.dictionaries.items() if other.dictionaries.get(site) == digest}
    if one.model.fingerprint != other.model.fingerprint or not same:
        raise BadInput("the circuits are of different models or dictionaries; expected the same for both")
    sides = [
        {_name(node): node for node in each.nodes if node.place in same or node.kind == "token"}
        for each in (one, other)
    ]
    both = sorted(sides[0].keys() & sides[1].keys())
    found = [{(node.place, node.feature) for node in side.values() if node.kind == "feature"} for side in sides]
    effects = [[side[name].effect for name in both] for side in sides]
    rank = float(spearman(torch.tensor(effects[0])[None], torch.tensor(effects[1]))[0]) if len(both) >= 3 else None
    return Shared(_jaccard(*map(set, sides)), _jaccard(*found), rank, tuple(both))


def _name(node: NodeRow) -> str:
    return f"{node.place}/{node.role}/{node.kind if node.feature is None else node.feature}"


def _jaccard(one: set[Any], other: set[Any]) -> float:
    return len(one & other) / max(1, len(one | other))
