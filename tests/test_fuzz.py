"""Small files, mutated: none reaches a user as a traceback. Ten thousand are recorded in benchmarks/results."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from fuzz import fuzz, mutated_bytes, mutated_json

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "fuzz.json"


def test_mutants_are_loaded_or_refused_in_one_message():
    outcomes, failures = fuzz(300, seed=1)
    assert failures == []
    assert {kind: sum(found.values()) for kind, found in outcomes.items()} == dict.fromkeys(outcomes, 60)
    assert all(found["refused"] > 5 for found in outcomes.values())
    assert all(found["works"] > 0 for found in outcomes.values())


def test_mutants_are_not_what_they_were():
    whole = json.dumps({f"key{i}": i for i in range(20)}).encode()
    for change in (mutated_bytes, mutated_json):
        found = {change(whole, random.Random(i)) for i in range(40)}
        assert len(found - {whole}) > 30


@pytest.mark.parametrize("kind", ["config.json", "adapter_config.json", "chat template", "prompt file", "GGUF header"])
def test_the_recorded_run_tried_every_kind_and_nothing_failed(kind: str):
    record = json.loads(RECORD.read_text())
    assert record["failures"] == []
    assert sum(record["outcomes"][kind].values()) >= 2_000
