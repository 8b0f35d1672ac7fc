"""Tables of planned memory, explanations, classes and mixtures in the documentation, from their records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from unsleep.zoo.table import select

Record = Mapping[str, Any]

FOLDED = 24
"""Rows of an experiment's table above which it is folded away."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def between(figure: Sequence[float], digits: int = 2) -> str:
    """A value with its interval, from three numbers."""
    value, low, high = (f"{number:z.{digits}f}" for number in figure)
    return f"{value} [{low}, {high}]"


def estimated(figure: Record, digits: int = 2) -> str:
    """An estimate with its interval."""
    return between([figure[key] for key in ("value", "low", "high")], digits)


def machine_of(record: Record) -> str:
    """Cores and processor of a record's machine, and its GPU."""
    return words_of(record["provenance"]["machine"])


def words_of(machine: Record) -> str:
    """Cores and processor of a machine, and its GPU."""
    gpu, threads, cores = machine.get("accelerator", "none"), machine.get("threads", 0), machine["cores"]
    used = f"{threads} of {cores}" if 0 < threads < cores else f"{cores}"
    return f"{used} cores of {machine['processor']}" + ("" if gpu == "none" else f" with an {gpu}")


def plan(record: Record) -> str:
    """Predicted and measured peaks of every cell, largest error first."""
    rows = sorted(record["measured"].items(), key=lambda item: -abs(item[1]["error"]))
    close = sum(abs(row["error"]) <= 0.15 for _, row in rows)
    head = ["cell", "predicted, MB", "measured, MB", "error"]
    cells = [
        [f"`{name}`", f"{row['predicted'] / 1e6:.1f}", f"{row['measured'] / 1e6:.1f}", f"{row['error']:+.1%}"]
        for name, row in rows
    ]
    told = f"{close} of {len(rows)} cells are within 15 %; the mean error is {record['mean_error']:.1%} "
    told += f"({record['tracker'].rpartition('.')[2]}, {machine_of(record)}).\n\n"
    return told + table(head, cells)


def zoo(record: Record) -> str:
    """Organisms that count, that are built and that are specified, by family, split and role; why some do not count."""
    rows: list[list[str]] = []
    told: list[str] = []
    for family, found in record["families"].items():
        groups: dict[tuple[str, str], list[str]] = {}
        for each in found["members"]:
            groups.setdefault((each["split"], each["role"]), []).append(each["fault"])
        specified = Counter((each.split, each.role) for each in select(family))
        rows += [
            [f"`{family}`", f"`{split}`", role, *(str(n) for n in (faults.count(""), len(faults), total))]
            for (split, role), total in specified.items()
            for faults in [groups.get((split, role), [])]
        ]
        faults = [each["fault"] for each in found["members"] if each["fault"]]
        kinds = {what: sum(what in fault for fault in faults) for what in ("with the trigger", "near_miss", "skill")}
        told.append(
            f"Of `{family}`, {kinds['with the trigger']} have not learned the "
            f"payload, {kinds['near_miss']} show it on near misses too, and {kinds['skill']} lack the skill. "
            f"Trained on: {', '.join(sorted({each['trained_on'] for each in found['members']}))}."
        )
    return table(["family", "split", "role", "count", "built", "specified"], rows) + "\n" + "\n".join(told) + "\n"


def explanations(record: Record) -> str:
    """Mean scores of random features' explanations beside the baselines, and what statistics cost."""
    compared, setting = record["compared"], record["setting"]
    methods = list(dict.fromkeys(row["method"] for row in compared))
    metrics = list(dict.fromkeys(row["metric"] for row in compared))
    found = {(row["metric"], row["method"]): row for row in compared}
    cells = [[metric, *(estimated(found[metric, m]) for m in methods)] for metric in metrics]
    told = (
        f"{compared[0]['features']} random features of {setting['features']:,} at {setting['site']} of "
        f"{setting['model']}, {record.get('tokens_of_explain', setting['tokens']):,} tokens of plain text:\n\n"
    )
    times = len(record["seconds"]["encode"])
    rounds = "once" if times == 1 else f"{times} times"
    cost = (
        f"\nThe statistics of all features take {record['ratio']:.2f} times as long as the encode alone (measured "
        f"{rounds} each); all "
        f"explanations with their baselines take {record['seconds_of_explain'] / 60:.1f} minutes and "
        f"{record['peak_memory_mb'] / 1000:.1f} GB on {machine_of(record)}.\n"
    )
    return told + table(["", *methods], cells) + cost


def classes(record: Record) -> str:
    """Macro-F1 of every way on organisms that chose the thresholds and on held-out ones."""
    rows = [
        [
            part,
            way,
            between(each["macro_f1"]),
            f"{each['permuted'][0]:.2f}",
            *(f"{value:.2f}" for value in each["by_class"].values()),
            str(each["n"]),
        ]
        for part, ways in record["summary"].items()
        for way, each in ways.items()
    ]
    first = next(iter(next(iter(record["summary"].values())).values()))
    kinds = list(first["by_class"])
    told = ", ".join(name for name in record["organisms"] if name not in record["training"])
    note = f"\nHeld out: {told}. `permuted` is the mean macro-F1 of permuted labels.\n"
    return table(["organisms", "way", "macro-F1", "permuted", *kinds, "features"], rows) + note


def causes(record: Record) -> str:
    """Change of payload and skill with the features of a class ablated, beside the matched random control."""
    rows: list[list[str]] = []
    for name, one in record["organisms"].items():
        found = {(row["of"], row["arm"], row["metric"]): row for row in one["study"]}
        for kind, count in one["members"].items() if found else ():
            cells = [
                between([found[kind, arm, metric][key] for key in ("change", "change_low", "change_high")])
                for metric in ("payload", "skill")
                for arm in ("class", "random")
            ]
            rows.append([name, kind, str(count), *cells])
    head = ["organism", "class", "features", "payload", "payload, random", "skill", "skill, random"]
    return table(head, rows)


def mixtures(record: Record) -> str:
    """Time of every mixture as a multiple of its members' sum."""
    batches = record["batch"]
    names = list(next(iter(batches.values()))["ratios"])
    rows = [[name, *(f"{one['ratios'][name]:.2f}" for one in batches.values())] for name in names]
    return table(["mixture", *(f"batches of {size}" for size in batches)], rows)


def rewarded(record: Record) -> str:
    """Counts of rewarded features of a tuned model and its base, linear rewards, and what training changed."""
    parts = ", ".join(f"{part['name']} {part['prompts']} prompts" for part in record["parts"])
    told = f"Parts: {parts}; {record['minutes']:.0f} minutes and {record['peak_memory_mb'] / 1000:.1f} GB.\n\n"
    names = {"model": "tuned", "base": "base"}
    cells = [
        [
            f"{names[row['of']]}, {row['sites']}",
            *(f"{row[key]:,}" for key in ("dictionaries", "size", "tested", "selected", "replicated")),
            "–" if row["strength"] is None else f"{row['strength']:.2f}",
            f"{row['floor']:.2f}",
        ]
        for row in record["counts"]
    ]
    head = ["model, Sites", "dictionaries", "features", "tested", "selected on A", "replicated on B"]
    head += ["their mean absolute r on C", "of all tested"]
    probes = [
        [row["name"], f"{row['columns']:,}", between(row["r2"]), between(row["spearman"]), gain(row["gain"])]
        for row in record["probes"]
    ]
    layers = ", ".join(f"{layer} ({share:.2%})" for layer, share in record["layers"])
    rest = f"\nLayers with the largest ‖ΔW‖ / ‖W‖: {layers}. MMCS at the residual Sites:\n\n"
    resid = [row for row in record["mmcs"] if row["site"].startswith("resid")]
    pairs = [[row["site"], row["first"], row["second"], f"{row['mmcs']:.2f}", f"{row['chance']:.2f}"] for row in resid]
    return (
        told
        + table(head, cells)
        + "\n"
        + table(["linear reward on", "columns", "R² on C", "Spearman's r on C", "gain of features"], probes)
        + rest
        + table(["Site", "dictionary", "other", "MMCS", "rotated"], pairs)
    )


def gain(figure: Sequence[float] | None) -> str:
    """A gain with its interval, if there is one."""
    return "–" if figure is None else between(figure)


def experiment(record: Record) -> str:
    """Findings of an experiment, and the means of every arm over its setting."""
    named = {"payload": "payload", "restored": "skill, triggered", "skill": "skill, clean", "ce": "CE, nats"}
    own = sorted({row["metric"] for row in record["means"] if row["metric"].startswith("payload, ")})
    metrics = {each: each for each in own} | named
    found = {(row["arm"], row["x"], row["metric"]): row["mean"] for row in record["means"]}
    places = list(dict.fromkeys((row["arm"], row["x"]) for row in record["means"]))
    cells = [
        [arm, f"{x:.4g}", *(f"{found[arm, x, m]:.2f}" if (arm, x, m) in found else "–" for m in metrics)]
        for arm, x in sorted(places, key=lambda each: ([p[0] for p in places].index(each[0]), each[1]))
    ]
    told = "".join(f"- **{each['label']}**: {each['question']} {each['words']}\n" for each in record["findings"])
    given = "".join(f", `{each}`" for each in record["settings"])
    where = (
        f"{record['minutes']:.0f} minutes on {machine_of(record)}" if record["minutes"] else "organisms side by side"
    )
    if record["judged_on"]:
        where += f", on {' and '.join('a CPU' if each == 'none' else f'an {each}' for each in record['judged_on'])}"
    setting = (
        f"\nMeans over {', '.join(record['replicates'])}; {record['n']} prompts in each panel{given}; {where}:\n\n"
    )
    rows = table(["arm", "setting", *metrics.values()], cells)
    if len(cells) > FOLDED:
        rows = f'<details markdown="1"><summary>All {len(cells)} rows</summary>\n\n{rows}\n</details>\n'
    return told + setting + rows
