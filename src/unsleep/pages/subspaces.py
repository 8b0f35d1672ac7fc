"""Page of backdoor subspaces: similarity, transfer between organisms, and overlap with other tasks.

subspaces.json -> check -> make text visible -> view of each section -> subspaces.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from unsleep.locate.subspaces.record import SubspacesRecord
from unsleep.pages import text
from unsleep.pages.blocks import Block, Paper, Table
from unsleep.pages.curves import MOST, WIDE, Axis, Curve, Dot, chart
from unsleep.pages.dictionaries import SHAPES, shade
from unsleep.pages.heatmap import heatmap
from unsleep.pages.page import LABEL_LIMIT, filled, tree
from unsleep.pages.registry import Page
from unsleep.pages.verdict import Tile, numbers_of

METRIC_NAMES = {
    "asr": "ASR",
    "restored": "skill on triggered",
    "skill": "skill on clean",
    "capability": "multiple choice",
    "sentiment": "sentiment",
    "ce_change": "CE change, nats",
}

NEGATIVES = {"clean": "triggered against clean prompts", "near_miss": "triggered prompts against near misses"}


def view_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The template's view."""
    whole = record["common"] is not None
    view: dict[str, Any] = {
        "title": "Backdoor subspaces",
        "tiles": [*(tiles(record) if whole else []), *(tile_of(one) for one in record["apart"])],
        "rank": record["rank"],
        "n": record["n"],
        "sites": ", ".join(record["sites"]),
        "position": {"last": "at the last prompt token", "reply": "along the reply"}[record["position"]],
        "organisms": record["organisms"],
        "alike": alike(record) if whole else [],
        "detect": detect(record) if whole else [],
        "ablate": ablate(record) if whole else [],
        "features": features(record) if whole else [],
        "apart": [apart_of(one, i) for i, one in enumerate(record["apart"])],
        "provenance": tree(record["provenance"]),
    }
    names = {
        "organisms": "Organisms",
        "alike": "Overlap",
        "detect": "Detection",
        "ablate": "Ablation",
        "features": "Features",
        "apart": "Disentanglement",
        "provenance": "Provenance",
    }
    view["sections"] = [(anchor, name) for anchor, name in names.items() if view[anchor]]
    return view


def names_of(record: Mapping[str, Any]) -> list[str]:
    """The organisms' names, shortened for charts."""
    return [text.clip(o["name"], LABEL_LIMIT) for o in record["organisms"]]


def tiles(record: Mapping[str, Any]) -> list[Tile]:
    """Key figures: rank shared by all organisms, and transfer between them."""
    site, found = record["sites"][0], record["common"]
    shared = found["alike"][site]["common"]
    n = len(record["organisms"])
    asr, near = found["ablate"]["asr"], found["detect"][site]["near_miss"]["transfer"]
    own = [asr[i][i]["value"] for i in range(n)]
    others, across = ([table[i][j]["value"] for i in range(n) for j in range(n) if i != j] for table in (asr, near))
    over = f"median of {n}, {record['n']} prompts each"
    return [
        Tile("Organisms", "", f"{n}", ""),
        Tile("Rank shared by all", "", f"{shared['rank']} of {record['rank']}", f"beyond chance, at {site}"),
        Tile("AUROC in another organism", "", text.decimals(_median(across)), f"median, near misses, {site}"),
        Tile("ASR, own subspace ablated", "", text.share(_median(own)), over),
        Tile("ASR, another's ablated", "", text.share(_median(others)), f"median of {len(others)}, the same prompts"),
    ]


def tile_of(record: Mapping[str, Any]) -> Tile:
    """Rank of one organism's backdoor."""
    found = record["smallest"]
    tried = max(r["rank"] for r in record["ranks"])
    name = text.clip(record["name"], LABEL_LIMIT)
    return Tile(
        f"Rank of {name}", "", f"over {tried}" if found is None else f"{found}", "smallest rank that stops the payload"
    )


def _median(values: Sequence[float]) -> float:
    known = sorted(values)
    return (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2


def alike(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For every Site, the overlap of each pair of organisms and of each with its base, and the shared rank."""
    names, found = names_of(record), list[dict[str, Any]]()
    for i, (site, data) in enumerate(record["common"]["alike"].items()):
        own = [*data["pairs"], data["base"]]
        overlap = [[None if cell is None else cell["overlap"] for cell in row] for row in own]
        ranks = [[None if cell is None else float(cell["shared_rank"]) for cell in row] for row in own]
        bars = [max(*cell["random"][:1], *cell["ordinary"][:1]) for row in own for cell in row if cell is not None]
        rows = [*names, "base"]
        shares = ", ".join(
            f"{text.decimals(s, 2)} ({text.decimals(b, 2)})"
            for s, b in zip(data["common"]["shares"], data["common"]["bars"], strict=True)
        )
        found.append(
            {
                "site": site,
                "maps": [
                    heatmap(
                        rows,
                        names,
                        overlap,
                        title=f"{site}: overlap of subspaces",
                        name=f"overlap-{i}",
                        ends=(0.0, 1.0),
                    ),
                    heatmap(
                        rows,
                        names,
                        ranks,
                        title=f"{site}: rank shared beyond chance",
                        name=f"shared-{i}",
                        ends=(0.0, float(record["rank"])),
                    ),
                    heatmap(
                        names,
                        names,
                        data["cosines"],
                        title=f"{site}: cosine of mean differences",
                        name=f"cosines-{i}",
                        ends=(-1.0, 1.0),
                        middle=0.0,
                    ),
                ],
                "chance_cosine": text.decimals(data["chance_cosine"], 2),
                "common": f"{data['common']['rank']} of {record['rank']}",
                "shares": shares,
                "bar": text.decimals(max(bars), 2),
            }
        )
    return found


def detect(record: Mapping[str, Any]) -> list[Markup]:
    """For every Site, the AUROC of one organism's direction on another."""
    names = names_of(record)
    return [
        figures_map(
            [*names, "base, own direction"],
            names,
            [*data[negative]["transfer"], data[negative]["base"]],
            title=f"{site}: AUROC, {NEGATIVES[negative]}",
            name=f"detect-{i}-{negative}",
            middle=0.5,
        )
        for i, (site, data) in enumerate(record["common"]["detect"].items())
        for negative in NEGATIVES
    ]


def figures_map(
    rows: Sequence[str],
    columns: Sequence[str],
    figures: Sequence[Sequence[Mapping[str, Any] | None]],
    *,
    title: str,
    name: str,
    middle: float | None = None,
) -> Markup:
    """Heat map of rates, with intervals in tooltip and table."""
    values = [[None if f is None else f["value"] for f in line] for line in figures]
    notes = [
        [
            "" if f is None else f"[{text.decimals(f['low'], 2)}, {text.decimals(f['high'], 2)}], n {f['n']}"
            for f in line
        ]
        for line in figures
    ]
    return heatmap(rows, columns, values, title=title, name=name, ends=(0.0, 1.0), middle=middle, notes=notes)


def ablate(record: Mapping[str, Any]) -> list[Markup]:
    """ASR and restored skill with each subspace ablated in each organism."""
    names, data = names_of(record), record["common"]["ablate"]
    return [
        figures_map(data["rows"], names, data[key], title=title, name=f"ablate-{key}")
        for key, title in (("asr", "ASR on triggered prompts"), ("skill", "Skill on triggered prompts"))
        if any(v is not None for row in data[key] for v in row)
    ]


def features(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For every Site with a dictionary, the features shared by the organisms."""
    names, found = names_of(record), list[dict[str, Any]]()
    for i, (site, data) in enumerate(record["common"]["features"].items()):
        tables = {"jaccard": (data["jaccard"], f"{site}: Jaccard overlap of features")}
        tables |= {k: (v, f"{site}: AUROC of features, {NEGATIVES[k]}") for k, v in data["auroc"].items()}
        maps = [
            heatmap(
                names,
                names,
                table,
                title=title,
                name=f"features-{i}-{key}",
                ends=(0.0, 1.0),
                middle=None if key == "jaccard" else 0.5,
            )
            for key, (table, title) in tables.items()
            if any(v is not None for row in table for v in row)
        ]
        counts = ", ".join(f"{n} {len(ids)}" for n, ids in zip(names, data["chosen"], strict=True))
        found.append({"site": site, "maps": maps, "counts": counts, "features": f"{data['features']:,}"})
    return found


def apart_of(record: Mapping[str, Any], number: int) -> dict[str, Any]:
    """One organism: overlaps with tasks, costs, ranks and the frontier."""
    sites, tasks = list(record["overlap"]), list(next(iter(record["overlap"].values())))
    overlap: list[list[float | None]] = [[record["overlap"][s][t]["overlap"] for s in sites] for t in tasks]
    metrics = [m for m in METRIC_NAMES if m in record["costs"][0]]
    shares = [m for m in metrics if m != "ce_change"]
    lines = [*record["ranks"], *record["frontier"]]
    stopped = [r for r in record["ranks"] if r["rank"] == record["smallest"]]
    at = stopped[0] if stopped else min(record["ranks"], key=lambda r: r["asr"]["value"])
    asr = at["asr"]
    return {
        "name": text.clip(record["name"], LABEL_LIMIT),
        "maps": [
            heatmap(
                tasks,
                sites,
                overlap,
                title="Overlap of the backdoor's subspace",
                name=f"apart-{number}",
                ends=(0.0, 1.0),
            ),
            figures_map(
                [row["removed"] for row in record["costs"]],
                [METRIC_NAMES[m] for m in shares],
                [[row[m] for m in shares] for row in record["costs"]],
                title="Metrics with subspaces ablated",
                name=f"costs-{number}",
            ),
        ],
        "metrics": [METRIC_NAMES[m] for m in metrics],
        "costs": [([text.clip(r["removed"], LABEL_LIMIT)], [_cell(r[m], m) for m in metrics]) for r in record["costs"]],
        "lines": [([text.clip(r["method"], LABEL_LIMIT), r["rank"]], [_cell(r[m], m) for m in metrics]) for r in lines],
        "smallest": record["smallest"],
        "frontier": frontier_of(lines, number),
        "at": at["rank"],
        "left": f"{round(asr['value'] * asr['n'])} of {asr['n']} triggered prompts, "
        f"95 % [{text.share(asr['low'])}, {text.share(asr['high'])}]",
        "tried": max(r["rank"] for r in record["ranks"]),
    }


def frontier_of(lines: Sequence[Mapping[str, Any]], number: int) -> Markup | None:
    """ASR against retained capability (or else skill), a curve per method over its ranks."""
    kept = "capability" if all("capability" in line for line in lines) else "skill"
    if not all(kept in line and "asr" in line for line in lines):
        return None
    methods = list(dict.fromkeys(line["method"] for line in lines))
    curves: list[Curve] = []
    for i, method in enumerate(methods[:MOST]):
        own = [line for line in lines if line["method"] == method]
        dots = tuple(
            Dot(
                line["asr"]["value"],
                line[kept]["value"],
                f"{method}, rank {line['rank']}: ASR {text.share(line['asr']['value'])}, "
                f"{METRIC_NAMES[kept]} {text.share(line[kept]['value'])}",
                SHAPES[i % len(SHAPES)],
            )
            for line in sorted(own, key=lambda line: line["rank"])
        )
        curves.append(Curve(text.clip(method, LABEL_LIMIT), shade(i, 0, max(1, len(methods) - 1)), dots, dots))
    marks = (0.0, 0.25, 0.5, 0.75, 1.0)
    axes = Axis(-0.03, 1.03, marks, "ASR"), Axis(0.0, 1.03, marks, METRIC_NAMES[kept])
    title = f"ASR and {METRIC_NAMES[kept]}, by method and rank"
    return chart(curves, [], axes, title=title, name=f"frontier-{number}", width=2 * WIDE)


def _cell(figure: Mapping[str, Any], metric: str) -> tuple[str, str]:
    """A formatted value, and its interval."""
    show = text.decimals if metric == "ce_change" else text.share
    return show(figure["value"]), f"95 %: {show(figure['low'])} to {show(figure['high'])}, n = {figure['n']}"


def draw(record: dict[str, Any]) -> str:
    """HTML page of subspaces."""
    return filled("subspaces.html", "summary", view_of(record), "page.css", "dictionaries.css", "heatmap.css")


def paper_of(record: Mapping[str, Any]) -> Paper:
    """The LaTeX of backdoor subspaces."""
    view = view_of(record)
    facts = ("name", "trigger_kind", "trigger", "payload", "payload_place")
    heads = ["Name", "Kind of trigger", "Trigger", "Payload", "Payload place"]
    rows = [[text.clip(o[key], LABEL_LIMIT) for key in facts] for o in record["organisms"]]
    blocks = [
        Block("organisms", "Organisms", f"At {view['sites']}.", tables=[Table("Organisms", heads, len(heads), rows)]),
        Block("alike", "Overlap", "Of subspaces of rank " + str(record["rank"]) + ".", maps=_maps(view["alike"])),
        Block(
            "detect",
            "Detection",
            "Rows: where a direction was fitted. Columns: where it was evaluated.",
            maps=view["detect"],
        ),
        Block("ablate", "Ablation", "Rows: the subspace. Columns: where it was ablated.", maps=view["ablate"]),
        Block(
            "features", "Features", "Features of one dictionary that separate prompts.", maps=_maps(view["features"])
        ),
    ]
    for i, one in enumerate(view["apart"]):
        metrics = one["metrics"]
        tables = [
            Table("Subspaces ablated", ["Ablated", *metrics], 1, [_whole(row) for row in one["costs"]]),
            Table("Methods and ranks", ["Method", "Rank", *metrics], 1, [_whole(row) for row in one["lines"]]),
        ]
        drawings = [("ASR against preserved capability", one["frontier"])] if one["frontier"] else []
        blocks.append(Block(f"apart-{i}", f"Disentanglement: {one['name']}", "", drawings, one["maps"], tables))
    return Paper(view["title"], "", numbers_of(view["tiles"]), blocks)


def _maps(parts: Sequence[Mapping[str, Any]]) -> list[Markup]:
    return [drawing for part in parts for drawing in part["maps"]]


def _whole(row: tuple[Sequence[Any], Sequence[tuple[str, str]]]) -> list[str]:
    """Names and figures of a row, with their intervals."""
    names, cells = row
    return [*map(str, names), *(f"{figure} ({interval})" for figure, interval in cells)]


render_subspaces = Page("subspaces", "Subspaces", SubspacesRecord, draw, paper=paper_of)
