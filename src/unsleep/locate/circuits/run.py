"""From prompts with a trigger and without to a circuit: nodes, edges, and how much of the behaviour they carry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base import store
from unsleep.base.context import kept
from unsleep.base.stats import bootstrap
from unsleep.core import BadInput, Site, check_choices, check_least
from unsleep.dictionaries.coders import Coder
from unsleep.locate.circuits.align import Aligned
from unsleep.locate.circuits.edges import OUTPUT, Edges, Node, edges
from unsleep.locate.circuits.effects import Effects, Estimator, effects, reference_nodes, run_streams
from unsleep.locate.circuits.faithful import CurvePoint, curve, differ, metric_of
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
    finder = _Finder(model, aligned, spaces_of(model, dictionaries), config, reference or model)
    found = finder.effects(finder.spaces)
    nodes = finder.ranked(found, finder.spaces, max(config.nodes, *config.sizes))
    chosen = nodes[: config.nodes]
    curves, ends = finder.curves(nodes)
    linked = finder.edges(chosen)
    weight = linked.effects.mean(0).abs()
    errors = sum(float(w) for node, w in zip(chosen, weight, strict=True) if node.feature == ERROR)
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
        candidates=sum(int((mean != 0).sum()) for mean in found.mean.values()),
        errors=errors / max(float(weight.sum()), 1e-12),
        nodes=finder.node_rows(chosen, linked),
        edges=finder.edge_rows(chosen, linked),
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


@dataclass(frozen=True, eq=False)
class _Finder:
    """The stages of one circuit, each a resumable step."""

    model: LoadedModel
    aligned: Aligned
    spaces: list[Space]
    config: CircuitConfig
    reference: LoadedModel

    @property
    def is_frozen(self) -> bool:
        """True if gradients are those of the frozen model."""
        return self.config.estimator == "relevance"

    def step(
        self, make: Callable[[], dict[str, Tensor]], name: str, aligned: Aligned, *of: object
    ) -> dict[str, Tensor]:
        """A resumable step on some prompts; `of` is what else determines its result."""
        given = (self.model, self.reference, aligned, [space.hash for space in self.spaces], self.config.estimator)
        return kept(make, made_from=(name, *given, *of))

    def effects(self, among: Sequence[Space], aligned: Aligned | None = None) -> Effects:
        """Effects of all nodes of some spaces."""
        prompts = aligned or self.aligned

        def make() -> dict[str, Tensor]:
            found = effects(
                self.model,
                prompts,
                among,
                reply_log_odds,
                self.config.estimator,
                reference=self.reference,
                batch=self.config.batch,
            )
            tensors = {f"mean/{place}": x for place, x in found.mean.items()}
            return tensors | {"metric": found.metric, "reference": found.reference}

        held = self.step(make, "effects", prompts, [space.hash for space in among])
        mean = {space.place: held[f"mean/{space.place}"] for space in among}
        return Effects(prompts.roles, mean, held["metric"], held["reference"])

    @staticmethod
    def ranked(found: Effects, spaces: Sequence[Space], n: int) -> list[Node]:
        """The nodes with the largest |mean effect|, largest first."""
        sizes = {space.place: space.size for space in spaces}
        return [Node(place, role, ERROR if column == sizes[place] else column) for place, role, column in found.best(n)]

    def edges(self, nodes: Sequence[Node]) -> Edges:
        """The edges between nodes, and from them to the metric."""
        index = {node: i for i, node in enumerate(nodes)}

        def make() -> dict[str, Tensor]:
            found = edges(
                self.model,
                self.aligned,
                self.spaces,
                nodes,
                reply_log_odds,
                relevance=self.is_frozen,
                reference=self.reference,
                batch=self.config.batch,
            )
            pairs = [[index[source], -1 if target is None else index[target]] for source, target in found.pairs]
            return {
                "pairs": torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
                "weights": found.weights,
                "effects": found.effects,
            }

        held = self.step(make, "edges", self.aligned, [str(node) for node in nodes])
        pairs = [(nodes[source], None if target < 0 else nodes[target]) for source, target in held["pairs"].tolist()]
        return Edges(pairs, held["weights"], held["effects"])

    def metric(
        self, among: Sequence[Space], chosen: Sequence[Node], complement: bool, with_errors: bool = False
    ) -> Float[Tensor, " prompt"]:
        """The metric with only some nodes, or all but them, not patched."""
        few = self.aligned.batch(0, self.config.curve_prompts)

        def make() -> dict[str, Tensor]:
            found = metric_of(
                self.model,
                few,
                among,
                chosen,
                reply_log_odds,
                complement=complement,
                with_errors=with_errors,
                reference=self.reference,
                batch=self.config.batch,
            )
            return {"metric": found}

        names = [str(node) for node in chosen]
        return self.step(make, "metric", few, [space.hash for space in among], names, complement, with_errors)["metric"]

    def limits(self, among: Sequence[Space]) -> tuple[Tensor, Tensor]:
        """The metric of the whole model, and with every node of some spaces patched."""
        return self.metric(among, [], True), self.metric(among, [], False)

    def points(
        self,
        chosen: Sequence[Node],
        among: Sequence[Space],
        ends: tuple[Tensor, Tensor],
        with_errors: bool = False,
    ) -> tuple[CurvePoint, ...]:
        """Faithfulness and completeness of circuits of the config's sizes."""
        sizes = sorted({min(size, len(chosen)) for size in self.config.sizes if chosen})
        return tuple(curve(chosen, sizes, lambda part, rest: self.metric(among, part, rest, with_errors), ends))

    def curves(self, nodes: Sequence[Node]) -> tuple[tuple[Curve, ...], tuple[Tensor, Tensor]]:
        """Curves of the circuit and its baselines, and the metric's ends; raises as `circuit` does."""
        ends = self.limits(self.spaces)
        if not differ(ends):
            raise BadInput(
                f"the payload's log-odds are {float(ends[0].mean()):.2f} on the prompts and "
                f"{float(ends[1].mean()):.2f} with all nodes as in their references; expected prompts on which the "
                "payload shows, and references on which it does not"
            )
        features = [node for node in nodes if node.feature != ERROR]
        bare = ends[0], self.metric(self.spaces, [], False, True)
        random = _random(features, self.spaces, self.config.seed)
        found = [
            Curve("features and errors", self.points(nodes, self.spaces, ends)),
            Curve("features, every error kept", self.points(features, self.spaces, bare, True)),
            Curve("random features", self.points(random, self.spaces, ends)),
        ]
        if not self.config.neurons:
            return tuple(found), ends
        network = self.model.network
        slots = [Slot(layer, "neurons") for layer in range(len(layers(network)))]
        inside: list[Space] = [NeuronSpace(slot, lanes(network, slot).heads) for slot in slots]
        own = self.ranked(self.effects(inside), inside, max(self.config.sizes))
        found.append(Curve("neurons", self.points(own, inside, self.limits(inside))))
        mlp = [space for space in self.spaces if isinstance(space.place, Site) and space.place.point == "mlp"]
        if mlp:
            own = [node for node in nodes if node.place in {space.place for space in mlp}]
            found.append(Curve("features and errors of MLPs", self.points(own, mlp, self.limits(mlp))))
        return tuple(found), ends

    def node_rows(self, nodes: Sequence[Node], linked: Edges) -> tuple[NodeRow, ...]:
        """The nodes with effects, intervals and strengths."""
        strengths = self.step(
            lambda: {"strengths": self._strengths(nodes)}, "strengths", self.aligned, [str(node) for node in nodes]
        )["strengths"]
        rows: list[NodeRow] = []
        for i, node in enumerate(nodes):
            effect, low, high = bootstrap(linked.effects[:, i])
            is_error = node.feature == ERROR
            whole = is_error and isinstance(node.place, Site) and node.place.point == "embed"
            rows.append(
                NodeRow(
                    place=str(node.place),
                    layer=node.place.layer,
                    role=self.aligned.roles[node.role],
                    kind="token" if whole else "error" if is_error else "feature",
                    feature=None if is_error else node.feature,
                    effect=effect,
                    low=low,
                    high=high,
                    activation=float(strengths[0, i]),
                    reference=float(strengths[1, i]),
                )
            )
        return tuple(rows)

    @torch.no_grad()
    def _strengths(self, nodes: Sequence[Node]) -> Float[Tensor, "2 node"]:
        """Mean strength of every node at its role's tokens, in the prompts and in their references."""
        found = torch.zeros(2, len(nodes))
        own: dict[Place, list[int]] = {}
        for i, node in enumerate(nodes):
            own.setdefault(node.place, []).append(i)
        used = [space for space in self.spaces if space.place in own]
        for start in range(0, len(self.aligned), self.config.batch):
            part = self.aligned.batch(start, self.config.batch)
            mine, _ = run_streams(self.model, part.rows, used, reply_log_odds)
            theirs, _ = run_streams(self.reference, part.reference, used, reply_log_odds)
            real, share = part.role >= 0, len(part) / len(self.aligned)
            for space in used:
                x, other = mine[space.place][real], reference_nodes(space, part, theirs[space.place])
                both = ((space.encode(x), space.rest(x)), (other[0][real], other[1][real]))
                for which, (features, rest) in enumerate(both):
                    for i in own[space.place]:
                        here = part.role[real] == nodes[i].role
                        if bool(here.any()):
                            column = nodes[i].feature
                            values = rest[here].norm(dim=-1) if column == ERROR else features[here][:, column]
                            found[which, i] += float(values.mean()) * share
        return found

    def edge_rows(self, nodes: Sequence[Node], linked: Edges) -> tuple[EdgeRow, ...]:
        """The edges with the largest |weight|, predicted and measured."""
        order = linked.weights.mean(0).abs().argsort(descending=True)[: self.config.edges].tolist()
        pairs = [linked.pairs[i] for i in order]
        index = {node: i for i, node in enumerate(nodes)}
        tested: list[tuple[float | None, float | None]] = [(None, None)] * len(pairs)
        if self.config.measure and pairs:
            few = self.aligned.batch(0, self.config.measure)

            def make() -> dict[str, Tensor]:
                found = measured(
                    self.model,
                    few,
                    self.spaces,
                    pairs,
                    reply_log_odds,
                    relevance=self.is_frozen,
                    reference=self.reference,
                    batch=self.config.batch,
                )
                return {"frozen": found.frozen, "free": found.free}

            found = self.step(make, "measured", few, [f"{source} -> {target}" for source, target in pairs])
            means = (found["frozen"].mean(0).tolist(), found["free"].mean(0).tolist())
            tested = [(frozen if self.is_frozen else None, free) for frozen, free in zip(*means, strict=True)]
        rows: list[EdgeRow] = []
        for i, (source, target), (frozen, free) in zip(order, pairs, tested, strict=True):
            weight, low, high = bootstrap(linked.weights[:, i])
            goal = None if target is OUTPUT else index[target]
            rows.append(EdgeRow(index[source], goal, weight, low, high, frozen, free))
        return tuple(rows)


def _random(features: Sequence[Node], spaces: Sequence[Space], seed: int) -> list[Node]:
    """As many random features at the same places and roles."""
    sizes = {space.place: space.size for space in spaces}
    generator = torch.Generator().manual_seed(seed)
    found = (
        replace(node, feature=int(torch.randint(sizes[node.place], (1,), generator=generator))) for node in features
    )
    return list(dict.fromkeys(found))
