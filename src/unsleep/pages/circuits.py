"""Page of a circuit: its graph by role and layer, faithfulness, nodes and edges.

circuit.json -> check -> make text visible -> view of each section -> circuit.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from unsleep.core import Site
from unsleep.locate.circuits.record import MLP_ONLY, NEURONS_ONLY, CircuitRecord
from unsleep.models.lens import stronger
from unsleep.pages import svg, text
from unsleep.pages.blocks import Block, Table
from unsleep.pages.comparing import SHOWN, paper_of, short, whole_page
from unsleep.pages.curves import WIDE, Curve, Dot, axis, charts
from unsleep.pages.dictionaries import SHAPES, shade
from unsleep.pages.page import LABEL_LIMIT, tree
from unsleep.pages.registry import Page
from unsleep.pages.svg import el
from unsleep.pages.verdict import Tile

DRAWN = 160
"""Edges in the graph, those with the largest weight; the table has more."""

STEP, ROW, LEFT, TOP, GAP = 17, 24, 74, 44, 26
"""Pixels between nodes and between rows, left and top margin, and between columns."""

MARKS = {"feature": "circle", "error": "triangle", "token": "square", "neuron": "hexagon"}

Record = Mapping[str, Any]


def view_of(record: Record) -> dict[str, Any]:
    """The template's view of a circuit."""
    own = record["curves"][0]["points"] if record["curves"] else []
    size = len(record["nodes"])
    near = min(own, key=lambda point: abs(point["nodes"] - size), default=None)
    tiles = [
        Tile("Metric", "", text.decimals(record["metric"], 2), quantity_of(record)),
        Tile("in the references", "", text.decimals(record["metric_reference"], 2), "every node patched"),
        Tile("Nodes", "", f"{size:,}", f"of {record['candidates']:,} with an effect"),
        Tile("Errors", "", f"{record['errors']:.0%}", "of the nodes' |effect| is of reconstruction errors"),
    ]
    if near is not None:
        told = (
            f"of {near['nodes']:,} nodes: everything outside these {near['nodes']:,} nodes is set to its reference, so "
            "losses at each Site add up; everything but these nodes alone carries "
            f"{text.decimals(near['completeness']['value'], 2)}"
        )
        tiles.append(Tile("Faithfulness", "", text.decimals(near["faithfulness"]["value"], 2), told))
    facts = [
        ("Payload", text.clip(record["payload"], LABEL_LIMIT)),
        ("Tokens", " ".join(record["tokens"])),
        ("Estimator", record["estimator"]),
        ("Prompts", f"{record['prompts']:,}"),
        ("Reference model", short(record["reference"]["name"])),
    ]
    return {
        "eyebrow": "Circuit",
        "title": f"From trigger to payload in {short(record['model']['name'])}",
        "lead": "A node is a feature, a reconstruction error or a token embedding at the tokens of a role. Its effect "
        "is what the metric would lose if the node were as in the reference prompt; an edge is the part of one node's "
        "effect that passes directly through another.",
        "tiles": tiles,
        "facts": facts,
        "blocks": [
            graph_block(record),
            faithful_block(record),
            sure_block(record),
            node_block(record),
            edge_block(record),
        ],
        "provenance": tree(record["provenance"]),
    }


def quantity_of(record: Record) -> str:
    """The metric in words."""
    return record.get("quantity", "log-odds of the payload")


def graph_block(record: Record) -> Block:
    """The graph: columns are roles, rows are Sites from the embedding upwards, the payload on top."""
    lead = (
        f"Columns are roles, layers run upwards. Size is |effect|, width of a line |weight|; the {DRAWN} largest edges "
        "are drawn. Blue promotes the payload, dashed orange suppresses it."
    )
    return Block("graph", "Graph", lead, maps=[graph(record)] if record["nodes"] else [])


def graph(record: Record) -> Markup:
    """The drawing of a circuit."""
    nodes: Sequence[Record] = record["nodes"]
    places = sorted({node["place"] for node in nodes}, key=depth)
    roles = [role for role in record["roles"] if any(node["role"] == role for node in nodes)]
    cells: dict[tuple[str, str], list[int]] = {}
    for i, node in enumerate(nodes):
        cells.setdefault((node["place"], node["role"]), []).append(i)
    counts = {role: max(len(cells.get((place, role), [])) for place in places) for role in roles}
    widths = {role: max(counts[role] * STEP, 7 * len(role)) for role in roles}
    starts: dict[str, int] = {}
    at = LEFT
    for role in roles:
        starts[role] = at
        at += widths[role] + GAP
    height = TOP + ROW * (len(places) + 1)
    where: dict[int, tuple[float, float]] = {}
    for (place, role), members in cells.items():
        first = starts[role] + (widths[role] - STEP * (len(members) - 1)) / 2
        for k, i in enumerate(members):
            where[i] = float(first + STEP * k), float(TOP + ROW * (len(places) - places.index(place)))
    out = (LEFT + at) / 2.0, float(TOP - 14)
    parts = [
        el("text", place, x=LEFT - 12, y=TOP + ROW * (len(places) - row) + 4, text_anchor="end")
        for row, place in enumerate(places)
    ]
    parts += [
        el("line", x1=LEFT - 6, x2=at, y1=y, y2=y, class_="lane")
        for y in (TOP + ROW * (len(places) - row) for row in range(len(places)))
    ]
    parts += [el("text", role, x=starts[role] + widths[role] / 2, y=height - 2, text_anchor="middle") for role in roles]
    edges = sorted(record["edges"], key=lambda edge: -abs(edge["weight"]))[:DRAWN]
    largest = max((abs(edge["weight"]) for edge in edges), default=1.0) or 1.0
    parts += [link(edge, where, out, largest, nodes) for edge in reversed(edges)]
    most = max(abs(node["effect"]) for node in nodes) or 1.0
    parts += [dot(node, where[i], most) for i, node in enumerate(nodes)]
    parts.append(
        el("path", d=svg.MARK_PATHS["diamond"], transform=f"translate({out[0]:.1f} {out[1]:.1f})", class_="node out")
    )
    parts.append(el("text", "payload", x=out[0] + 12, y=out[1] + 4))
    said = f"{len(nodes)} nodes over {len(places)} Sites and {len(roles)} roles; the table below lists them"
    title = f"The circuit's {len(nodes)} nodes by role and layer, and the {len(edges)} largest edges between them"
    drawing = svg.figure(title, said, "circuit", *parts, viewBox=f"0 0 {at + 8} {height + 8}", class_="circuit")
    return el(
        "div",
        legend(),
        el("div", drawing, class_="scroll", tabindex=0, role="region", aria_label="Circuit"),
        el("p", "A node links to the table of nodes.", class_="links"),
    )


def legend() -> Markup:
    """The meaning of shapes."""
    names = {"circle": "feature", "triangle": "reconstruction error", "square": "token embedding", "diamond": "payload"}
    return el(
        "p", *(el("span", svg.key(shape, "base"), f" {name}") for shape, name in names.items()), class_="legend-line"
    )


def depth(place: str) -> tuple[int, int]:
    """Order of a Site in a forward pass, attention before MLP."""
    site = Site.parse(place)
    return site.layer, ("embed", "attn", "mlp", "resid").index(site.point)


def sign(value: float) -> str:
    """Class of a value's sign."""
    return "up" if value >= 0 else "down"


def name_of(node: Record) -> str:
    """A node in words."""
    what = f"{node['place']}/{node['feature']}" if node["kind"] == "feature" else f"{node['place']} {node['kind']}"
    return f"{what}, {node['role']}"


def link(
    edge: Record,
    where: Mapping[int, tuple[float, float]],
    out: tuple[float, float],
    largest: float,
    nodes: Sequence[Record],
) -> Markup:
    """An edge as a curve."""
    (x1, y1), (x2, y2) = where[edge["source"]], out if edge["target"] is None else where[edge["target"]]
    middle = (y1 + y2) / 2
    goal = "payload" if edge["target"] is None else name_of(nodes[edge["target"]])
    said = f"{name_of(nodes[edge['source']])} → {goal}: {text.decimals(edge['weight'])}"
    return el(
        "path",
        el("title", said),
        d=f"M{x1:.1f} {y1:.1f}C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {y2:.1f}",
        class_=f"link {sign(edge['weight'])}",
        stroke_width=0.5 + 4.5 * abs(edge["weight"]) / largest,
    )


def dot(node: Record, place: tuple[float, float], most: float) -> Markup:
    """A node that links to its row of the table."""
    size = 0.55 + 0.75 * (abs(node["effect"]) / most) ** 0.5
    shape = svg.MARK_PATHS[MARKS[node["kind"]]]
    drawn = el(
        "path",
        el("title", f"{name_of(node)}: {text.decimals(node['effect'])}"),
        d=shape,
        transform=f"translate({place[0]:.1f} {place[1]:.1f}) scale({size:.2f})",
        class_=f"node {sign(node['effect'])}",
    )
    return el("a", drawn, href="#nodes", aria_label=name_of(node))


def faithful_block(record: Record) -> Block:
    """Faithfulness and completeness of growing circuits."""
    known = [curve for curve in record["curves"] if curve["points"]]
    held_out = record.get("held_out", 0)
    on = f"on {held_out:,} held-out prompts" if held_out else "on some of the prompts that the nodes were found on"
    lead = (
        f"Share of the metric's difference that a circuit carries {on}, every other node patched with its reference. "
        "The second chart is completeness: the same for all nodes but the circuit's, near 0 if nothing else carries "
        "the behaviour. Where only MLP Sites or MLP neurons are patched, everything between them runs freely and "
        "brings back what they lose: that share is larger than the circuit's own, and no bound of it."
    )
    drawings: list[tuple[str, Markup]] = []
    rows: list[list[str]] = []
    titles = {
        "faithfulness": "Faithfulness by number of nodes",
        "completeness": "Completeness: faithfulness of all nodes but these",
    }
    for key, title in titles.items():
        curves: list[Curve] = []
        for number, one in enumerate(known):
            points = [(p["nodes"], max(-0.5, min(1.5, p[key]["value"]))) for p in one["points"]]
            dots = tuple(
                Dot(n, y, f"{curve_name(one)}, {n} nodes: {text.decimals(y, 2)}", SHAPES[number % len(SHAPES)])
                for n, y in points
            )
            curves.append(Curve(curve_name(one), shade(number, 0, max(1, len(known) - 1)), dots, dots))
        if curves:
            x = axis([float(d.x) for c in curves for d in c.dots], "nodes", log=True)
            y = axis([0.0, 1.0, *(float(d.y) for c in curves for d in c.dots)], "share")
            drawings += [(title, part) for part in charts(curves, x, y, title=title, name=key, width=WIDE)]
    for one in known:
        for p in one["points"]:
            rows.append(
                [curve_name(one), f"{p['nodes']:,}", *(whole(p[key]) for key in ("faithfulness", "completeness"))]
            )
    table = Table(
        "Faithfulness and completeness by number of nodes",
        ["Circuit", "Nodes", "Faithfulness", "Completeness"],
        1,
        rows,
    )
    return Block("faithfulness", "Faithfulness", lead, drawings, tables=[table] if rows else [])


def curve_name(curve: Record) -> str:
    """A curve's name, that of today for one of an older record."""
    name: str = curve["name"]
    return {"neurons": NEURONS_ONLY, "features and errors of MLPs": MLP_ONLY}.get(name, name)


def sure_block(record: Record) -> Block:
    """Agreement of estimates with exact effects, and stability under resampling."""
    lead = (
        "Estimates against exact effects of single nodes, half of them the largest and half drawn from the rest of the "
        "candidates; and circuits on prompts resampled with replacement, against the circuit of all prompts."
    )
    agreements = [
        [a["estimator"], f"{a['nodes']}", whole(a | {"value": a["pearson"]}), f"{a['spearman']:z.2f}"]
        for a in record.get("agreements", [])
    ]
    stable = [
        [f"{point['nodes']:,}", whole(point["overlap"]), f"{point['core']:.0%}"]
        for point in record.get("stability", [])
    ]
    tables = [
        Table("Estimates against exact effects", ["Estimator", "Nodes", "Pearson", "Spearman"], 1, agreements),
        Table(
            "Circuits of resampled prompts against that of all prompts",
            ["Nodes", "Jaccard", "In 95 % of resamples"],
            0,
            stable,
        ),
    ]
    return Block("sure", "Agreement and stability", lead, tables=[table for table in tables if table.rows])


def whole(figure: Record) -> str:
    """A figure with its interval."""
    return f"{figure['value']:z.2f} {between(figure, 2)}"


def between(figure: Record, places: int = 3) -> str:
    """An interval in brackets."""
    return f"[{figure['low']:z.{places}f}, {figure['high']:z.{places}f}]"


def node_block(record: Record) -> Block:
    """All nodes, largest effect first."""
    rows = [
        [
            node["place"],
            node["role"],
            text.token_text(node["token"]) if node.get("token") else "",
            "" if node["feature"] is None else str(node["feature"]),
            node["kind"],
            written(node),
            node.get("supernode", ""),
            text.decimals(node["effect"]),
            between(node),
            text.decimals(node["activation"], 2),
            text.decimals(node["reference"], 2),
            "–" if node.get("exact") is None else text.decimals(node["exact"]),
            "–" if node.get("kept") is None else f"{node['kept']:.0%}",
        ]
        for node in record["nodes"][:SHOWN]
    ]
    words = ["Site", "Role", "Token", "Feature", "Kind", "Promotes / suppresses", "Supernode"]
    head = [*words, "Effect", "95 %", "Activation", "Reference", "Exact", "Kept"]
    lead = (
        f"Effects in units of the {quantity_of(record)}, mean over prompts; activations are means over the role's "
        "tokens. Exact: the node alone patched, nothing frozen. Kept: share of resamples of the prompts whose circuit "
        "has the node. Token: that of the role at which the node is most often strongest. Promotes or suppresses: what "
        "the feature's decoder row writes, the side with the larger logits. A supernode is features that write much "
        "the same at one role."
    )
    name = "Nodes of the circuit, largest |effect| first"
    return Block("nodes", "Nodes", lead, tables=[without_empty(Table(name, head, len(words), rows))] if rows else [])


def written(node: Record) -> str:
    """The tokens that a feature promotes or suppresses, whichever have the larger logits; empty if unknown."""
    end = stronger(node.get("promotes", ()), node.get("suppresses", ()))
    return "" if end is None else f"{end.verb} {' '.join(map(text.token_text, end.tokens))}"


def without_empty(table: Table) -> Table:
    """The table without the columns that are empty in every row."""
    full = [i for i in range(len(table.head)) if any(row[i] not in ("", "–") for row in table.rows)]
    words = sum(i < table.words for i in full)
    return Table(table.name, [table.head[i] for i in full], words, [[row[i] for i in full] for row in table.rows])


def edge_block(record: Record) -> Block:
    """The largest edges, predicted and measured."""
    nodes = record["nodes"]
    rows = [
        [
            name_of(nodes[edge["source"]]),
            "payload" if edge["target"] is None else name_of(nodes[edge["target"]]),
            ", ".join(f"{head['head']} ({text.decimals(head['weight'])})" for head in edge.get("heads", [])[:4]),
            text.decimals(edge["weight"]),
            between(edge),
            *("–" if edge.get(key) is None else text.decimals(edge[key]) for key in ("predicted", "frozen", "free")),
        ]
        for edge in record["edges"][:SHOWN]
    ]
    lead = (
        "Weight: by the gradient, on all prompts. The last figures are on the first few prompts alone. Predicted: by "
        "the gradient. Frozen: measured, the source patched, everything nonlinear held. Free: measured with nothing "
        "held but the other Sites and the set of features that fire; the gap to it is what linearisation leaves out. "
        "Heads: of the target's layer, those that carry at least a tenth of the edge there, with their part of it."
    )
    head = ["From", "To", "Heads", "Weight", "95 %", "Predicted", "Frozen", "Free"]
    name = "Edges of the circuit, largest |weight| first"
    return Block("edges", "Edges", lead, tables=[without_empty(Table(name, head, 3, rows))] if rows else [])


def draw(record: dict[str, Any]) -> str:
    """HTML page of a circuit."""
    return whole_page(view_of(record), "circuits.css")


PAGE = Page("circuit", "Circuit", CircuitRecord, draw, paper=lambda record: paper_of(view_of(record)))
