"""circuit.json: nodes, edges and how faithful they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from unsleep.base.records import Count, Share
from unsleep.locate.circuits.effects import Estimator
from unsleep.locate.circuits.exact import Agreement
from unsleep.locate.circuits.faithful import CurvePoint
from unsleep.locate.circuits.heads import HeadLoading
from unsleep.locate.circuits.stability import StabilityPoint
from unsleep.models.model import Named

NodeKind = Literal["feature", "error", "token", "neuron"]


@dataclass(frozen=True)
class NodeRow:
    """One node of the circuit, aggregated over prompts and over the tokens of a role."""

    place: str
    """Such as resid.12."""
    layer: Count
    role: str
    kind: NodeKind
    feature: Count | None
    """Of its dictionary; none for errors and tokens."""
    effect: float
    """Mean over prompts, in units of the metric."""
    low: float
    high: float
    activation: float
    """Mean over prompts of its strength at the role's tokens; the norm, for errors and tokens."""
    reference: float
    """The same in the reference."""
    exact: float | None = None
    """Exact effect on the first `CircuitConfig.measure` prompts, where it was measured: the node alone patched with its
    reference, nothing frozen."""
    kept: Share | None = None
    """Share of resamples of the prompts whose circuit has the node."""
    supernode: str = ""
    """Name of its supernode; empty where it is alone."""
    token: str = ""
    """The role's token at which it is most often strongest."""
    promotes: tuple[tuple[str, float], ...] = ()
    """Of a feature, the tokens whose logits its decoder row raises most, largest first (`models.lens.logit_lens`)."""
    suppresses: tuple[tuple[str, float], ...] = ()
    """Likewise, lowers most."""


@dataclass(frozen=True)
class EdgeRow:
    """Direct effect of one node through another."""

    source: Count
    """Index of its node."""
    target: Count | None
    """None is the metric itself."""
    weight: float
    """Predicted by the gradient: mean over all prompts, in units of the metric."""
    low: float
    high: float
    frozen: float | None = None
    """Measured on the first `CircuitConfig.measure` prompts: the source patched with its reference, nonlinearities
    frozen."""
    free: float | None = None
    """The same with nothing frozen but the other places and the set of features that fire."""
    heads: tuple[HeadLoading, ...] = ()
    """Attention heads of the target's layer that carry it on these prompts, largest first."""
    predicted: float | None = None
    """The predicted weight on the prompts on which the edge was measured, for comparison with `frozen` and `free`."""


MLP_ONLY = "MLP Sites only, the rest runs freely"
NEURONS_ONLY = "MLP neurons only, the rest runs freely"
"""Names of curves: nodes are at some places, and everything between these is as the model computes it."""


@dataclass(frozen=True)
class Curve:
    """Faithfulness and completeness of ever larger circuits."""

    name: str
    """`features and errors`, `features, no error nodes`, `features, every error kept`, `random features`,
    `NEURONS_ONLY` or `MLP_ONLY`."""
    points: tuple[CurvePoint, ...]
    """None where such nodes alone carry nothing: the metric is the same with all of them put back."""


@dataclass(frozen=True)
class CircuitRecord:
    """A circuit."""

    SCHEMA: ClassVar = "unsleep.circuit/1"

    model: Named
    reference: Named
    payload: str
    tokens: tuple[str, ...]
    """Of the payload, whose log-odds are the metric; or the answers, whose logits it is the difference of."""
    estimator: Estimator
    prompts: Count
    roles: tuple[str, ...]
    inserted: Share
    """Share of the trigger's tokens in whose place the reference has none."""
    metric: float
    """Mean at the prompts on which faithfulness is measured."""
    metric_reference: float
    """Mean with every node put back to its reference."""
    candidates: Count
    """Nodes with an effect, of which the circuit keeps those with the largest."""
    errors: Share
    """Share of the kept nodes' |effect| that is of reconstruction errors."""
    nodes: tuple[NodeRow, ...]
    edges: tuple[EdgeRow, ...]
    curves: tuple[Curve, ...]
    dictionaries: dict[str, str]
    """Site → hash."""
    provenance: dict[str, Any]
    quantity: str = "log-odds of the payload"
    """The metric, in words."""
    chosen_on: tuple[str, ...] = ()
    """Digests of the prompts, on which an edit made of the circuit is not to be judged."""
    agreements: tuple[Agreement, ...] = ()
    """Correlation of estimated with exact effects."""
    stability: tuple[StabilityPoint, ...] = ()
    """Overlap of circuits on resampled prompts, by size."""
    held_out: Count = 0
    """Further prompts, on which faithfulness and the metric are measured; 0 where they are of the same prompts."""
