r"""LaTeX of a record: tables with booktabs, drawings as PDF, and the skeleton of a paper around them.

`latex/paper.tex` is written once and belongs to the author. `latex/results/` is generated: `numbers.tex` names every
key figure, so that a sentence quotes it as `\unsleep{name}`, `results.tex` inputs `tables/` and `figures/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from unsleep.base import store
from unsleep.core import BadInput
from unsleep.pages import pdf
from unsleep.pages.blocks import Block, Paper, Table
from unsleep.pages.page import plain, source
from unsleep.pages.registry import Page

ROWS = 120
"""Maximum rows of a table; the record has all of them."""

FLOAT = 24
"""Rows above which a table breaks across pages."""

WORDY = 36
"""Characters above which a column breaks its lines."""

WIDTH, HEIGHT = 455.0, 520.0
"""Room for the drawings of one figure, in points."""

HALF = 400.0
"""Width of a drawing, in pixels, up to which two stand side by side."""

LANDSCAPE = r"\begin{landscape}"
"""Begins a table that is too wide for an upright page."""

RESULTS = "results.tex"
"""File that marks a generated folder."""

MARK = re.compile(r"/|\\_|-\{\}|(?<=\w)[.:=](?=\w)")
"""Marks in a path or a name, escaped, behind which a line may break."""

SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "-": "-{}",
    "\n": " ",
    "\t": " ",
    "\u00a0": "~",
    "−": "$-$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "×": r"$\times$",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "→": r"$\rightarrow$",
    "←": r"$\leftarrow$",
    "·": r"\textperiodcentered{}",
    "∅": r"$\emptyset$",
    "↵": r"$\hookleftarrow$",
    "⇥": r"$\mapsto$",
    "✓": r"$\checkmark$",
    "✗": r"$\times$",
    "‖": r"$\Vert$",
    "Δ": r"$\Delta$",
    "∞": r"$\infty$",
    "⟨": r"$\langle$",
    "⟩": r"$\rangle$",
    "“": "``",
    "”": "''",
    "‘": "`",
    "’": "'",
    "⁻": r"$^{-}$",
    **{digit: f"$^{{{i}}}$" for i, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
}
"""Characters that LaTeX reads otherwise or its fonts lack → how they are written."""

LETTERS = frozenset(
    "¡¿§©®°µ¶«»£¥¢¬¼½¾ª"
    "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÐÑÒÓÔÕÖØÙÚÛÜÝÞßàáâãäåæçèéêëìíîïðñòóôõöøùúûüýþÿ"
    "ĂăĄąĆćČčĎďĐđĘęĚěĞğİıĹĺĽľŁłŃńŇňŊŋŐőŒœŔŕŘřŚśŞşŠšŢţŤťŮůŰűŸŹźŻżŽž"
)
"""Characters outside ASCII that the T1 encoding has."""


class Drawn(NamedTuple):
    """A drawing with its caption and file."""

    drawing: pdf.Drawing
    caption: str
    file: str

    @property
    def share(self) -> float:
        """Share of the line that it takes."""
        return 0.49 if self.drawing.box[0] <= HALF else 1.0

    @property
    def height(self) -> float:
        """Height on the page, in points, of a line with it."""
        width, height = (pdf.POINTS * side for side in self.drawing.box)
        return height * min(1.0, self.share * WIDTH / width) + 24


def write(page: Page, folder: Path) -> Path:
    """Write the LaTeX of a folder's record into `latex/` below it; returns the path of `paper.tex`.

    `latex/results/` is replaced as a whole; a `paper.tex` that exists is left as it is. Raises `BadInput` for a page
    without LaTeX, and where reportlab is not installed.
    """
    if page.paper is None:
        raise BadInput(f"{page.name}.json has no LaTeX; run it without --latex, or give its page a `paper`")
    pdf.check()
    arrange = page.paper
    paper, made_from = page.read(folder, lambda record: (arrange(record), origin(record)))
    target = folder / "latex"
    with store.new_folder(target / "results", replace=RESULTS) as scratch:
        (scratch / "tables").mkdir()
        (scratch / "figures").mkdir()
        store.write_text(scratch / "preamble.tex", source("preamble.tex"))
        store.write_text(scratch / "numbers.tex", numbers(paper, made_from))
        file = f"{page.name}.json"
        store.write_text(scratch / "tables" / "provenance.tex", provenance(made_from, file))
        store.write_text(scratch / RESULTS, "\n".join(sections(paper.blocks, scratch, file)))
    if not (target / "paper.tex").exists():
        store.write_text(target / "paper.tex", skeleton(paper, file))
    return target / "paper.tex"


def origin(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The provenance of a record, or of the result in it."""
    return record.get("provenance") or record.get("result", {}).get("provenance") or {}


def escape(text: str) -> str:
    r"""Text as LaTeX shows it; characters that its fonts lack are written as their number.

    >>> escape("0 of 200, at most 1.9 %")
    '0 of 200, at most 1.9\\,\\%'
    """
    out: list[str] = []
    for char in text:
        if char in SPECIAL:
            out.append(SPECIAL[char])
        elif " " <= char <= "~" or char in LETTERS:
            out.append(char)
        else:
            out.append(rf"\texttt{{U+{ord(char):04X}}}")
    return "".join(out).replace(r" \%", r"\,\%")


def key(name: str) -> str:
    """A figure's name as LaTeX takes it: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9/.]+", "-", name.lower().replace("_", "-")).strip("-")


def numbers(paper: Paper, made_from: Mapping[str, Any]) -> str:
    """Definitions of the key figures, of the version and of the date."""
    known = {
        **paper.numbers,
        "version": str(made_from.get("versions", {}).get("unsleep", "of an unknown version")),
        "created": str(made_from.get("created", ""))[:10],
    }
    head = '% Generated by "unsleep report --latex": \\unsleep{name} gives a figure.'
    return (
        "\n".join([head, *(rf"\unsleepnumber{{{key(name)}}}{{{escape(text)}}}" for name, text in known.items())]) + "\n"
    )


def skeleton(paper: Paper, file: str) -> str:
    """The paper that an author starts from."""
    made = Environment(
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<<",
        variable_end_string=">>>",
        trim_blocks=True,
        undefined=StrictUndefined,
        autoescape=False,
    )
    view = {
        "title": escape(paper.title),
        "lead": escape(paper.lead),
        "source": f"../{file}",
        "examples": [key(name) for name in paper.numbers][:3],
    }
    return made.from_string(source("paper.tex")).render(view)


def sections(blocks: Sequence[Block], folder: Path, file: str) -> Iterator[str]:
    """The results, section by section, once their tables and drawings are written into `folder`."""
    yield '% Generated by "unsleep report --latex".'
    turned: list[str] = []  # a page of its own amid the text would leave the one before half empty
    for block in blocks:
        anchor = key(block.anchor)
        drawn = list(drawings_of(block, anchor))
        for one in drawn:
            pdf.save(one.drawing, folder / "figures" / one.file)
        own = [table for table in block.tables if table.rows]
        found = own or [table for part in block.maps for table in pdf.tables(part) if not block.tables]
        if not drawn and not found:
            continue
        yield rf"\subsection{{{escape(block.name)}}}"
        yield escape(block.lead)
        yield from floats(drawn, anchor, block.name)
        for i, table in enumerate(found, 1):
            name = f"{anchor}-{i}"
            written = table_of(table, name, file)
            store.write_text(folder / "tables" / f"{name}.tex", written)
            if LANDSCAPE in written:
                turned.append(name)
                yield rf"Table~\ref{{tab:{name}}}, at the end of the results, has the figures."
            else:
                yield rf"\input{{results/tables/{name}}}"
        yield "\\FloatBarrier\n"
    yield from (rf"\input{{results/tables/{name}}}" for name in turned)


def drawings_of(block: Block, anchor: str) -> Iterator[Drawn]:
    """A block's drawings, numbered."""
    count = 0
    for caption, markup in [*block.charts, *(("", part) for part in block.maps)]:
        for drawing in pdf.drawings(markup):
            count += 1
            said = caption or drawing.caption
            yield Drawn(drawing._replace(caption=said), said, f"{anchor}-{count}.pdf")


def floats(drawn: Sequence[Drawn], anchor: str, name: str) -> Iterator[str]:
    """Figures of a section, each with as many drawings as fit a page."""
    groups: list[list[Drawn]] = [[]]
    room = HEIGHT
    for one in drawn:
        needed = one.height * one.share
        if needed > room and groups[-1]:
            groups.append([])
            room = HEIGHT
        groups[-1].append(one)
        room -= needed
    for i, group in enumerate(groups if drawn else (), 1):
        yield "\\begin{figure}[htbp]\n\\centering"
        for one in group:
            share = 1.0 if len(group) == 1 else one.share
            picture = rf"\includegraphics[max width=\linewidth]{{results/figures/{one.file}}}"
            label = "" if len(group) == 1 else rf"\\[2pt]{{\footnotesize {escape(one.caption)}}}\par\medskip"
            yield rf"\begin{{minipage}}[t]{{{share:.2f}\linewidth}}\centering {picture}{label}\end{{minipage}}\hfill"
        part = f", {i} of {len(groups)}" if len(groups) > 1 else ""
        caption = group[0].caption if len(group) == 1 else f"{name}{part}"
        yield rf"\caption{{{escape(caption)}.}}\label{{fig:{anchor}-{i}}}"
        yield "\\end{figure}"


def provenance(made_from: Mapping[str, Any], file: str) -> str:
    """The table of a record's provenance: versions, command, hashes."""
    rows = [[name, text] for name, text in leaves(made_from)]
    return table_of(Table("Provenance", ["Key", "Value"], 2, rows), "provenance", file)


def leaves(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of nested JSON objects with its dotted path."""
    for name, item in value.items():
        if isinstance(item, dict) and item:
            yield from leaves(cast("dict[str, Any]", item), f"{above}{name}.")
        elif isinstance(item, list):
            joint = " " if name == "command" else ", "
            yield f"{above}{name}", joint.join(plain(part) for part in cast("list[Any]", item))
        else:
            yield f"{above}{name}", plain(item)


def table_of(table: Table, name: str, file: str) -> str:
    """A table as a float, or across pages where it is long; the caption says which file has rows that are left out."""
    rows = [[c.striptags() if isinstance(c, Markup) else c for c in row] for row in table.rows[:ROWS]]
    left_out = len(table.rows) - len(rows)
    caption = escape(table.name) + (f"; the first {ROWS} rows of {escape(file)}" if left_out else "")
    widths = [max(len(row[i]) for row in [list(table.head), *rows]) for i in range(len(table.head))]
    columns = "".join(column(width, i < table.words) for i, width in enumerate(widths))
    breaking = [i for i, width in enumerate(widths) if i < table.words and width > WORDY]
    head = [line(table.head), r"\midrule"]
    body = [line(row, breaking) for row in rows]
    title = rf"\caption{{{caption}.}}\label{{tab:{name}}}"
    start = f'% Generated from {file} by "unsleep report --latex".'
    total = sum(min(width, WORDY) for width in widths) + 2 * len(widths)
    if len(rows) <= FLOAT:
        parts = [
            start,
            "\\begin{table}[htbp]\n\\centering\\small",
            title,
            rf"\begin{{adjustbox}}{{max width=\linewidth}}\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
            r"\toprule",
            *(*head, *body),
            "\\bottomrule\n\\end{tabular}\\end{adjustbox}\n\\end{table}",
        ]
        return "\n".join(parts) + "\n"
    turned = total > 130
    is_roomy = total <= 105 or turned
    size, gap = (r"\footnotesize", "4pt") if is_roomy else (r"\scriptsize", "2.5pt")
    parts = [
        start,
        *([LANDSCAPE] if turned else []),
        rf"\begingroup{size}\setlength{{\tabcolsep}}{{{gap}}}",
        rf"\begin{{longtable}}{{@{{}}{columns}@{{}}}}",
        rf"{title}\\ \toprule",
        *head,
        "\\endfirsthead\n\\toprule",
        *head,
        "\\endhead\n\\bottomrule\n\\endfoot",
        *body,
        "\\end{longtable}\\endgroup",
        *([r"\end{landscape}"] if turned else []),
    ]
    return "\n".join(parts) + "\n"


def column(width: int, is_text: bool) -> str:
    """The format of a column of so many characters."""
    if not is_text:
        return "r"
    return "l" if width <= WORDY else r">{\raggedright\arraybackslash}p{0.32\linewidth}"


def line(cells: Sequence[str], breaking: Sequence[int] = ()) -> str:
    """A row; a bracket in front would be read as an argument of the row before.

    Cells of the columns `breaking`, such as paths, may break behind a mark.
    """
    said = (
        MARK.sub(r"\g<0>\\allowbreak{}", escape(cell)) if i in breaking else escape(cell)
        for i, cell in enumerate(cells)
    )
    return "{}" + " & ".join(said) + r" \\"
