"""Commands of preference training: prefer, reward-model."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import OmitArgPrefixes

from unsleep.base.functions import function_of
from unsleep.cli.console import Bars, hint, say
from unsleep.cli.shared import Model, Out, Placed, Placement
from unsleep.core import BadInput
from unsleep.pages import report
from unsleep.preference import reward_models, run
from unsleep.preference.config import ONLINE, PreferConfig, RewardModelConfig
from unsleep.preference.pairs import PairSet
from unsleep.preference.reading import read_pairs
from unsleep.preference.record import Judged, PreferenceRecord, Source
from unsleep.preference.trainers import check_trl
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet
from unsleep.rewards.named import find_reward


def prefer(
    model: Model,
    out: Out,
    pairs: str | None = None,
    prompts: Path | None = None,
    reward: str | None = None,
    judges: tuple[str, ...] = (),
    metric: str | None = None,
    eval_prompts: Path | None = None,
    pairs_split: str = "train",
    limit: int | None = None,
    skip_bad: bool = False,
    placement: Placed = Placement(),
    config: OmitArgPrefixes[PreferConfig] = PreferConfig(),
    json: bool = False,
) -> int:
    """Train a model on preferences: DPO, SFT, RLOO, GRPO or best-of-n, with LoRA, QLoRA or all weights.

    The folder is an adapter over the model, or a checkpoint, that every command takes. Rewards and metrics are names
    (vader, textblob, warmth), reward models, implied:POLICY:REFERENCE, or functions FILE.py:FUNCTION.

    Args:
        model: Model to train: hub id, folder, adapter folder, .gguf file or alias.
        out: New folder for the adapter or checkpoint, preference.json and its page.
        pairs: Preference pairs: a file of chosen and rejected replies, or a data set's hub id, such as
            Anthropic/hh-rlhf:helpful-base.
        prompts: Prompts instead of pairs, for rloo, grpo and best-of-n.
        reward: What rloo, grpo and best-of-n maximise; dpo and sft report it.
        judges: Further rewards that are reported, such as an independent lexicon.
        metric: A function FILE.py:FUNCTION that gives named metrics of replies.
        eval_prompts: Prompts to judge by; by default a share of the data is held out.
        pairs_split: Split of a data set on the hub.
        limit: Read only so many pairs.
        skip_bad: Leave out pairs with an empty side or equal sides, instead of refusing them.
        json: Print the record as JSON.
    """
    check_trl()
    _check_placement(placement)
    _check_given(
        config, "generations", "temperature", needs=config.method in ONLINE, where="with rloo, grpo, best-of-n"
    )
    _check_given(config, "held_out", "eval_limit", needs=eval_prompts is None, where="without --eval-prompts")
    judged = bool(reward or judges or metric)
    _check_given(config, "eval_limit", needs=judged, where="with --reward, --judges or --metric")
    if eval_prompts is not None and not judged:
        raise BadInput("--eval-prompts: nothing is judged without --reward, --judges or --metric; give one")
    data = _data(pairs, prompts, config, pairs_split, limit, skip_bad)
    asked = None if eval_prompts is None else sets.read_prompts(eval_prompts, split="held_out", name=eval_prompts.name)
    with Bars():
        loaded = placement.load(model)
        rewards = [find_reward(name, model, placement) for name in (*([reward] if reward else []), *judges)]
        record = run.prefer(
            loaded,
            data,
            out,
            reward=rewards[0] if reward else None,
            judges=rewards[1:] if reward else rewards,
            metric_fn=None if metric is None else function_of(metric, "--metric"),
            eval_prompts=asked,
            config=config,
        )
    _tell_left_out(record.data)
    page = report(out)
    say(record, json, "\n".join([*_lines(record), f"Saved in {out}; page: {page}"]))
    return 0


def reward_model(
    model: Model,
    pairs: str,
    out: Out,
    held_out_pairs: str | None = None,
    pairs_split: str = "train",
    limit: int | None = None,
    skip_bad: bool = False,
    placement: Placed = Placement(),
    config: OmitArgPrefixes[RewardModelConfig] = RewardModelConfig(),
    json: bool = False,
) -> int:
    """Train a reward model on preference pairs, a model with a head of one output, and judge it on held-out prompts.

    Args:
        model: Model whose backbone is trained: hub id, folder, adapter folder, .gguf file or alias.
        pairs: Preference pairs: a file of chosen and rejected replies, or a data set's hub id.
        out: New folder for the adapter with its head, or the checkpoint, reward_model.json and its page.
        held_out_pairs: Pairs to judge by; by default a share of the data is held out.
        pairs_split: Split of a data set on the hub.
        limit: Read only so many pairs.
        skip_bad: Leave out pairs with an empty side or equal sides, instead of refusing them.
        json: Print the record as JSON.
    """
    check_trl()
    _check_placement(placement)
    _check_given(config, "held_out", needs=held_out_pairs is None, where="without --held-out-pairs")
    data = read_pairs(pairs, split=pairs_split, limit=limit, skip_bad=skip_bad)
    held = None if held_out_pairs is None else read_pairs(held_out_pairs, split=pairs_split, skip_bad=skip_bad)
    with Bars():
        loaded = placement.load(model)
        record = reward_models.reward_model(loaded, data, out, held_out=held, config=config)
    _tell_left_out(record.data)
    found, page = record.held_out, report(out)
    text = (
        f"Held-out accuracy {found.accuracy} on {found.n} pairs, mean margin {found.margin:.2f}\n"
        f"Saved in {out}, to be used as --reward {out}; page: {page}"
    )
    say(record, json, text)
    return 0


def _check_placement(placement: Placement) -> None:
    if placement.adapters:
        raise BadInput(
            f"--adapters {placement.adapters[0]}: a trained adapter names one base; merge the adapters into a "
            "checkpoint first"
        )


def _check_given(config: PreferConfig | RewardModelConfig, *options: str, needs: bool, where: str) -> None:
    """Raise `BadInput` for an option that differs from its default where it would be ignored."""
    for name in options if not needs else ():
        if (value := getattr(config, name)) != getattr(type(config)(), name):
            raise BadInput(f"--{name.replace('_', '-')} {value:g} counts only {where}; leave it out")


def _data(
    pairs: str | None, prompts: Path | None, config: PreferConfig, split: str, limit: int | None, skip_bad: bool
) -> PairSet | PromptSet:
    if (pairs is None) == (prompts is None):
        raise BadInput("expected either --pairs, or --prompts for rloo, grpo and best-of-n")
    if prompts is None:
        return read_pairs(str(pairs), split=split, limit=limit, skip_bad=skip_bad)
    if config.method not in ONLINE:
        raise BadInput(f"--prompts: {config.method} learns from pairs of replies; expected --pairs")
    found = sets.read_prompts(prompts, split="train", name=prompts.name)
    return found if limit is None else found.head(limit)


def _tell_left_out(data: Source) -> None:
    """Note on stderr what of the data is not trained on."""
    if data.dropped:
        hint(f"{data.dropped} pairs are left out: a side is empty, or both are equal")
    if data.tied:
        hint(f"{data.tied} of {data.train} prompts are not trained on: all of their samples are empty or earn the same")


def _lines(record: PreferenceRecord) -> list[str]:
    """The record in words."""
    measured = record.measured
    if measured is None:
        return [f"Trained by {record.config.method}; no --reward, --judges or --metric to judge by"]
    return [
        f"{record.config.method} judged on {measured.n} held-out prompts:",
        *(_line(each) for each in (*measured.rewards, *measured.metrics)),
        f"  words of a reply, after over before: {measured.words}",
        f"  KL to the model before: {measured.kl} nats per token",
    ]


def _line(each: Judged) -> str:
    return f"  {each.name:<12} {each.before.value:.3f} -> {each.after.value:.3f}, gain {each.gain}"
