"""The stages of a circuit search, each a resumable step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unsleep.base.context import kept
from unsleep.base.stats import bootstrap
from unsleep.core import BadInput, Site
from unsleep.locate.circuits.align import Aligned
from unsleep.locate.circuits.config import CircuitConfig
from unsleep.locate.circuits.contrast import Contrast
from unsleep.locate.circuits.edges import OUTPUT, Edges, Node, edges
from unsleep.locate.circuits.effects import Effects, Estimator, effects, reference_nodes
from unsleep.locate.circuits.exact import Agreement, agreement, exact_effects
from unsleep.locate.circuits.faithful import Patcher, curve, differ
from unsleep.locate.circuits.heads import head_loadings, listed
from unsleep.locate.circuits.measure import measured
from unsleep.locate.circuits.record import MLP_ONLY, NEURONS_ONLY, Curve, EdgeRow, NodeRow
from unsleep.locate.circuits.spaces import ERROR, NeuronSpace, Space, WholeSpace
from unsleep.locate.circuits.stability import StabilityPoint, kept_shares, stability
from unsleep.models.lens import TokenReading
from unsleep.models.sites import Place, Slot, lanes, layers


class Known(NamedTuple):
    """Facts of nodes."""

    effects: Float[Tensor, "prompt node"]
    """In the order of the circuit's nodes."""
    exact: dict[Node, float]
    kept: dict[Node, float]
    """Share of resamples."""
    supernodes: dict[Node, str]
    readings: dict[Node, TokenReading]
    """Tokens that each feature promotes and suppresses."""


class Strengths(NamedTuple):
    """Strengths of nodes at their roles' tokens."""

    values: Float[Tensor, "2 node"]
    """Means over prompts and tokens, in the prompts and in their references."""
    tokens: Int[Tensor, " node"]
    """Token id at which a node is strongest in most prompts; -1 where it is strong at none."""


@dataclass(frozen=True, eq=False)
class Finder:
    """The stages of one circuit, each a resumable step."""

    contrast: Contrast
    spaces: list[Space]
    config: CircuitConfig
    judged: Contrast
    """Prompts on which faithfulness is measured."""
    patchers: dict[tuple[str, ...], Patcher] = field(default_factory=dict[tuple[str, ...], Patcher])
    """By the hashes of their spaces."""

    @property
    def is_frozen(self) -> bool:
        """True if edges are those of the frozen model."""
        return self.config.estimator in ("relevance", "inputs")

    def effects(
        self,
        among: Sequence[Space],
        keep: int = 0,
        *,
        on: Contrast | None = None,
        by: Estimator | None = None,
        stage: str = "node effects",
    ) -> Effects:
        """Effects of all nodes of some spaces, and of the largest ones on every prompt.

        Args:
            keep: number of the latter.
            on: some of the prompts.
            by: another estimator than the config's.
            stage: name for the progress callback.
        """
        contrast, estimator = on or self.contrast, by or self.config.estimator

        def make() -> dict[str, Tensor]:
            found = effects(contrast, among, estimator, keep=keep, stage=stage)
            tensors = {f"mean/{place}": x for place, x in found.mean.items()}
            return tensors | {"metric": found.metric, "reference": found.reference, "each": found.each}

        held = kept(make, made_from=(contrast, among, estimator, keep))
        mean = {space.place: held[f"mean/{space.place}"] for space in among}
        return Effects(contrast.aligned.roles, mean, held["metric"], held["reference"], held["each"])

    @staticmethod
    def ranked(found: Effects, spaces: Sequence[Space], n: int) -> list[Node]:
        """The nodes with the largest |mean effect|, largest first."""
        sizes = {space.place: space.size for space in spaces}
        return [Node(place, role, ERROR if column == sizes[place] else column) for place, role, column in found.best(n)]

    def edges(self, nodes: Sequence[Node]) -> Edges:
        """The edges between nodes, and from them to the metric."""
        index = {node: i for i, node in enumerate(nodes)}

        def make() -> dict[str, Tensor]:
            found = edges(self.contrast, self.spaces, nodes, relevance=self.is_frozen)
            pairs = [[index[source], -1 if target is None else index[target]] for source, target in found.pairs]
            return {
                "pairs": torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
                "weights": found.weights,
                "effects": found.effects,
            }

        held = kept(make, made_from=(self.contrast, self.spaces, nodes, self.is_frozen))
        pairs = [(nodes[source], None if target < 0 else nodes[target]) for source, target in held["pairs"].tolist()]
        return Edges(pairs, held["weights"], held["effects"])

    def metric_with(
        self, among: Sequence[Space], chosen: Sequence[Node], complement: bool, with_errors: bool = False
    ) -> Float[Tensor, " prompt"]:
        """The metric with only some nodes, or all but them, not patched."""
        few = self.judged.head(self.config.curve_prompts)
        key = tuple(space.hash for space in among)
        if key not in self.patchers:
            self.patchers[key] = Patcher(few, among)

        def make() -> dict[str, Tensor]:
            return {"metric": self.patchers[key].run(chosen, complement=complement, with_errors=with_errors)}

        return kept(make, made_from=(few, among, chosen, complement, with_errors))["metric"]

    def limits(self, among: Sequence[Space]) -> tuple[Tensor, Tensor]:
        """The metric of the whole model, and with every node of some spaces patched."""
        return self.metric_with(among, [], True), self.metric_with(among, [], False)

    def points(
        self,
        name: str,
        chosen: Sequence[Node],
        among: Sequence[Space],
        ends: tuple[Tensor, Tensor],
        with_errors: bool = False,
    ) -> Curve:
        """Faithfulness and completeness of circuits of the config's sizes, under a name."""
        sizes = sorted({min(size, len(chosen)) for size in self.config.sizes if chosen})

        def measure(part: Sequence[Node], rest: bool) -> Float[Tensor, " prompt"]:
            return self.metric_with(among, part, rest, with_errors)

        return Curve(name, tuple(curve(chosen, sizes, measure, ends, f"faithfulness of {name}".replace(",", ""))))

    def curves(self, nodes: Sequence[Node]) -> tuple[tuple[Curve, ...], tuple[Tensor, Tensor]]:
        """Curves of the circuit and its baselines, and the metric's ends; raises as `circuit` does."""
        ends = self.limits(self.spaces)
        if not differ(ends):
            raise BadInput(
                f"the metric is {float(ends[0].mean()):.2f} on the prompts and {float(ends[1].mean()):.2f} with all "
                "nodes as in their references; expected prompts on which the payload shows, or the clean answer, and "
                "references on which it does not"
            )
        features = [node for node in nodes if node.feature != ERROR]
        bare = ends[0], self.metric_with(self.spaces, [], False, True)
        random = _random(features, self.spaces, self.config.seed)
        found = [
            self.points("features and errors", nodes, self.spaces, ends),
            self.points("features, no error nodes", features, self.spaces, ends),
            self.points("features, every error kept", features, self.spaces, bare, True),
            self.points("random features", random, self.spaces, ends),
        ]
        if not self.config.neurons:
            return tuple(found), ends
        network = self.contrast.model.network
        slots = [Slot(layer, "neurons") for layer in range(len(layers(network)))]
        inside: list[Space] = [NeuronSpace(slot, lanes(network, slot).heads) for slot in slots]
        ranking = self.effects(inside, stage="effects of MLP neurons")
        own = self.ranked(ranking, inside, max(self.config.sizes))
        found.append(self.points(NEURONS_ONLY, own, inside, self.limits(inside)))
        mlp = [space for space in self.spaces if isinstance(space.place, Site) and space.place.point == "mlp"]
        if mlp:
            own = [node for node in nodes if node.place in {space.place for space in mlp}]
            found.append(self.points(MLP_ONLY, own, mlp, self.limits(mlp)))
        return tuple(found), ends

    def exact(
        self, candidates: Sequence[Node], each: Float[Tensor, "prompt node"]
    ) -> tuple[dict[Node, float], tuple[Agreement, ...]]:
        """Exact effects of some nodes, and how well the estimators agree with them: the largest and random others.

        Args:
            each: estimated effects of the candidates.
        """
        half = self.config.exact // 2
        others = range(min(half, len(candidates)), len(candidates))
        drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(self.config.seed)).tolist()
        ids = [*range(others.start), *(others[i] for i in drawn[: self.config.exact - half])]
        nodes = [candidates[i] for i in ids]
        if not nodes:
            return {}, ()
        few = self.contrast.head(max(self.config.measure, 1))
        held = kept(lambda: {"exact": exact_effects(few, self.spaces, nodes)}, made_from=(few, self.spaces, nodes))
        exact = held["exact"].mean(0)
        estimated: dict[Estimator, Tensor] = {self.config.estimator: each[: len(few), ids].mean(0)}
        if "attribution" not in estimated:
            used = [space for space in self.spaces if any(node.place == space.place for node in nodes)]
            by_gradient = self.effects(used, on=few, by="attribution", stage="effects by attribution")
            mean, sizes = by_gradient.mean, {space.place: space.size for space in used}
            columns = [sizes[node.place] if node.feature == ERROR else node.feature for node in nodes]
            values = [float(mean[n.place][n.role, column]) for n, column in zip(nodes, columns, strict=True)]
            estimated["attribution"] = torch.tensor(values)
        found = (agreement(name, values, exact) for name, values in estimated.items())
        return dict(zip(nodes, exact.tolist(), strict=True)), tuple(a for a in found if a is not None)

    def stability(
        self, each: Float[Tensor, "prompt node"], size: int
    ) -> tuple[list[float], tuple[StabilityPoint, ...]]:
        """Share of resamples of the prompts that keep each candidate, and stability of smaller and larger circuits."""
        sizes = sorted({n for n in (size // 4, size // 2, size) if 0 < n < each.shape[1]})
        share, _ = kept_shares(each, size, self.config.seed)
        return share.tolist(), tuple(stability(each, sizes, self.config.seed))

    def node_rows(self, nodes: Sequence[Node], known: Known) -> tuple[NodeRow, ...]:
        """The nodes with effects, intervals and strengths."""
        made = kept(lambda: self._strengths(nodes)._asdict(), made_from=(self.contrast, self.spaces, nodes))
        strengths, tokens = made["values"], made["tokens"].tolist()
        spell = self.contrast.model.spell
        by_place = {space.place: space for space in self.spaces}
        rows: list[NodeRow] = []
        for i, node in enumerate(nodes):
            effect, low, high = bootstrap(known.effects[:, i])
            is_token = isinstance(by_place[node.place], WholeSpace)
            reading = known.readings.get(node, TokenReading((), ()))
            rows.append(
                NodeRow(
                    place=str(node.place),
                    layer=node.place.layer,
                    role=self.contrast.aligned.roles[node.role],
                    kind="token" if is_token else "error" if node.feature == ERROR else "feature",
                    feature=None if node.feature == ERROR else node.feature,
                    effect=effect,
                    low=low,
                    high=high,
                    activation=float(strengths[0, i]),
                    reference=float(strengths[1, i]),
                    exact=known.exact.get(node),
                    kept=known.kept.get(node),
                    supernode=known.supernodes.get(node, ""),
                    token="" if tokens[i] < 0 else spell(tokens[i]),
                    promotes=reading.promotes,
                    suppresses=reading.suppresses,
                )
            )
        return tuple(rows)

    @torch.no_grad()
    def _strengths(self, nodes: Sequence[Node]) -> Strengths:
        """Strength of every node at its role's tokens, in the prompts and in their references."""
        found, peaks = torch.zeros(2, len(nodes)), [Counter[int]() for _ in nodes]
        own: dict[Place, list[int]] = {}
        for i, node in enumerate(nodes):
            own.setdefault(node.place, []).append(i)
        used = [space for space in self.spaces if space.place in own]
        for _, part in self.contrast.parts():
            mine, _ = self.contrast.run(part, list(own))
            theirs, _ = self.contrast.run_reference(part, list(own))
            real, share = part.role >= 0, len(part) / len(self.contrast)
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
                            if which == 0:
                                peaks[i].update(_peaks(part, part.role == nodes[i].role, values))
        best = [max(each, key=lambda t: (each[t], -t), default=-1) for each in peaks]
        return Strengths(found, torch.tensor(best, dtype=torch.long))

    def edge_rows(self, nodes: Sequence[Node], linked: Edges) -> tuple[EdgeRow, ...]:
        """The edges with the largest |weight|, predicted and measured."""
        order = linked.weights.mean(0).abs().argsort(descending=True)[: self.config.edges].tolist()
        pairs = [linked.pairs[i] for i in order]
        index = {node: i for i, node in enumerate(nodes)}
        few = self.contrast.head(max(self.config.measure, 1))
        predicted = linked.weights[: len(few)].mean(0).tolist()
        tested: list[tuple[float | None, float | None]] = [(None, None)] * len(pairs)
        if self.config.measure and pairs:

            def make() -> dict[str, Tensor]:
                return measured(few, self.spaces, pairs, relevance=self.is_frozen)._asdict()

            found = kept(make, made_from=(few, self.spaces, pairs, self.is_frozen))
            means = (found["frozen"].mean(0).tolist(), found["free"].mean(0).tolist())
            tested = [(frozen if self.is_frozen else None, free) for frozen, free in zip(*means, strict=True)]
        loadings = self._loadings(nodes, pairs)
        rows: list[EdgeRow] = []
        for number, (i, (source, target), (frozen, free)) in enumerate(zip(order, pairs, tested, strict=True)):
            weight, low, high = bootstrap(linked.weights[:, i])
            goal = None if target is OUTPUT else index[target]
            heads = listed(predicted[i], loadings[number]) if number in loadings else ()
            own = None if free is None else predicted[i]
            rows.append(EdgeRow(index[source], goal, weight, low, high, frozen, free, heads, own))
        return tuple(rows)

    def _loadings(
        self, nodes: Sequence[Node], pairs: Sequence[tuple[Node, Node | None]]
    ) -> dict[int, Float[Tensor, "prompt head"]]:
        """The parts of listed edges that heads carry, by edge."""
        few = self.contrast.head(max(self.config.measure, 1))

        def make() -> dict[str, Tensor]:
            found = head_loadings(few, self.spaces, nodes, pairs, relevance=self.is_frozen)
            return {"": torch.zeros(0)} | {str(i): parts for i, parts in found.items()}

        if not self.config.heads:
            return {}
        found = kept(make, made_from=(few, self.spaces, nodes, pairs, self.is_frozen))
        return {int(i): parts for i, parts in found.items() if i}


def _peaks(part: Aligned, here: Bool[Tensor, "row position"], values: Float[Tensor, " token"]) -> list[int]:
    """Token ids at which a node is strongest, one for every prompt in which it is strong at all."""
    strength = torch.zeros(here.shape, device=values.device).masked_scatter(here.to(values.device), values.float())
    top = strength.max(1)
    ids = part.rows.ids.to(top.indices.device).gather(1, top.indices[:, None])[:, 0]
    return ids[top.values > 0].tolist()


def _random(features: Sequence[Node], spaces: Sequence[Space], seed: int) -> list[Node]:
    """As many random features at the same places and roles."""
    sizes = {space.place: space.size for space in spaces}
    generator = torch.Generator().manual_seed(seed)
    found = (
        replace(node, feature=int(torch.randint(sizes[node.place], (1,), generator=generator))) for node in features
    )
    return list(dict.fromkeys(found))
