"""Targets of activation patching: tokens by position, places by level, and groups that are patched jointly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from unsleep.base.linear import orthonormal
from unsleep.core import BadInput, Point, Site, check_finite
from unsleep.dictionaries.coders import Coder
from unsleep.interventions import donors
from unsleep.models.forward import Rows
from unsleep.models.sites import Place, Slot, all_sites, lanes, tap, width

Level = Literal["resid", "attn", "mlp", "embed", "heads", "q", "k", "v", "features", "projection"]
"""Patched part of a layer; `features` and `projection` are parts of the activation at a Site."""


@dataclass(frozen=True)
class Position:
    """Tokens of a prompt as a Python slice; negative indices count from the end.

    The chat template's own tokens count. The default is the last token, which predicts the reply.

    >>> [str(Position.parse(t)) for t in ("last", "prompt", "all", "-3", "-8:-1")]
    ['last', 'prompt', 'all', '-3', '-8:-1']
    """

    start: int | None = -1
    stop: int | None = None
    reply: bool = False
    """Also every token of the teacher-forced reply."""

    @classmethod
    def parse(cls, text: str) -> Position:
        """Parse `last`, `prompt` (all its tokens), `all` (the forced reply's too), an index or a span such as -8:-1."""
        named = {"last": cls(), "prompt": cls(None), "all": cls(None, reply=True)}
        if text.strip() in named:
            return named[text.strip()]
        parts = [part.strip() for part in text.split(":")]
        numbers = [part == "" or part.removeprefix("-").isdecimal() for part in parts]
        if len(parts) > 2 or not all(numbers) or parts == [""] or any(len(part) > 7 for part in parts):
            raise BadInput(
                f"position {text[:40]!r} is unknown; expected last, prompt, all, an index such as -3 or a span "
                "such as -8:-1"
            )
        bounds = [int(part) if part else None for part in parts]
        if len(bounds) == 2:
            return cls(bounds[0], bounds[1])
        first = cast("int", bounds[0])
        return cls(first, first + 1 if first != -1 else None)

    def __str__(self) -> str:
        if self.start is None and self.stop is None:
            return "all" if self.reply else "prompt"
        if self.start == -1 and self.stop is None:
            return "last"
        if self.start is not None and self.stop == self.start + 1:
            return str(self.start)
        return ":".join("" if bound is None else str(bound) for bound in (self.start, self.stop))

    def check(self, lengths: Sequence[int]) -> None:
        """Raise `BadInput` where prompts of these lengths lack some of the tokens."""
        shortest, longest = min(lengths), max(lengths)
        bounds = [bound for bound in (self.start, self.stop) if bound]
        if any(bound > 0 for bound in bounds) and shortest != longest:
            raise BadInput(
                f"position {self} counts from the beginning, but the prompts have {shortest} to {longest} tokens: it "
                "would be a different position in each. Count from the end, such as -3, or give prompts of one length"
            )
        if any(not -shortest <= bound <= shortest for bound in bounds):
            raise BadInput(f"position {self} is out of range: the shortest prompt has {shortest} tokens")
        if not len(range(shortest)[self.start : self.stop]):
            raise BadInput(f"position {self} selects no token; expected a span of at least one")

    def columns(self, rows: Rows) -> Bool[Tensor, "row position"]:
        """Mask of the selected tokens in rows without a prefix."""
        length = (rows.mask.sum(1) - rows.reply.sum(1))[:, None]
        index = rows.positions
        found = rows.mask & (index < length)
        for bound, is_stop in ((self.start, False), (self.stop, True)):
            if bound is not None:
                at = index if bound >= 0 else index - length
                found = found & ((at < bound) if is_stop else (at >= bound))
        return found | (rows.mask & (index >= length)) if self.reply else found


@dataclass(frozen=True, eq=False)
class Target:
    """A place, and the part of it that is patched: all, some heads, some features, or a subspace.

    See `interventions.donors`; a basis is orthonormalised.
    """

    place: Place
    heads: tuple[int, ...] | None = None
    """Patched heads, at a Slot."""
    dictionary: Coder | None = None
    """Dictionary of the patched features, at a Site."""
    features: tuple[int, ...] | None = None
    """Patched features; all where `None`."""
    basis: Float[Tensor, "rank d_model"] | None = None
    """Rows that span the patched subspace, at a Site."""

    def __post_init__(self) -> None:
        given = [x is not None for x in (self.heads, self.dictionary, self.basis)]
        if sum(given) > 1:
            raise BadInput(f"target {self.place} is given several of heads, dictionary and basis; expected one")
        if isinstance(self.place, Slot) and any(given[1:]):
            raise BadInput(f"target {self.place} is inside attention; dictionaries and bases belong to a Site")
        if isinstance(self.place, Site) and self.heads is not None:
            raise BadInput(f"target {self.place} names heads; expected a Slot of heads, q, k or v")
        if self.features is not None and self.dictionary is None:
            raise BadInput(f"target {self.place} names features without a dictionary")
        if self.dictionary is not None:
            _check_dictionary(self.place, self.dictionary, self.features)
        if self.basis is not None:
            check_finite(self.basis, f"the basis at {self.place}")
            if not len(self.basis) or not bool((self.basis.norm(dim=1) > 0).all()):
                raise BadInput(f"the basis at {self.place} has no rows or a row of zeros; expected directions")

    @property
    def layer(self) -> int:
        """The layer of its place."""
        return self.place.layer

    def check(self, model: PreTrainedModel) -> None:
        """Raise `BadInput` where the model lacks the place or heads, or has another width."""
        if isinstance(self.place, Slot):
            count = lanes(model, self.place).heads
            wrong = [h for h in self.heads or () if not 0 <= h < count]
            if wrong or self.heads == ():
                raise BadInput(f"target {self.place} names heads {list(self.heads or ())}; it has 0 to {count - 1}")
            return
        tap(model, self.place)
        have = {"dictionary": self.dictionary and self.dictionary.d_model}
        have["basis"] = None if self.basis is None else self.basis.shape[1]
        for name, d in have.items():
            if d is not None and d != width(model):
                raise BadInput(f"the {name} at {self.place} has width {d}; the model's is {width(model)}")

    def merge(self, model: PreTrainedModel) -> donors.Merge:
        """The merge of the donor's tokens into the recipient's."""
        if self.heads is not None:
            _, count, size, _ = lanes(model, cast("Slot", self.place))
            taken = torch.zeros(count, size, dtype=torch.bool, device=model.device)
            taken[list(self.heads)] = True
            return donors.lanes_of(taken.flatten())
        if self.dictionary is not None:
            kept = torch.zeros(self.dictionary.n_features, device=model.device)
            kept[list(self.features) if self.features is not None else slice(None)] = 1
            return donors.features_of(self.dictionary.to(torch.float32, model.device), kept)
        if self.basis is not None:
            return donors.subspace_of(orthonormal(self.basis.double().to(model.device)).float())
        return donors.whole


def _check_dictionary(place: Place, dictionary: Coder, features: tuple[int, ...] | None) -> None:
    if dictionary.target is not None:
        raise BadInput(f"the dictionary at {dictionary.site} rebuilds {dictionary.target}; expected no transcoder")
    if dictionary.site != place:
        raise BadInput(f"target {place} is given a dictionary of {dictionary.site}; expected the same Site")
    wrong = [j for j in features or () if not 0 <= j < dictionary.n_features]
    if wrong or features == ():
        raise BadInput(
            f"target {place} names features {list(features or ())[:5]}; the dictionary has 0 to "
            f"{dictionary.n_features - 1}"
        )


@dataclass(frozen=True, eq=False)
class Group:
    """Targets that are patched jointly, at one position."""

    name: str
    targets: tuple[Target, ...]
    position: Position = Position()

    def __post_init__(self) -> None:
        places = [t.place for t in self.targets]
        if not places or len(set(places)) != len(places):
            raise BadInput(
                f"group {self.name!r} has the places {', '.join(map(str, places)) or 'none'}; expected one or more, "
                "each once"
            )

    @property
    def layer(self) -> int:
        """The lowest patched layer."""
        return min(t.layer for t in self.targets)


def grid(
    model: PreTrainedModel,
    level: Level,
    layers: Sequence[int] | None = None,
    positions: Sequence[Position] = (Position(),),
    *,
    per_head: bool = False,
    dictionaries: Sequence[Coder] = (),
    bases: Mapping[Site, Float[Tensor, "rank d_model"]] | None = None,
) -> list[Group]:
    """One group per layer (and head) and position at one level.

    `features` uses the Sites of `dictionaries`, `projection` those of `bases`. Raises `BadInput` for an
    unknown level, layers that the model does not have, or a level without its inputs.
    """
    if level not in get_args(Level):
        raise BadInput(f"level is {level!r}; expected one of {', '.join(get_args(Level))}")
    if not positions or (layers is not None and not layers):
        raise BadInput("no positions or no layers were given; expected at least one of both")
    targets = _targets(model, level, layers, per_head, dictionaries, bases or {})
    return [
        Group(f"{name} at {position}", (target,), position)
        for position in dict.fromkeys(positions)
        for name, target in targets
    ]


def _targets(
    model: PreTrainedModel,
    level: Level,
    layers: Sequence[int] | None,
    per_head: bool,
    dictionaries: Sequence[Coder],
    bases: Mapping[Site, Tensor],
) -> list[tuple[str, Target]]:
    if level == "features" or level == "projection":
        found = [Target(d.site, dictionary=d) for d in dictionaries] if level == "features" else []
        found += [Target(site, basis=rows) for site, rows in bases.items()] if level == "projection" else []
        found = [t for t in found if layers is None or t.layer in layers]
        if not found:
            needs = "dictionaries" if level == "features" else "directions"
            raise BadInput(f"level {level} has no {needs} at the layers that were asked for; give at least one")
        return [(str(t.place), t) for t in sorted(found, key=lambda t: t.layer)]
    if level == "embed":
        return [("embed", Target(Site(0, "embed")))]
    chosen = range(len(all_sites(model, ("resid",)))) if layers is None else sorted(set(layers))
    if level in ("resid", "attn", "mlp"):
        return [(str(site), Target(site)) for site in (Site(layer, cast("Point", level)) for layer in chosen)]
    slots = [Slot(layer, level) for layer in chosen]
    if not per_head:
        return [(str(slot), Target(slot)) for slot in slots]
    return [
        (f"{slot} head {head}", Target(slot, heads=(head,)))
        for slot in slots
        for head in range(lanes(model, slot).heads)
    ]
