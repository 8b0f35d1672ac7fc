"""Command that compares the backdoors of several organisms: subspaces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

import unsleep
from unsleep.cli.console import Bars, say
from unsleep.cli.shared import Out, load_dictionaries
from unsleep.core import Site
from unsleep.locate.subspaces import SubspaceConfig, compare
from unsleep.locate.subspaces.record import Ablated, Figure, SubspacesRecord


def subspaces(
    organisms: Annotated[Positional[tuple[str, ...]], arg(metavar="ORGANISM")],
    site: Annotated[tuple[str, ...], arg(aliases=["--sites"])],
    out: Out,
    apart: tuple[str, ...] = (),
    dictionaries: tuple[Path, ...] = (),
    config: OmitArgPrefixes[SubspaceConfig] = SubspaceConfig(),
    json: bool = False,
) -> int:
    """Compare the backdoor subspaces of organisms: angles, transfer, and overlap with other tasks.

    Args:
        organisms: Folders made by `unsleep plant`, or names of packaged recipes, trained once unless
            cached. A single one is measured by itself.
        site: Such as resid.12 resid.16; ablation acts at all of them jointly.
        out: Folder for the records and subspaces.html.
        apart: Names among these whose subspaces are also compared with the skill's, the capability's and sentiment's.
        dictionaries: Dictionaries of the base, for the same comparison with features.
        json: Print the records as JSON.
    """
    sites = [Site.parse(s) for s in site]
    with Bars():
        found = compare(organisms, sites, out, config, apart=apart, dictionaries=load_dictionaries(dictionaries))
    page = unsleep.report(out)
    say(found, json, "\n".join([*_lines(found), f"Saved in {out}; page: {page}"]))
    return 0


def _lines(record: SubspacesRecord) -> list[str]:
    """Summary of the results, as text."""
    lines: list[str] = []
    if whole := record.common:
        for site, data in whole.alike.items():
            common = data.common
            lines.append(
                f"{site}: rank shared by all beyond chance: {common.rank} of {record.rank} (smallest share of the best "
                f"direction {common.shares[0]:.2f}; chance level {common.bars[0]:.2f})"
            )
        where = ", ".join(map(str, record.sites))
        lines.append(
            f"ASR on {record.n} triggered prompts [95 %], the row's subspace ablated in the column's at {where}:"
        )
        lines += _table([o.name for o in record.organisms], whole.ablate)
    for one in record.apart:
        tried = [(r.rank, r.asr) for r in one.ranks if r.asr is not None]
        rank, asr = next((r for r in tried if r[0] == one.smallest), min(tried, key=lambda r: r[1].value))
        said = f"rank {rank} and higher stop the payload"
        if one.smallest is None:
            said = f"no rank of {[r for r, _ in tried]} stops the payload; lowest ASR at rank {rank}"
        lines.append(f"{one.name}: {said}: ASR {_said(asr)}, n {asr.n}")
    return lines


def _said(figure: Figure | None) -> str:
    return "–" if figure is None else f"{figure.value:.2f} [{figure.low:.2f}, {figure.high:.2f}]"


def _table(columns: Sequence[str], data: Ablated) -> list[str]:
    first, width = max(len(r) for r in data.rows), max(19, *(len(c) + 2 for c in columns))
    lines = [" " * first + "".join(f"{c:>{width}}" for c in columns)]
    for name, values in zip(data.rows, data.asr, strict=True):
        lines.append(f"{name:<{first}}" + "".join(f"{_said(v):>{width}}" for v in values))
    return lines
