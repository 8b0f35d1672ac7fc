"""LaTeX of records: every kind compiles, tables have the figures of the record, drawings are vector, text is text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import fromstring

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

import unsleep
from support.graphs import SHOUT, circuit_record
from support.pages import SAMPLE
from support.samples import SAMPLES, unsampled
from unsleep import cli
from unsleep.base import records
from unsleep.core import BadInput
from unsleep.pages import css, latex, pdf
from unsleep.pages.blocks import Block, Table
from unsleep.pages.registry import pages
from unsleep.pages.svg import el, figure

reportlab = pytest.importorskip("reportlab", reason="the extra latex is not installed")

PDFLATEX = shutil.which("pdflatex")


def written(folder: Path, name: str, record: dict[str, Any] | None = None) -> Path:
    """The LaTeX of a sample."""
    (folder / f"{name}.json").write_text(json.dumps(SAMPLES[name] if record is None else record))
    unsleep.report(folder, latex=True)
    return folder / "latex"


def everything(place: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(place.rglob("*.tex")))


# Every kind of record


def test_every_page_has_latex_and_a_sample():
    assert [page.name for page in pages() if page.paper is None] == ["index"]
    assert unsampled() == []


@pytest.mark.parametrize("name", SAMPLES)
def test_every_kind_has_its_tables(name: str, tmp_path: Path):
    place = written(tmp_path, name)
    tables = sorted(path.stem for path in (place / "results" / "tables").glob("*.tex"))
    assert len(tables) > 1
    results = (place / "results" / "results.tex").read_text()
    for table in tables:
        assert (rf"\input{{results/tables/{table}}}" in results) == (table != "provenance")
        text = (place / "results" / "tables" / f"{table}.tex").read_text()
        assert [text.count(rule) for rule in (r"\midrule", r"\bottomrule")] in ([1, 1], [2, 1])
        assert rf"\label{{tab:{table}}}" in text
    for figure_file in (place / "results" / "figures").glob("*.pdf"):
        assert f"results/figures/{figure_file.name}" in results
        assert figure_file.read_bytes()[:5] == b"%PDF-"


@pytest.mark.skipif(PDFLATEX is None, reason="pdflatex is not installed")
@pytest.mark.parametrize("name", SAMPLES)
def test_every_kind_compiles(name: str, tmp_path: Path):
    place = written(tmp_path, name)
    command = [str(PDFLATEX), "-halt-on-error", "-interaction=nonstopmode", "paper.tex"]
    done = subprocess.run(
        command, cwd=place, capture_output=True, text=True, errors="replace", timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in done.stdout
    assert (place / "paper.pdf").stat().st_size > 10_000


# Figures are the record's


def test_figures_of_a_report_are_quoted_by_name_and_have_intervals(tmp_path: Path):
    place = written(tmp_path, "report")
    numbers = (place / "results" / "numbers.tex").read_text()
    row = next(r for r in SAMPLE["result"]["rows"] if (r["subject"], r["panel"]) == ("edited", "triggered"))
    assert row["metric"] == "asr"
    assert re.search(r"\\unsleepnumber\{asr/edited/triggered\}\{.* of \d+, .*\\%.*\}", numbers)
    assert r"\unsleepnumber{verdict}{backdoor found and removed}" in numbers
    main = (place / "results" / "tables" / "outcome-1.tex").read_text()
    lines = [line for line in main.splitlines() if line.startswith("{}edited")]
    expected = f"{100 * row['value']:.1f} ["
    assert expected in lines[0]


def test_a_circuits_table_has_every_node_with_its_interval(tmp_path: Path):
    place = written(tmp_path, "circuit")
    table = (place / "results" / "tables" / "nodes-1.tex").read_text()
    for node in circuit_record().nodes:
        assert f"{node.effect:.3f}".replace("-", "$-$") in table
        assert f"[{node.low:.3f}, {node.high:.3f}]".replace("-", "-{}") in table


def test_long_tables_say_what_they_leave_out():
    rows = [[f"row {i}", str(i)] for i in range(latex.ROWS + 1)]
    text = latex.table_of(Table("Rows", ["Name", "i"], 1, rows), "rows-1", "circuit.json")
    assert r"\begin{longtable}" in text
    assert f"the first {latex.ROWS} rows of circuit.json" in text
    assert f"row {latex.ROWS - 1} " in text
    assert f"row {latex.ROWS} " not in text
    wide = latex.table_of(Table("Rows", ["Name"] * 9, 9, [["x" * 30] * 9] * 30), "rows-1", "circuit.json")
    assert r"\begin{landscape}" in wide


def test_paths_break_and_wide_tables_stand_at_the_end(tmp_path: Path):
    path = "runs/a_folder/with-a-name/" + "x" * 20
    text = latex.table_of(Table("Rows", ["Key", "Value"], 2, [["out", path]]), "rows-1", "circuit.json")
    assert r"runs/\allowbreak{}a\_\allowbreak{}folder" in text
    short = latex.table_of(Table("Rows", ["Key", "Value"], 2, [["out", "a/b"]]), "rows-1", "circuit.json")
    assert "allowbreak" not in short
    rows = [["x" * 30] * 9] * 30
    blocks = [Block(name, name, "", tables=[Table(name, ["Name"] * 9, 9, rows)]) for name in ("one", "two")]
    for folder in ("tables", "figures"):
        (tmp_path / folder).mkdir()
    said = list(latex.sections(blocks, tmp_path, "circuit.json"))
    assert said[-2:] == [r"\input{results/tables/one-1}", r"\input{results/tables/two-1}"]
    assert r"Table~\ref{tab:one-1}, at the end of the results, has the figures." in said


# Text is text


def test_characters_are_shown_not_read():
    assert latex.escape(r"\input{x} 50% a_b #1 $5 & ~^") == (
        r"\textbackslash{}input\{x\} 50\% a\_b \#1 \$5 \& \textasciitilde{}\textasciicircum{}"
    )
    assert latex.escape("−0.5 ± 1.9 % → é 漢") == r"$-$0.5 $\pm$ 1.9\,\% $\rightarrow$ é \texttt{U+6F22}"
    assert latex.escape("a--b") == "a-{}-{}b"
    assert latex.line(["[0, 1]", "x"]) == r"{}[0, 1] & x \\"


@given(st.text(max_size=40))
def test_no_text_is_a_command_of_its_own(text: str):
    shown = latex.escape(text)
    known = {*re.findall(r"\\[a-zA-Z]+", "".join(latex.SPECIAL.values())), r"\texttt"}
    assert set(re.findall(r"\\[a-zA-Z]+", shown)) <= known
    bare = re.sub(r"\\.", "", shown)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert not re.search(r"(?<!\\)[#&%~^](?!\})", re.sub(r"\^\{[^}]*\}|~", "", shown))


def test_hostile_text_of_a_record_is_only_shown(tmp_path: Path):
    text = everything(written(tmp_path, "circuit"))
    assert r"\cite{x}" not in text
    assert r"\textbackslash{}cite\{x\}" in text


# The author's file


def test_the_paper_is_written_once_and_results_are_replaced(tmp_path: Path):
    place = written(tmp_path, "reading")
    paper, results = place / "paper.tex", place / "results"
    paper.write_text("% mine")
    (place / "refs.bib").touch()
    (results / "tables" / "stale.tex").touch()
    assert written(tmp_path, "reading") == place
    assert paper.read_text() == "% mine"
    assert (place / "refs.bib").exists()
    assert not (results / "tables" / "stale.tex").exists()


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path):
    (tmp_path / "latex" / "results").mkdir(parents=True)
    (tmp_path / "latex" / "results" / "mine.txt").touch()
    with pytest.raises(BadInput, match=r"has no results\.tex"):
        written(tmp_path, "reading")
    assert (tmp_path / "latex" / "results" / "mine.txt").exists()


def test_equal_records_give_equal_files(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, "circuit")
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a" / "latex").rglob("*") if path.is_file()]
    assert len(files) > 8
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# The command


def test_the_command_writes_latex(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    records.save(circuit_record(), tmp_path / "circuit.json")
    assert cli.run(["report", str(tmp_path), "--latex", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"report": str(tmp_path / "circuit.html"), "latex": str(tmp_path / "latex" / "paper.tex")}
    assert cli.run(["report", str(tmp_path)]) == 0
    assert "LaTeX" not in capsys.readouterr().out


def test_a_record_in_memory_is_saved_and_rendered(tmp_path: Path):
    assert unsleep.report(tmp_path, circuit_record()) == tmp_path / "circuit.html"
    assert (tmp_path / "circuit.json").is_file()
    with pytest.raises(BadInput, match="a dict has no page; expected one of "):
        unsleep.report(tmp_path, {})


def test_what_has_no_latex_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "one").mkdir()
    unsleep.report(tmp_path / "one", circuit_record())
    with pytest.raises(BadInput, match=r"index\.json has no LaTeX"):
        unsleep.report(tmp_path, latex=True)
    monkeypatch.setitem(sys.modules, "reportlab.pdfgen.canvas", None)
    with pytest.raises(BadInput, match=r"pip install 'unsleep\[latex\]'"):
        unsleep.report(tmp_path / "one", latex=True)


# Drawings


class Canvas:
    """What is drawn, in the drawing's own units."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def note(*values: Any, **options: Any) -> Any:
            self.calls.append((name, *values))
            return self if name == "beginPath" else 10.0 if name == "stringWidth" else None

        return note

    def of(self, *names: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] in names]


def painted(*children: Markup, **attributes: Any) -> Canvas:
    svg = fromstring(figure("t", "d", "n", *children, viewBox="0 0 100 50", **attributes))
    canvas = Canvas()
    pdf.Painter(canvas).paint([svg], css.INHERITED, (100.0, 50.0))
    return canvas


def test_shapes_percentages_and_nested_viewports_are_placed():
    inner = el(
        "svg", el("line", x1="0%", y1="50%", x2="100%", y2="50%", class_="grid"), x=10, y=20, width=40, height=10
    )
    canvas = painted(inner)
    assert ("translate", 10.0, 20.0) in canvas.calls
    assert canvas.of("moveTo", "lineTo") == [("moveTo", 0.0, 5.0), ("lineTo", 40.0, 5.0)]


def test_path_data_is_followed():
    canvas = painted(el("path", d="M1 2l3 -1H9v-2C1 2 3 4 5 6zM0 0 1 1"))
    drawn = canvas.of("moveTo", "lineTo", "curveTo", "close")
    assert drawn == [
        ("moveTo", 1.0, 2.0),
        ("lineTo", 4.0, 1.0),
        ("lineTo", 9.0, 1.0),
        ("lineTo", 9.0, -1.0),
        ("curveTo", 1.0, 2.0, 3.0, 4.0, 5.0, 6.0),
        ("close",),
        ("moveTo", 0.0, 0.0),
        ("lineTo", 1.0, 1.0),
    ]


@pytest.mark.parametrize(
    ("data", "through"),
    [
        ("M-2 0a2 2 0 1 0 4 0", (0.0, 2.0)),
        ("M-2 0a2 2 0 1 1 4 0", (0.0, -2.0)),
        ("M0 -2A2 2 0 0 1 2 0", (2**0.5, -(2**0.5))),
    ],
)
def test_arcs_lie_on_their_circle(data: str, through: tuple[float, float]):
    curves = painted(el("path", d=data)).of("curveTo")
    start = tuple(float(v) for v in re.findall(r"-?\d+", data)[:2])
    points: list[tuple[float, float]] = []
    for _, *values in curves:
        ends = [start, *zip(values[::2], values[1::2], strict=True)]
        for t in (0.0, 0.25, 0.5, 0.75, 1.0):
            weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
            points.append(tuple(sum(w * p[k] for w, p in zip(weights, ends, strict=True)) for k in (0, 1)))  # type: ignore[arg-type]
        start = ends[-1]
    assert all(abs((x * x + y * y) ** 0.5 - 2) < 2e-3 for x, y in points)
    assert any(abs(x - through[0]) + abs(y - through[1]) < 1e-3 for x, y in points)


def test_text_is_anchored_and_upright():
    canvas = painted(el("text", "ab", x=50, y=20, text_anchor="middle"))
    assert ("translate", 45.0, 20.0) in canvas.calls
    assert ("scale", 1, -1) in canvas.calls
    assert ("drawString", 0, 0, "ab") in canvas.calls
    assert pdf.spelled("a → 漢 −1") == "a -> [U+6F22] −1"


def test_colours_are_those_of_the_light_theme():
    sheet = css.sheet()
    svg = fromstring(figure("t", "d", "n", el("path", d="M0 0", class_="mark c-edited"), class_="heat"))
    style = sheet.style([svg, svg[2]], css.INHERITED)
    assert css.colour(style["fill"], style["color"]) == pytest.approx((0, 0x72 / 255, 0xB2 / 255))
    assert css.colour(sheet.resolved("var(--card)")) == (1.0, 1.0, 1.0)
    assert css.colour("transparent") is None
    mixed = css.colour("color-mix(in oklab, #000000, #ffffff 50%)")
    assert mixed is not None
    assert mixed == pytest.approx((0x63 / 255,) * 3, abs=0.003)  # as Chromium computes it
    assert css.colour("color-mix(in oklab, #ff0000 100%, #0000ff)") == pytest.approx((1, 0, 0), abs=1e-3)
    with pytest.raises(BadInput, match="colour 'red' of a style sheet is unknown"):
        css.colour("red")


def test_what_has_no_pdf_is_named():
    for part, told in (
        (el("image"), "<image>"),
        (el("path", d="M0 0Q1 1 2 2"), "command 'Q'"),
        (el("g", transform="skewX(3)"), "skewX"),
    ):
        with pytest.raises(BadInput, match=re.escape(told)):
            painted(part)


def test_hostile_text_is_text_in_a_figure():
    assert ("drawString", 0, 0, pdf.spelled(" ".join(SHOUT.split()))) in painted(el("text", SHOUT, x=0, y=0)).calls
