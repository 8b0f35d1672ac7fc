"""Writes a baked checkpoint that nothing has judged yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unsleep.interventions.features import Edit
from unsleep.interventions.intervention import Intervention
from unsleep.interventions.subspaces import Projection
from unsleep.models.model import LoadedModel
from unsleep.pages.card import model_card
from unsleep.repairs.bake import Baked, BakedRecord, save_baked


def export(
    baked: Baked, model: LoadedModel, edits: Sequence[Intervention], out: str | Path, *, base: str, **made_from: Any
) -> BakedRecord:
    """Write a checkpoint with its model card and its record, atomically; raises as `save_baked` does.

    Args:
        model: the model that the edits were made for.
        base: its name on the card.
        made_from: further provenance of the record.
    """
    record = baked.record(model=model.fingerprint, origin=model.origin, **made_from)
    removed = {str(e.site): list(e.removed) for e in edits if isinstance(e, Edit)}
    ranks = {str(e.site): len(e.basis) for e in edits if isinstance(e, Projection)}
    save_baked(baked, out, card=model_card(None, removed, base=base, ranks=ranks), record=record)
    return record
