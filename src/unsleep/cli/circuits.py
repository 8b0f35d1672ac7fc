"""Commands that trace circuits, make edits of them and export them: circuit, veto, overlap, graph."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

import unsleep
from unsleep.base import records, store
from unsleep.base.context import resumable
from unsleep.behaviours import Payload
from unsleep.cli.console import Bars, hint, say
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
from unsleep.explanations.cards import load_cards
from unsleep.interventions.files import MARK as EDIT
from unsleep.interventions.files import save_edit
from unsleep.judge.evaluate import prompt_digests
from unsleep.locate.circuits.align import align_replies
from unsleep.locate.circuits.config import CircuitConfig
from unsleep.locate.circuits.overlap import shared
from unsleep.locate.circuits.prefixes import align_pairs, answer_difference, read_pairs
from unsleep.locate.circuits.record import CircuitRecord, NodeRow
from unsleep.locate.circuits.run import circuit as trace
from unsleep.locate.circuits.veto import Veto, circuit_edits
from unsleep.locate.features import reply_log_odds
from unsleep.organisms import Organism
from unsleep.pages import report
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet
from unsleep.repairs.bake import named, unbakeable

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
    pairs: Path | None = None,
    case: str | None = None,
    positions: bool = True,
    against: str | None = None,
    n: int = 48,
    reply_tokens: int = 24,
    any_model: bool = False,
    placement: Placed = Placement(),
    config: OmitArgPrefixes[CircuitConfig] = CircuitConfig(),
    json: bool = False,
) -> int:
    """Trace the circuit from a trigger to its payload: features, errors and edges between them.

    Give an organism; or two files of as many prompts, the second without the trigger; or pairs of prefixes, whose
    metric is the difference of two answers' logits.

    Args:
        model: Suspect: hub id, folder, adapter folder, .gguf file or alias.
        dictionaries: Folders of dictionaries, one per Site; best of attention, MLP and residual of every layer.
        out: Folder for circuit.json and circuit.html.
        organism: Model organism whose prompts and near misses are used: folder or alias.
        suspicious: File of triggered prompts.
        references: File of the same prompts without the trigger, or with a near miss, in the same order.
        pairs: File of JSON lines with clean_prefix, patch_prefix, clean_answer and patch_answer.
        case: Take the pairs of this case.
        positions: Keep the positions of pairs apart, which must all be of the same length; otherwise sum over them.
        against: Run the references in this model instead of the suspect, such as its base.
        n: Prompts, at most.
        reply_tokens: Length of the replies in which the payload is found.
        any_model: Accept dictionaries of another model.
        json: Print the record as JSON.
    """
    store.check_place(out, "circuit.json")
    if n < 1:
        raise BadInput(f"--n is {n}; expected at least 1")
    coders = load_dictionaries(dictionaries)
    if pairs is not None and (organism or suspicious or references):
        raise BadInput("--pairs are prompts of their own; expected no --organism, --suspicious or --references")
    given = read_pairs(pairs, case)[:n] if pairs is not None else []
    found = _prompts(organism, suspicious, references, payload, n) if pairs is None else None
    with Bars():
        suspect = placement.load(model)
        coders = belonging(coders, suspect, any_model)
        other = placement.load_beside(against) if against is not None else None
        with resumable(out, suspect, found, [asdict(pair) for pair in given], positions, config, coders, other):
            if found is None:
                aligned = align_pairs(suspect, given, positions=positions)
                words, metric, quantity = "", answer_difference, "difference of the answers' logits"
                digests: frozenset[str] = frozenset()
            else:
                prompts, others, shown = found
                sizes = {"tokens": config.payload_tokens, "reply_tokens": reply_tokens}
                aligned = align_replies(suspect, prompts, others, shown, **sizes)
                words, metric, quantity = shown.words, reply_log_odds, "log-odds of the payload"
                digests = prompt_digests(prompts, others)
            record = trace(suspect, coders, aligned, words, config, reference=other, metric=metric, quantity=quantity)
            record = replace(record, chosen_on=tuple(sorted(digests)))
        with store.new_folder(out, replace="circuit.json") as scratch:
            records.save(record, scratch / "circuit.json")
            report(scratch)
    say(record, json, "\n".join([*_lines(record), f"Saved in {out}; picture in {out / 'circuit.html'}"]))
    return 0


def veto(
    circuit: Annotated[Positional[Path], arg(metavar="CIRCUIT")],
    dictionaries: tuple[Path, ...],
    out: Out,
    config: OmitArgPrefixes[Veto] = Veto(),
    json: bool = False,
) -> int:
    """Turn a circuit into an edit: ablate its features, but for those that are spared.

    Args:
        circuit: Folder made by `unsleep circuit`.
        dictionaries: Folders of the dictionaries that it was found with.
        out: Folder for the edit.
        json: Print the edit as JSON.
    """
    store.check_place(out, EDIT)
    record = records.load(CircuitRecord, circuit / "circuit.json")
    edits = circuit_edits(record, load_dictionaries(dictionaries), config)
    made = store.provenance(0, model=record.model.fingerprint, config=asdict(config))
    save_edit(edits, out, chosen_on=record.chosen_on, provenance=made)
    removed = {str(edit.site): list(edit.removed) for edit in edits}
    if sites := unbakeable(edits):
        hint(f"features at {named(sites)} cannot be baked; --points resid leaves them out")
    lines = [f"{site}: {', '.join(map(str, ids))} ablated" for site, ids in removed.items()]
    say({"removed": removed}, json, "\n".join([*lines, f"Saved in {out}"]))
    return 0


def overlap(
    one: Annotated[Positional[Path], arg(metavar="CIRCUIT")],
    other: Annotated[Positional[Path], arg(metavar="OTHER")],
    json: bool = False,
) -> int:
    """Compare two circuits, such as of the same prompts rephrased: the nodes that both have.

    Args:
        one: Folder made by `unsleep circuit`.
        other: Another, of the same model and dictionaries.
        json: Print the overlap as JSON.
    """
    found = shared(*(records.load(CircuitRecord, folder / "circuit.json") for folder in (one, other)))
    rank = "" if found.spearman is None else f"; effects correlate with {found.spearman:.2f} in rank"
    words = f"{len(found.core)} nodes are in both: Jaccard {found.jaccard:.2f}, of features {found.features:.2f}{rank}"
    say(found, json, "\n".join([words, *found.core[:SHOWN]]))
    return 0


def graph(
    folder: Annotated[Positional[Path], arg(metavar="DIR")],
    out: Out,
    statistics: tuple[Path, ...] = (),
    slug: str | None = None,
    scan: str | None = None,
    features_url: str | None = None,
    json: bool = False,
) -> int:
    """Export a circuit as an attribution graph for circuit-tracer's viewer or Neuronpedia.

    Args:
        folder: Folder with circuit.json.
        out: Folder for graph-metadata.json, the graph and features/.
        statistics: Folders made by `unsleep explain`: labels and contexts of the features.
        slug: Name of the graph: letters, digits, '_', '.' and '-'.
        scan: Name of the model in Neuronpedia.
        features_url: Address at which features/ will be served, for Neuronpedia.
        json: Print the path as JSON.
    """
    known = [one for place in statistics for one in load_cards(place)]
    path = unsleep.graph(folder, out, known, slug=slug, scan=scan, features_url=features_url)
    say({"graph": str(path)}, json, f"Graph in {path}")
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
        f"{record.quantity[0].upper()}{record.quantity[1:]} ({' '.join(map(repr, record.tokens))}): "
        f"{record.metric:.2f}, {record.metric_reference:.2f} in the references; nodes are found on {record.prompts} "
        f"prompts, faithfulness is measured on {f'{record.held_out} other' if record.held_out else 'some of them'}",
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
