"""Results of activation patching: log-probabilities and KL by group and prompt, and effects with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unsleep.base import stats
from unsleep.base.records import Count
from unsleep.behaviours import Payload, as_payload
from unsleep.locate.patching.places import Group
from unsleep.models.model import Named

Values = Float[Tensor, "group prompt"]


class Measured(NamedTuple):
    """Values by group and prompt, in nats; the donor's and recipient's own come from the same pass."""

    log_prob: Values
    """Σ log p of the payload's first tokens in the patched recipient."""
    donor: Values
    recipient: Values
    kl_donor: Values
    """KL(donor ‖ patched), mean over the teacher-forced tokens."""
    kl_recipient: Values
    """KL(recipient ‖ patched), mean over the teacher-forced tokens."""

    @classmethod
    def empty(cls, groups: int, prompts: int) -> Measured:
        """All values NaN."""
        return cls(*(torch.full((groups, prompts), torch.nan) for _ in cls._fields))

    def put(self, group: int, prompts: Sequence[int], numbers: Mapping[str, Float[Tensor, " row"]]) -> None:
        """Store a group's values on some prompts (see `numbers_of`)."""
        for name, values in numbers.items():
            getattr(self, name)[group, list(prompts)] = values


def numbers_of(
    logits: Float[Tensor, "row reply vocabulary"],
    clean: tuple[Float[Tensor, "row reply vocabulary"], Float[Tensor, "row reply vocabulary"]],
    targets: Int[Tensor, "row reply"],
) -> dict[str, Float[Tensor, " row"]]:
    """The values of `Measured` for patched rows; `clean` are the donor's and the recipient's log-probabilities."""
    patched = torch.log_softmax(logits.float(), -1)
    said = {"log_prob": patched, "donor": clean[0], "recipient": clean[1]}
    apart = {"kl_donor": clean[0], "kl_recipient": clean[1]}
    return {name: log_p.gather(-1, targets[..., None]).squeeze(-1).sum(1).cpu() for name, log_p in said.items()} | {
        name: (log_p.exp() * (log_p - patched)).sum(-1).mean(1).cpu() for name, log_p in apart.items()
    }


class Figure(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class GroupRow:
    """Results of one group, means over prompts."""

    name: str
    layer: Count
    places: tuple[str, ...]
    heads: tuple[Count, ...]
    position: str
    figure: float | None
    """Normalised effect with its interval: 0 is the recipient, 1 the donor (see `Patched.figures`)."""
    low: float | None
    high: float | None
    log_prob: float
    nll: float
    """Negative log-likelihood of the payload, in nats per token."""
    kl_donor: float
    kl_recipient: float
    asr: Figure | None = None
    """Share of generated replies that show the payload, where generated."""


@dataclass(frozen=True)
class PatchRun:
    """One direction of a patching run."""

    donor: Named
    recipient: Named
    ends: dict[str, float]
    groups: tuple[GroupRow, ...]


@dataclass(frozen=True)
class PatchRecord:
    """patch.json."""

    SCHEMA: ClassVar = "unsleep.patch/1"

    level: str
    payload: str
    tokens: Count
    """Number of measured payload tokens."""
    prompts: Count
    runs: tuple[PatchRun, ...]
    provenance: dict[str, Any]
    payload_kind: str | None = None


def payload_rates(replies: Sequence[Sequence[str]], payload: Payload | str) -> list[Figure]:
    """ASR of each group's `patched_replies`, with its Wilson interval."""
    found, shown = list[Figure](), as_payload(payload)
    for own in replies:
        hits = sum(shown.shows(reply) for reply in own)
        found.append(Figure(hits / len(own), *stats.wilson(hits, len(own))))
    return found


@dataclass(frozen=True, eq=False)
class Patched:
    """Results of `patch`."""

    groups: tuple[Group, ...]
    measured: Measured
    models: tuple[str, str]
    """Fingerprints of the donor and the recipient."""
    prompts: str
    """Hash of the prompts."""
    payload: tuple[int, ...]
    """The measured payload tokens."""

    def figures(self) -> list[Figure | None]:
        """(mean patched − mean recipient) / (mean donor − mean recipient) of each group, means over prompts.

        0 is the recipient, 1 the donor; the interval is a bootstrap over prompts.

        `None` where donor and recipient differ by less than 10⁻⁶ nats per prompt: there is no effect to transfer.
        """
        m = self.measured
        found: list[Figure | None] = []
        for moved, whole in zip(m.log_prob - m.recipient, m.donor - m.recipient, strict=True):
            apart = abs(float(whole.double().mean())) > 1e-6
            found.append(Figure(*stats.ratio(moved, whole)) if apart else None)
        return found

    def get(self, name: str) -> Figure | None:
        """The effect of the named group; raises `KeyError` where it was not patched."""
        for group, figure in zip(self.groups, self.figures(), strict=True):
            if group.name == name:
                return figure
        raise KeyError(f"no group {name}")

    def rows(self) -> list[GroupRow]:
        """Entries of patch.json for each group, in order."""
        means = [values.double().mean(1).tolist() for values in self.measured]
        out: list[GroupRow] = []
        for i, (group, figure) in enumerate(zip(self.groups, self.figures(), strict=True)):
            log_prob, _, _, kl_donor, kl_recipient = (values[i] for values in means)
            places = tuple(str(t.place) for t in group.targets)
            heads = tuple(h for t in group.targets for h in t.heads or ())
            where = group.name, group.layer, places, heads, str(group.position)
            ends = figure or (None, None, None)
            out.append(GroupRow(*where, *ends, log_prob, -log_prob / len(self.payload), kl_donor, kl_recipient))
        return out

    def ends(self) -> dict[str, float]:
        """Mean Σ log p of the payload's first tokens in the donor and in the recipient, in nats per prompt."""
        return {name: float(getattr(self.measured, name)[0].double().mean()) for name in ("donor", "recipient")}

    def tensors(self) -> dict[str, Tensor]:
        """Content of patch.safetensors: every value by group and prompt."""
        return self.measured._asdict()
