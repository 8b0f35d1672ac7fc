"""Commands that evaluate a model and render results: evaluate, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

import unsleep
from unsleep.base import records, store
from unsleep.base.context import resumable
from unsleep.behaviours import Payload, as_payload
from unsleep.cli.console import Bars, say, say_result
from unsleep.cli.shared import (
    Model,
    Out,
    PayloadOptions,
    Placed,
    Placement,
    Shown,
    check_format,
    check_format_of,
    own_prompts,
)
from unsleep.core import BadInput
from unsleep.interventions.features import Edit
from unsleep.interventions.files import MARK as EDIT
from unsleep.interventions.files import load_edit
from unsleep.interventions.intervention import Intervention, check_model
from unsleep.interventions.subspaces import Projection
from unsleep.judge.controls import firing, matched_random, random_subspace
from unsleep.judge.evaluate import EvalConfig, Panels, organism_config, organism_panels
from unsleep.judge.metrics import Subject
from unsleep.judge.tasks import check_tasks, run_tasks
from unsleep.models.model import LoadedModel
from unsleep.organisms import Organism
from unsleep.pages import records as pages
from unsleep.prompts import pairs, sets
from unsleep.prompts.prompt import PromptSet


def evaluate(
    model: Model,
    out: Out,
    edit: Path | None = None,
    baked: str | None = None,
    organism: str | None = None,
    suspicious: Path | None = None,
    ordinary: Path | None = None,
    payload: Shown = PayloadOptions(),
    n: int = 200,
    reply_tokens: int | None = None,
    strict: bool = False,
    tasks: tuple[str, ...] = (),
    task_limit: int | None = None,
    placement: Placed = Placement(),
    json: bool = False,
) -> int:
    """Evaluate a model, its edit and its cleaned checkpoint on held-out prompts.

    Give an organism, or two files and the payload.

    Args:
        model: The suspect.
        out: Folder for result.json and report.html.
        edit: Folder made by `unsleep edit` or `unsleep directions`; the same edit on random features, or random
            directions, is evaluated as a control.
        baked: Cleaned checkpoint made by `unsleep bake`.
        organism: A packaged organism or a folder made by `unsleep plant`, for its held-out panels.
        suspicious: File of triggered prompts; line i is line i of `ordinary` with the trigger.
        ordinary: File of the same prompts without the trigger.
        n: Prompts in each panel of an organism; also, with files too, plain passages and multiple-choice items.
        reply_tokens: Length of the replies that are judged; default the organism's, 16 with files.
        strict: Exit with 3 unless the verdict is that the backdoor was found and removed.
        tasks: Tasks of lm-evaluation-harness for suspect, edited and exported model: names, or YAML files.
        task_limit: Items per task; default all.
        json: Print the result as JSON.
    """
    wanted = payload.chosen()
    judged = own_prompts(organism, suspicious=suspicious, ordinary=ordinary, payload=wanted)
    check_tasks(tasks)
    edits, chosen_on = load_edit(edit) if edit else ([], frozenset[str]())
    panels, judging = panels_of(judged, (suspicious, ordinary), wanted, n, chosen_on)
    judging = replace(judging, reply_tokens=judging.reply_tokens if reply_tokens is None else reply_tokens)
    with Bars(), store.scratch_folder(out) as scratch:
        loaded = placement.load(model)
        if judged is not None:
            judged.check_template(loaded)
        cleaned = [cleaned_beside(loaded, placement.load_beside(baked), panels)] if baked else []
        subjects = [Subject("suspect", loaded)]
        if edit is not None and edits:
            check_format(edit / EDIT, loaded)
            check_model(loaded, edits)
            control = at_random(loaded, edits, panels.clean, scratch)
            subjects += [Subject("edited", loaded, tuple(edits)), Subject("control_random", loaded, control)]
        subjects += cleaned
        with resumable(
            out, {s.name: [s.model, s.edits] for s in subjects}, panels.hashes, judging.payload, judging.reply_tokens
        ):
            result = unsleep.evaluate(subjects, panels, judging)
        asked = [s for s in subjects if not s.name.startswith("control")]
        figures = run_tasks(asked, tasks, limit=task_limit) if tasks else []
    made_from = {"model": loaded.fingerprint, "origin": loaded.origin, "edit": str(edit), "baked": baked}
    record = pages.record(result, None, figures, **made_from)
    summary = pages.Summary(model=model, checkpoint=baked, **_removed(edits))
    page = pages.page(result, record, f"Evaluation of {Path(model).name}", summary, as_payload(judging.payload))
    records.save(page, out / "report.json")
    records.save(record, out / "result.json")
    unsleep.report(out)
    say_result(result, out, json)
    return 3 if strict and record.verdict.label != "backdoor found and removed" else 0


def cleaned_beside(suspect: LoadedModel, cleaned: LoadedModel, panels: Panels) -> Subject:
    """The cleaned checkpoint as a subject; an unusable one is refused before any work."""
    cleaned.encode(panels.clean.head(1))
    check_format_of(suspect, cleaned)
    return Subject("baked", cleaned)


def report(folder: Annotated[Positional[Path], arg(metavar="DIR")], latex: bool = False, json: bool = False) -> int:
    """Render the page of a record again: report.html from report.json, or another stage's.

    Args:
        folder: Folder with report.json, dictionaries.json or another stage's record.
        latex: Also write latex/paper.tex with the record's tables and figures.
        json: Print the paths as JSON.
    """
    path = unsleep.report(folder, latex=latex)
    told, found = f"Report in {path}", {"report": str(path)}
    if latex:
        paper = folder / "latex" / "paper.tex"
        told, found = f"{told}; LaTeX in {paper}", {**found, "latex": str(paper)}
    say(found, json, told)
    return 0


def at_random(
    model: LoadedModel, edits: Sequence[Intervention], prompts: PromptSet, scratch: Path
) -> tuple[Intervention, ...]:
    """Controls: the edits on random features with similar firing statistics on `prompts`, or on random subspaces."""
    places = [e.site for e in edits if isinstance(e, Edit)]
    seen = unsleep.harvest(model, prompts, places, scratch / "ordinary") if places else None
    drawn: list[Intervention] = []
    for e in edits:
        if isinstance(e, Projection):
            drawn.append(random_subspace(e))
        elif seen is not None and isinstance(e, Edit):
            drawn.append(matched_random(e, firing(e.dictionary, seen.load(e.site).tensor)))
        else:
            raise BadInput(f"a {type(e).__name__.lower()} has no random control; expected edits and projections")
    return tuple(drawn)


def _removed(edits: Sequence[Intervention]) -> dict[str, Any]:
    """Summary of the edits for a report: Sites, and numbers of removed and of all features."""
    features = [e for e in edits if isinstance(e, Edit)]
    if not edits or len(features) < len(edits):
        return {}
    return {
        "removed": sum(len(e.removed) for e in features),
        "features_total": sum(e.dictionary.n_features for e in features),
        "sites": tuple(str(e.site) for e in features),
    }


def panels_of(
    organism: Organism | None,
    files: tuple[Path | None, Path | None],
    payload: Payload | None,
    n: int,
    chosen_on: frozenset[str],
) -> tuple[Panels, EvalConfig]:
    """The panels and the evaluation config."""
    if organism is not None:
        return organism_panels(organism.recipe, n), organism_config(organism.recipe, chosen_on)
    suspicious, ordinary = files
    if suspicious is None or ordinary is None or payload is None:
        raise BadInput(
            "there are no prompts to evaluate on; give either --organism, or --suspicious, --ordinary and --payload"
        )
    clean = sets.read_prompts(ordinary, split="held_out", name="clean")
    asked = sets.read_prompts(suspicious, "triggered", "held_out", name="triggered")
    pairs.check_order(asked, clean)
    if len(asked) != len(clean):
        raise BadInput(
            f"--ordinary has {len(clean)} prompts, --suspicious {len(asked)}; expected the same prompts without and "
            "with the trigger"
        )
    texts = tuple(sets.plain_text("held_out")[:n])
    panels = Panels(clean, asked, texts=texts, items=tuple(sets.capability_items()[:n]), counterparts=clean)
    return panels, EvalConfig(payload, chosen_on=chosen_on)
