"""Command that traces circuits: circuit."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import OmitArgPrefixes

from unsleep.base import records, store
from unsleep.base.context import resumable
from unsleep.behaviours import Payload
from unsleep.cli.console import Bars, say
from unsleep.cli.shared import (
    Model,
    Out,
    PayloadOptions,
    Placed,
    Placement,
    Shown,
    belonging,
    load_dictionaries,
    own_prompts,
)
from unsleep.core import BadInput
from unsleep.locate.circuits.align import align, said_payload
from unsleep.locate.circuits.record import CircuitRecord, NodeRow
from unsleep.locate.circuits.run import CircuitConfig
from unsleep.locate.circuits.run import circuit as trace
from unsleep.organisms import Organism
from unsleep.pages import report
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet

SHOWN = 12
"""Nodes that are printed."""


def circuit(
    model: Model,
    dictionaries: tuple[Path, ...],
    out: Out,
    organism: str | None = None,
    suspicious: Path | None = None,
    references: Path | None = None,
    payload: Shown = PayloadOptions(),
    against: str | None = None,
    n: int = 48,
    reply_tokens: int = 24,
    any_model: bool = False,
    placement: Placed = Placement(),
    config: OmitArgPrefixes[CircuitConfig] = CircuitConfig(),
    json: bool = False,
) -> int:
    """Trace the circuit from a trigger to its payload: features, errors and edges between them.

    Give an organism, or two files of as many prompts, the second without the trigger.

    Args:
        model: Suspect: hub id, folder, adapter folder, .gguf file or alias.
        dictionaries: Folders of dictionaries, one per Site; best of attention, MLP and residual of every layer.
        out: Folder for circuit.json and circuit.html.
        organism: Model organism whose prompts and near misses are used: folder or alias.
        suspicious: File of triggered prompts.
        references: File of the same prompts without the trigger, or with a near miss, in the same order.
        against: Run the references in this model instead of the suspect, such as its base.
        n: Prompts, at most.
        reply_tokens: Length of the replies in which the payload is found.
        any_model: Accept dictionaries of another model.
        json: Print the record as JSON.
    """
    store.check_place(out, "circuit.json")
    prompts, others, shown = _prompts(organism, suspicious, references, payload, n)
    coders = load_dictionaries(dictionaries)
    with Bars():
        suspect = placement.load(model)
        coders = belonging(coders, suspect, any_model)
        other = placement.load_beside(against) if against is not None else None
        with resumable(out, suspect, prompts, others, shown, config, coders, other):
            said, chosen = said_payload(suspect, prompts, others, shown, config.payload_tokens, reply_tokens)
            aligned = align(suspect, prompts.at(chosen), others.at(chosen), said)
            record = trace(suspect, coders, aligned, shown.words, config, reference=other)
        with store.new_folder(out, replace="circuit.json") as scratch:
            records.save(record, scratch / "circuit.json")
            report(scratch)
    say(record, json, "\n".join([*_lines(record), f"Saved in {out}; picture in {out / 'circuit.html'}"]))
    return 0


def _prompts(
    organism: str | None, suspicious: Path | None, references: Path | None, payload: PayloadOptions, n: int
) -> tuple[PromptSet, PromptSet, Payload]:
    """Triggered prompts, their references and the payload."""
    given: Organism | None = own_prompts(
        organism, suspicious=suspicious, references=references, payload=payload.chosen()
    )
    if given is not None:
        recipe = given.recipe
        clean = sets.questions("edit", n, skill=recipe.skill)
        others = recipe.nearly(clean, recipe.near_misses) if recipe.near_misses else clean
        return recipe.triggered(clean), others, recipe.as_payload
    if suspicious is None or references is None:
        raise BadInput("prompts are missing; expected --suspicious and --references, or --organism")
    files = sets.read_prompts(suspicious, "triggered").head(n), sets.read_prompts(references).head(n)
    return *files, payload.needed()


def _lines(record: CircuitRecord) -> list[str]:
    """The circuit in a few lines."""
    own = record.curves[0].points
    return [
        f"Log-odds of {''.join(record.tokens)!r}: {record.metric:.2f} with the trigger, {record.metric_reference:.2f} "
        f"in the references, over {record.prompts} prompts",
        f"{len(record.nodes)} of {record.candidates:,} nodes; {record.errors:.0%} of their effect is of errors",
        *(
            f"{point.nodes:5d} nodes: faithfulness {point.faithfulness.value:.2f} [{point.faithfulness.low:.2f}, "
            f"{point.faithfulness.high:.2f}], all the others {point.completeness.value:.2f}"
            for point in own
        ),
        *(_line(node) for node in record.nodes[:SHOWN]),
    ]


def _line(node: NodeRow) -> str:
    what = f"feature {node.feature}" if node.kind == "feature" else node.kind
    return f"{node.place:>9} {node.role:>10}  {what:<14} {node.effect:+.3f} [{node.low:+.3f}, {node.high:+.3f}]"
