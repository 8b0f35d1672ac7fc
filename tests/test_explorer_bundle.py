"""The explorer's bundle: small, inert, and what its source gives."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STATIC = ROOT / "src" / "unsleep" / "explorer" / "static"
WEB = ROOT / "web"


def test_the_bundle_is_small_classic_and_without_requests() -> None:
    sizes = {name: len(gzip.compress((STATIC / name).read_bytes(), 9)) for name in ("app.js", "app.css")}
    assert sum(sizes.values()) < 100_000
    script = (STATIC / "app.js").read_text(encoding="utf-8")
    for banned in ("innerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "http://", "import("):
        assert [line for line in script.splitlines() if banned in line and banned not in ALLOWED] == [], banned
    assert "url(http" not in (STATIC / "app.css").read_text(encoding="utf-8")


ALLOWED = {"innerHTML", "http://"}
"""Words of Preact itself: its property for HTML, which no part of the page uses, and the names of XML."""


def test_no_source_writes_html() -> None:
    for path in (WEB / "src").rglob("*.ts*"):
        text = path.read_text(encoding="utf-8")
        assert "innerHTML" not in text.replace("never innerHTML", ""), path
        assert "dangerouslySetInnerHTML" not in text, path
        assert len(text.splitlines()) <= 450, path


def test_the_bundle_is_what_its_source_gives(tmp_path: Path) -> None:
    """Build it anew; a machine with node and the registry is needed."""
    if shutil.which("npm") is None:
        pytest.skip("no npm is on the path, with which the bundle is built")
    copy = tmp_path / "web"
    shutil.copytree(WEB, copy, ignore=shutil.ignore_patterns("node_modules"))
    styles = tmp_path / "src" / "unsleep" / "pages"
    styles.mkdir(parents=True)
    shutil.copy(ROOT / "src" / "unsleep" / "pages" / "page.css", styles)
    for words in (["ci", "--no-audit", "--no-fund"], ["run", "build"]):
        found = subprocess.run(["npm", *words], cwd=copy, capture_output=True, text=True, check=False)
        assert found.returncode == 0, f"npm {words[0]}: {found.stdout[-2000:]}{found.stderr[-2000:]}"
    built = tmp_path / "src" / "unsleep" / "explorer" / "static"
    for name in ("app.js", "app.css"):
        digests = {hashlib.sha256((place / name).read_bytes()).hexdigest() for place in (built, STATIC)}
        assert len(digests) == 1, f"{name} is not what web/ gives: run make web"
