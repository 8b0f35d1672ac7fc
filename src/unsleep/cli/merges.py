"""Command that merges two models: merge."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

import unsleep
from unsleep.cli.console import Bars, hint, say
from unsleep.cli.shared import Out
from unsleep.mixing.merge_config import MergeConfig
from unsleep.mixing.merge_record import shares


def merge(
    first: Annotated[Positional[str], arg(metavar="A")],
    second: Annotated[Positional[str], arg(metavar="B")],
    out: Out,
    config: OmitArgPrefixes[MergeConfig] = MergeConfig(),
    json: bool = False,
) -> int:
    """Merge two models into a checkpoint that loads without unsleep: a point between them, or beyond one.

    Args:
        first: First model: hub id, folder, adapter folder or alias; tokenizer and settings of the merge are its own.
        second: Second model, of the same architecture and vocabulary.
        out: Folder for the checkpoint, or for an adapter where both models are one base with and without LoRAs.
        json: Print the record as JSON.
    """
    with Bars():
        record = unsleep.merge(first, second, out, config)
    for note in record.notes:
        hint(note)
    say(record, json, "\n".join([f"{record.formula}, α = {record.alpha:g}", *shares(record), f"Saved in {out}"]))
    return 0
