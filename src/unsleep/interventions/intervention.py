"""Base class of interventions on a running model, and the context manager that applies them.

    with applied(model, intervention) as network:
        network.generate(…)

An `Intervention` is a frozen value. `applied` turns it into transforms of the activations at its places, which hooks
call until the block ends; several at one place are composed in order. It works under `generate` with a KV cache, with
left padding and in batches. The weights are unchanged, and an identity registers no hook.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from unsleep.base import store
from unsleep.base.context import identified
from unsleep.core import BadInput, Refused, Site
from unsleep.interventions.passes import Passes
from unsleep.models.hooks import Transform, calls_watched
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Slot, width
from unsleep.models.streams import transformed
from unsleep.models.weights import device_of, fingerprint

Stream = Float[Tensor, "*token d_model"]


class Intervention(ABC):
    """A change of activations at some places of a running model; see the subclasses."""

    @property
    @abstractmethod
    def widths(self) -> Mapping[Any, int | None]:
        """The places that it changes, in forward order, with the width that it requires there; `None` for any width."""

    @property
    def made_on(self) -> str:
        """Fingerprint of the model that it was fitted on; empty for any model."""
        return ""

    @property
    def acts(self) -> bool:
        """False for the identity."""
        return True

    @property
    def follows_passes(self) -> bool:
        """True if it needs to know which tokens a forward pass runs."""
        return False

    @abstractmethod
    def transforms(self, passes: Passes, dtype: torch.dtype, device: torch.device | str) -> Mapping[Any, Transform]:
        """Place → transform of the activation, for a model in that dtype."""

    @property
    def hash(self) -> str:
        """Content hash; 16 hex digits."""
        return interventions_hash([self])

    def saved(self, folder: Path, number: int) -> Entry:
        """Write the tensors into a folder, and return the entry of edit.json from which `Entry.load` restores it.

        `number` tells the interventions of one folder apart. Raises `BadInput` for a kind that has no entry.
        """
        raise BadInput(f"a {type(self).__name__.lower()} cannot be saved; expected edits, projections or steering")


class Entry(ABC):
    """Base of the entries of edit.json, one dataclass per kind of intervention; found as a subclass."""

    @abstractmethod
    def load(self, folder: Path) -> Intervention:
        """Restore the intervention from its folder; raises `BadInput` naming what is invalid."""


@contextlib.contextmanager
def applied(
    model: LoadedModel | PreTrainedModel,
    interventions: Intervention | Sequence[Intervention],
    *,
    replies: Bool[Tensor, "row reply"] | None = None,
    any_model: bool = False,
) -> Generator[PreTrainedModel]:
    """Run a model with interventions until the block ends.

    Args:
        replies: mask of the reply tokens, where prompt and reply run in one pass (see `passes.Passes`).
        any_model: accept interventions that were fitted on another model.

    Yields the Hugging Face model. Raises `BadInput` for a Site that the model does not have or a wrong
    width, and `Refused` where an intervention belongs to another model.
    """
    network = model.network if isinstance(model, LoadedModel) else model
    several = as_interventions(interventions)
    check_widths(network, several)
    acting = [each for each in several if each.acts]
    if not any_model:
        check_model(model, acting)
    passes = Passes(replies)
    with contextlib.ExitStack() as stack:
        if any(each.follows_passes for each in acting):
            stack.enter_context(calls_watched(network, passes.note))
        stack.enter_context(transformed(network, transforms_of(acting, network, passes)))
        yield network


def as_interventions(given: Intervention | Sequence[Intervention]) -> list[Intervention]:
    """One intervention or several as a list; raises `BadInput` for anything else."""
    several: list[Any] = [given] if isinstance(given, Intervention) else list(given)
    for each in several:
        if not isinstance(each, Intervention):
            raise BadInput(
                f"a {type(each).__name__} is no intervention; expected edits, projections or steering. `load_edit` "
                "returns a pair: the interventions, and digests of the prompts that they were chosen on"
            )
    return several


def transforms_of(
    interventions: Sequence[Intervention], network: PreTrainedModel, passes: Passes | None = None
) -> dict[Any, Transform]:
    """Place → composed transform of several interventions."""
    return composed(interventions, passes or Passes(), network.dtype, device_of(network))


def composed(
    interventions: Sequence[Intervention], passes: Passes, dtype: torch.dtype, device: torch.device | str
) -> dict[Any, Transform]:
    """Place → composed transform of several interventions, for given passes and dtype."""
    chains: dict[Any, list[Transform]] = {}
    for each in interventions:
        for place, transform in each.transforms(passes, dtype, device).items():
            chains.setdefault(place, []).append(transform)
    return {place: chain[0] if len(chain) == 1 else partial(_chained, chain) for place, chain in chains.items()}


def _chained(chain: Sequence[Transform], x: Tensor) -> Tensor:
    for transform in chain:
        x = transform(x)
    return x


def operation(intervention: Intervention, dtype: torch.dtype, device: torch.device | str) -> Transform:
    """The transform of an intervention at a single place, on every token."""
    [transform] = intervention.transforms(Passes(), dtype, device).values()
    return transform


def check_widths(network: PreTrainedModel, interventions: Sequence[Intervention]) -> None:
    """Raise `BadInput` where an intervention does not fit the model's width."""
    if not interventions:
        return
    d_model = width(network)
    for each in interventions:
        for place, found in each.widths.items():
            if not isinstance(place, Slot) and found not in (None, d_model):
                kind = type(each).__name__.lower()
                raise BadInput(f"{kind} at {place} has width {found}; the model's is {d_model}")


def check_model(model: LoadedModel | PreTrainedModel, interventions: Sequence[Intervention]) -> None:
    """Raise `Refused` where an intervention was fitted on another model."""
    found_in = {each.made_on for each in interventions if each.made_on}
    if not found_in:
        return
    print_of = model.fingerprint if isinstance(model, LoadedModel) else fingerprint(model)
    if found_in != {print_of}:
        kinds = " and ".join(sorted({type(each).__name__.lower() for each in interventions if each.made_on}))
        raise Refused(
            f"the {kinds} belongs to model {', '.join(sorted(found_in))}, this one is {print_of}; features and "
            "directions of one model need not mean anything in another. In Python, any_model=True overrides this"
        )


def interventions_hash(interventions: Sequence[Intervention]) -> str:
    """Content hash of interventions in order; 16 hex digits."""
    return store.hash_value([[type(each).__name__, identified(each.__dict__)] for each in interventions])


def depth(site: Site) -> tuple[int, int]:
    """Sort key of a Site in forward order; attention and MLP are equal, because some blocks run them in parallel."""
    return site.layer, {"embed": 0, "attn": 1, "mlp": 1, "resid": 2}[site.point]
