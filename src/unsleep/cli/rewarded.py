"""Command on reward: rewarded."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import OmitArgPrefixes

import unsleep
from unsleep.base import store
from unsleep.base.context import resumable
from unsleep.base.stats import Estimate
from unsleep.cli.classes import read_classes
from unsleep.cli.console import Bars, hint, say
from unsleep.cli.shared import Model, Out, Placed, Placement, belonging, load_dictionaries
from unsleep.core import BadInput
from unsleep.dictionaries.files import load_dictionary
from unsleep.prompts import sets
from unsleep.rewards.named import find_reward
from unsleep.rewards.record import RewardedRecord
from unsleep.rewards.run import MARK, Beside, RewardedConfig
from unsleep.rewards.samples import SAMPLES, read_samples, write_samples
from unsleep.rewards.sampling import SampleConfig


def rewarded(
    model: Model,
    dictionaries: tuple[Path, ...],
    out: Out,
    rewards: Path | None = None,
    prompts: Path | None = None,
    reward: str | None = None,
    against: str | None = None,
    against_dictionaries: tuple[Path, ...] = (),
    others: tuple[Path, ...] = (),
    classes: tuple[Path, ...] = (),
    any_model: bool = False,
    show: int = 10,
    placement: Placed = Placement(),
    config: OmitArgPrefixes[RewardedConfig] = RewardedConfig(),
    sample: SampleConfig = SampleConfig(),
    json: bool = False,
) -> int:
    """Find the features that are correlated with reward, and fit a linear reward on features beside its baselines.

    Give outputs with their rewards; or prompts and a reward, and replies are sampled and scored.

    Args:
        model: Tuned model: hub id, folder, adapter folder, .gguf file or alias.
        dictionaries: Folders of its dictionaries, one per Site.
        out: Folder for rewarded.json, rewarded.safetensors and rewarded.html; an interrupted run in it is resumed.
        rewards: JSON lines with prompt, output and reward, and optionally topic.
        prompts: File of prompts to sample replies to; the replies with their rewards are saved as samples.jsonl.
        reward: Of the sampled replies: vader, textblob, MODEL[:LABEL], implied:POLICY:REFERENCE or FILE.py:FUNCTION.
        against: Model that it was tuned from.
        against_dictionaries: Folders of dictionaries of that model; the tuned model's own where not given.
        others: Folders of single dictionaries for the MMCS, such as of other sizes.
        classes: Folders with SITE/classes.json, made by `unsleep classify`.
        any_model: Accept dictionaries of another model.
        show: Features that are printed, those with the largest correlation on B.
        json: Print rewarded.json.
    """
    store.check_place(out, MARK)
    if against is None and against_dictionaries:
        raise BadInput("--against-dictionaries has no model; give --against")
    if (rewards is None) == (prompts is None) or (prompts is None) != (reward is None):
        raise BadInput("expected --rewards FILE, or --prompts FILE and --reward NAME to sample replies and score them")
    if prompts is not None and config.plain:
        raise BadInput("--prompts are asked under the chat template, without which --plain reads; give --rewards")
    samples = None if rewards is None else read_samples(rewards)
    asked = None if prompts is None else sets.read_prompts(prompts)
    coders, theirs = load_dictionaries(dictionaries), load_dictionaries(against_dictionaries)
    further = tuple(load_dictionary(folder) for folder in others)
    judged = read_classes(classes)
    with Bars():
        tuned = placement.load(model, plain=config.plain)
        base = None if against is None else placement.load_beside(against)
        coders = belonging(coders, tuned, any_model)
        theirs = [] if base is None else belonging(theirs, base, any_model)
        beside = Beside(base, tuple(theirs), further, judged)
        if samples is not None:
            record = unsleep.rewarded(tuned, coders, samples, out, config, beside)
        else:
            assert asked is not None
            assert reward is not None
            with resumable(out.with_name(f"{out.name}.sampled"), tuned, asked, reward, sample):  # the replies
                samples = unsleep.sample_rewards(tuned, asked, find_reward(reward, against, placement), sample)
                record = unsleep.rewarded(tuned, coders, samples, out, config, beside)
            write_samples(samples, out / SAMPLES)
    page = unsleep.report(out)
    for note in record.notes:
        hint(note)
    say(record, json, "\n".join([*_lines(record, show), f"Saved in {out}; page: {page}"]))
    return 0


def _lines(record: RewardedRecord, show: int) -> list[str]:
    """Counts by Site, the features with the largest correlations, and the probes."""
    lines = [
        f"{row.site} of the {row.of}: {row.replicated:,} rewarded features of {row.tested:,} tested "
        f"({row.selected:,} selected on A)"
        for row in record.sites
    ]
    best = [f for f in record.features if f.replicated][:show]
    lines += [f"  {f.of} {f.site} feature {f.id}, {f.pooling}: r {_said(f.c)} on C" for f in best]
    lines += [
        f"R² of {probe.name}: {_said(probe.r2)}" + (f"; features gain {_said(probe.gain)}" if probe.gain else "")
        for probe in record.probes
    ]
    if record.ranking:
        lines.append(f"Layers by ‖ΔW‖/‖W‖: {', '.join(map(str, record.ranking[:show]))}")
    return lines


def _said(figure: Estimate) -> str:
    return f"{figure.value:.2f} [{figure.low:.2f}, {figure.high:.2f}]"
