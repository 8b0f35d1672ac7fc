"""From prompts with a trigger and without to a circuit: nodes, edges, and how much of the behaviour they carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from unsleep.base import store
from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.locate.circuits.align import Aligned
from unsleep.locate.circuits.config import CircuitConfig
from unsleep.locate.circuits.contrast import Contrast, Metric
from unsleep.locate.circuits.finder import Finder, Known
from unsleep.locate.circuits.record import CircuitRecord
from unsleep.locate.circuits.spaces import FeatureSpace, Space, WholeSpace
from unsleep.locate.circuits.supernodes import readings, supernodes
from unsleep.locate.features import reply_log_odds
from unsleep.models.model import LoadedModel
from unsleep.models.sites import tap, width


def circuit(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    aligned: Aligned,
    payload: str,
    config: CircuitConfig = CircuitConfig(),
    *,
    reference: LoadedModel | None = None,
    metric: Metric = reply_log_odds,
    quantity: str = "log-odds of the payload",
) -> CircuitRecord:
    """Find by which features, at which tokens, a trigger becomes a payload.

    Args:
        dictionaries: one a Site; edges run from each to the next that there is.
        aligned: prompts on which the payload shows with their references, the payload forced behind (`align`).
        payload: what it says, for the record.
        reference: the model that the references run in, such as the base; the model itself where not given.
        metric: what is explained, a function of a module: the payload's log-odds, or another function of the logits.
        quantity: the metric in words, for the record.

    Raises `BadInput` for no dictionary, two at one Site, one of a Site that the model does not have, a transcoder, no
    prompts beside the held-out ones, and prompts on which the metric does not differ from the references.
    """
    kept, judged = _split(aligned, config.held_out)
    contrast, other = (Contrast(model, each, metric, reference, config.batch) for each in (kept, judged))
    finder = Finder(contrast, spaces_of(model, dictionaries), config, other)
    considered = max(2 * config.nodes, *config.sizes)
    found = finder.effects(finder.spaces, considered)
    nodes = finder.ranked(found, finder.spaces, considered)
    chosen = nodes[: config.nodes]
    curves, ends = finder.curves(nodes)
    linked = finder.edges(chosen)
    candidates = nodes[: 2 * config.nodes]
    each = found.each[:, : len(candidates)]
    exact, agreements = finder.exact(candidates, each)
    shares, stable = finder.stability(each, len(chosen))
    groups = supernodes(model, finder.spaces, chosen, aligned.roles)
    read = readings(model, finder.spaces, chosen)
    known = Known(each[:, : len(chosen)], exact, dict(zip(candidates, shares, strict=True)), groups, read)
    rows = finder.node_rows(chosen, known)
    errors = sum(abs(row.effect) for row in rows if row.kind == "error")
    return CircuitRecord(
        model=model.named,
        reference=(reference or model).named,
        payload=payload,
        tokens=tuple(model.spell(int(t)) for t in aligned.rows.targets[0]),
        estimator=config.estimator,
        prompts=len(contrast),
        roles=aligned.roles,
        inserted=aligned.inserted,
        metric=float(ends[0].mean()),
        metric_reference=float(ends[1].mean()),
        candidates=sum(int((mean != 0).sum()) for mean in found.mean.values()),
        errors=errors / max(sum(abs(row.effect) for row in rows), 1e-12),
        nodes=rows,
        edges=finder.edge_rows(chosen, linked),
        curves=curves,
        dictionaries={str(d.site): d.hash for d in dictionaries},
        provenance=store.provenance(config.seed, config=asdict(config)),
        quantity=quantity,
        agreements=agreements,
        stability=stable,
        held_out=min(config.held_out, config.curve_prompts),
    )


def _split(aligned: Aligned, held_out: int) -> tuple[Aligned, Aligned]:
    """The prompts on which nodes are found, and those on which faithfulness is measured."""
    if not held_out:
        return aligned, aligned
    if held_out >= len(aligned):
        raise BadInput.of("held_out", held_out, f"fewer than the {len(aligned)} prompts", "circuit")
    at = len(aligned) - held_out
    return aligned.at(slice(at)), aligned.at(slice(at, None))


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
    embed = [] if Site(0, "embed") in sites else [WholeSpace(Site(0, "embed"), width(model.network))]
    return [*embed, *(FeatureSpace(d) for d in placed)]
