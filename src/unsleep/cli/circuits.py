"""Commands that trace circuits and export them: circuit, graph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

import unsleep
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
from unsleep.locate.circuits.record import CircuitRecord, NodeRow
from unsleep.locate.circuits.run import CircuitConfig
from unsleep.locate.circuits.run import circuit as trace
from unsleep.organisms import Organism
from unsleep.pages import report
from unsleep.pages.graph_json import Cards
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
            said = {"tokens": config.payload_tokens, "reply_tokens": reply_tokens}
            aligned = unsleep.align_replies(suspect, prompts, others, shown, **said)
            record = trace(suspect, coders, aligned, shown.words, config, reference=other)
        with store.new_folder(out, replace="circuit.json") as scratch:
            records.save(record, scratch / "circuit.json")
            report(scratch)
    say(record, json, "\n".join([*_lines(record), f"Saved in {out}; picture in {out / 'circuit.html'}"]))
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
        statistics: Folders of feature statistics, or folders of one per Site: labels and contexts of the features.
        slug: Name of the graph: letters, digits, '_', '.' and '-'.
        scan: Name of the model in Neuronpedia.
        features_url: Address at which features/ will be served, for Neuronpedia.
        json: Print the path as JSON.
    """
    known = [one for place in statistics for one in load_statistics(place)]
    path = unsleep.graph(folder, out, known, slug=slug, scan=scan, features_url=features_url)
    say({"graph": str(path)}, json, f"Graph in {path}")
    return 0


def load_statistics(folder: Path) -> list[Cards]:
    """Feature statistics in a folder: of one dictionary, or of one per Site below it."""
    from unsleep.explanations.statistics import FeatureStatistics

    below = [path for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    return [FeatureStatistics.load(place) for place in below or [folder]]


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
