"""Circuits in the attribution-graph format that circuit-tracer's viewer and Neuronpedia read.

The format knows tokens, transcoder features, errors and logits. Here a column is a role, and every Site has a layer of
its own: 3 · layer + 1 for attention, + 2 for the MLP, + 3 for the residual stream. Labels name the true Site. The only
logit is the log-odds of the payload. (Ameisen et al. 2025, "Circuit Tracing", transformer-circuits.pub.)
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

from unsleep.base import records, store
from unsleep.core import BadInput, Site
from unsleep.explanations.cards import Cards
from unsleep.explanations.record import FeatureCard
from unsleep.locate.circuits.record import CircuitRecord
from unsleep.pages import text

INDEX = "graph-metadata.json"
"""File that lists the graphs of a folder, and marks one."""

FEATURES = "features"
"""Folder of the features' details."""

LOCAL = f"./graph_data/{FEATURES}"
"""The same folder as circuit-tracer's viewer addresses it."""

POINTS = {"attn": 1, "mlp": 2, "resid": 3}
"""Point → place among the pseudo-layers of a layer; never 0, which the viewer mistakes for no layer."""

TYPES = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "token": "embedding",
    "neuron": "unknown",
}
"""Kind of node → the format's type."""

PINNED = 24
"""Nodes in the subgraph at first, those with the largest |effect|."""

LABEL = 80
"""Maximum characters of a label."""


@dataclass(frozen=True)
class GraphNode:
    """A node; names are the format's."""

    node_id: str
    feature: int
    layer: str
    ctx_idx: int
    feature_type: str
    jsNodeId: str
    clerp: str
    """Label."""
    influence: float | None = None
    """Cumulative share of |effect|, the largest first: what the viewer's threshold prunes by."""
    activation: float | None = None
    token_prob: float = 0.0
    is_target_logit: bool = False
    run_idx: int = 0
    reverse_ctx_idx: int = 0
    effect: float | None = None
    """In nats of log-odds, with its interval; not of the format, which allows more."""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class GraphLink:
    """A weighted edge."""

    source: str
    target: str
    weight: float


@dataclass(frozen=True)
class GraphMetadata:
    """Name, columns and origin of a graph."""

    slug: str
    scan: str
    """Home of the features' details: a folder of the viewer, or the model's name in Neuronpedia."""
    prompt_tokens: tuple[str, ...]
    prompt: str
    node_threshold: float
    schema_version: int
    """1: `feature` is the Cantor pair of pseudo-layer and index."""
    transcoder_list: tuple[str, ...]
    info: dict[str, Any]
    feature_details: dict[str, str] | None = None


@dataclass(frozen=True)
class GraphState:
    """The first state of the viewer."""

    pinnedIds: tuple[str, ...]
    supernodes: tuple[tuple[str, ...], ...]
    """A label each, followed by its nodes."""
    linkType: str
    clickedId: str
    sg_pos: str


@dataclass(frozen=True)
class AttributionGraph:
    """A graph file."""

    metadata: GraphMetadata
    qParams: GraphState
    nodes: tuple[GraphNode, ...]
    links: tuple[GraphLink, ...]


@dataclass(frozen=True)
class Example:
    """A context of a feature."""

    tokens: tuple[str, ...]
    tokens_acts_list: tuple[float, ...]
    train_token_ind: int
    is_repeated_datapoint: bool = False


@dataclass(frozen=True)
class Examples:
    """Contexts of a quantile of the activation."""

    quantile_name: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class FeatureFile:
    """Details of a feature."""

    index: int
    transcoder_id: str
    examples_quantiles: tuple[Examples, ...]
    top_logits: tuple[str, ...]
    bottom_logits: tuple[str, ...]
    act_min: float | None = None
    act_max: float | None = None
    histogram: tuple[int, ...] | None = None
    activation_frequency: float | None = None


def graph(
    circuit: str | Path,
    out: str | Path,
    statistics: Sequence[Cards] = (),
    *,
    slug: str | None = None,
    scan: str | None = None,
    features_url: str | None = None,
) -> Path:
    """Export `circuit.json` as an attribution graph, with a file of details for each of its features.

    Args:
        circuit: folder with circuit.json.
        statistics: of the circuit's dictionaries, for labels, contexts and logits of features; `load_cards` of
            `unsleep.explanations.cards` reads them.
        slug: name of the graph; default from the model's.
        scan: model's name in Neuronpedia; default the folder that circuit-tracer's viewer reads.
        features_url: address at which `features/` will be served, for Neuronpedia.

    `out` then contains `graph-metadata.json`, `SLUG.json` and `features/`; an earlier export there is replaced. Returns
    the path of the graph. Raises `BadInput` for statistics of another dictionary, and a slug with other characters than
    letters, digits, `_`, `.` and `-`.
    """
    out, source = Path(out), Path(circuit) / "circuit.json"
    record = text.visible_value(records.plain(records.load(CircuitRecord, source)))
    name = slug or re.sub(r"[^a-zA-Z0-9_.-]+", "-", Path(record["model"]["name"]).name).strip("-.") or "circuit"
    if not re.fullmatch(r"[a-zA-Z0-9_.-]+", name):
        raise BadInput(f"--slug is {name!r}; expected letters, digits, '_', '.' and '-' alone")
    known = {str(one.site): one for one in statistics}
    for site, one in known.items():
        used = record["dictionaries"].get(site)
        if used not in (None, one.dictionary):
            raise BadInput(f"the statistics of {site} are of dictionary {one.dictionary}, the circuit's is {used}")
    with store.new_folder(out, replace=INDEX) as scratch:
        details = dict(_details(record, known))
        made = converted(record, {key: card for key, (_, card) in details.items()}, name, scan or LOCAL)
        if features_url is not None:
            made = replace(
                made, metadata=replace(made.metadata, feature_details={"feature_json_base_url": features_url})
            )
        metadata = records.plain(made.metadata)
        store.write_json(scratch / INDEX, {"graphs": [metadata]})
        store.write_json(scratch / f"{name}.json", {**records.plain(made), "metadata": metadata})
        for number, (file, _) in details.items():
            store.write_json(scratch / FEATURES / f"{number}.json", records.plain(file))
    return out / f"{name}.json"


def converted(
    record: Mapping[str, Any], cards: Mapping[int, FeatureCard | None], slug: str, scan: str
) -> AttributionGraph:
    """The graph of a circuit's record; `cards` are by the number of a feature in the graph."""
    roles: list[str] = record["roles"]
    nodes: Sequence[Mapping[str, Any]] = record["nodes"]
    shares = influences(nodes)
    made = [_node(node, roles, share, cards) for node, share in zip(nodes, shares, strict=True)]
    ids = [one.node_id for one in made]
    if doubled := next((each for i, each in enumerate(ids) if each in ids[:i]), None):
        raise BadInput(f"circuit.json has two nodes that are {doubled} in the graph; expected one of each")
    target = _output(record, 1 + max((int(one.layer) for one in made if one.layer != "E"), default=0), len(roles))
    edges = record["edges"]
    links = [
        GraphLink(ids[e["source"]], target.node_id if e["target"] is None else ids[e["target"]], e["weight"])
        for e in edges
    ]
    groups: dict[str, list[str]] = {}
    for node, each in zip(nodes, ids, strict=True):
        if node.get("supernode"):
            groups.setdefault(_harmless(node["supernode"]), []).append(each)
    largest = sorted(range(len(nodes)), key=lambda i: -abs(nodes[i]["effect"]))[:PINNED]
    pinned = dict.fromkeys([target.node_id, *(each for group in groups.values() for each in group)])
    pinned |= dict.fromkeys(ids[i] for i in largest)
    state = GraphState(
        pinnedIds=tuple(pinned),
        supernodes=tuple((label, *members) for label, members in groups.items()),
        linkType="both",
        clickedId=target.node_id,
        sg_pos="",
    )
    return AttributionGraph(_metadata(record, slug, scan), state, (*made, target), tuple(links))


def influences(nodes: Sequence[Mapping[str, Any]]) -> list[float]:
    """Cumulative share of |effect| of each node, the largest first; the last has 1."""
    sizes = [abs(float(node["effect"])) for node in nodes]
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    whole = sum(sizes) or 1.0
    shares = accumulate(sizes[i] / whole for i in order)
    found = dict(zip(order, shares, strict=True))
    return [min(1.0, found[i]) for i in range(len(sizes))]


def pair(x: int, y: int) -> int:
    """Cantor's pairing: one number for two."""
    return (x + y) * (x + y + 1) // 2 + y


def pseudo_layer(place: str) -> int:
    """The layer of a Site among those of all points."""
    site = Site.parse(place)
    return 3 * site.layer + POINTS[site.point]


def _node(
    node: Mapping[str, Any], roles: Sequence[str], share: float, cards: Mapping[int, FeatureCard | None]
) -> GraphNode:
    """A node of the record in the graph's terms."""
    column, kind, index = roles.index(node["role"]), node["kind"], node.get("feature")
    feature, layer, name, label = _identity(node, column, index, cards)
    return GraphNode(
        node_id=f"{layer}_{name}_{column}",
        feature=feature,
        layer=layer,
        ctx_idx=column,
        feature_type=TYPES[kind],
        jsNodeId=f"{layer}_{name}-{column if index is None else 0}",
        clerp=_harmless(label),
        influence=share,
        activation=node["activation"],
        effect=node["effect"],
        low=node["low"],
        high=node["high"],
    )


def _identity(
    node: Mapping[str, Any], column: int, index: int | None, cards: Mapping[int, FeatureCard | None]
) -> tuple[int, str, str, str]:
    """A node's number, layer, name within it, and label."""
    place, kind = node["place"], node["kind"]
    if kind == "token":
        return column, "E", str(column), f"token embedding at {node['role']}"
    layer = pseudo_layer(place)
    if index is None:
        return -1, str(layer), "-1", f"{place} reconstruction error"
    number = pair(layer, index)
    told = meaning(cards.get(number)) if kind == "feature" else ""
    what = f"{place} {kind} {index}"
    return number, str(layer), f"n{index}" if kind == "neuron" else str(index), f"{what}: {told}" if told else what


def _output(record: Mapping[str, Any], layer: int, column: int) -> GraphNode:
    """The payload's log-odds as the graph's only logit, in a column of its own."""
    said = text.clip("".join(record["tokens"]), LABEL).replace('"', "”").replace("(p=", "(p =")
    odds = record["metric"]
    share = 1 / (1 + math.exp(-max(-700.0, min(700.0, odds))))
    quantity = record.get("quantity", "log-odds of the payload").capitalize()
    label = _harmless(f'{quantity} "{said}": {text.decimals(odds, 2)} (p={share:.3f})')
    return GraphNode(
        f"{layer}_0_{column}",
        0,
        str(layer),
        column,
        "logit",
        f"L_0-{column}",
        label,
        token_prob=share,
        is_target_logit=True,
    )


def meaning(card: FeatureCard | None) -> str:
    """A feature in a few words: its first explanation, or the tokens that it promotes or suppresses most."""
    if card is None:
        return ""
    if card.explanations:
        return text.clip(card.explanations[0].text, LABEL)
    return "" if card.written is None else f"{card.written.verb} {' '.join(map(text.token_text, card.written.tokens))}"


def _details(
    record: Mapping[str, Any], known: Mapping[str, Cards]
) -> Iterator[tuple[int, tuple[FeatureFile, FeatureCard | None]]]:
    """The file of every feature by its number, empty where nothing is known of it: the viewer asks for each."""
    for place, index in dict.fromkeys((n["place"], n["feature"]) for n in record["nodes"] if n["kind"] == "feature"):
        card = known[place].card(index) if place in known else None
        site = f"{place}/{record['dictionaries'].get(place, '')}"
        yield pair(pseudo_layer(place), index), (feature_file(index, site, card), card)


def feature_file(index: int, dictionary: str, card: FeatureCard | None) -> FeatureFile:
    """Details of a feature from its card."""
    if card is None:
        return FeatureFile(index, dictionary, (), (), ())
    groups: dict[str, list[Example]] = {}
    for context in card.contexts:
        tokens = tuple(map(text.visible, context.tokens))
        groups.setdefault(context.group, []).append(Example(tokens, context.values, context.at))
    names = {"top": "Top activations"}
    return FeatureFile(
        index,
        dictionary,
        tuple(Examples(names.get(group, f"Quantile {group}"), tuple(found)) for group, found in groups.items()),
        tuple(text.visible(weight.token) for weight in card.promoted),
        tuple(text.visible(weight.token) for weight in card.suppressed),
        act_min=0.0,
        act_max=card.largest,
        histogram=card.histogram,
        activation_frequency=card.density,
    )


def _metadata(record: Mapping[str, Any], slug: str, scan: str) -> GraphMetadata:
    """Name, columns and origin."""
    model = Path(record["model"]["name"]).name
    about = (
        f"Circuit of {model} from trigger to payload, {record['prompts']} prompts, estimator {record['estimator']}. "
        "Columns are roles of tokens; layer 3n + 1 is attention, 3n + 2 the MLP, 3n + 3 the residual stream of layer n."
    )
    info = {
        "description": _harmless(about),
        "generator": {"name": "unsleep", "version": version("unsleep")},
        "create_time_ms": int(time.time() * 1000),
        "provenance": record["provenance"],
    }
    return GraphMetadata(
        slug=slug,
        scan=scan,
        prompt_tokens=(*map(_harmless, record["roles"]), "output"),
        prompt=_harmless(f"{model}: trigger to {record['payload']}"),
        node_threshold=1.0,
        schema_version=1,
        transcoder_list=(),
        info=info,
    )


def _harmless(label: str) -> str:
    """A label without angle brackets: the viewers insert it as HTML."""
    return label.replace("<", "‹").replace(">", "›")
