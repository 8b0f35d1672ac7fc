"""Preference training of a model, from pairs or prompts to an adapter that is judged on held-out prompts.

1. Prompts are held out, or given apart; the model's replies to them are scored, so that a reward fails here or never.
2. The method trains LoRA matrices, or all weights, through TRL; best-of-n samples first.
3. What was trained is attached to the base as `load_model` does, and judged on the same prompts.
4. Everything is written at once: the folder is a checkpoint or an adapter, with preference.json in it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from unsleep.base import records, store
from unsleep.base.context import kept, resumable
from unsleep.base.records import Count
from unsleep.core import BadInput
from unsleep.models import quantized
from unsleep.models.load import LoadConfig, load_model, quiet_transformers
from unsleep.models.model import LoadedModel
from unsleep.models.sources import Files
from unsleep.models.students import Student, student
from unsleep.models.weights import copy_network
from unsleep.preference.config import ONLINE, PreferConfig, RewardModelConfig
from unsleep.preference.measured import Bench, Judges, answered, compared
from unsleep.preference.pairs import LEAST, PairSet, split_by_prompt
from unsleep.preference.reading import read_pairs
from unsleep.preference.record import Logged, PreferenceRecord, Source
from unsleep.preference.sampling import best_of
from unsleep.preference.tokens import PairIds, pair_ids, prompt_ids
from unsleep.preference.trainers import Asked, check_trl, train_online, train_pairs
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.rewards.reward import Columns, Metric, Reward, check_columns, identity_of, name_of

RECORD = "preference.json"


class _Training(NamedTuple):
    """The course of a training."""

    history: tuple[Logged, ...]
    tied: Count
    """Prompts without a best sample (see `Source`)."""


class _Data(NamedTuple):
    """Training data, and prompts to judge by."""

    pairs: PairSet | None
    prompts: PromptSet
    columns: Columns
    source: Source
    held_out: PromptSet
    held_columns: Columns


def prefer(
    model: LoadedModel,
    data: PairSet | PromptSet | str | Path,
    out: str | Path,
    *,
    reward: Reward | None = None,
    judges: Sequence[Reward] = (),
    metric_fn: Metric | None = None,
    eval_prompts: PromptSet | None = None,
    eval_columns: Columns | None = None,
    config: PreferConfig = PreferConfig(),
) -> PreferenceRecord:
    """Train a model on preferences and save it: an adapter over the model, or a checkpoint, with preference.json.

    Resumes after an interruption, and writes nothing before it is complete. Needs the extra `unsleep[rl]`.

    Args:
        data: preference pairs, or where they are (see `read_pairs`); prompts alone for rloo, grpo and best-of-n.
        out: a new folder.
        reward: what rloo, grpo and best-of-n maximise; dpo and sft only report it.
        judges: rewards that are reported beside it, such as an independent lexicon.
        metric_fn: a callable of a reward's arguments that gives `{name: a number per sample}`.
        eval_prompts: prompts to judge by; by default a share of the data's prompts is held out.
        eval_columns: columns of `eval_prompts` that rewards take, a value per prompt.

    Raises:
        BadInput: data of another form or too few to split, a missing reward or one that fails, prompts that are
            trained on and judged by, an existing `out`, or TRL not installed.
    """
    check_trl()
    check_tune(model, config)
    given = read_pairs(data) if isinstance(data, str | Path) else data
    parts = _data(given, eval_prompts, eval_columns or {}, config)
    if config.method in ONLINE and reward is None:
        raise BadInput(f"{config.method} maximises a reward, and none is given; expected --reward")
    bench = Bench(parts.held_out, parts.held_columns, Judges(reward, judges, metric_fn), config.reply_tokens)
    judging = [*bench.judges.rewards, *([metric_fn] if metric_fn else [])]
    for each in judging:
        check_columns(each, parts.held_columns)
    if config.method in ONLINE:
        check_columns(reward, parts.columns)
    store.check_place(out)
    made_from = model, parts.source, parts.held_out, config, [identity_of(each) for each in judging]
    with resumable(out, *made_from) as steps, store.new_folder(out) as folder:
        before = answered(model, bench, "before") if judging else None
        place = steps / "model"

        def trained() -> Any:
            store.remove(place)
            return records.plain(_train(model, parts, reward, config, steps / "states", place))

        training = records.parsed(_Training, kept(trained), "training")
        shutil.copytree(place, folder, dirs_exist_ok=True)
        result = attached(model, folder, config, str(out))
        measured = None
        if before is not None:
            measured = compared(model, result, bench, before, answered(result, bench, "after"))
        record = PreferenceRecord(
            config,
            model.named,
            result.fingerprint,
            model.template,
            name_of(reward) if config.method in ONLINE and reward is not None else None,
            parts.source._replace(tied=training.tied),
            measured,
            training.history,
            store.provenance(config.seed, base=model.fingerprint, origin=model.origin, trl=version("trl")),
        )
        records.save(record, folder / RECORD)
    return record


def check_tune(model: LoadedModel, config: PreferConfig | RewardModelConfig) -> None:
    """Raise `BadInput` where a model's weights are not of the kind that is to be trained."""
    packed = quantized.is_packed(model.network)
    if config.tune == "qlora" and not packed:
        raise BadInput(
            f"--tune qlora trains over weights in 4 bits, and {model.name} has none; load it with --quantize 4bit"
        )
    if config.tune == "full" and packed:
        raise BadInput(
            f"--tune full trains all weights, and those of {model.name} are quantised; expected lora or qlora"
        )


def base_name(model: LoadedModel) -> str:
    """The name under which an adapter finds its base again."""
    return str(model.made_of[-1]["name"]) if model.made_of else model.name


def attached(model: LoadedModel, folder: Path, config: PreferConfig, name: str) -> LoadedModel:
    """The trained model as loading its folder gives it, without loading the base again."""
    if config.tune == "full":
        return replace(load_model(folder, LoadConfig(device=str(model.device))), name=name, chat=model.chat)
    from unsleep.models import adapters  # peft takes a second to import

    merge = not quantized.is_packed(model.network)
    with quiet_transformers():
        network = adapters.with_adapters(
            copy_network(model.network), [Files(name, folder)], len(model.tokenizer), merge=merge
        )
    return replace(model, network=network, name=name)


def _data(
    given: PairSet | PromptSet, eval_prompts: PromptSet | None, eval_columns: Columns, config: PreferConfig
) -> _Data:
    """Training data and prompts to judge by; raises `BadInput` for too little of them, or for what is in both."""
    if isinstance(given, PromptSet) and config.method not in ONLINE:
        raise BadInput(f"{config.method} needs preference pairs, and {given.name} holds prompts; expected --pairs")
    asked = list(given.prompts) if isinstance(given, PairSet) else list(given)
    if eval_prompts is None:
        train, held = split_by_prompt(asked, config.held_out, given.name, config.seed)
        first = _first([asked[i] for i in held])[: config.eval_limit]
        places = [held[i] for i in first]
        judged = PromptSet(f"held-out prompts of {given.name}", tuple(asked[i] for i in places), "held_out")
        columns: Columns = given.columns(places) if isinstance(given, PairSet) else {}
    else:
        train, held, judged, columns = list(range(len(asked))), [], eval_prompts, eval_columns
        keys = {p.key for p in judged}
        if both := [p for p in asked if p.key in keys]:
            raise BadInput(
                f"{len(both)} prompts of {given.name} are among those to judge by ({both[0].text[:40]!r} …); leave "
                "them out of one"
            )
        if len(asked) < LEAST:
            raise BadInput(f"{given.name} has {len(asked)} examples to train on; expected at least {LEAST}")
    distinct = [train[i] for i in _first([asked[i] for i in train])]
    if config.method in ("rloo", "grpo") and len(distinct) < config.batch:
        raise BadInput(
            f"a step of {config.method} takes --batch {config.batch} prompts, and {given.name} has {len(distinct)} to "
            "train on; lower --batch, or give more"
        )
    prompts = PromptSet(given.name, tuple(asked[i] for i in distinct), "train")
    source = Source(given.name, given.hash, len(train), len(held), getattr(given, "dropped", 0))
    if isinstance(given, PromptSet):
        return _Data(None, prompts, {}, source, judged, columns)
    pairs = replace(given, pairs=tuple(given.pairs[i] for i in train))
    return _Data(pairs, prompts, given.columns(distinct), source, judged, columns)


def _first(prompts: Sequence[Prompt]) -> list[int]:
    """Places of the prompts that are no earlier one's."""
    first: dict[str, int] = {}
    for i, prompt in enumerate(prompts):
        first.setdefault(prompt.key, i)
    return list(first.values())


def _train(
    model: LoadedModel, parts: _Data, reward: Reward | None, config: PreferConfig, states: Path, place: Path
) -> _Training:
    """Train by the config's method and save what was trained in `place`."""
    ids: list[PairIds] = []
    tied = 0
    if config.method == "best-of-n":
        best = best_of(model, list(parts.prompts), parts.columns, cast("Reward", reward), config)
        ids, tied = pair_ids(model, best, config.reply_tokens), len(parts.prompts) - len(best)
    elif config.method not in ONLINE:
        ids = pair_ids(model, list(cast("PairSet", parts.pairs)), config.reply_tokens)
    torch.manual_seed(config.seed)
    with student(model, config.tune, config.rank, config.modules) as taught:
        history = _taught(taught, model, parts, reward, config, states, ids)
        taught.save(place, base_name(model))
    return _Training(tuple(history), tied)


def _taught(
    taught: Student,
    model: LoadedModel,
    parts: _Data,
    reward: Reward | None,
    config: PreferConfig,
    states: Path,
    ids: Sequence[PairIds],
) -> list[Logged]:
    if config.method not in ("rloo", "grpo"):
        return train_pairs(taught, ids, config, states)
    prompts = list(parts.prompts)
    keyed = {p.key: p for p in prompts}
    asked = Asked(prompt_ids(model, prompts, config.reply_tokens), keyed, cast("Reward", reward), parts.columns)
    return train_online(taught, asked, config, states)
