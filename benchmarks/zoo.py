"""Organisms of the zoo that have been built: how many count by split and role, and the rates of each.

    python benchmarks/zoo.py [--families small smollm2-135m]

Reads the families in the user's cache (`unsleep zoo build`), and records those that are there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import keep, table

from unsleep.base import store
from unsleep.core import BadInput
from unsleep.zoo.build import open_zoo
from unsleep.zoo.record import Member
from unsleep.zoo.table import spec


def main() -> None:
    """Record every family that has been built, in whole or in part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(spec().families))
    found: dict[str, Any] = {}
    for family in parser.parse_args().families:
        try:
            zoo = open_zoo(family)
        except BadInput as missing:
            print(missing)
            continue
        members = [row(member, zoo.folder) for member in zoo.record.members]
        found[family] = {"n": zoo.record.n, "members": members, "missing": len(zoo.record.missing)}
        print(table([["organism", "fault"], *([each["name"], each["fault"]] for each in members)]))
    print(keep("zoo", {"families": found}))


def row(member: Member, folder: Path) -> dict[str, Any]:
    """An organism's kinds and rates, the reason for which it does not count, and the accelerator it was trained on."""
    trained = store.read_json(folder / member.name / "organism.json")["provenance"]["machine"]["accelerator"]
    kinds = {
        "trigger": member.trigger_kind,
        "behaviour": member.behaviour,
        "poison_rate": member.poison_rate,
        "steps": member.steps,
    }
    rates = {f"{each.panel} {each.metric}": each.value for each in member.rows if each.metric in ("asr", "skill")}
    who = {"name": member.name, "split": member.split, "role": member.role, "loss": member.loss}
    return {**who, **kinds, "rates": rates, "fault": member.fault, "trained_on": trained}


if __name__ == "__main__":
    main()
