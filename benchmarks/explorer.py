"""Frame times of the explorer's page in headless Chromium, with 10,000 features and a circuit of 2,000 nodes.

The page is written to a folder and opened from disk. By input events a list is scrolled, a circuit is panned and
zoomed, and a threshold is dragged; the time of a frame is that between two animation frames.

    python benchmarks/explorer.py [--features 10000] [--nodes 2000] [--edges 20000]
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from common import keep, table

from support.browser import Tab, chromium
from support.explorer import FakeStatistics, write_results
from unsleep.explorer import folder

LONG = 32
"""Milliseconds of a frame that a reader notices."""

COUNT = """(() => { window.frames_ = []; let last = performance.now();
  const step = (now) => { frames_.push(now - last); last = now; window.frame_ = requestAnimationFrame(step); };
  window.frame_ = requestAnimationFrame(step); })()"""

DONE = "(() => { cancelAnimationFrame(frame_); return frames_.slice(2); })()"


def measured(tab: Tab, act: Any) -> dict[str, float]:
    """Frame times in milliseconds while something is done."""
    tab.run(COUNT)
    act()
    tab.run("new Promise(r => setTimeout(r, 300))")
    frames = sorted(tab.run(DONE))
    return {
        "frames": len(frames),
        "median": round(median(frames), 2),
        "p95": round(frames[int(0.95 * (len(frames) - 1))], 2),
        "longest": round(frames[-1], 2),
        "long": sum(frame > LONG for frame in frames),
    }


def pan(tab: Tab) -> None:
    """Drag the canvas to and fro, a step a frame."""
    tab.mouse("mousePressed", 500, 450, button="left", buttons=1, clickCount=1)
    for i in range(120):
        x = 500 + 240 * (1 - abs((i % 80) / 40 - 1))
        tab.mouse("mouseMoved", x, 450 + x / 8, button="left", buttons=1)
        time.sleep(0.012)
    tab.mouse("mouseReleased", 500, 450, button="left", clickCount=1)


def wheel(tab: Tab) -> None:
    """Zoom in and out."""
    for i in range(60):
        tab.mouse("mouseWheel", 600, 450, deltaX=0, deltaY=-60 if i % 40 < 20 else 60)
        time.sleep(0.016)


def scroll(tab: Tab) -> None:
    """Scroll the list of features as fast as a flung wheel does."""
    for _ in range(90):
        tab.mouse("mouseWheel", 200, 500, deltaX=0, deltaY=300)
        time.sleep(0.014)


def drag(tab: Tab) -> None:
    """Drag the threshold of edges."""
    for i in range(20):
        tab.set("input[aria-label='Edges that are drawn']", str(0.3 + 0.03 * i))
        time.sleep(0.05)


def first_view(tab: Tab, url: str, ready: str) -> float:
    """Milliseconds from the navigation until a view shows its content."""
    tab.call("Page.navigate", url="about:blank")
    tab.open(url, ready)
    return round(tab.run("performance.getEntriesByName('shown')[0]?.startTime ?? performance.now()"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, size in (("features", 10_000), ("nodes", 2_000), ("edges", 20_000)):
        parser.add_argument(f"--{name}", type=int, default=size)
    asked = vars(parser.parse_args())
    folder.FeatureStatistics = FakeStatistics
    with tempfile.TemporaryDirectory() as scratch:
        write_results(Path(scratch) / "results", **asked)
        began = time.perf_counter()
        index = folder.write(Path(scratch) / "results", Path(scratch) / "page")
        seconds = time.perf_counter() - began
        size = sum(path.stat().st_size for path in index.parent.rglob("*") if path.is_file())
        with chromium(Path(scratch) / "profile") as browser:
            figures, opened, version = (
                views(browser.tab(), index.as_uri(), asked),
                {},
                browser.call("Browser.getVersion"),
            )
            opened = figures.pop("opened")
    static = files("unsleep.explorer").joinpath("static")
    packed = {name: len(gzip.compress(static.joinpath(name).read_bytes(), 9)) for name in ("app.js", "app.css")}
    head = ["", "frames", "median", "p95", "longest", f"over {LONG} ms"]
    print(table([head, *([name, *map(str, figure.values())] for name, figure in figures.items())]))
    print(f"first view {opened}")
    kept = {"size": asked, "frames_ms": figures, "first_view_ms": opened, "gzip_bytes": packed}
    path = keep(
        "explorer", {**kept, "write_seconds": round(seconds, 1), "folder_bytes": size, "browser": version["product"]}
    )
    print(f"Saved in {path}")


def views(tab: Tab, base: str, asked: dict[str, int]) -> dict[str, Any]:
    """Figures of every view."""
    tab.open(f"{base}#/", "document.querySelector('.tiles')")  # once, so that the disk is warm
    found: dict[str, Any] = {"opened": {}}
    ready = {
        "overview": ("#/", "document.querySelector('.tiles')"),
        "features": ("#/features", "document.querySelectorAll('.row').length > 5"),
        "circuit": (f"#/circuit?nodes={asked['nodes']}&edges={asked['edges']}", "document.querySelector('.node-line')"),
    }
    for name, (fragment, expression) in ready.items():
        found["opened"][name] = first_view(tab, base + fragment, expression)
        time.sleep(1.5)
        if name == "features":
            found["scroll of the list"] = measured(tab, lambda: scroll(tab))
    found["pan, every node and edge"] = measured(tab, lambda: pan(tab))
    found["zoom, every node and edge"] = measured(tab, lambda: wheel(tab))
    found["drag of a threshold"] = measured(tab, lambda: drag(tab))
    tab.open("about:blank", "true")
    tab.open(f"{base}#/circuit", "document.querySelector('.node-line')")
    time.sleep(1)
    found["pan, as it opens"] = measured(tab, lambda: pan(tab))
    assert tab.troubles == [], tab.troubles
    return found


if __name__ == "__main__":
    main()
