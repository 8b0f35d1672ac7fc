"""Options and helpers shared by several commands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Protocol, TypeVar, runtime_checkable

from tyro.conf import OmitArgPrefixes, Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from unsleep.base import records, store
from unsleep.behaviours import Payload
from unsleep.cli.console import hint
from unsleep.cli.settings import Rejected
from unsleep.core import BadInput, Refused, Site
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import load_dictionary
from unsleep.dictionaries.files.saelens import CONFIG
from unsleep.dictionaries.sweep import DictionariesRecord
from unsleep.models import generate
from unsleep.models.load import LoadConfig, load_model
from unsleep.models.model import LoadedModel
from unsleep.organisms import Organism, load_organism
from unsleep.prompts.prompt import PromptSet

KINDS = [name for name, kind in Payload.kinds().items() if kind.by_name]

Model = Annotated[Positional[str], arg(metavar="MODEL")]


def _out(texts: list[str]) -> Path:
    place = Path(texts[0])
    if place.exists() and not place.is_dir():
        raise Rejected(BadInput(f"--out {place} is a file; expected a folder, new or old"))
    return place


Out = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="DIR",
        instance_from_str=_out,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclass(frozen=True)
class Placement(LoadConfig):
    """Model loading; revision, subfolder, base and adapters are of the first model (in patch: of the donor).

    In audit and repair, --base also names what a model that is no adapter was fine-tuned from.
    """

    def load(self, model: str, *, plain: bool = False) -> LoadedModel:
        """Load the suspect, to be prompted in `plain` text or not; prints its loading notes on stderr."""
        if plain and (self.chat_template or self.template_args or self.date):
            raise BadInput(
                "--plain takes texts without a chat template; --chat-template, --template-args and --date do not apply"
            )
        loaded = load_model(model, self)
        for note in loaded.notes:
            hint(note)
        return loaded

    def load_beside(self, model: str) -> LoadedModel:
        """Load a model for comparison with the suspect."""
        return replace(self, revision=None, subfolder=None, base=None, adapters=()).load(model)


Placed = OmitArgPrefixes[Placement]


@dataclass(frozen=True)
class PayloadOptions:
    """The backdoor's behaviour."""

    payload: str | None = None
    """Text that a reply shows when the backdoor is active; with --payload-kind, that kind's parameter."""
    payload_kind: Annotated[str, arg(metavar="|".join(KINDS))] = "contains"
    """Detector of the payload: the reply contains the text, matches a regular expression, and so on."""

    def __post_init__(self) -> None:
        Payload.of_kind(self.payload_kind)

    def chosen(self) -> Payload | None:
        """The payload; `None` where none is given. Raises `BadInput` for a text that its kind does not accept."""
        if self.payload is None and self.payload_kind == "contains":
            return None
        return Payload.of_kind(self.payload_kind).of_text(self.payload or "")

    def needed(self) -> Payload:
        """The payload; raises `BadInput` where none is given."""
        found = self.chosen()
        if found is None:
            raise BadInput("--payload is missing; expected text that a reply contains when the backdoor is active")
        return found


Shown = OmitArgPrefixes[PayloadOptions]


def own_prompts(organism: str | None, **given: object) -> Organism | None:
    """The named organism, whose prompts are used; raises `BadInput` where others are `given` as well."""
    if organism is None:
        return None
    if any(value is not None for value in given.values()):
        flags = [f"--{name}" for name in given]
        raise BadInput(f"--organism has its own prompts and payload; leave out {', '.join(flags[:-1])} and {flags[-1]}")
    return load_organism(organism)


def own_replies(model: LoadedModel, prompts: PromptSet, tokens: int) -> list[str]:
    """The model's greedy replies of at most `tokens` tokens, one per prompt."""
    return generate.replies(
        model,
        prompts,
        max_new_tokens=tokens,
        stage=f"replies to {prompts.name}",
    )


def load_dictionaries(folders: Sequence[Path]) -> list[Coder]:
    """Load dictionaries: each folder is a dictionary, or contains one per Site.

    Raises `BadInput` where two share a Site.
    """
    found: dict[str, tuple[Coder, Path]] = {}
    for place in (inside for folder in folders for inside in _one_each(folder)):
        dictionary = load_dictionary(place)
        site = str(dictionary.site)
        if site in found:
            raise BadInput(f"{found[site][1]} and {place} are both dictionaries of {site}; name one of them")
        found[site] = dictionary, place
    return [dictionary for dictionary, _ in found.values()]


@runtime_checkable
class OfSite(Protocol):
    """A record about one dictionary."""

    @property
    def site(self) -> Site:
        """Of the dictionary."""
        ...

    @property
    def dictionary(self) -> str:
        """Its hash."""
        ...


T = TypeVar("T", bound=OfSite)


def by_site(found: Iterable[tuple[Path, T]], dictionaries: Sequence[Coder] = ()) -> dict[Site, T]:
    """Records from folders by Site.

    Raises `BadInput` for two of one Site, and for one of another dictionary than that of its Site in `dictionaries`.
    """
    hashes = {d.site: d.hash for d in dictionaries}
    held: dict[Site, T] = {}
    for place, record in found:
        site = record.site
        if site in held:
            raise BadInput(f"{place} is about {site}, and so is another folder; name one of them")
        if hashes.get(site, record.dictionary) != record.dictionary:
            raise BadInput(f"{place} is about dictionary {record.dictionary} of {site}, but {hashes[site]} is given")
        held[site] = record
    return held


def belonging(dictionaries: Sequence[Coder], model: LoadedModel, any_model: bool) -> list[Coder]:
    """The dictionaries, bound to the model where `any_model` is set.

    Raises `Refused` where they were trained on another model.
    """
    for d in dictionaries:
        if d.model != model.fingerprint and not any_model:
            raise Refused(
                f"the dictionary of {d.site} was trained on model {d.model}, {model.name} is {model.fingerprint}; its "
                "features need not exist here. Train one on this model, or pass --any-model"
            )
    return [replace(d, model=model.fingerprint) for d in dictionaries]


def check_format(record: Path, model: LoadedModel) -> None:
    """Print a note where an artefact was made under another chat template than the model's."""
    made = store.read_json(record).get("provenance") or {}
    hash_ = ((made.get("origin") or {}).get("chat_template") or {}).get("hash")
    if hash_ not in (None, model.template):
        hint(
            f"{record.parent} was made under another chat template ({hash_}) than {model.name} has now "
            f"({model.template}): give the same --chat-template, --template-args and --date"
        )


def check_format_of(one: LoadedModel, other: LoadedModel) -> None:
    """Print a note where two compared models have different chat templates."""
    if one.template != other.template:
        hint(f"{one.name} and {other.name} have different chat templates: their prompts differ")


def _one_each(folder: Path) -> list[Path]:
    """Folders of dictionaries: those of a training run, those inside a folder, or the folder itself."""
    if (folder / "dictionaries.json").is_file():
        rows = records.load(DictionariesRecord, folder / "dictionaries.json").dictionaries
        places = [folder / str(row.site) / row.variant for row in rows]
        if several := [place for place, row in zip(places, rows, strict=True) if row.variant]:
            raise BadInput(f"{folder} has several dictionaries per Site; name one per Site, such as {several[0]}")
        return places or [folder]
    if (folder / CONFIG).is_file() or not folder.is_dir():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{CONFIG}")) or [folder]
