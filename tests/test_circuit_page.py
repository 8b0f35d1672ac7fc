"""What the page of a circuit says of its nodes and curves."""

from __future__ import annotations

from dataclasses import replace

from support.graphs import circuit_record
from unsleep.base import records
from unsleep.locate.circuits.faithful import CurvePoint, Faithfulness
from unsleep.locate.circuits.record import MLP_ONLY, CircuitRecord, Curve
from unsleep.models.lens import Written, stronger
from unsleep.pages.blocks import Table
from unsleep.pages.circuits import faithful_block, node_block, view_of, without_empty

UP, DOWN = (("outheastern", 23.3), ("imum", 23.2)), (("[", -29.6), (" [", -20.0))


def of(record: CircuitRecord) -> dict[str, object]:
    return records.plain(record)


def test_the_end_with_the_larger_logits_is_named() -> None:
    assert stronger(UP, DOWN, 1) == Written("suppresses", ("[",))
    assert stronger(UP, [("[", -3.0)]) == Written("promotes", ("outheastern", "imum"))
    assert stronger(UP, ()) == Written("promotes", ("outheastern", "imum"))
    assert stronger((), ()) is None


def test_nodes_have_token_and_written_tokens_and_no_empty_column() -> None:
    record = circuit_record()
    [table] = node_block(of(record)).tables
    assert not {"Token", "Promotes / suppresses"} & set(table.head)
    nodes = tuple(replace(n, token=" you", promotes=UP, suppresses=DOWN, supernode="") for n in record.nodes)
    [table] = node_block(of(replace(record, nodes=nodes))).tables
    assert "Supernode" not in table.head
    row = dict(zip(table.head, table.rows[0], strict=True))
    assert (row["Token"], row["Promotes / suppresses"]) == ("·you", "suppresses [ ·[")
    assert table.head[table.words] == "Effect"
    assert without_empty(Table("t", ["a", "b", "c"], 2, [["x", "", "1"], ["y", "", "–"]])) == Table(
        "t", ["a", "c"], 1, [["x", "1"], ["y", "–"]]
    )


def test_a_small_share_of_many_sites_is_told_apart_from_a_large_one_of_few() -> None:
    point = CurvePoint(5, Faithfulness(-0.001, -0.004, 0.002), Faithfulness(0.9, 0.8, 1.0))
    own, mlp = Curve("features and errors", (point,)), Curve("features and errors of MLPs", (point,))
    record = of(replace(circuit_record(), curves=(own, mlp)))
    tile = next(tile for tile in view_of(record)["tiles"] if tile.label == "Faithfulness")
    assert "everything outside these 5 nodes is set to its reference, so losses at each Site add up" in tile.note
    [table] = faithful_block(record).tables
    assert [row[0] for row in table.rows] == ["features and errors", MLP_ONLY]
    assert table.rows[0][2] == "0.00 [0.00, 0.00]"
