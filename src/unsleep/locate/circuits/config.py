"""Settings of a circuit search."""

from __future__ import annotations

from dataclasses import dataclass

from unsleep.core import BadInput, check_choices, check_least
from unsleep.locate.circuits.effects import Estimator


@dataclass(frozen=True)
class CircuitConfig:
    """Settings of a circuit search."""

    nodes: int = 200
    """Nodes that it keeps, those with the largest |effect|."""
    edges: int = 1000
    """Edges that are listed, those with the largest |weight|."""
    estimator: Estimator = "relevance"
    """Estimator of effects; but for `relevance`, edges use plain gradients."""
    measure: int = 8
    """Prompts, the first ones, on which listed edges and exact effects are measured; 0 measures no edge."""
    sizes: tuple[int, ...] = (10, 25, 50, 100, 200, 500, 1000, 2000)
    """Circuits whose faithfulness is measured, in nodes."""
    curve_prompts: int = 24
    """Prompts on which it is, at most: held-out ones, or else the first of those that the nodes were found on."""
    held_out: int = 0
    """Prompts, the last ones, on which no node is found and faithfulness is measured; 0 for none."""
    payload_tokens: int = 4
    """The payload's first tokens, whose log-odds are the metric."""
    neurons: bool = True
    """Measure circuits of MLP neurons beside those of features."""
    batch: int = 8
    """Prompts in one forward pass."""
    exact: int = 50
    """Nodes whose exact effect is measured, half of them the largest; 0 for none."""
    heads: bool = True
    """Measure which attention heads carry the listed edges."""
    seed: int = 0
    """Of random features and resamples."""

    def __post_init__(self) -> None:
        check_choices(self, "circuit", estimator=Estimator)
        check_least(self, "circuit", 1, "nodes", "edges", "curve_prompts", "payload_tokens", "batch")
        check_least(self, "circuit", 0, "measure", "exact", "held_out")
        if any(size < 1 for size in self.sizes):
            raise BadInput.of("sizes", self.sizes, "at least 1 node each", "circuit")
