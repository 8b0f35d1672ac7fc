"""Commands that harvest activations and train dictionaries: harvest, train."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

import unsleep
from unsleep.activations.harvest import Harvest, HarvestConfig, open_harvest, streamed
from unsleep.base.machine import device_of
from unsleep.cli.console import Bars, say
from unsleep.cli.grid import ONE, Grid
from unsleep.cli.shared import Model, Out, Placed, Placement, load_dictionaries, own_replies
from unsleep.core import BadInput, Site
from unsleep.dictionaries import parallel
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files.folders import Format
from unsleep.dictionaries.sweep import Entry, Job, Setup, sweep, train_alone
from unsleep.dictionaries.tracking import Tracker
from unsleep.models.sites import all_sites, tap
from unsleep.prompts import sets

POINTS = ("attn", "mlp", "resid")
"""Points that every layer has."""


def harvest(
    model: Model,
    prompts: Path,
    sites: Annotated[tuple[str, ...], arg(aliases=["--site"])],
    out: Out,
    reply_tokens: int = 0,
    replies_of: Path | None = None,
    plain: bool = False,
    placement: Placed = Placement(),
    config: OmitArgPrefixes[HarvestConfig] = HarvestConfig(),
    json: bool = False,
) -> int:
    """Collect a model's activations at Sites on every token of prompts, into shards on disk.

    Args:
        model: Hub id, folder, adapter folder, .gguf file or alias such as smollm2-135m.
        prompts: One prompt per line, or .jsonl with {"text": …}.
        sites: Such as resid.12 mlp.3 attn.0 embed; `attn`, `mlp` or `resid` of every layer, `all` for these three.
        out: Output folder; an interrupted harvest in it is resumed.
        reply_tokens: Also harvest the model's own greedy replies of this many tokens.
        replies_of: Harvest the replies to these prompts instead, line by line, as reference replies.
        plain: Take the lines as plain text, without the chat template.
        json: Print the manifest as JSON.
    """
    wanted, points = sets.read_prompts(prompts), POINTS if sites == ("all",) else [s for s in sites if s in POINTS]
    places = [] if sites == ("all",) else [Site.parse(s) for s in sites if s not in POINTS]
    asked = wanted if replies_of is None else sets.read_prompts(replies_of)
    if reply_tokens < 0:
        raise BadInput(f"--reply-tokens is {reply_tokens}; expected at least 0")
    if len(asked) != len(wanted):
        raise BadInput(f"--replies-of has {len(asked)} prompts, {prompts} {len(wanted)}; expected the same number")
    if replies_of is not None and not reply_tokens:
        raise BadInput("--replies-of was given without --reply-tokens; give the length of the replies in tokens")
    with Bars():
        loaded = placement.load(model, plain=plain)
        places = list(dict.fromkeys([*places, *(all_sites(loaded.network, tuple(points)) if points else ())]))
        for site in places:
            tap(loaded.network, site)  # refuses missing Sites before any work
        replies = own_replies(loaded, asked, reply_tokens) if reply_tokens else None
        done = unsleep.harvest(loaded, wanted, places, out, replies=replies, plain=plain, config=config)
    sinks = ", ".join(f"{site} {n}" for site, n in done.manifest.sinks.items())
    say(
        done.manifest,
        json,
        f"{done.tokens:,} tokens at {len(done.sites)} Sites in {out}; attention sinks left out: {sinks}",
    )
    return 0


def train(
    harvests: Annotated[Positional[tuple[Path, ...]], arg(metavar="HARVEST")],
    site: Annotated[tuple[str, ...], arg(aliases=["--sites"])],
    out: Out,
    target: tuple[str, ...] = (),
    start: tuple[Path, ...] = (),
    config: OmitArgPrefixes[Grid] = ONE,
    device: str = "auto",
    tracker: Tracker | None = None,
    format: Format = "saelens",
    json: bool = False,
) -> int:
    """Train dictionaries (sparse autoencoders, transcoders) on the activations of one or more Sites.

    Include a harvest of suspicious prompts: otherwise the backdoor remains in the dictionary's error.
    Settings with several values are trained in one pass, in every combination.
    Under torchrun the processes share every batch.

    Args:
        harvests: Folders made by `unsleep harvest`; several are pooled.
        site: Such as resid.12; several are trained one after another, `all` is every Site of the harvests.
        out: Folder for the dictionary; with several, for a folder each and
            dictionaries.html. Repeating the command resumes an interrupted training.
        target: Site that a transcoder reconstructs; one for all or one per Site.
        start: Dictionaries for a warm start, one per Site, or the folder that contains them; such as a base model's,
            on activations of a suspect. They determine architecture, features and k; the rotation of every feature
            is written beside the weights.
        device: Such as cpu or cuda:1; `auto` is CUDA where available.
        tracker: Installed experiment tracker for training metrics.
        format: File format of the dictionaries.
        json: Print the fit as JSON.
    """
    configs = config.configs
    jobs = _started(_jobs([open_harvest(h) for h in harvests], site, target), load_dictionaries(start))
    alone = len(jobs) == len(configs) == 1
    with parallel.joined(str(device_of(device))) as place:
        first = parallel.place()[0] == 0
        setup = Setup(place, tracker, out.with_name(f"{out.name}.runs"), format)
        with Bars() if first else contextlib.nullcontext():
            trained = train_alone(jobs[0], configs, out, setup) if alone else None
            record = None if alone else sweep(jobs, configs, out, setup)
    if trained is not None:
        words = f"FVU {trained.fvu:.3f}, L0 {trained.l0:.1f}, dead {trained.dead:.1%}, dense {trained.dense or 0:.1%}"
        words += f" on {trained.tokens:,} training tokens; saved in {out}"
        say(trained, json, "\n".join([words, *_turned([trained]), *_few([trained])]))
    elif record is not None and first:
        page, rows = unsleep.report(out), record.dictionaries
        lines = [_table(rows), *_turned(rows), *_few(rows), f"Saved in {out}; page: {page}"]
        say(record, json, "\n".join(lines))
    return 0


def _jobs(harvests: Sequence[Harvest], sites: Sequence[str], targets: Sequence[str]) -> list[Job]:
    """The training job of each Site; no shards are read yet."""
    if not harvests or not sites:
        raise BadInput(f"{len(harvests)} harvests and {len(sites)} Sites were given; expected at least one of both")
    if tuple(sites) == ("all",):
        wanted = sorted(set[Site].intersection(*(set(h.sites) for h in harvests)))
        if not wanted:
            raise BadInput(f"the {len(harvests)} harvests have no Site in common; name the Sites")
    else:
        wanted = list(dict.fromkeys(Site.parse(s) for s in sites))
    aims = [Site.parse(s) for s in targets]
    if len(aims) not in (0, 1, len(wanted)):
        raise BadInput(f"{len(aims)} targets for {len(wanted)} Sites; expected one for all, or one per Site")
    places = aims * len(wanted) if len(aims) == 1 else aims or [None] * len(wanted)
    return [
        Job(streamed(harvests, s), None if aim is None else streamed(harvests, aim))
        for s, aim in zip(wanted, places, strict=True)
    ]


def _started(jobs: Sequence[Job], starts: Sequence[Coder]) -> list[Job]:
    """The jobs with the dictionaries that they start from."""
    at = {str(d.site): d for d in starts}
    lacking = [job.name for job in jobs if job.name not in at]
    if starts and lacking:
        raise BadInput(
            f"there is no dictionary at {lacking[0]} to start from; those given are at {', '.join(sorted(at))}"
        )
    return [job._replace(start=at.get(job.name)) for job in jobs]


def _few(rows: Sequence[Entry]) -> list[str]:
    """A warning where a dictionary has too few training tokens for a meaningful fit."""
    if all(row.tokens >= row.features for row in rows):
        return []
    least = min(rows, key=lambda row: row.tokens / row.features)
    return [
        f"Warning: {least.tokens:,} tokens for {least.features:,} features. The fit is measured on the training "
        "tokens and overestimated with so few: harvest more text, such as plain passages with --plain"
    ]


def _turned(rows: Sequence[Entry]) -> list[str]:
    """After a warm start, a line per dictionary with the features that rotated most."""
    lines: list[str] = []
    for row in rows:
        if row.rotation is not None:
            most = ", ".join(f"{i} ({cosine:.2f})" for i, cosine in row.rotation.turned_most[:5])
            lines.append(f"{row.site}: largest rotation (cosine of decoder rows before and after): {most}")
    return lines


def _table(rows: Sequence[Entry]) -> str:
    """A line per dictionary."""
    width = max(len(row.variant) for row in rows)
    named = f"  {'variant':<{max(width, 7)}}" if width else ""
    lines = [f"{'site':<10}{named}    FVU      L0   dead  dense  training tokens"]
    for row in rows:
        name = f"  {row.variant:<{max(width, 7)}}" if width else ""
        figures = f"{row.fvu:.3f}  {row.l0:>6.1f}  {row.dead:>5.1%}  {row.dense or 0:>5.1%}  {row.tokens:>15,}"
        lines.append(f"{row.site!s:<10}{name}  {figures}")
    return "\n".join(lines)
