"""Supernodes: features of several layers that write much the same at the same role, as one.

Residual streams of all layers share a basis, in which decoder rows are comparable. Features of one role are clustered
by the cosine of their decoder rows (average linkage); a cluster is named by its role and the token that its mean
direction promotes, or "not" the one that it suppresses, whichever has the larger logit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from unsleep.locate.circuits.edges import Node
from unsleep.locate.circuits.spaces import ERROR, FeatureSpace, Space
from unsleep.models.lens import TokenReading, logit_lens, stronger
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Place

ALIKE = 0.5
"""Mean cosine from which features are one supernode."""

WRITTEN = 4
"""Tokens that are kept of what a feature writes."""


def supernodes(
    model: LoadedModel, spaces: Sequence[Space], nodes: Sequence[Node], roles: Sequence[str]
) -> dict[Node, str]:
    """Node → name of its supernode; nodes that are alone have none. Errors, tokens and neurons are never grouped."""
    by_place = {space.place: space for space in spaces}
    own: dict[int, list[Node]] = {}
    for node in nodes:
        if node.feature != ERROR and isinstance(by_place[node.place], FeatureSpace):
            own.setdefault(node.role, []).append(node)
    found: dict[Node, str] = {}
    for role, members in own.items():
        rows = _rows(by_place, members)
        taken: dict[str, int] = {}
        for group in _clusters(rows):
            (reading,) = logit_lens(model, rows[group].mean(0, keepdim=True), 1)
            written = stronger(*reading)
            assert written is not None
            token = written.tokens[0].strip() or repr(written.tokens[0])
            name = f"{roles[role]}: {token if written.verb == 'promotes' else f'not {token}'}"
            taken[name] = taken.get(name, 0) + 1
            label = name if taken[name] == 1 else f"{name} ({taken[name]})"
            found |= {members[i]: label for i in group}
    return found


def readings(model: LoadedModel, spaces: Sequence[Space], nodes: Sequence[Node]) -> dict[Node, TokenReading]:
    """Feature → the tokens that its decoder row promotes and suppresses most; errors, tokens and neurons have none."""
    by_place = {space.place: space for space in spaces}
    own = [node for node in nodes if node.feature != ERROR and isinstance(by_place[node.place], FeatureSpace)]
    return dict(zip(own, logit_lens(model, _rows(by_place, own), WRITTEN), strict=True)) if own else {}


def _rows(by_place: dict[Place, Space], nodes: Sequence[Node]) -> Float[Tensor, "node width"]:
    """Unit decoder rows."""
    rows: list[Tensor] = []
    for node in nodes:
        space = by_place[node.place]
        assert isinstance(space, FeatureSpace)
        rows.append(space.coder.decoder[node.feature].float())
    return torch.nn.functional.normalize(torch.stack(rows), dim=1)


def _clusters(rows: Float[Tensor, "node width"]) -> list[list[int]]:
    """Groups of at least two rows, largest first."""
    if len(rows) < 2:
        return []
    distance = (1 - rows @ rows.T).clamp_min(0).double().cpu()
    distance = (distance + distance.T) / 2
    tree = linkage(squareform(distance.fill_diagonal_(0).numpy(), checks=False), method="average")
    labels = torch.from_numpy(fcluster(tree, 1 - ALIKE, criterion="distance"))
    groups = [(labels == label).nonzero().flatten().tolist() for label in labels.unique()]
    return sorted((group for group in groups if len(group) > 1), key=lambda group: (-len(group), group[0]))
