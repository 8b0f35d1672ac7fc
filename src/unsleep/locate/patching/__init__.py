"""Cross-model activation patching: a donor's activations in a recipient of the same architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from unsleep.behaviours import Payload
from unsleep.core import Site
from unsleep.dictionaries.coders import Coder
from unsleep.locate.patching.places import Group, Level, Position, Target, grid
from unsleep.locate.patching.result import Figure, Measured, Patched, payload_rates
from unsleep.locate.patching.run import PatchConfig, patch, patched_replies
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import PromptSet

__all__ = [
    "Figure",
    "Group",
    "Level",
    "Measured",
    "PatchConfig",
    "Patched",
    "Position",
    "Target",
    "grid",
    "patch",
    "patched_replies",
    "payload_rates",
    "sweep",
]


def sweep(
    donor: LoadedModel,
    recipient: LoadedModel,
    prompts: PromptSet,
    payload: Payload | str,
    layers: Sequence[int] | None = None,
    positions: Sequence[Position] = (Position(),),
    level: Level = "resid",
    config: PatchConfig = PatchConfig(),
    *,
    per_head: bool = False,
    dictionaries: Sequence[Coder] = (),
    bases: Mapping[Site, Float[Tensor, "rank d_model"]] | None = None,
) -> Patched:
    """Patch every layer at every position, one at a time: `patch` of `grid`; raises as they do.

    Args:
        layers: all where `None`.
        per_head: at the levels heads, q, k and v, one head at a time instead of a layer's.
        dictionaries: at level `features`: one per Site, all of whose features are patched.
        bases: at level `projection`: Site → rows that span the patched subspace.
    """
    groups = grid(
        recipient.network, level, layers, positions, per_head=per_head, dictionaries=dictionaries, bases=bases
    )
    return patch(donor, recipient, prompts, payload, groups, config)
