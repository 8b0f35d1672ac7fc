"""The largest nodes of a traced circuit, what their features write, and where its effect is: docs/tracing.md.

`benchmarks/circuit.py` records them with its own figures; this script does so for a circuit that it left before.

    python benchmarks/circuit_nodes.py [runs/circuit/page] [--dictionaries runs/circuit/dictionaries]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import keep

import unsleep
from unsleep.base import records
from unsleep.core import Site
from unsleep.dictionaries.coders import Coder
from unsleep.locate.circuits.record import CircuitRecord, NodeRow
from unsleep.models.lens import logit_lens
from unsleep.models.model import LoadedModel

RUN = Path(__file__).parents[1] / "runs" / "circuit"
LISTED = 8
"""Features of each role that are listed, the largest first."""
DRAWN = 60
"""Nodes that are drawn, with the edges between them."""
PROMOTED = 4
"""Tokens of either end of the vocabulary that stand for what a feature writes."""


def largest(nodes: Sequence[NodeRow], role: str) -> list[int]:
    """The features of a role with the largest |effect|, by their place in the record."""
    own = [i for i, node in enumerate(nodes) if node.role == role and node.kind == "feature"]
    return sorted(own, key=lambda i: -abs(nodes[i].effect))[:LISTED]


def shares(record: CircuitRecord) -> list[dict[str, Any]]:
    """Of every role with a node its nodes by kind, the sum of their effects, and its share of all |effect|."""
    whole = sum(abs(node.effect) for node in record.nodes)
    found: list[dict[str, Any]] = []
    for role in record.roles:
        own = [node for node in record.nodes if node.role == role]
        if own:
            kinds = {kind: sum(node.kind == kind for node in own) for kind in ("feature", "error", "token")}
            size = sum(abs(node.effect) for node in own)
            found.append({"role": role, **kinds, "effect": sum(n.effect for n in own), "share": size / whole})
    return found


def nodes_of(record: CircuitRecord, model: LoadedModel, coders: Mapping[Site, Coder]) -> dict[str, Any]:
    """Record of a circuit's nodes."""
    listed = {role: largest(record.nodes, role) for role in record.roles}
    written: dict[int, dict[str, Any]] = {}
    for i in (i for ids in listed.values() for i in ids):
        node = record.nodes[i]
        assert node.feature is not None
        row = coders[Site.parse(node.place)].decoder[node.feature][None].float()
        [read] = logit_lens(model, row, PROMOTED)
        written[i] = {"promotes": read.promotes, "suppresses": read.suppresses}
    drawn = sorted(range(len(record.nodes)), key=lambda i: -abs(record.nodes[i].effect))[:DRAWN]
    index = {i: k for k, i in enumerate(drawn)}
    edges = [e for e in record.edges if e.source in index and (e.target is None or e.target in index)]
    return {
        "circuit": {"created": record.provenance.get("created"), "config": record.provenance.get("config")},
        "model": record.model.name,
        "payload": record.payload,
        "tokens": record.tokens,
        "estimator": record.estimator,
        "prompts": record.prompts,
        "inserted": record.inserted,
        "metric": [record.metric, record.metric_reference],
        "candidates": record.candidates,
        "kept": len(record.nodes),
        "errors": record.errors,
        "sites": len(record.dictionaries),
        "roles": shares(record),
        "features": {
            role: [{**records.plain(record.nodes[i]), **written[i]} for i in ids] for role, ids in listed.items() if ids
        },
        "drawn": {
            "roles": record.roles,
            "nodes": [records.plain(record.nodes[i]) for i in drawn],
            "edges": [
                {
                    "source": index[e.source],
                    "target": None if e.target is None else index[e.target],
                    "weight": e.weight,
                }
                for e in edges
            ],
        },
    }


def main() -> None:
    """Record the nodes of a circuit that was traced before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("circuit", nargs="?", type=Path, default=RUN / "page")
    parser.add_argument("--dictionaries", type=Path, default=RUN / "dictionaries")
    asked = parser.parse_args()
    record = records.load(CircuitRecord, asked.circuit / "circuit.json")
    places = {record.nodes[i].place for role in record.roles for i in largest(record.nodes, role)}
    model = unsleep.load_model(record.model.name)
    if model.fingerprint != record.model.fingerprint:
        raise SystemExit(f"{record.model.name} is {model.fingerprint}; the circuit is of {record.model.fingerprint}")
    coders = {Site.parse(place): unsleep.load_dictionary(asked.dictionaries / place) for place in sorted(places)}
    wrong = [site for site, coder in coders.items() if coder.hash != record.dictionaries[str(site)]]
    if wrong:
        raise SystemExit(f"the dictionary of {wrong[0]} is not the one that the circuit was found with")
    print(f"Saved in {keep('circuit_nodes', nodes_of(record, model, coders))}")


if __name__ == "__main__":
    main()
