"""Command that explains features with a language model as judge: ask."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

import unsleep
from unsleep.base.stats import Estimate
from unsleep.cli.console import Bars, fail, hint, say, visible_line
from unsleep.cli.shared import Placed, Placement
from unsleep.core import BadInput, Refused
from unsleep.explanations.asked import AskConfig, Asked, estimate, write
from unsleep.explanations.budget import Limits
from unsleep.explanations.calls import Asker, Tally
from unsleep.explanations.endpoint import NO_CONNECTION, Endpoint, EndpointConfig
from unsleep.explanations.judges import Judge
from unsleep.explanations.local import LocalJudge
from unsleep.explanations.material import StatisticsContexts
from unsleep.explanations.statistics import FeatureStatistics


def ask(
    folder: Annotated[Positional[Path], arg(metavar="FOLDER")],
    judge: str,
    features: tuple[int, ...] = (),
    sample: int = 0,
    dry_run: bool = False,
    cache: Path | None = None,
    batch: int = 8,
    placement: Placed = Placement(),
    endpoint: OmitArgPrefixes[EndpointConfig] = EndpointConfig(),
    limits: OmitArgPrefixes[Limits] = Limits(),
    config: OmitArgPrefixes[AskConfig] = AskConfig(),
    json: bool = False,
) -> int:
    """Explain, score and classify features with a language model: an OpenAI-compatible endpoint or a local one.

    Args:
        folder: Folder of one Site made by `unsleep explain`; explanations.json in it is added to.
        judge: With --endpoint, the model's name there; else a local model: hub id, folder or alias.
        features: Numbers of features.
        sample: Also this many random features that fire.
        dry_run: Print calls, tokens and cost that the run needs at most, and call nothing.
        cache: Folder of answered calls; default `calls` in FOLDER.
        batch: Questions per batch of a local judge.
        json: Print what was found, or the estimate, as JSON.
    """
    statistics = FeatureStatistics.load(folder)
    wanted = _features(statistics, features, sample, config.seed)
    contexts = StatisticsContexts(statistics, 2 * config.asked)
    with Bars():
        asker = Asker(_judge(judge, endpoint, placement, batch, dry_run), cache or folder / "calls", limits)
        bound = estimate(contexts, wanted, asker, config)
        if dry_run:
            say(bound, json, f"{len(wanted)} features need at most {_spent(bound)}; {bound.cached:,} calls are cached")
            return 0
        _check_capped(endpoint, limits, bound)
        asked = unsleep.ask(contexts, wanted, asker, config)
    if _unreached(asked):
        raise Refused(f"no connection to {endpoint.endpoint}: is the endpoint running?")
    if not asked.explanations and not asked.stopped:
        raise Refused(f"{asker.judge.name} explained no feature: {_reasons(asked)}. Another judge may keep to the form")
    write(asked, folder, statistics, config)
    for note in asker.judge.notes:
        hint(note)
    say(
        {"explanations": asked.explanations, "classes": asked.classes, "means": asked.means},
        json,
        _words(asked, folder),
    )
    if asked.stopped:
        left = f"{len(asked.explanations)} of {len(wanted)} features are complete; answered calls are kept"
        return fail(f"stopped: {asked.stopped}. {left}, and the same command goes on", 3)
    return 0


def _unreached(asked: Asked) -> bool:
    """True if every call failed because there was no connection."""
    failed = [asked.stopped] if asked.stopped else [why for why in asked.left_out.values() if why.startswith("failed")]
    answered = asked.explanations or asked.tally.calls or asked.tally.cached
    return bool(failed) and not answered and all(NO_CONNECTION in why for why in failed)


def _features(statistics: FeatureStatistics, given: tuple[int, ...], sample: int, seed: int) -> list[int]:
    """The features to ask about; raises `BadInput` for none, and for one that does not exist."""
    if unknown := [f for f in given if not 0 <= f < statistics.size]:
        raise BadInput(
            f"--features {unknown[0]} does not exist at {statistics.site}; it has 0 to {statistics.size - 1}"
        )
    if sample < 0 or not (given or sample):
        raise BadInput("no features are named; expected --features 17 203, or --sample 50 for random ones")
    firing = [i for i, density in enumerate(statistics.density.tolist()) if density > 0 and i not in given]
    return [*dict.fromkeys(given), *random.Random(seed).sample(firing, min(sample, len(firing)))]


def _judge(name: str, config: EndpointConfig, placement: Placement, batch: int, dry: bool) -> Judge:
    if name.startswith(("http://", "https://")):
        raise BadInput("--judge is a URL; give it as --endpoint, and the model's name there as --judge")
    if config.endpoint is None:
        if config.key_env is not None:
            raise BadInput("--key-env is for an endpoint; pass --endpoint with it")
        if batch < 1:
            raise BadInput(f"--batch is {batch}; expected at least 1")
        return LocalJudge(placement.load(name), batch)
    return Endpoint.of(name, replace(config, key_env=None) if dry else config)


def _check_capped(config: EndpointConfig, limits: Limits, bound: Tally) -> None:
    """Raise `BadInput` for an endpoint without a cap; print a note where a cap is below the estimate."""
    if config.endpoint is not None and limits.max_cost is None and limits.max_calls is None:
        raise BadInput(f"the run needs at most {_spent(bound)}; cap it with --max-cost or --max-calls")
    over = limits.max_cost is not None and bound.cost is not None and bound.cost > limits.max_cost
    if over or (limits.max_calls is not None and bound.calls > limits.max_calls):
        hint(f"the run needs at most {_spent(bound)}, more than its cap: it may stop before the end")


def _words(asked: Asked, folder: Path) -> str:
    """The result as text."""
    lines: list[str] = []
    for feature, explanation in asked.explanations.items():
        labels = ", ".join(f"{c.name} {c.score:.0%}" for c in asked.classes.get(feature, ()))
        lines.append(f"feature {feature}: {visible_line(explanation.text)}{f' [{labels}]' if labels else ''}")
        lines += [f"  {name:<20} {_figure(score)}" for name, score in explanation.scores.items()]
    if asked.means:
        lines += ["means over features:", *(f"  {name:<22} {_figure(mean)}" for name, mean in asked.means.items())]
    if reasons := _reasons(asked):
        lines.append(f"left out: {reasons}")
    if unanswered := asked.tally.unanswered:
        lines.append("questions without an answer: " + ", ".join(f"{n:,} {why}" for why, n in unanswered.items()))
    lines.append(f"{_spent(asked.tally)}; {asked.tally.cached:,} calls cached. Saved in {folder}")
    return "\n".join(lines)


def _figure(interval: Estimate) -> str:
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _reasons(asked: Asked) -> str:
    """Features without an explanation, by reason."""
    why: dict[str, list[int]] = {}
    for feature, reason in asked.left_out.items():
        why.setdefault(reason, []).append(feature)
    named = {reason: ", ".join(map(str, found[:5])) + ", …" * (len(found) > 5) for reason, found in why.items()}
    return "; ".join(f"{len(found)} ({named[reason]}): {reason}" for reason, found in why.items())


def _spent(tally: Tally) -> str:
    cost = "" if tally.cost is None else f", cost {tally.cost:.4f}"
    return f"{tally.calls:,} calls, {tally.input_tokens:,} + {tally.output_tokens:,} tokens{cost}"
