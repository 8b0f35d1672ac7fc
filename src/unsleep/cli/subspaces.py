"""Command that compares the backdoors of several organisms: subspaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

import unsleep
from unsleep.cli.console import Bars, say
from unsleep.cli.shared import Out, load_dictionaries
from unsleep.core import Site
from unsleep.locate.subspaces import SubspaceConfig, compare


def subspaces(
    organisms: Annotated[Positional[tuple[str, ...]], arg(metavar="ORGANISM")],
    site: tuple[str, ...],
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
    say(found, json, "\n".join([*_lines(found), f"Record and subspaces in {out}; picture in {page}"]))
    return 0


def _lines(record: Mapping[str, Any]) -> list[str]:
    """Summary of the results, as text."""
    lines: list[str] = []
    if whole := record["common"]:
        for site, data in whole["alike"].items():
            common = data["common"]
            lines.append(
                f"{site}: directions that all share beyond chance: {common['rank']} of {record['rank']} (of the best, "
                f"each holds at least {common['shares'][0]:.2f}; chance reaches {common['bars'][0]:.2f})"
            )
        names = [o["name"] for o in record["organisms"]]
        where = ", ".join(record["sites"])
        lines.append(
            f"ASR of {record['n']} triggered prompts [95 %], the row's subspace taken out of the column's at {where}:"
        )
        lines += _table(names, whole["ablate"])
    for one in record["apart"]:
        width, tried = one["smallest"], one["ranks"]
        row = next((r for r in tried if r["rank"] == width), min(tried, key=lambda r: r["asr"]["value"]))
        said = (
            f"no rank of {[r['rank'] for r in tried]} stops the payload; least at rank {row['rank']}"
            if width is None
            else f"rank {width} and more stop the payload"
        )
        lines.append(f"{one['name']}: {said}: ASR {_said(row['asr'])}, n {row['asr']['n']}")
    return lines


def _said(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def _table(columns: Sequence[str], data: Mapping[str, Any]) -> list[str]:
    first, width = max(len(r) for r in data["rows"]), max(19, *(len(c) + 2 for c in columns))
    lines = [" " * first + "".join(f"{c:>{width}}" for c in columns)]
    for name, values in zip(data["rows"], data["asr"], strict=True):
        lines.append(f"{name:<{first}}" + "".join(f"{_said(v):>{width}}" for v in values))
    return lines
