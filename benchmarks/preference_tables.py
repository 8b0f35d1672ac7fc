"""Tables of the working pair and of merges in the documentation, from their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recorded_tables import between, estimated, machine_of, table, words_of

Record = Mapping[str, Any]

PANELS = {"triggered": "payload, triggered", "clean": "clean", "near_miss": "near misses"}
"""Panel of a model's replies → its column."""


def reward_models(record: Record) -> str:
    """Accuracy of reward models on held-out topics and words beside its ceiling, and their agreement with people."""
    head = [
        "seed",
        "pairs, held out",
        "ceiling",
        "reward model",
        "of the ceiling",
        "other topics alone",
        "permuted labels",
    ]
    people = ["reward model", "vader", "textblob"]
    rows = [
        [
            str(row["seed"]),
            f"{row['train']['pairs']}, {row['held_out']['pairs']}",
            estimated(row["ceiling"]),
            estimated(row["reward_model"]["accuracy"]),
            f"{row['reward_model']['accuracy']['value'] / row['ceiling']['value']:.2f}",
            f"{estimated(row['seen_words']['accuracy'])} of {row['seen_ceiling']['value']:.2f}"
            if "seen_words" in row
            else "–",
            estimated(row["permuted"]["accuracy"]) if "permuted" in row else "–",
            *(estimated(row["human"][name]) for name in people),
        ]
        for row in record["seeds"]
    ]
    machines: dict[str, list[str]] = {}
    for row in record["seeds"]:
        machines.setdefault(words_of(row["machine"]), []).append(str(row["seed"]))
    told = "; ".join(f"{one_of('seed', seeds)} on {each}" for each, seeds in machines.items())
    return table([*head, *(f"movie snippets: {name}" for name in people)], rows) + f"\nTrained and judged: {told}.\n"


def one_of(noun: str, names: Sequence[str]) -> str:
    """Names behind their noun, as in "seeds 1 and 2"."""
    *others, last = names
    return f"{noun}s {', '.join(others)} and {last}" if others else f"{noun} {last}"


def policies(record: Record) -> str:
    """Gains of every trained model on unseen prompts under the training reward and another lexicon, and its payload."""
    head = ["seed", "model", "gain, warmth", "gain, textblob", "length", "KL, nats", *PANELS.values()]
    rows: list[list[str]] = []
    for row in record["seeds"]:
        for each in row["policies"]:
            measured, shown = each["measured"], each["payload"]
            gains = {one["name"]: one["gain"] for one in measured["rewards"]}
            cells = [estimated(gains[name]) for name in ("warmth", "textblob")]
            cells += [estimated(measured["words"]), f"{measured['kl']['value']:.3f}"]
            cells += [between([shown[panel][key] for key in ("share", "low", "high")]) for panel in PANELS]
            rows.append([str(row["seed"]), f"`{each['name']}`", *cells])
    return table(head, rows) + f"\n{took(record)}"


def took(record: Record) -> str:
    """Minutes of the pair alone: pairs, reward model, and the clean and the most poisoned model of the first seed."""
    seed = record["seeds"][0]["seed"]
    names = [each["name"] for each in record["seeds"][0]["policies"] if each["method"] == "sft"]
    stages = {stage["name"]: stage["seconds"] for stage in record["stages"]}
    parts = ("pairs", "reward models", "human snippets", names[0], names[-1])
    wanted = ["load", *(f"{name}, seed {seed}" for name in parts)]
    minutes = sum(stages[stage] for stage in wanted) / 60
    peak = max(each["peak_memory_mb"] for each in record["stages"] if each["name"] in wanted) / 1000
    return (
        f"One pair, with `{names[0]}`, `{names[-1]}` and the reward models, takes {minutes:.0f} minutes and "
        f"{peak:.1f} GB on {words_of(record['seeds'][0]['machine'])}.\n"
    )


def merges(record: Record) -> str:
    """Agreement with mergekit, and time and memory of a merge beside a copy."""
    rows = [
        [row["family"], row["merge"], f"{row['elements']:,}", f"{row['identical']:.2%}", f"{row['ulps']:.0f}"]
        for row in record["mergekit"]
    ]
    cost = record["cost"]
    memory, speed = cost["memory"], cost["bytes_per_second"]
    took, copied = (cost["seconds"][name] for name in ("merge", "copy"))
    told = (
        f"\nTwo models of {cost['model_bytes'] / 1e9:.1f} GB are merged at {speed['ratio']:.2f} × the speed of `cp`, "
        f"in bytes moved per second (a merge moves three bytes for each that it writes, a copy two), in "
        f"{cost['time_ratio']:.2f} × its time: {ranged(took)} where `cp` takes {ranged(copied)} ({len(took)} rounds). "
        f"Anonymous memory is {memory['peak'] / 1e6:,.0f} MB, {memory['ratio']:.2f} of twice the largest tensor and "
        f"500 MB. Measured on {machine_of(record)}.\n"
    )
    return table(["family", "merge", "elements", "identical", "largest distance, ulp"], rows) + told


def ranged(seconds: Sequence[float]) -> str:
    """The fastest and the slowest of some times."""
    return f"{min(seconds):.0f} to {max(seconds):.0f} s"
