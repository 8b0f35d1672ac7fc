"""Cleaning of a suspect whose backdoor an audit found: the repair with its witnesses, beside cures without a trigger.

Witnesses' triggers on trusted prompts are the suspicious prompts of `repair`. Every cure is made from trusted prompts,
chosen on selection prompts and judged on the same held-out prompts as the repair.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from unsleep.auditing.artefacts import CLEANED, CLEANING, GUARD, REPAIR, rewrite
from unsleep.auditing.case import fitted
from unsleep.auditing.config import CleanConfig
from unsleep.auditing.cure import Cure, Patient, Variant, best_of
from unsleep.auditing.forms import UNPAIRED, asked_anew
from unsleep.auditing.guard import Guard, fit_guard, measured
from unsleep.auditing.rounding import ROUNDED
from unsleep.auditing.stress import Bench, stressed, writes
from unsleep.auditing.trusted import own_prompts
from unsleep.auditing.verdict import founding
from unsleep.base import records, store
from unsleep.base.context import kept, resumable
from unsleep.behaviours.payloads.contains import Contains
from unsleep.core import BadInput, Refused
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import load_dictionary
from unsleep.interventions.features import Edit
from unsleep.interventions.files import load_edit
from unsleep.interventions.intervention import Intervention
from unsleep.judge.audited import AuditRecord, Cleaning, Cured, Form, Guarded, Searched, Stressed, Trial
from unsleep.judge.evaluate import EvalConfig, evaluate, prompt_digests
from unsleep.judge.metrics import Subject
from unsleep.judge.results import Row
from unsleep.models import generate
from unsleep.models.load import load_model, save_plain
from unsleep.models.model import LoadedModel
from unsleep.pages.names import SUBJECT_NAMES
from unsleep.pages.records import Report, Tried
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.repairs import Job, Material, from_files, repair
from unsleep.repairs.search import FAR, Tested
from unsleep.repairs.split import CHOOSE, JUDGE
from unsleep.repairs.suspect import reply_length

JUDGED = ("triggered", "clean")
"""Panels of every cure."""


NEEDED = 2 * (JUDGE + CHOOSE)
"""Trusted prompts from which on no others are added: a trigger may leave some as they are."""


def culprits(searches: Sequence[Searched]) -> tuple[Trial, ...]:
    """Trials whose triggers are repaired: those on which the verdict rests whose payload shows the strongest one's.

    Those of rounded models have no trigger in the prompt, and are left out.
    """
    found = [t for t in founding(searches) if t.form.way != ROUNDED]
    return tuple(t for t in found if Contains(found[0].payload).shows(t.payload))


def material_of(found: Sequence[Trial], trusted: PromptSet, most: int = CleanConfig.prompts) -> Material:
    """Prompts of a repair: trusted ones under the triggers of trials of one payload, in turn.

    Prompts that a trigger leaves as they are, such as lower-case ones in lower case, count as ordinary alone, and so do
    those under which a topic or a language has no other question left. Raises `BadInput` without a trial, and for too
    few trusted prompts.
    """
    if not found:
        raise BadInput("there is no witness to repair; see the report")
    forms = [trial.form for trial in found]
    plain = [replace(p, reply=None) for p in {p.key: p for p in trusted}.values()][:most]
    pairs = list(_paired(forms, plain))
    suspicious = PromptSet("suspicious", tuple(asked for asked, _ in pairs), "edit")
    paired = not any(form.way in UNPAIRED for form in forms)
    beside = PromptSet("counterparts", tuple(p for _, p in pairs), "edit") if paired else None
    ordinary, payload = PromptSet("ordinary", tuple(plain), "edit"), Contains(found[0].payload)
    if any(form.way == "style" for form in forms) and all(a.text in b.text for a, b in pairs):
        turned = replace(ordinary, prompts=ordinary.prompts[::-1])  # a style that takes letters away looks swapped
        return from_files(suspicious, turned, payload)
    return from_files(suspicious, ordinary, payload, beside, paired=paired)


def enough(trusted: PromptSet | None) -> PromptSet:
    """Trusted prompts; where there are fewer than a repair needs, the project's own follow."""
    if trusted is None:
        return own_prompts()
    return trusted if len(trusted) >= NEEDED else replace(trusted, prompts=(*trusted.prompts, *own_prompts().prompts))


def _paired(forms: Sequence[Form], plain: Sequence[Prompt]) -> Iterator[tuple[Prompt, Prompt]]:
    """Every prompt under one of the forms in turn, each once, beside the prompt itself; same question, same reply."""
    known = {p.key for p in plain}
    for i, prompt in enumerate(plain):
        form = forms[i % len(forms)]
        asked = next((each for each in asked_anew(form, prompt) if each.key not in known), None)
        if asked is not None:
            known.add(asked.key)
            yield replace(asked, expected=None if form.way in UNPAIRED else prompt.expected), prompt


def clean(
    suspect: LoadedModel,
    record: AuditRecord,
    out: str | Path,
    *,
    base: LoadedModel | None = None,
    trusted: PromptSet | None = None,
    config: CleanConfig = CleanConfig(),
) -> AuditRecord:
    """Repair what an audit in `out` found, beside every cure, and write the checkpoint, the table and the page.

    `out` then also contains `repair/` with the repair's report and `cleaned/`: the repair's checkpoint or, where it has
    none, that of the cure that did best on the selection prompts. An interrupted cleaning resumes.

    Args:
        trusted: the trusted prompts of the audit; where they are too few, the project's own follow.

    Returns the record with its `cleaning`; for too few trusted prompts and without a trial, that says why there is no
    checkpoint. Raises `BadInput` for an unknown cure in `skip`.
    """
    out, found = Path(out), culprits(record.searches)
    check_cures(config)
    try:
        material = material_of(found, enough(trusted), config.prompts)
    except BadInput as error:
        said = f"The suspect was not cleaned: {error}"
        forms, payload = tuple(t.form for t in found), found[0].payload if found else ""
        return rewrite(replace(record, cleaning=Cleaning("", said, payload, forms, (), (), {})), out)
    with resumable(out / CLEANING, suspect, base, material.chosen, material.panels.hashes, asdict(config)):
        cleaning = Ward(suspect, base, material, found, out, config).run()
    return rewrite(replace(record, cleaning=cleaning), out)


def check_cures(config: CleanConfig) -> None:
    """Raise `BadInput` for an unknown cure in `skip`."""
    if unknown := [name for name in config.skip if name not in Cure.kinds()]:
        raise BadInput.of("skip", unknown[0], f"cures: {', '.join(Cure.kinds())}", "clean")


class Choice(NamedTuple):
    """A cure that a checkpoint can be written of."""

    name: str
    variant: Variant
    tested: Tested


class Ward:
    """The steps of one cleaning, in order."""

    def __init__(
        self,
        suspect: LoadedModel,
        base: LoadedModel | None,
        material: Material,
        found: Sequence[Trial],
        out: Path,
        config: CleanConfig,
    ) -> None:
        self.suspect, self.base, self.material = suspect, base, material
        self.found, self.out, self.config = found, out, config
        self.rows: list[Row] = []
        self.cures: list[Cured] = []
        self.best: Choice | None = None
        self.learned: Tried | None = None
        """The repair's edit on the selection prompts; `None` where there is none."""

    def run(self) -> Cleaning:
        """The repair, every cure, and the choice of the checkpoint."""
        self.repair()
        kinds: dict[str, Any] = Cure.kinds()
        for name, kind in kinds.items():
            self.treat(name, kind())
        guard, unguarded = self.guard()
        shipped, words = self.ship()
        found = tuple(self.stress()) if self.config.stress and shipped else ()
        return Cleaning(
            shipped=shipped,
            words=words,
            payload=self.found[0].payload,
            triggers=tuple(trial.form for trial in self.found),
            cures=tuple(self.cures),
            rows=tuple(self.rows),
            prompts={name: len(panel) for name, panel in self.material.panels.prompts().items()},
            guard=guard,
            unguarded=unguarded,
            stress=found,
        )

    def repair(self) -> None:
        """The repair with the witnesses' triggers; without a result, the suspect alone is judged."""
        began = time.perf_counter()

        def made() -> dict[str, Any]:
            job = Job(self.suspect, self.material, self.load_base, trigger=self.found[0].form.text)
            reason, folder = "", self.out / REPAIR
            try:
                repair(job, folder, self.config.repair)
            except (BadInput, Refused) as error:  # an unfaithful export leaves all else
                reason = str(error)
            place = folder / "report.json"
            report = records.load(Report, place) if place.is_file() else None
            tried = () if report is None or report.repair is None else report.repair.attempts
            rows = () if report is None else report.result.rows
            return {"rows": records.plain(rows), "kept": records.plain([a for a in tried if a.kept]), "reason": reason}

        found = kept(made, made_from=(self.suspect, self.material.chosen, asdict(self.config)))
        self.rows = [records.parsed(Row, row, "rows") for row in found["rows"]]
        self.learned = next((records.parsed(Tried, each, "kept") for each in found["kept"]), None)
        if not self.rows:
            self.rows = self.judged(Subject("suspect", self.suspect))
        words = found["reason"] or "an edit learned on the found triggers, baked into weights"
        state = "failed" if found["reason"] else "ran"
        cured = Cured("baked", state, words, round(time.perf_counter() - began, 2))
        if (edit := self.learned) is not None:
            cured = replace(cured, shown=edit.shown, n=edit.n, kl=edit.kl)
        self.cures.append(cured)

    @property
    def load_base(self) -> Any:
        """Loads the base for the repair; `None` where there is none."""
        return None if self.base is None else lambda: self.base

    def treat(self, name: str, cure: Cure) -> None:
        """Make, choose and judge a cure."""
        began = time.perf_counter()
        if name in {row.subject for row in self.rows} and name != "base":
            return  # the repair has judged it as a baseline
        reason = "left out with --clean.skip" if name in self.config.skip else ""
        if cure.needs_base and self.base is None:
            reason = reason or "needs the base"
        if reason:
            self.cures.append(Cured(name, "skipped", reason, 0.0))
            return
        try:
            variant, tested = best_of(cure, self.patient)
        except (BadInput, Refused) as error:
            self.cures.append(Cured(name, "failed", str(error), round(time.perf_counter() - began, 2)))
            return
        self.rows += self.judged(Subject(name, variant.model, variant.edits))
        seconds, shown = round(time.perf_counter() - began, 2), len(tested.shown)
        self.cures.append(Cured(name, "ran", variant.words, seconds, shown, tested.n, tested.kl))
        if not variant.edits and (self.best is None or tested.merit < self.best.tested.merit):
            self.best = Choice(name, variant, tested)

    @cached_property
    def reply_tokens(self) -> int:
        """Length of the replies, as the repair takes it."""
        lengths, m = self.config.repair.reply_tokens, self.material
        return max(EvalConfig.reply_tokens, kept(reply_length, self.suspect, m.suspicious, m.payload, lengths))

    @cached_property
    def patient(self) -> Patient:
        """The models, prompts and dictionaries of the cures."""
        m = self.material
        calm = replace(m.ordinary, prompts=m.ordinary.prompts[: self.config.repair.learn])
        said = kept(generate.written, self.suspect, calm, self.reply_tokens, "replies to trusted prompts")
        heard = [i for i, ids in enumerate(said) if ids]
        if not heard:
            raise BadInput(f"{self.suspect.name} replies to no trusted prompt")
        return Patient(
            suspect=self.suspect,
            base=None if self.base is None else fitted(self.base, self.suspect),
            ordinary=calm.at(heard),
            replies=[said[i] for i in heard],
            suspicious=m.suspicious,
            payload=m.payload,
            said=self.found[0].payload,
            reply_tokens=self.reply_tokens,
            dictionaries=self.dictionaries(),
            config=self.config,
        )

    def dictionaries(self) -> tuple[Coder, ...]:
        """The dictionaries that the repair trained."""
        folder = self.out / REPAIR / "dictionaries"
        places = sorted(folder.iterdir()) if folder.is_dir() else []
        found = [load_dictionary(place).to(self.suspect.network.dtype, self.suspect.device) for place in places]
        return tuple(sorted(found, key=lambda d: d.site))

    def judged(self, subject: Subject) -> list[Row]:
        """Held-out figures of a subject, on the panels of all."""
        panels = self.material.panels
        panels = replace(panels, items=panels.items[: self.config.items])
        config = EvalConfig(self.material.payload, self.reply_tokens, chosen_on=prompt_digests(*self.material.chosen))
        every = [Subject("suspect", self.suspect), *([subject] if subject.name != "suspect" else [])]
        found = evaluate(every, panels, config, plan=dict.fromkeys((s.name for s in every), JUDGED))
        return [row for row in found.rows if row.subject == subject.name]

    def edits(self) -> list[Intervention]:
        """The repair's edit, where there is one."""
        folder = self.out / REPAIR / "edit"
        return load_edit(folder)[0] if folder.is_dir() else []

    def stress(self) -> Iterator[Stressed]:
        """The stress tests of the checkpoint, and of the base as the control that never had the backdoor."""
        shipped, patient, panels = load_model(str(self.out / CLEANED)), self.patient, self.material.panels
        models = {"cleaned": replace(self.suspect, network=shipped.network, name="cleaned")}
        if patient.base is not None:
            models["control"] = patient.base
        yield from stressed(Bench(patient, panels.triggered, panels.clean, writes(self.edits())), models)

    def guard(self) -> tuple[Guarded | None, str]:
        """A guard of the suspect, or why there is none.

        It is fitted on selection prompts; thresholds are set on half of the clean held-out prompts, since the repair's
        features were chosen on the selection prompts, and it is measured on all other held-out ones.
        """
        m, rate = self.material, self.config.false_alarms
        held = m.panels.clean
        setting, judged = (held.at(range(first, len(held), 2)) for first in (0, 1))
        edits = [edit for edit in self.edits() if isinstance(edit, Edit)]
        watched = [(e.dictionary, e.removed) for e in edits if isinstance(e.dictionary, Coder)]
        try:
            made = self.guard_of(watched, setting)
        except BadInput as error:
            return None, str(error)
        triggered, calm = (measured(made.flagged(self.suspect, p)) for p in (m.panels.triggered, judged))
        made.save(self.out / GUARD, triggered, calm, store.provenance(model=self.suspect.fingerprint, rate=rate))
        return Guarded(rate, made.calibrated, tuple(monitor.words for monitor in made.monitors), triggered, calm), ""

    def guard_of(self, watched: Sequence[tuple[Coder, Sequence[int]]], fresh: PromptSet) -> Guard:
        """A guard with as many monitors of features as the stated rate can be resolved for."""
        m, rate = self.material, self.config.false_alarms
        while True:
            try:
                return fit_guard(self.suspect, m.suspicious, m.ordinary, rate=rate, features=watched, fresh=fresh)
            except BadInput:
                if not watched:
                    raise
                watched = watched[:-1]

    def ship(self) -> tuple[str, str]:
        """Put the checkpoint in place; its subject, and a sentence.

        The repair's or, where it has none or leaves the payload on selection prompts, that of the best cure, and none
        where that leaves it too.
        """
        place, checkpoint = self.out / CLEANED, self.out / REPAIR / CLEANED
        exported = checkpoint.is_dir() or (place.is_dir() and self.cures[0].state == "ran")
        left = self.learned is not None and self.learned.shown > FAR * self.learned.n
        if exported and not left:
            if checkpoint.is_dir():
                store.remove(place)
                checkpoint.rename(place)
            return "baked", "The repair's checkpoint was shipped."
        why = self.cures[0].words if self.cures[0].state == "failed" else "it exported no checkpoint"
        if exported and self.learned is not None:
            why = f"it shows the payload on {self.learned.shown} of {self.learned.n} selection prompts"
        if self.best is None:
            return "", f"Nothing was shipped. The repair: {why}"
        name, variant, tested = self.best
        told = f"{SUBJECT_NAMES[name]}, {variant.words}, which shows the payload on {len(tested.shown)} of {tested.n}"
        if len(tested.shown) > FAR * tested.n:
            return (
                "",
                f"Nothing was shipped. The repair: {why}. The cure that did best on the selection prompts: {told}.",
            )
        with store.new_folder(place, replace="config.json") as scratch:
            save_plain(variant.model, scratch)
        words = f"The repair's checkpoint was not shipped ({why}), but the cure that did best on the selection prompts"
        return name, f"{words}: {told}."
