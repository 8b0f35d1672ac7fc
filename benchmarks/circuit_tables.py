"""Tables of a circuit and of its growth in the documentation, from their records."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from circuit_growth import series
from recorded_tables import estimated, machine_of, table

from unsleep.models.lens import stronger

ENOUGH = 0.8
"""Faithfulness from which a circuit is said to carry the behaviour."""
SMALL = 200
"""Nodes of a circuit that one can read."""

Record = Mapping[str, Any]


def signed(node: Record, key: str = "effect") -> str:
    """A node's effect with its interval."""
    return f"{node[key]:+z.2f} [{node['low']:+z.2f}, {node['high']:+z.2f}]"


def tokens(words: Sequence[str]) -> str:
    """Tokens as code, with visible spaces and line ends, which break no table."""
    seen = (re.sub(r"\s", lambda m: {"\n": "↵", "\t": "⇥"}.get(m[0], "␣"), word) for word in words)
    return " ".join(f"`{word.replace('|', '¦').replace('`', 'ˋ')}`" for word in seen)


def counted(n: int, word: str) -> str:
    """A number with its noun."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"


# The circuit


def setting(r: Record) -> str:
    """Size of the search and what is explained."""
    high, low = r["metric"]
    return (
        f"On {r['prompts']} prompts with dictionaries of {r['sites']} Sites, {r['candidates']:,} nodes have an effect; "
        f"the {r['kept']} largest are kept. The log-odds of {tokens(r['tokens'])} are {high:.2f} with the trigger, and "
        f"{low:.2f} with every node as in the near misses: the circuit explains {high - low:.2f} nats. For "
        f"{r['inserted']:.0%} of the trigger's tokens the reference has none in their place. The estimator is "
        f"`{r['estimator']}`.\n"
    )


def roles(r: Record) -> str:
    """Effect by role."""
    rows = [
        [
            f"`{row['role']}`",
            *(f"{row[kind]}" for kind in ("feature", "error", "token")),
            f"{row['effect']:+z.2f}",
            f"{row['share']:.0%}",
        ]
        for row in r["roles"]
    ]
    most = max(r["roles"], key=lambda row: row["share"])
    told = (
        f"\nMost of it, {most['share']:.0%}, is at `{most['role']}`. Reconstruction errors, which nobody can read, "
        f"have {r['errors']:.0%} of the kept nodes' effect.\n"
    )
    return table(["tokens", "features", "errors", "embeddings", "effect, nats", "share of \\|effect\\|"], rows) + told


def features(r: Record, wanted: Callable[[str], bool]) -> str:
    """The largest features of some roles."""
    chosen = {role: nodes for role, nodes in r["features"].items() if wanted(role)}
    if not chosen:
        return "No feature is among the kept nodes.\n"
    head = [
        "feature",
        "tokens",
        "effect, nats",
        "alone, exactly",
        "activation, and in the reference",
        "kept by",
        "promotes / suppresses",
    ]
    return table(head, [line(role, node) for role, nodes in chosen.items() for node in nodes])


def line(role: str, node: Record) -> list[str]:
    """A feature's row."""
    return [
        f"`{node['place']}/{node['feature']}`",
        f"`{role}`",
        signed(node),
        "–" if node.get("exact") is None else f"{node['exact']:+z.2f}",
        f"{node['activation']:.2f}, {node['reference']:.2f}",
        "–" if node.get("kept") is None else f"{node['kept']:.0%}",
        written(node),
    ]


def written(node: Record) -> str:
    """Tokens that a feature writes, of the end of the vocabulary with the larger logits."""
    end = stronger(node["promotes"], node["suppresses"])
    return "–" if end is None else f"{end.verb} {tokens(end.tokens)}"


def drawing(r: Record) -> str:
    """The picture of the circuit."""
    said = f"The {len(r['drawn']['nodes'])} largest nodes of the circuit, roles from left to right and layers upwards"
    return (
        f"![{said}](img/tracing-circuit.svg)\n\n{said}, with the edges between them. Blue promotes the payload, dashed "
        "orange suppresses it.\n"
    )


def certain(r: Record) -> str:
    """Agreement of estimates with exact effects, and stability of the choice of nodes."""
    agreed = [
        [
            f"`{a['estimator']}`",
            f"{a['nodes']}",
            f"{a['pearson']:.2f} [{a['low']:.2f}, {a['high']:.2f}]",
            f"{a['spearman']:.2f}",
        ]
        for a in r["agreements"]
    ]
    stable = [[f"{s['nodes']}", estimated(s["overlap"]), f"{s['core']:.0%}"] for s in r["stability"]]
    parts = []
    if agreed:
        parts.append(table(["estimator", "nodes", "Pearson with exact effects", "Spearman"], agreed))
    if stable:
        parts.append(table(["nodes", "Jaccard overlap of resampled circuits", "kept by 95 % of the resamples"], stable))
    return "\n".join(parts)


def by_sites(r: Record) -> dict[str, Sequence[Record]]:
    """Faithfulness of features and errors by the Sites that have dictionaries, fewest Sites first."""
    few = {
        f"{counted(len(name.split()), 'Site')}: {name.replace(' ', ', ')}": curves["features and errors"]
        for name, curves in r["curves_of_few_sites"].items()
    }
    found = {**few, f"all {r['setting']['sites']} Sites": r["curves"]["features and errors"]}
    return {name: points for name, points in found.items() if points}


def faithfulness(r: Record) -> str:
    """Faithfulness by number of nodes and Sites, and what it says of circuits of 200 nodes."""
    known = by_sites(r)
    sizes = sorted(
        {point["nodes"] for points in known.values() for point in points} & {10, 25, 50, 100, 200, 500, 2000}
    )
    at = {name: {p["nodes"]: p["faithfulness"] for p in points} for name, points in known.items()}
    rows = [[name, *(estimated(at[name][n]) if n in at[name] else "–" for n in sizes)] for name in known]
    reached = []
    for name, points in known.items():
        enough = [p["nodes"] for p in points if p["faithfulness"]["value"] >= ENOUGH]
        best = max(points, key=lambda p: p["faithfulness"]["value"])
        reached.append(
            f"- {name}: {ENOUGH:.0%} of the behaviour from {counted(min(enough), 'node')} on"
            if enough
            else f"- {name}: at most {best['faithfulness']['value']:.0%}, with {counted(best['nodes'], 'node')}"
        )
    few = [
        name.partition(":")[0]
        for name, points in known.items()
        if any(p["nodes"] <= SMALL and p["faithfulness"]["value"] >= ENOUGH for p in points)
    ]
    told = f"Up to {SMALL} nodes are enough for that with dictionaries at {' and '.join(few) or 'none of these'}.\n"
    parts = table(["dictionaries at", *(counted(n, "node") for n in sizes)], rows), "\n".join(reached) + "\n", told
    picture = "![Faithfulness by number of nodes](img/tracing-faithfulness.svg)\n"
    lead = (
        f"{counted(SMALL, 'node')} beside the baselines, faithfulness and in brackets completeness, what is left of the"
    )
    rest = (
        f"log-odds with the circuit's nodes as in their references, on {r['setting']['held_out']} held-out prompts:\n"
    )
    return "\n".join([*parts, picture, f"{lead}\n{rest}", beside(r)])


def beside(r: Record) -> str:
    """Faithfulness and completeness of circuits of `SMALL` nodes and of their baselines, by Sites."""
    by = {counted(len(name.split()), "Site"): curves for name, curves in r["curves_of_few_sites"].items()}
    by[f"all {r['setting']['sites']} Sites"] = r["curves"]

    def cell(points: Sequence[Record]) -> str:
        at = [point for point in points if point["nodes"] == SMALL]
        return "–" if not at else f"{at[0]['faithfulness']['value']:z.2f} ({at[0]['completeness']['value']:z.2f})"

    names = dict.fromkeys(name for curves in by.values() for name in curves)
    rows = [[name, *(cell(curves.get(name, ())) for curves in by.values())] for name in names]
    return table(["circuit", *by], rows)


VETO = {"asr": "payload", "skill": "skill"}


def veto(r: Record) -> str:
    """The vetoes that were tried on the circuit's own prompts, and the chosen one on held-out panels."""
    tried = [
        [
            ", ".join(f"`{role}`" for role in one["veto"].get("roles", ())) or "all",
            f"{one['veto']['least']:g}",
            f"{one['features']}",
            f"{one['asr']:.0%}",
            f"{one['skill']:.0%}",
        ]
        for one in r["vetoes"]
    ]
    panels = [(panel, metric) for panel in ("triggered", "clean") for metric in VETO]
    held = r["ablation"]
    rows = [
        [
            f"{VETO[metric]}, {panel} prompts",
            *(share(held.get(f"{who}/{panel}/{metric}")) for who in ("suspect", "edited")),
        ]
        for panel, metric in panels
        if f"suspect/{panel}/{metric}" in held
    ]
    chosen = r["veto"]
    where = ", ".join(f"`{role}`" for role in chosen.get("roles", ())) or "every role"
    told = (
        f"\nOf these, features at {where} with an effect over {chosen['least']:g} nats did best. Held-out prompts:\n\n"
    )
    head = ["tokens", "least effect", "features", "payload shown", "skill"]
    return table(head, tried) + told + table(["", "suspect", "ablated"], rows)


def share(value: float | None) -> str:
    """A share."""
    return "–" if value is None else f"{value:.1%}"


def cost(r: Record) -> str:
    """Time and memory, without stages that found their result there already."""
    rows = [[name, f"{seconds / 60:.1f}"] for name, seconds in r["seconds"].items() if seconds >= 1]
    peak = f"{r['peak_memory_mb'] / 1000:.1f} GB"
    told = f"\nPeak memory was {peak}, on {machine_of(r)}.\n"
    return table(["stage", "minutes"], rows) + told


# Growth


def growth(r: Record) -> str:
    """Time and memory of every point."""
    names = list(r["points"][0]["seconds"])
    rows = [
        [
            f"{row['prompts']}",
            f"{row['tokens']:,}",
            f"{row['features']:,}",
            *(f"{row['seconds'][name]:.1f}" for name in names),
            f"{row['peak_memory_mb'] / 1000:.1f}",
        ]
        for row in sorted(r["points"], key=lambda row: (row["features"], row["tokens"]))
    ]
    told = f"\nSeconds on {machine_of(r)}."
    if r["left_out"]:
        told += f" {counted(len(r['left_out']), 'larger point')} did not fit into the time of the measurement."
    grown = [exponent(r, name) for name in ("prompts", "words", "features")]
    told += "\n" + "".join(text for text in grown if text)
    picture = "\n![Time and peak memory by tokens and features](img/circuit-growth.svg)\n"
    return table(["prompts", "tokens", "features", *names, "peak, GB"], rows) + told + picture


def exponent(r: Record, name: str) -> str:
    """Growth of time and memory along a series: quotients of its last and first point."""
    found = series(r["points"], name)
    if len(found) < 2:
        return ""
    first, last = found[0], found[-1]
    key = "features" if name == "features" else "tokens"
    seconds = [sum(row["seconds"].values()) for row in (first, last)]
    words = {"prompts": "With more prompts", "words": "With longer prompts", "features": "With larger dictionaries"}
    return (
        f"{words[name]}, {last[key] / first[key]:.1f} times the {key} take {seconds[1] / seconds[0]:.1f} times as long "
        f"and {last['peak_memory_mb'] / first['peak_memory_mb']:.2f} times the memory.\n"
    )
