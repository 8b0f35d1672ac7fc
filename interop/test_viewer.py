"""An exported circuit in circuit-tracer's own viewer: it opens, draws every node, and its console stays silent.

Nothing is fetched. The test takes a checkout of circuit-tracer, and a folder of npm modules with d3, d3-jetpack and
dagre, which the viewer loads from the web otherwise:

    npm install --prefix viewer d3@7 d3-jetpack@2 dagre
    UNSLEEP_VIEWER=circuit-tracer UNSLEEP_VIEWER_MODULES=viewer/node_modules pytest interop/test_viewer.py

`UNSLEEP_VIEWER_SHOT` names a PNG to keep of what was drawn.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import unsleep
from support.graphs import NODES, Statistics, circuit_record
from unsleep.base import records
from unsleep.core import Site

CHECKOUT, MODULES, SHOT = (os.environ.get(f"UNSLEEP_VIEWER{name}", "") for name in ("", "_MODULES", "_SHOT"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(
    not (CHECKOUT and MODULES and CHROMIUM), reason="needs UNSLEEP_VIEWER, UNSLEEP_VIEWER_MODULES and Chromium"
)

LIBRARIES = {
    "d3.js": ("d3/dist/d3.js", "d3-collection/dist/d3-collection.js"),
    "jetpack_2024-07-20.js": ("d3-jetpack/build/d3-jetpack.cjs",),
    "dagre.js": ("dagre/dist/dagre.js",),
}
"""Name of a script that the viewer loads from the web → files among the npm modules; the others are not needed."""


DRAW_AXES = """
{
  const conventions = d3.conventions
  d3.conventions = options => {
    const c = conventions(options)
    c.drawAxis = svg => {
      svg.append('g').attr('class', 'x axis').call(c.xAxis)
      svg.append('g').attr('class', 'y axis').call(c.yAxis)
    }
    return c
  }
}
"""
"""A function of the viewer's own build of d3-jetpack that the published one lacks."""


def library(name: str) -> bytes:
    """A script of the viewer's. d3-jetpack's browser build would replace d3 instead of adding to it."""
    source = "\n".join((Path(MODULES) / file).read_text(encoding="utf-8") for file in LIBRARIES.get(name, ()))
    source = source.replace("factory(global.d3 = {}, global.d3,", "factory(global.d3, global.d3,")
    return (source + DRAW_AXES * name.startswith("jetpack")).encode()


class Viewer(SimpleHTTPRequestHandler):
    """The viewer's page and one folder of graphs, as its own server gives them, without the web."""

    def __init__(self, *arguments: Any, graphs: Path, **options: Any) -> None:
        self.graphs = graphs
        super().__init__(*arguments, **options)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def translate_path(self, path: str) -> str:
        found = re.match(r"/(?:data|graph_data)/([^?]*)", path)
        return str(self.graphs / found[1]) if found else super().translate_path(path)

    def do_GET(self) -> None:
        name = self.path.partition("?")[0]
        if name.startswith("/modules/"):
            self.answer(library(name.removeprefix("/modules/")), "text/javascript")
        elif name == "/index.html":
            page = Path(self.translate_path(name)).read_text(encoding="utf-8")
            page = re.sub(r"https://[^'\"]*/([\w.-]+\.js)", r"/modules/\1", page)
            self.answer(page.encode(), "text/html; charset=utf-8")
        else:
            super().do_GET()

    def answer(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A server of the viewer with the sample's graph."""
    records.save(circuit_record(), tmp_path / "circuit" / "circuit.json")
    known = [Statistics(Site(0, "attn"), "a" * 16), Statistics(Site(0), "c" * 16, "fires on <b>the trigger</b>")]
    graph = unsleep.graph(tmp_path / "circuit", tmp_path / "graphs", known)
    assets = Path(CHECKOUT) / "circuit_tracer" / "frontend" / "assets"
    handler = partial(Viewer, graphs=graph.parent, directory=str(assets))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html?slug={graph.stem}"
        server.shutdown()


def opened(address: str, *more: str) -> tuple[str, list[str]]:
    """The document after it has drawn, and the messages of its console that are errors."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1600,1100"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=8000", *more]
    done = subprocess.run([str(CHROMIUM), *flags, address], capture_output=True, text=True, timeout=120, check=True)
    said = re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr)
    return done.stdout, [line for line in said if re.search(r"error|exception|uncaught|failed|not found", line, re.I)]


def test_a_graph_opens_without_an_error(address: str) -> None:
    document, errors = opened(address, "--dump-dom")
    assert errors == []
    drawn = re.findall(r'<text class="node[^"]*"[^>]*>(.)</text>', document)
    assert len(drawn) == len(NODES) + 1
    assert "Couldn't load data" not in document
    assert "<img" not in document
    if SHOT:
        opened(address, f"--screenshot={SHOT}")


def test_a_features_details_are_shown(address: str, tmp_path: Path) -> None:
    graph = json.loads(next((tmp_path / "graphs").glob("s*.json")).read_text())
    [feature] = [n for n in graph["nodes"] if n["clerp"].startswith("resid.0 feature")]
    document, errors = opened(f"{address}&clickedId={feature['node_id']}", "--dump-dom")
    assert errors == []
    assert "fires on ‹b›the trigger‹/b›" in document
    assert "Top activations" in document
    assert "Token Predictions" in document
