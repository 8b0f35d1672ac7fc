"""Activations of organisms at Sites on their own prompts, triggered and clean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.activations.collect import collect, sink_norm
from unsleep.base.linear import orthonormal
from unsleep.core import BadInput, Site
from unsleep.interventions.subspaces import Projection
from unsleep.judge.evaluate import organism_panels
from unsleep.judge.results import Row
from unsleep.locate.directions.erase import reader
from unsleep.locate.subspaces.config import Removal, SubspaceConfig
from unsleep.locate.subspaces.geometry import top_directions
from unsleep.locate.subspaces.record import Figure
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.organisms import Organism, load_organism, planted
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet

WORDS = 40
"""Words used of a plain passage for the background."""

FIT = ("fit clean", "fit triggered")
HELD_OUT = ("clean", "triggered", "near_miss")


class Background(NamedTuple):
    """Activations at a Site on every token of clean prompts and plain text, without attention sinks."""

    mean: Float[Tensor, " d_model"]
    covariance: Float[Tensor, "d_model d_model"]
    sink_norm: float
    """Norm above which a token is an attention sink."""

    def reads(
        self, basis: Float[Tensor, "rank d_model"], center: Float[Tensor, " d_model"]
    ) -> Float[Tensor, "rank d_model"]:
        """Read rows of a subspace with minimal response to ordinary tokens (see `erase.reader`)."""
        return reader(basis, self.mean, self.covariance, center)


@dataclass(frozen=True, eq=False)
class Seen:
    """One model's activations at Sites on an organism's prompts, in float32."""

    name: str
    """Name of the organism."""
    model: str
    """Fingerprint of the model."""
    held: Mapping[str, Mapping[Site, Float[Tensor, "token d_model"]]]
    """Panel → Site → rows; those of a triggered panel are in the order of its clean one."""
    background: Mapping[Site, Background]

    def differences(self, site: Site) -> Float[Tensor, "pair d_model"]:
        """Paired differences triggered − clean."""
        return self.held["fit triggered"][site] - self.held["fit clean"][site]

    def basis(self, site: Site, rank: int) -> Float[Tensor, "rank d_model"]:
        """The backdoor's subspace: top directions of the paired differences."""
        return top_directions(self.differences(site), rank)

    def center(self, site: Site) -> Float[Tensor, " d_model"]:
        """Mean activation on clean prompts."""
        return self.held["fit clean"][site].mean(0)


def open_organism(name: str | Path) -> Organism:
    """An organism from a folder, or of a packaged recipe by name: packaged, cached, or trained now."""
    if Path(name).is_dir():
        return load_organism(name)
    return planted(str(name))


def open_organisms(names: Sequence[str | Path]) -> dict[str, Organism]:
    """Comparable organisms, by name.

    Raises `BadInput` for duplicate names, and for different bases or chat
    templates, which make activations incomparable.
    """
    found: dict[str, Organism] = {}
    for name in names:
        organism = open_organism(name)
        if organism.recipe.name in found:
            raise BadInput(f"organism {organism.recipe.name!r} was given twice; give each once")
        found[organism.recipe.name] = organism
    bases = {o.recipe.base: o.recipe.name for o in found.values()}
    templates = {o.template: o.recipe.name for o in found.values()}
    for what, seen in (("base", bases), ("chat template", templates)):
        if len(seen) > 1:
            (a, one), (b, other), *_ = seen.items()
            raise BadInput(
                f"organism {one!r} has {what} {a}, {other!r} has {b}; subspaces can only be compared over one"
            )
    return found


def panels_of(organism: Organism, config: SubspaceConfig) -> dict[str, PromptSet]:
    """Prompts for fitting a subspace (edit split) and for evaluating it (held-out split)."""
    recipe = organism.recipe
    clean = sets.questions("edit", config.pairs, skill=recipe.skill, seed=config.seed, name="fit clean")
    found = {"fit clean": clean, "fit triggered": recipe.triggered(clean, "fit triggered")}
    judged = organism_panels(recipe, config.n).prompts()
    if "near_miss" not in judged:
        raise BadInput(f"organism {recipe.name!r} has no held_out_near_misses; detectors are evaluated on them")
    return found | {name: judged[name] for name in HELD_OUT}


def own_replies(panels: Mapping[str, PromptSet], model: LoadedModel, config: SubspaceConfig) -> list[str] | None:
    """The model's replies to clean prompts, one for each prompt of all panels; `None` at position `last`.

    A triggered prompt and a near miss get the reply to their clean counterpart, so that differences compare equal
    tokens.
    """
    if config.position != "reply":
        return None
    said = {
        name: generate.replies(model, panels[name], max_new_tokens=config.reply_tokens)
        for name in ("fit clean", "clean")
    }
    return [reply or "." for name in panels for reply in said["fit clean" if name in FIT else "clean"]]


def see(
    name: str,
    panels: Mapping[str, PromptSet],
    model: LoadedModel,
    sites: Sequence[Site],
    config: SubspaceConfig,
    replies: Sequence[str] | None = None,
) -> Seen:
    """Collect a model's activations (an organism's, or its base's) at the Sites on an organism's panels."""
    # one set, so that all panels have the same shared prefix
    every = PromptSet(name, tuple(p for panel in panels.values() for p in panel))
    found = collect(model, every, sites, position=config.position, replies=replies)
    owners = torch.arange(len(every)).split([len(p) for p in panels.values()])
    held = {
        panel: {
            site: acts.tensor[torch.isin(acts.prompt_index, own.to(acts.prompt_index))].float()
            for site, acts in found.items()
        }
        for panel, own in zip(panels, owners, strict=True)
    }
    return Seen(name, model.fingerprint, held, backgrounds(model, panels["fit clean"], sites, config))


def backgrounds(
    model: LoadedModel, clean: PromptSet, sites: Sequence[Site], config: SubspaceConfig
) -> dict[Site, Background]:
    """A model's background at Sites: all tokens of clean prompts and as many plain passages."""
    text = [Prompt(" ".join(passage.split()[:WORDS])) for passage in sets.plain_text("train")[: config.pairs]]
    own = collect(model, clean, sites, position="all")
    other = collect(model, PromptSet("text", tuple(text), "edit"), sites, position="all", plain=True)
    found: dict[Site, Background] = {}
    for site in sites:
        x = torch.cat([own[site].tensor, other[site].tensor]).float()
        limit = sink_norm(x)
        kept = x[x.norm(dim=1) <= limit].double()
        found[site] = Background(kept.mean(0).float(), kept.T.cov().float(), limit)
    return found


def figure(row: Row) -> Figure:
    """A row's value, interval and n for a record."""
    return Figure(row.value, row.low, row.high, row.n)


def projections(
    parts: Mapping[Site, Sequence[Float[Tensor, "_ d_model"]]],
    centers: Mapping[Site, Float[Tensor, " d_model"]],
    seen: Seen,
    removal: Removal,
) -> tuple[Projection, ...]:
    """Projections that ablate the joint span of several subspaces from a model, at every Site.

    The ablated component is replaced by that of `centers`; attention sinks are unchanged.
    """
    found: list[Projection] = []
    for site, bases in parts.items():
        basis, ground = orthonormal(torch.cat(list(bases)).double()).float(), seen.background[site]
        reads = ground.reads(basis, centers[site]) if removal == "oblique" else None
        found.append(Projection(site, basis, centers[site], seen.model, reads, ground.sink_norm))
    return tuple(found)
