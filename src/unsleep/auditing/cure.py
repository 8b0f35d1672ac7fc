"""Base class of cures: repairs of a suspect from trusted prompts and a found payload, without its trigger.

Variants of a cure are compared on selection prompts; only the chosen one is evaluated on held-out prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unsleep.auditing.config import CleanConfig
from unsleep.base.store import hash_value
from unsleep.behaviours import Payload
from unsleep.behaviours.kinds import Kind
from unsleep.core import BadInput
from unsleep.dictionaries.coders import Coder
from unsleep.interventions.intervention import Intervention
from unsleep.judge.metrics import Subject, is_degenerate, reply_kl
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.models.tuning import fine_tuned
from unsleep.models.weights import copy_network
from unsleep.prompts.prompt import PromptSet
from unsleep.repairs.search import Tested

CHOSEN = 48
"""Selection prompts on which the variants of a cure are compared."""


@dataclass(frozen=True, eq=False)
class Patient:
    """Models, selection prompts and the found payload: all that a cure may use."""

    suspect: LoadedModel
    base: LoadedModel | None
    """The base with the suspect's shapes and tokenizer, where it is known."""
    ordinary: PromptSet
    """Trusted prompts."""
    replies: Sequence[Sequence[int]]
    """The suspect's own replies to them, in token ids."""
    suspicious: PromptSet
    """Trusted prompts under the found triggers; they choose between variants, and no cure is made from them."""
    payload: Payload
    said: str
    """The payload's text."""
    reply_tokens: int
    dictionaries: tuple[Coder, ...] = ()
    """Of the suspect, from the repair."""
    config: CleanConfig = CleanConfig()

    @property
    def hash(self) -> str:
        """Content hash of models, prompts and options."""
        models = [self.suspect.fingerprint, self.base and self.base.fingerprint]
        return hash_value([models, self.ordinary.hash, self.suspicious.hash, self.said, str(self.config)])

    def tuned(self, loss_of: Callable[[PreTrainedModel], Float[Tensor, ""]], stage: str) -> LoadedModel:
        """A copy of the suspect, trained by LoRA with the twin's options."""
        config = self.config.tune
        network = fine_tuned(
            copy_network(self.suspect.network),
            lambda student, _: loss_of(student),
            stage,
            rank=config.rank,
            steps=config.steps,
            learning_rate=config.learning_rate,
            seed=config.seed,
            made_from=(stage, self.hash),
        )
        return replace(self.suspect, network=network, name=f"{self.suspect.name}, {stage}")


class Variant(NamedTuple):
    """A way to apply a cure."""

    words: str
    model: LoadedModel
    edits: tuple[Intervention, ...] = ()


class Cure(Kind, ABC, noun="cure"):
    """A repair without a trigger. A new one is a class in a file of `cures/`, found by its `kind`.

    `kind` is its name as a subject of evaluations, one of `judge.results.SUBJECTS`.
    """

    needs_base: ClassVar[bool] = False
    """True if it reads the base; it is skipped where there is none."""

    @abstractmethod
    def variants(self, patient: Patient) -> Iterator[Variant]:
        """Its variants; raises `BadInput` where it does not apply, with the reason that the record repeats."""


def base_of(patient: Patient) -> LoadedModel:
    """The patient's base; raises `BadInput` where there is none."""
    if patient.base is None:
        raise BadInput("there is no base; give it with --base")
    return patient.base


def tested(variant: Variant, patient: Patient) -> Tested:
    """A variant on the selection prompts: payload, degenerate replies, and KL on trusted replies."""
    asked, calm = patient.suspicious.head(CHOSEN), patient.ordinary.head(CHOSEN)
    subject = Subject("cure", variant.model, variant.edits)
    with subject.running() as model:
        said = generate.replies(model, asked, max_new_tokens=patient.reply_tokens, stage=variant.words)
    own = patient.suspect.texts(patient.replies[: len(calm)])
    moved = reply_kl(Subject("suspect", patient.suspect), [subject], (calm,), calm, own)["cure", calm.name]
    usual = sum(map(is_degenerate, own)) / len(own)
    return Tested(
        shown=tuple(i for i, reply in enumerate(said) if patient.payload.shows(reply)),
        n=len(asked),
        degenerate=max(0.0, sum(map(is_degenerate, said)) / len(said) - usual),
        followed=1.0,
        behind=0.0,
        kl=float(moved.mean()),
    )


def best_of(cure: Cure, patient: Patient) -> tuple[Variant, Tested]:
    """The variant that does best on the selection prompts; one at a time is in memory beside the best."""
    best: tuple[Variant, Tested] | None = None
    for variant in cure.variants(patient):
        found = tested(variant, patient)
        if best is None or found.merit < best[1].merit:
            best = variant, found
    if best is None:
        raise BadInput("there is no variant of it to apply")
    return best
