"""Figures in the docs are those that were recorded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "repair.json"


@pytest.mark.skipif(not RECORD.is_file(), reason="no repair is recorded")
def test_the_tables_of_repairs_are_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import repair_tables

    organisms = json.loads(RECORD.read_text())["organisms"]
    written = (ROOT / "docs" / "repair.md").read_text()
    for line in [*repair_tables.repairs(organisms), *repair_tables.baselines(organisms)]:
        assert line in written
    sys.modules.pop("repair_tables")
