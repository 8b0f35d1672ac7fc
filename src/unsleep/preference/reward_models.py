"""Reward models: a model's backbone with a head of one output, trained on preference pairs.

The loss is the Bradley–Terry negative log-likelihood −log σ(r(chosen) − r(rejected)) (Christiano et al. 2017,
arXiv:1706.03741; Ouyang et al. 2022, arXiv:2203.02155), judged on pairs with other prompts.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base import records, stats, store
from unsleep.base.context import kept, resumable
from unsleep.base.stats import Estimate
from unsleep.core import BadInput
from unsleep.models.load import LoadConfig, quiet_transformers
from unsleep.models.model import LoadedModel
from unsleep.models.students import student
from unsleep.models.weights import copy_network
from unsleep.preference.config import RewardModelConfig
from unsleep.preference.pairs import LEAST, Halves, Pair, PairSet
from unsleep.preference.reading import read_pairs
from unsleep.preference.record import Logged, Ranking, RewardModelRecord, Source
from unsleep.preference.run import base_name, check_tune
from unsleep.preference.tokens import pair_ids
from unsleep.preference.trainers import check_trl, train_pairs
from unsleep.rewards.classifier import HEAD, Classifier, headed, load_classifier, merged
from unsleep.rewards.reward import Reward, scored

RECORD = "reward_model.json"
RESAMPLES = 2000
"""Bootstrap resamples of topics or prompts."""


def reward_model(
    model: LoadedModel,
    data: PairSet | str | Path,
    out: str | Path,
    *,
    held_out: PairSet | None = None,
    config: RewardModelConfig = RewardModelConfig(),
) -> RewardModelRecord:
    """Train a reward model on preference pairs and save it: an adapter with its head, or a checkpoint.

    `load_classifier(out)` and `--reward OUT` load it. Resumes after an interruption, and writes nothing before it is
    complete. Needs the extra `unsleep[rl]`.

    Args:
        data: preference pairs, or where they are (see `read_pairs`).
        out: a new folder.
        held_out: pairs to judge by; by default a share of the data's prompts is held out.

    Raises:
        BadInput: pairs of another form or too few to split, prompts that are trained on and judged by, an existing
            `out`, a family without sequence-classification models, or TRL not installed.
    """
    check_trl()
    check_tune(model, config)
    given = read_pairs(data) if isinstance(data, str | Path) else data
    sides = _halves(given, held_out, config)
    store.check_place(out)
    source = Source(given.name, given.hash, len(sides.train), len(sides.held_out), given.dropped)
    with resumable(out, model, sides.train, sides.held_out, config) as steps, store.new_folder(out) as folder:
        place = steps / "model"

        def trained() -> list[Any]:
            store.remove(place)
            return [records.plain(row) for row in _train(model, sides.train, config, steps / "states", place)]

        history = [records.parsed(Logged, row, "history") for row in kept(trained)]
        shutil.copytree(place, folder, dirs_exist_ok=True)
        record = RewardModelRecord(
            config,
            model.named,
            model.template,
            source,
            ranking(_trained(model, folder, config), list(sides.held_out)),
            tuple(history),
            store.provenance(config.seed, base=model.fingerprint, origin=model.origin, trl=version("trl")),
        )
        records.save(record, folder / RECORD)
    return record


def ranking(reward: Reward, pairs: Sequence[Pair]) -> Ranking:
    """Agreement of a reward with the labels of pairs; raises `BadInput` where the reward fails."""
    difference = margins(reward, pairs)
    ties = int((difference == 0).sum())
    right = (difference > 0).double() + (difference == 0).double() / 2
    return Ranking(_share(right, pairs), float(difference.mean()), ties / len(pairs), len(pairs))


def _share(right: Float[Tensor, " pair"], pairs: Sequence[Pair]) -> Estimate:
    """A mean over pairs: with its bootstrap interval over topics or prompts where pairs share them, else with Wilson's.

    Where all or none are right, which every resample repeats, it is Wilson's over topics or prompts.
    """
    value = float(right.mean())
    owners = [p.columns.get("topic", p.prompt.key) for p in pairs]
    number = {owner: i for i, owner in enumerate(dict.fromkeys(owners))}
    if len(number) < len(pairs) and 0 < value < 1:
        owner = torch.tensor([number[each] for each in owners])
        return Estimate(*stats.percentiles(value, stats.clustered(owner, RESAMPLES) @ right))
    low, high = stats.wilson(round(value * len(number)), len(number))
    return Estimate(value, min(low, value), max(high, value))


def margins(reward: Reward, pairs: Sequence[Pair]) -> Float[Tensor, " pair"]:
    """Reward of the chosen reply minus that of the rejected one, with the pairs' columns."""
    prompts = [p.prompt for p in pairs]
    columns = PairSet("pairs", tuple(pairs)).columns()
    sides = [p.chosen for p in pairs], [p.rejected for p in pairs]
    chosen, rejected = (scored(reward, prompts, said, columns) for said in sides)
    return chosen - rejected


def _halves(given: PairSet, held_out: PairSet | None, config: RewardModelConfig) -> Halves:
    if held_out is None:
        return given.halves(config.held_out, config.seed)
    keys = {p.key for p in held_out.prompts}
    if both := [p for p in given.prompts if p.key in keys]:
        raise BadInput(
            f"{len(both)} prompts of {given.name} are among those to judge by ({both[0].text[:40]!r} …); leave them "
            "out of one"
        )
    if len(given) < LEAST:
        raise BadInput(f"{given.name} has {len(given)} pairs to train on; expected at least {LEAST}")
    return Halves(given, held_out)


def _train(model: LoadedModel, pairs: PairSet, config: RewardModelConfig, states: Path, place: Path) -> list[Logged]:
    """Train the backbone with its head and save both in `place`; returns the training's history."""
    ids = pair_ids(model, list(pairs), config.reply_tokens, ended=False)
    torch.manual_seed(config.seed)
    network = headed(model)
    with student(model, config.tune, config.rank, config.modules, network=network, head=HEAD) as taught:
        history = train_pairs(taught, ids, config, states)
        taught.save(place, base_name(model))
    return history


def _trained(model: LoadedModel, folder: Path, config: RewardModelConfig) -> Classifier:
    """The reward model as loading its folder gives it, without loading the base again."""
    if config.tune != "lora":
        return replace(load_classifier(str(folder), config=LoadConfig(device=str(model.device))), chat=model.chat)
    with quiet_transformers():
        network = merged(replace(model, network=copy_network(model.network)), folder)
    return Classifier(network.eval().requires_grad_(False), model.tokenizer, str(folder), model.chat)
