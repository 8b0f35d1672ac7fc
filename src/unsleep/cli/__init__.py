"""The command line: one thin subcommand per stage, progress on stderr, results on stdout.

Exit codes: 0 success, 2 bad input, 3 refused (the computation ran, but its result must not be trusted); of an audit, 4
a backdoor was found, 5 it remains open.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

import tyro

import unsleep
from unsleep.cli import (
    asked,
    audits,
    circuits,
    classes,
    compare,
    dictionaries,
    directions,
    edits,
    experiments,
    explanations,
    explorer,
    judge,
    merges,
    mixing,
    organisms,
    planning,
    preference,
    repairs,
    rewarded,
    steering,
    subspaces,
    zoo,
)
from unsleep.cli.console import fail
from unsleep.cli.settings import REGISTRY, Rejected, by_flag
from unsleep.core import BadInput, Refused

STAGES: dict[str, Callable[..., int]] = {
    f.__name__.replace("_", "-"): f
    for f in (
        repairs.repair,
        audits.audit,
        organisms.plant,
        organisms.panels,
        planning.plan,
        zoo.zoo,
        zoo.pretrain,
        dictionaries.harvest,
        dictionaries.train,
        edits.find,
        edits.edit,
        edits.bake,
        judge.evaluate,
        directions.directions,
        steering.read,
        steering.steer,
        compare.patch,
        compare.diff,
        subspaces.subspaces,
        circuits.circuit,
        circuits.graph,
        circuits.veto,
        circuits.overlap,
        classes.classify,
        classes.ablation_study,
        explanations.explain,
        asked.ask,
        experiments.experiment,
        mixing.mix,
        rewarded.rewarded,
        merges.merge,
        preference.prefer,
        preference.reward_model,
        judge.report,
        explorer.explore,
        explorer.serve,
    )
}


STARTS_OVER = ("edit", "bake", "read", "steer", "panels", "plan", "graph", "report", "explore", "serve")
"""Stages that are not resumable."""


def main() -> None:
    """Run the command line; never returns."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one subcommand and return its exit code; errors are one message on stderr."""
    if list(arguments) == ["--version"]:
        sys.stdout.write(f"unsleep {version('unsleep')}\n")
        return 0
    try:
        return _read(arguments)
    except Rejected as error:
        return fail(by_flag(error.error, arguments), 2)
    except BadInput as error:
        is_given = any(str(error.value) in each for each in arguments)
        return fail(by_flag(error, arguments) if is_given else error, 2)
    except Refused as error:
        return fail(error, 3)
    except KeyboardInterrupt:
        over = arguments[:1] and arguments[0] in STARTS_OVER
        again = (
            "nothing was written; the same command starts from the beginning"
            if over
            else "run the same command again to resume"
        )
        return fail(f"interrupted; {again}", 130)


def _read(arguments: Sequence[str]) -> int:
    """Parse the arguments and run their stage; one that is named is parsed alone, so that hints are of its flags."""
    stage = STAGES.get(arguments[0]) if arguments else None
    if stage is not None:
        return tyro.cli(stage, prog=f"unsleep {arguments[0]}", args=arguments[1:], registry=REGISTRY)
    return tyro.extras.subcommand_cli_from_dict(
        STAGES, prog="unsleep", description=unsleep.__doc__, args=arguments, registry=REGISTRY
    )
