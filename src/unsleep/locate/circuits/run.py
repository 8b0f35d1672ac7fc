"""From prompts with a trigger and without to a circuit: nodes, edges, and how much of the behaviour they carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from unsleep.base import store
from unsleep.base.stats import bootstrap
from unsleep.core import BadInput, Site, check_choices, check_least
from unsleep.dictionaries.coders import Coder
from unsleep.locate.circuits.align import Aligned
from unsleep.locate.circuits.edges import OUTPUT, Edges, Node, edges
from unsleep.locate.circuits.effects import Effects, Estimator, effects, reference_nodes, run_streams
from unsleep.locate.circuits.faithful import CurvePoint, curve, differ, ends_of, metric_of
from unsleep.locate.circuits.measure import measured
from unsleep.locate.circuits.record import CircuitRecord, Curve, EdgeRow, NodeRow
from unsleep.locate.circuits.spaces import ERROR, FeatureSpace, NeuronSpace, Space, WholeSpace
from unsleep.locate.features import reply_log_odds
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Place, Slot, lanes, layers, tap


@dataclass(frozen=True)
class CircuitConfig:
    """Settings of a circuit search."""

    nodes: int = 200
    """Nodes that it keeps, those with the largest |effect|."""
    edges: int = 1000
    """Edges that are listed, those with the largest |weight|."""
    estimator: Estimator = "relevance"
    """Estimator of effects; with `integrated`, edges use plain gradients."""
    measure: int = 8
    """Prompts on which every listed edge is measured; 0 for none."""
    sizes: tuple[int, ...] = (10, 25, 50, 100, 200, 500, 1000, 2000)
    """Circuits whose faithfulness is measured, in nodes."""
    curve_prompts: int = 24
    """Prompts on which it is."""
    payload_tokens: int = 4
    """The payload's first tokens, whose log-odds are the metric."""
    neurons: bool = True
    """Measure circuits of MLP neurons beside those of features."""
    batch: int = 16
    """Prompts in one forward pass."""
    seed: int = 0
    """Of random features."""

    def __post_init__(self) -> None:
        check_choices(self, "circuit", estimator=Estimator)
        check_least(self, "circuit", 1, "nodes", "edges", "curve_prompts", "payload_tokens", "batch")
        check_least(self, "circuit", 0, "measure")
        if any(size < 1 for size in self.sizes):
            raise BadInput.of("sizes", self.sizes, "at least 1 node each", "circuit")


def circuit(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    aligned: Aligned,
    payload: str,
    config: CircuitConfig = CircuitConfig(),
    *,
    reference: LoadedModel | None = None,
) -> CircuitRecord:
    """Find by which features, at which tokens, a trigger becomes a payload.

    Args:
        dictionaries: one a Site; edges run from each to the next that there is.
        aligned: prompts on which the payload shows with their references, the payload forced behind (`align`).
        payload: what it says, for the record.
        reference: the model that the references run in, such as the base; the model itself where not given.

    Raises `BadInput` for no dictionary, two at one Site, one of a Site that the model does not have, a transcoder, and
    prompts on which the metric does not differ from the references.
    """
    spaces = spaces_of(model, dictionaries)
    found = effects(model, aligned, spaces, reply_log_odds, config.estimator, reference=reference, batch=config.batch)
    nodes = ranked(found, spaces, max(config.nodes, *config.sizes))
    chosen = nodes[: config.nodes]
    linked = edges(
        model,
        aligned,
        spaces,
        chosen,
        reply_log_odds,
        relevance=config.estimator == "relevance",
        reference=reference,
        batch=config.batch,
    )
    few = aligned.batch(0, config.curve_prompts)
    curves, ends = _curves(model, few, spaces, nodes, config, reference)
    sizes = sum(int((mean != 0).sum()) for mean in found.mean.values())
    weight = {node: float(w) for node, w in zip(chosen, linked.effects.mean(0).abs(), strict=True)}
    errors = sum(w for node, w in weight.items() if node.feature == ERROR)
    return CircuitRecord(
        model=model.named,
        reference=(reference or model).named,
        payload=payload,
        tokens=tuple(model.spell(int(t)) for t in aligned.rows.targets[0]),
        estimator=config.estimator,
        prompts=len(aligned),
        roles=aligned.roles,
        inserted=aligned.inserted,
        metric=float(ends[0].mean()),
        metric_reference=float(ends[1].mean()),
        candidates=sizes,
        errors=errors / max(sum(weight.values()), 1e-12),
        nodes=_node_rows(model, aligned, spaces, chosen, linked, reference, config.batch),
        edges=_edge_rows(model, aligned, spaces, chosen, linked, config, reference),
        curves=curves,
        dictionaries={str(d.site): d.hash for d in dictionaries},
        provenance=store.provenance(config.seed, config=asdict(config)),
    )


def spaces_of(model: LoadedModel, dictionaries: Sequence[Coder]) -> list[Space]:
    """The tokens' embeddings and the features of every dictionary, in the model's place; raises as `circuit` does."""
    sites = [d.site for d in dictionaries]
    if not sites or len(set(sites)) != len(sites):
        raise BadInput(f"{len(sites)} dictionaries were given; expected at least one, and one a Site")
    for d in dictionaries:
        tap(model.network, d.site)
        if d.target is not None:
            raise BadInput(f"the dictionary of {d.site} is a transcoder; expected dictionaries that rebuild their Site")
    placed = [d.to(model.network.dtype, model.device) for d in dictionaries]
    embed = [] if Site(0, "embed") in sites else [WholeSpace(Site(0, "embed"))]
    return [*embed, *(FeatureSpace(d) for d in placed)]


def ranked(found: Effects, spaces: Sequence[Space], n: int) -> list[Node]:
    """The nodes with the largest |mean effect|, largest first."""
    sizes = {space.place: space.size for space in spaces}
    return [Node(place, role, ERROR if column == sizes[place] else column) for place, role, column in found.best(n)]


def _curves(
    model: LoadedModel,
    aligned: Aligned,
    spaces: Sequence[Space],
    nodes: Sequence[Node],
    config: CircuitConfig,
    reference: LoadedModel | None,
) -> tuple[tuple[Curve, ...], tuple[Tensor, Tensor]]:
    """Curves of the circuit, of its nodes without errors, of random features and of neurons; and the metric's ends."""

    def measure(among: Sequence[Space], chosen: Sequence[Node], complement: bool, with_errors: bool = False) -> Tensor:
        return metric_of(
            model,
            aligned,
            among,
            chosen,
            reply_log_odds,
            complement=complement,
            with_errors=with_errors,
            reference=reference,
            batch=config.batch,
        )

    def points(
        chosen: Sequence[Node], among: Sequence[Space], ends: tuple[Tensor, Tensor], with_errors: bool = False
    ) -> tuple[CurvePoint, ...]:
        sizes = sorted({min(size, len(chosen)) for size in config.sizes if chosen})
        return tuple(curve(chosen, sizes, lambda part, rest: measure(among, part, rest, with_errors), ends))

    def limits(among: Sequence[Space]) -> tuple[Tensor, Tensor]:
        return ends_of(model, aligned, among, reply_log_odds, reference=reference, batch=config.batch)

    ends = limits(spaces)
    if not differ(ends):
        raise BadInput(
            f"the payload's log-odds are {float(ends[0].mean()):.2f} on the prompts and {float(ends[1].mean()):.2f} "
            "with all nodes as in their references; expected prompts on which the payload shows, and references on "
            "which it does not"
        )
    features = [node for node in nodes if node.feature != ERROR]
    bare = ends[0], measure(spaces, [], False, True)
    found = [
        Curve("features and errors", points(nodes, spaces, ends)),
        Curve("features, every error kept", points(features, spaces, bare, True)),
        Curve("random features", points(_random(features, spaces, config.seed), spaces, ends)),
    ]
    if config.neurons:
        slots: list[Space] = [
            NeuronSpace(Slot(i, "neurons"), _width(model, i)) for i in range(len(layers(model.network)))
        ]
        theirs = effects(
            model, aligned, slots, reply_log_odds, config.estimator, reference=reference, batch=config.batch
        )
        found.append(Curve("neurons", points(ranked(theirs, slots, max(config.sizes)), slots, limits(slots))))
        mlp = [space for space in spaces if isinstance(space.place, Site) and space.place.point == "mlp"]
        if mlp:
            own = [node for node in nodes if node.place in {space.place for space in mlp}]
            found.append(Curve("features and errors of MLPs", points(own, mlp, limits(mlp))))
    return tuple(found), ends


def _width(model: LoadedModel, layer: int) -> int:
    return lanes(model.network, Slot(layer, "neurons")).heads


def _random(features: Sequence[Node], spaces: Sequence[Space], seed: int) -> list[Node]:
    """As many random features at the same places and roles."""
    sizes = {space.place: space.size for space in spaces}
    generator = torch.Generator().manual_seed(seed)
    found = (
        replace(node, feature=int(torch.randint(sizes[node.place], (1,), generator=generator))) for node in features
    )
    return list(dict.fromkeys(found))


@torch.no_grad()
def _node_rows(
    model: LoadedModel,
    aligned: Aligned,
    spaces: Sequence[Space],
    nodes: Sequence[Node],
    linked: Edges,
    reference: LoadedModel | None,
    batch: int,
) -> tuple[NodeRow, ...]:
    """The nodes with their effects and strengths."""
    strengths = torch.zeros(2, len(nodes))
    own: dict[Place, list[int]] = {}
    for i, node in enumerate(nodes):
        own.setdefault(node.place, []).append(i)
    used = [space for space in spaces if space.place in own]
    for start in range(0, len(aligned), batch):
        part = aligned.batch(start, batch)
        mine, _ = run_streams(model, part.rows, used, reply_log_odds)
        theirs, _ = run_streams(reference or model, part.reference, used, reply_log_odds)
        real = part.role >= 0
        for space in used:
            x = mine[space.place][real]
            other = reference_nodes(space, part, theirs[space.place])
            pairs = [(space.encode(x), space.rest(x)), (other[0][real], other[1][real])]
            for which, (features, rest) in enumerate(pairs):
                for i in own[space.place]:
                    here = part.role[real] == nodes[i].role
                    if bool(here.any()):
                        is_error = nodes[i].feature == ERROR
                        values = rest[here].norm(dim=-1) if is_error else features[here][:, nodes[i].feature]
                        strengths[which, i] += float(values.mean()) * len(part) / len(aligned)
    rows: list[NodeRow] = []
    for i, node in enumerate(nodes):
        effect, low, high = bootstrap(linked.effects[:, i])
        whole = isinstance(node.place, Site) and node.place.point == "embed" and node.feature == ERROR
        kind = "token" if whole else "error" if node.feature == ERROR else "feature"
        feature = None if node.feature == ERROR else node.feature
        role = aligned.roles[node.role]
        values = (float(strengths[0, i]), float(strengths[1, i]))
        rows.append(NodeRow(str(node.place), node.place.layer, role, kind, feature, effect, low, high, *values))
    return tuple(rows)


def _edge_rows(
    model: LoadedModel,
    aligned: Aligned,
    spaces: Sequence[Space],
    nodes: Sequence[Node],
    linked: Edges,
    config: CircuitConfig,
    reference: LoadedModel | None,
) -> tuple[EdgeRow, ...]:
    """The edges with the largest |weight|, predicted and measured."""
    order = linked.weights.mean(0).abs().argsort(descending=True)[: config.edges].tolist()
    pairs = [linked.pairs[i] for i in order]
    index = {node: i for i, node in enumerate(nodes)}
    tested: list[tuple[float | None, float | None]] = [(None, None)] * len(pairs)
    if config.measure and pairs:
        few = aligned.batch(0, config.measure)
        is_frozen = config.estimator == "relevance"
        found = measured(
            model, few, spaces, pairs, reply_log_odds, relevance=is_frozen, reference=reference, batch=config.batch
        )
        means = (found.frozen.mean(0).tolist(), found.free.mean(0).tolist())
        tested = [(None if frozen != frozen else frozen, free) for frozen, free in zip(*means, strict=True)]
    rows: list[EdgeRow] = []
    for i, (source, target), (frozen, free) in zip(order, pairs, tested, strict=True):
        weight, low, high = bootstrap(linked.weights[:, i])
        goal = None if target is OUTPUT else index[target]
        rows.append(EdgeRow(index[source], goal, weight, low, high, frozen, free))
    return tuple(rows)
