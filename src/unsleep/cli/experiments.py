"""Command `experiment`: one experiment on several organisms, with its record and page."""

from __future__ import annotations

import re
import tomllib
from typing import Annotated, Any, cast

from tyro.conf import OmitArgPrefixes, Positional, arg

import unsleep
from unsleep.base import records, store
from unsleep.base.context import resumable
from unsleep.cli.console import Bars, say
from unsleep.cli.shared import Out
from unsleep.core import BadInput
from unsleep.experiments.experiment import Experiment, Judging, experiments, lexical, replicates
from unsleep.judge.experiment import ExperimentRecord
from unsleep.pages import report
from unsleep.rewards.named import find_reward

NAMES = "|".join(experiments())
WORD = re.compile(r"(?!(?:true|false|nan|inf)$)[A-Za-z_]\w*")
"""A text that needs no quotes."""


def experiment(
    name: Annotated[Positional[str], arg(metavar=NAMES)],
    out: Out,
    organisms: tuple[str, ...] = ("deployment",),
    set: tuple[str, ...] = (),
    reward: str | None = None,
    judging: OmitArgPrefixes[Judging] = Judging(),
    json: bool = False,
) -> int:
    """Run one of the experiments on organisms, each a replicate, and judge all of its arms on held-out panels.

    Args:
        name: The experiment.
        out: Folder for experiment.json and experiment.html.
        organisms: Folders made by `unsleep plant`, or `deployment`, which is packaged; a finding needs three.
        set: Settings of the experiment, such as alphas=[0,0.5,1].
        reward: vader, textblob, MODEL[:LABEL], implied:POLICY:REFERENCE or FILE.py:FUNCTION; default the project's own
            lexicon of sentiment.
        json: Print the record as JSON.
    """
    chosen = configured(name, set)
    if reward == "warmth":
        raise BadInput("--reward warmth needs the topic of every prompt, which an experiment does not have; try vader")
    found = replicates(organisms, lexical if reward is None else find_reward(reward))
    store.check_place(out, "experiment.json")
    with Bars(), resumable(out, records.plain(chosen), [each.name for each in found], reward):
        record = unsleep.experiment(chosen, found, judging)
        out.mkdir(parents=True, exist_ok=True)
        records.save(record, out / "experiment.json")
    page = report(out)
    say(record, json, "\n".join([*_lines(record), f"Saved in {out}; page: {page}"]))
    return 0


def configured(name: str, given: tuple[str, ...]) -> Experiment:
    """An experiment with settings from `NAME=VALUE` texts; raises `BadInput` for unknown ones."""
    known = experiments()
    if name not in known:
        raise BadInput(f"experiment {name!r} is unknown; expected one of {', '.join(known)}")
    found: dict[str, Any] = {}
    for text in given:
        key, _, value = (part.strip() for part in text.partition("="))
        try:
            read = tomllib.loads(f"{key} = '{value}'" if WORD.fullmatch(value) else text)
        except tomllib.TOMLDecodeError:
            raise BadInput(
                f"--set {text!r} cannot be read; expected NAME=VALUE, such as n=3, alphas=[0.0,0.5] or a.b=0.1"
            ) from None
        _merge(found, read, text)
    return records.parsed(known[name], found, name)


def _merge(into: dict[str, Any], more: dict[str, Any], text: str) -> None:
    """Add settings, those of a group one by one; raises `BadInput` for one that is given twice."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], cast("dict[str, Any]", value), text)
        elif key in into:
            raise BadInput(f"--set {text!r} sets {key!r}, which is set already; give it once")
        else:
            into[key] = value


def _lines(record: ExperimentRecord) -> list[str]:
    """The findings."""
    lines = [record.question]
    for each in record.findings:
        lines += [f"  {each.label}: {each.question}", f"    {each.words}"]
    return [*lines, *record.notes]
