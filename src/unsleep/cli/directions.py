"""Command that finds the directions of a behaviour: directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tyro.conf import OmitArgPrefixes

import unsleep
from unsleep.base import records, store
from unsleep.base.context import resumable
from unsleep.cli.console import Bars, say
from unsleep.cli.shared import Model, Out, Placed, Placement, load_dictionaries
from unsleep.core import BadInput, Site
from unsleep.interventions.files import save_edit
from unsleep.interventions.subspaces import Projection
from unsleep.judge.evaluate import prompt_digests
from unsleep.locate.directions.erase import Removed, tried_erasers
from unsleep.locate.directions.files import DirectionsRecord, write_directions
from unsleep.locate.directions.study import Study, StudyConfig, study
from unsleep.models.model import LoadedModel
from unsleep.models.sites import all_sites, everywhere
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet

EDIT = "edit"
"""Subfolder of `out` for the edit."""

EVERYWHERE = ("everywhere",)
"""Value of `project_sites` for the whole residual stream."""

TEXTS = 120
"""Plain passages that an eraser must preserve."""


def directions(
    model: Model,
    suspicious: Path,
    ordinary: Path,
    out: Out,
    sites: tuple[str, ...] = ("all",),
    neutral: Path | None = None,
    dictionaries: tuple[Path, ...] = (),
    project: int = 0,
    erase: bool = False,
    project_sites: tuple[str, ...] = (),
    placement: Placed = Placement(),
    config: OmitArgPrefixes[StudyConfig] = StudyConfig(),
    json: bool = False,
) -> int:
    """Find the directions that separate suspicious from ordinary prompts, and measure their effects.

    Every method at every Site: held-out AUROC against the best of many random directions, the share of the answer
    that a direction carries when patched, and the cost on plain text when it is ablated.

    Args:
        model: Hub id, folder, adapter folder, .gguf file or alias.
        suspicious: File of prompts on which the behaviour shows, one per line.
        ordinary: File of prompts on which it does not. Line i is patched from line i of `suspicious`: best the
            same prompt without the trigger.
        out: Folder for directions.json, directions.safetensors and directions.html.
        sites: Such as resid.12 mlp.3; `all` is the residual stream after every layer.
        neutral: File of prompts of neither group, for the one-sided methods.
        dictionaries: Folders of dictionaries; directions are also fitted in their feature space.
        project: Also write the edit that ablates the found subspace of this rank, to a folder `edit` in `out`.
        erase: Write the edit that erases the mean difference and preserves ordinary tokens instead.
        project_sites: Sites of the edit. By default, a projection acts at all of `sites`, and an eraser at
            the best one. `everywhere` ablates the best Site's subspace from the whole residual stream, which
            bakes into weights exactly.
        json: Print the results as JSON.
    """
    _check(project, erase, project_sites, out)
    groups = sets.read_prompts(suspicious, "triggered"), sets.read_prompts(ordinary)
    between = sets.read_prompts(neutral) if neutral is not None else None
    used = [group for group in (*groups, between) if group is not None]
    with Bars():
        found_dictionaries, loaded = load_dictionaries(dictionaries), placement.load(model)
        wanted = all_sites(loaded.network, ("resid",)) if tuple(sites) == ("all",) else [Site.parse(s) for s in sites]
        made_from = loaded.fingerprint, str(loaded.network.dtype), [g.hash for g in used], list(map(str, wanted))
        with resumable(out, *made_from, asdict(config), [d.hash for d in found_dictionaries]):
            found = study(
                loaded,
                *groups,
                wanted,
                config,
                neutral=between,
                dictionaries=found_dictionaries,
                texts=sets.plain_text("train"),
            )
            projections = _projections(found, project, project_sites, loaded, wanted) if project else []
            erased = None
            if erase:
                projections, erased = _erasers(loaded, groups, project_sites, wanted, config)
            provenance = store.provenance(config.seed, model=loaded.fingerprint, origin=loaded.origin)
            record = _written(found, projections, erased, prompt_digests(*used), provenance, out)
    page = unsleep.report(out)
    lines = [*table(found), "", f"Saved in {out}; page: {page}", *_saved(projections, erased, found.best, out)]
    say(record, json, "\n".join(lines))
    return 0


def _written(
    found: Study,
    projections: Sequence[Projection],
    erased: Removed | None,
    chosen_on: frozenset[str],
    provenance: dict[str, Any],
    out: Path,
) -> DirectionsRecord:
    """Write directions, record and edit; returns the record."""
    with store.new_folder(out, replace="directions.json") as scratch:
        entries = write_directions([f.direction for f in found.found], scratch)
        record = found.record(provenance, entries, erased)
        records.save(record, scratch / "directions.json")
        if projections:
            save_edit(projections, scratch / EDIT, chosen_on=chosen_on, provenance=provenance)
    return record


def _check(project: int, erase: bool, names: Sequence[str], out: Path) -> None:
    if project and erase:
        raise BadInput("--project and --erase were both given; expected one of them")
    if names and not (project or erase):
        raise BadInput(f"--project-sites {' '.join(names)} was given without an edit; give --project 1 or --erase too")
    if erase and tuple(names) == EVERYWHERE:
        raise BadInput("--project-sites everywhere was given with --erase; expected it with --project, such as 1")
    store.check_place(out, "directions.json")
    if (out / EDIT).is_dir() and not (project or erase):
        raise BadInput(f"{out / EDIT} is an edit of an earlier run; choose another --out, or remove it first")


def _projections(
    found: Study, rank: int, names: Sequence[str], model: LoadedModel, wanted: Sequence[Site]
) -> list[Projection]:
    if tuple(names) == EVERYWHERE:
        return found.everywhere(rank, everywhere(model.network))
    return found.projections(rank, [Site.parse(s) for s in names] or wanted)


def _erasers(
    model: LoadedModel,
    groups: tuple[PromptSet, PromptSet],
    names: Sequence[str],
    wanted: Sequence[Site],
    config: StudyConfig,
) -> tuple[list[Projection], Removed]:
    """Erasers fitted on most prompts and tested on the rest; only the best Site's where none is named."""
    texts, sites = sets.plain_text("train")[:TEXTS], [Site.parse(s) for s in names] or wanted
    made, removed = tried_erasers(
        model,
        *groups,
        texts,
        sites,
        kept=config.kept,
        pairs=config.pairs or None,
        position=config.where,
        plain=config.plain,
        batch=config.batch,
    )
    return (made if names else [e for e in made if e.site == removed.best]), removed


def _saved(projections: Sequence[Projection], erased: Removed | None, best: Site, out: Path) -> list[str]:
    if not projections:
        return []
    taken = ", ".join(str(p.site) for p in projections[:8]) + (" …" if len(projections) > 8 else "")
    lines = [f"Edit of rank {len(projections[0].basis)} at {taken}: {out / EDIT}"]
    if projections[0].site == Site(0, "embed") and len(projections) > 1:
        lines.append(
            f"It ablates the subspace found at {best} in the whole residual stream; evaluate it with unsleep evaluate"
        )
    if erased is not None:
        lines.append(
            f"KL from the model's own replies on {erased.pairs} suspicious prompts, one direction ablated at "
            f"{erased.best}: {erased.after[erased.best]:.3f} nats per token; {erased.before:.3f} without ablation"
        )
    return lines


def table(found: Study) -> Sequence[str]:
    """A line per method and space: its best Site by detection, and its ablation cost at the overall best Site."""
    rows: dict[tuple[str, str], list[Any]] = {}
    for f in found.found:
        rows.setdefault((f.direction.space, f.direction.method), []).append(f)
    mean = found.costs.get("mean")
    head = f"{'space':<9} {'method':<16} {'site':<9}  AUROC  random  accuracy  carried at      "
    kept = max(f.figures.n for f in found.found)
    lines = [
        f"Scores on {kept:,} held-out tokens",
        head + (f"  cost at {found.best}" if mean else ""),
    ]
    for (space, method), own in rows.items():
        best = max(own, key=lambda f: (f.figures.auroc, f.figures.margin))
        site = best.direction.site
        name = method if space == "residual" else f"features: {method}"
        carried = [(line[name], str(place)) for place, line in found.carried.items() if name in line]
        share = "{:>7.2f} {:<8}".format(*max(carried)) if carried else f"{'–':>7} {'':<8}"
        floor = found.floors[site, best.direction.space].best
        price = f"  {mean.increase[name]:+.4f}" if mean and name in mean.increase else ""
        lines.append(
            f"{space:<9} {method:<16} {site!s:<9}  {best.figures.auroc:.3f}   {floor:.3f}     "
            f"{best.figures.accuracy:.3f}  {share}{price}"
        )
    if not found.beats_chance:
        lines.append(
            "No direction beats the best random one at its Site: see their patching effects and ablation costs"
        )
    if mean:
        random = [v for values in mean.random.values() for v in values]
        lines.append(f"Random directions cost {min(random):+.4f} to {max(random):+.4f} nats per token at {found.best}")
    return lines
