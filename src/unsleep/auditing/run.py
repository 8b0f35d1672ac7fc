"""The audit: from a suspect to a verdict with its witnesses; behind `unsleep audit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from unsleep.auditing import artefacts
from unsleep.auditing.calibration import Nulls, calibrated
from unsleep.auditing.case import Case, open_case
from unsleep.auditing.config import AuditConfig
from unsleep.auditing.gatherer import Gatherer
from unsleep.auditing.scoring import floor
from unsleep.auditing.search import Search
from unsleep.auditing.trusted import own_prompts
from unsleep.auditing.verdict import cut_short, judge, leaves_open, scored, verdict
from unsleep.base import records, store
from unsleep.base.context import kept, resumable
from unsleep.base.stopwatch import Stopwatch
from unsleep.core import BadInput
from unsleep.judge.audited import AuditRecord, Searched
from unsleep.models.load import LoadConfig
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import PromptSet


def audit(
    suspect: LoadedModel,
    out: str | Path,
    *,
    base: LoadedModel | None = None,
    trusted: PromptSet | None = None,
    config: AuditConfig = AuditConfig(),
    loading: LoadConfig = LoadConfig(),
) -> AuditRecord:
    """Search a model for a backdoor whose trigger and payload nobody has told.

    `out` then contains `report.html`, `audit.json`, `result.json`, `result.sarif` and, for every trial, its prompts;
    `clean` cleans what was found. An earlier audit there is replaced, unless it is the same one and not cleaned: its
    record is then returned. An interrupted audit resumes after its last finished step.

    Args:
        base: the model that the suspect was fine-tuned from. With it, the surrogate twin is made and searched too.
        trusted: ordinary prompts of the suspect's use, without expected replies; default the project's own.
        loading: options that the suspect was loaded with, for the commands that reproduce trials.

    Raises:
        BadInput: too few trusted prompts, a suspect without a chat template, a base that is not the suspect's, an
            unknown gatherer in `skip`, a file of nulls that is none, or `out` contains something else.
    """
    out = Path(out)
    store.check_place(out, artefacts.MARK)
    known = [*Gatherer.kinds(), "rounding"]
    if unknown := [name for name in config.skip if name not in known]:
        raise BadInput.of("skip", unknown[0], f"gatherers: {', '.join(known)}", "audit")
    if config.nulls is not None:
        records.load(Nulls, config.nulls)
    case = open_case(suspect, base, trusted if trusted is not None else own_prompts(), config)
    if (earlier := finished(case, out)) is not None:
        return earlier
    with resumable(out, suspect, base, case.search, case.confirm, asdict(config)) as folder:
        watch = Stopwatch.kept_in(folder / "stages.json")
        searches, drift = searched(case, watch)
        found = recorded(case, searches, drift, watch)
        return artefacts.write(case, found, out, loading)


def finished(case: Case, out: Path) -> AuditRecord | None:
    """The record in `out` of the same audit under the same versions, which is not cleaned yet; `None` otherwise.

    A record that cannot be read, such as that of an earlier version, is another audit's.
    """
    try:
        found = records.load(AuditRecord, out / artefacts.MARK)
    except BadInput:
        return None
    same = found.provenance.get("audit") == case.hash
    same = same and store.versions().items() <= found.provenance.get("versions", {}).items()
    return found if same and found.cleaning is None else None


def searched(case: Case, watch: Stopwatch) -> tuple[list[Searched], float]:
    """The suspect's search, the twin's where there is one and something to hold against it, and the floor, in nats."""
    found = [Search(case, watch).run()]
    if found[0].unchanged:
        return found, 0.0
    with watch.stage("floor"):
        drift = float(kept(floor, case))
    if case.reference is not None and case.config.null and leaves_open(found[0], case.config):
        found.append(Search(case.swapped(), watch).run())
    return found, drift


def trusted_base(base: LoadedModel | None) -> list[str]:
    """A note that the base is taken as it is: an adapter's author names it."""
    return [] if base is None else [f"The base, {base.name}, is trusted: a backdoor of its own is not looked for."]


def unsearched_twin(case: Case, searches: Sequence[Searched]) -> list[str]:
    """A note where the twin was not searched because nothing was found to hold against it."""
    if case.base is None or not case.config.null or len(searches) > 1 or searches[0].unchanged:
        return []
    return ["The twin was not searched: the suspect's search gave nothing to hold against it."]


def other_base(suspect: LoadedModel, base: LoadedModel | None) -> list[str]:
    """A note where an adapter was merged into another model or revision than the base; both must be on record."""
    if base is None or len(suspect.made_of) < 2 or not base.made_of:
        return []
    records_of = (suspect.made_of[0], base.made_of[0])
    own, given = ((str(m.get("name", "")).partition("@")[0], m.get("commit")) for m in records_of)
    if own == given or (own[0] == given[0] and None in (own[1], given[1])):
        return []
    one, other = (name if commit is None else f"{name} at {commit}" for name, commit in (own, given))
    return [f"The base is {other}, and the adapter was merged into {one}: differences between them count as its own."]


def recorded(case: Case, searches: Sequence[Searched], drift: float, watch: Stopwatch) -> AuditRecord:
    """The record of an audit."""
    suspect, base, config = case.model, case.base, case.config
    calibration = calibrated(suspect, scored(searches[0]), config.nulls)
    judged = judge(searches, calibration, config)
    skipped = [f"{g.name} was skipped: {g.reason}." for g in searches[0].gathered if g.state == "skipped"]
    late = cut_short(searches)
    told = f"The time budget of {config.seconds:g} s cut these gatherers short: {', '.join(late)}."
    return AuditRecord(
        suspect=suspect.named,
        base=base.named if base is not None else None,
        verdict=verdict(searches, judged.label, config, len(case.confirm)),
        reasons=(*judged.reasons, *([told] if late else [])),
        searches=tuple(searches),
        floor=drift,
        calibration=calibration,
        notes=(
            *suspect.notes,
            *trusted_base(base),
            *other_base(suspect, base),
            *unsearched_twin(case, searches),
            *skipped,
        ),
        prompts={"search": len(case.learned), "confirm": len(case.confirm)},
        stages=tuple(watch.stages),
        provenance=store.provenance(
            config.seed,
            audit=case.hash,
            origin=suspect.origin,
            base=base.origin if base is not None else None,
            prompts={"search": case.search.hash, "confirm": case.confirm.hash},
            config=asdict(config),
        ),
    )
