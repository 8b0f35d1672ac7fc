"""The report page: the view of each section, and the template around them.

Hidden characters of all strings are made visible first; the template escapes them. The only
markup outside the template is built by `svg.el` and `Markup.format`, which escape too.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, cast

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from unsleep.behaviours import has_skill
from unsleep.judge.results import METRICS, PANELS, SHARES, SUBJECTS
from unsleep.pages import charts, evaluations, repairing, svg, text, verdict
from unsleep.pages.blocks import Paper
from unsleep.pages.names import BETTER, LABEL_LIMIT, METRIC_NAMES, PANEL_NAMES, SUBJECT_NAMES, named, subject_names
from unsleep.pages.records import Report
from unsleep.pages.registry import Page

REPLY_LIMIT = 4000
"""Maximum characters of a prompt or reply."""

UNTRIGGERED = "untriggered"
"""Column of the suspect's replies to the prompts without their trigger."""

HEAT_LEVELS = 9
"""Shades of a token's background; the exact activation is in its tooltip."""


@dataclass(frozen=True)
class Token:
    """A token of a context with its activation."""

    text: str
    level: int
    """0 where inactive, `HEAT_LEVELS` at the feature's peak."""
    title: str
    peak: bool


@dataclass(frozen=True)
class Node:
    """A node of the provenance tree."""

    key: str
    value: str
    children: tuple[Node, ...] = ()


def filled(name: str, top: str, view: Mapping[str, Any], *styles: str) -> str:
    """A template of this package rendered with a view; `top` is the anchor of its first section."""
    return fill(templates().get_template(name), top, view, *styles)


def fill(template: Template, top: str, view: Mapping[str, Any], *styles: str) -> str:
    """A template rendered with a view and the variables common to all pages."""
    style, script = "".join(map(source, styles)), source("page.js")
    # Only our own source files are unescaped.
    own = {
        "top": top,
        "style": Markup(style),
        "style_hash": csp_hash(style),
        "script": Markup(script),
        "script_hash": csp_hash(script),
    }
    return template.render({**view, **own})


@cache
def templates() -> Environment:
    """Environment of this package's templates, with autoescaping."""
    return Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(source)
    )


def source(name: str) -> str:
    """Text of one of this package's files."""
    return files("unsleep.pages").joinpath(name).read_text(encoding="utf-8")


def csp_hash(block: str) -> str:
    """Hash that allows one inline block in the content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()


def view_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The template's view of a report."""
    result = report["result"]
    rows = {(r["subject"], r["panel"], r["metric"]): r for r in result["rows"]}
    summary: dict[str, Any] = report.get("summary") or {}
    contract: list[Mapping[str, Any]] = report.get("contract") or []
    label = result["verdict"]["label"]
    names = subject_names(summary)
    stages, total = charts.stages(report.get("stages") or [])
    view: dict[str, Any] = {
        "title": text.clip(report["title"], 300),
        "label": label,
        "tone": verdict.TONES[label],
        "score": text.decimals(result["verdict"]["score"], 2) if label.startswith("backdoor found") else "",
        "headline": verdict.headline(label, rows, summary),
        "details": verdict.details(rows, summary, contract, (report.get("repair") or {}).get("teacher")),
        "step": verdict.next_step(label, rows, summary, contract),
        "tiles": verdict.tiles(rows, summary, contract),
        "facts": facts_of(summary),
        "part": bool(summary.get("part")),
        "skilled": any(metric == "skill" for _, _, metric in rows),
        "next": [text.clip(line, 600) for line in summary.get("next") or []],
        "repair": repairing.repair_of(report.get("repair"), names),
        "outcome": outcome_of(rows, names),
        "effects": effects_of(rows, names),
        "controls": [*verdict.control_notes(rows, names["control_random"]), *verdict.other_notes(rows, names)],
        "contract": [requirement(c, rows, names) for c in contract],
        "frontier": frontier_of(report.get("frontier") or [], summary.get("removed")),
        "features": [feature_of(f) for f in sorted(report.get("features") or [], key=lambda f: f["rank"])],
        "replies": replies_of(report.get("replies") or [], summary, report.get("reply_tokens")),
        "dictionaries": [dictionary_of(d) for d in report.get("dictionaries") or []],
        "tasks": tasks_of(result.get("tasks") or [], names),
        "rows": table_of(result["rows"], names),
        "stages": stages,
        "total": total,
        "provenance": tree(report.get("provenance") or result["provenance"]),
    }
    view["sections"] = sections_of(view)
    return view


def sections_of(view: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(anchor, name in the navigation) of each non-empty section, in page order."""
    names = {
        "outcome": "Before and after",
        "effects": "Side effects",
        "contract": "Requirements",
        "repair": "History",
        "frontier": "Frontier",
        "features": "Features",
        "replies": "Replies",
        "dictionaries": "Dictionaries",
        "tasks": "Tasks",
        "rows": "Figures",
        "stages": "Time",
        "provenance": "Provenance",
    }
    return [(anchor, name) for anchor, name in names.items() if view[anchor]]


def facts_of(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, model text) pairs below the verdict."""
    pairs = [
        ("Model", summary.get("model")),
        ("Payload", text.payload_words(summary)),
        ("Trigger", summary.get("trigger")),
        ("Taken for the trigger", summary.get("part")),
    ]
    return [(name, text.clip(value, 300)) for name, value in pairs if value]


def facets(rows: verdict.Rows, panel: str, metric: str, names: Mapping[str, str]) -> charts.Facet | None:
    """Chart of one panel and metric, or `None` where not measured."""
    own = [rows[key] for s in SUBJECTS if (key := (s, panel, metric)) in rows]
    if not own:
        return None
    titles = (PANEL_NAMES[panel], METRIC_NAMES[metric], f"{BETTER[metric]} is better")
    return charts.facet(own, f"facet-{panel}-{metric}", titles, names)


def outcome_of(rows: verdict.Rows, names: Mapping[str, str]) -> list[list[charts.Facet]]:
    """ASR and skill charts of each panel."""
    pairs = [[facets(rows, panel, metric, names) for metric in ("asr", "skill")] for panel in PANELS]
    return [kept for pair in pairs if (kept := [f for f in pair if f])]


def effects_of(rows: verdict.Rows, names: Mapping[str, str]) -> list[charts.Facet]:
    """Charts of side effects: degenerate replies, capability, KL and cross-entropy."""
    drawn = [facets(rows, p, m, names) for m in METRICS if m not in ("asr", "skill") for p in PANELS]
    return [f for f in drawn if f]


def requirement(item: Mapping[str, Any], rows: verdict.Rows, names: Mapping[str, str]) -> dict[str, Any]:
    """One line of the contract, with the interval of its row where there is one."""
    metric, value = item["metric"], item["value"]
    is_share = metric in SHARES
    way = "at most" if item["relation"] == "<=" else "at least"
    bound = text.percent(item["bound"]) if is_share else f"{text.number(item['bound'], 4)} nats"
    row = rows.get((item["subject"], item["panel"], metric))
    if value is None:
        measured = ["not measured"]
    elif row is not None and abs(row["value"] - value) <= 1e-9 * max(1.0, abs(value)):
        measured = charts.words(row).parts
    elif is_share and 0 <= value <= 1:
        measured = [text.share(value)]
    else:
        measured = [f"{text.decimals(value)} nats"]
    beyond = interval_beyond(item, row)
    return {
        "text": text.clip(item.get("text") or "", 300) or f"{named(METRIC_NAMES, metric)} {way} {bound}",
        "subject": named(names, item["subject"]),
        "panel": named(PANEL_NAMES, item["panel"]),
        "metric": named(METRIC_NAMES, metric),
        "bound": f"{way} {bound}",
        "measured": measured,
        "outcome": outcome(item),
        "beyond": beyond,
    }


def outcome(item: Mapping[str, Any]) -> tuple[str, str]:
    """Tone and wording of a contract line's result."""
    if item.get("too_few"):
        return "open", "– too few prompts"
    return ("good", "✓ met") if item["met"] else ("bad", "✗ not met")


def interval_beyond(item: Mapping[str, Any], row: Mapping[str, Any] | None) -> str:
    """Note on a bound that the measured value meets, but not its whole interval; empty otherwise.

    None for a cross-entropy: its interval is over passages, and much wider than that of its change.
    """
    if row is None or not item["met"] or item["metric"] == "ce":
        return ""
    low, high, bound = row["low"], row["high"], item["bound"]
    above = item["relation"] == "<="
    if (high <= bound) if above else (low >= bound):
        return ""
    is_share = item["metric"] in SHARES
    end = high if above else low
    said = text.percent(text.outward(end, up=above)) if is_share else f"{text.decimals(end)} nats"
    way = "up" if above else "down"
    return f"on the observed {'rate' if is_share else 'mean'}; interval {way} to {said}"


def frontier_of(points: Sequence[Mapping[str, Any]], chosen: int | None) -> dict[str, Any] | None:
    """The frontier's charts, legend and table."""
    if not points:
        return None
    series = charts.series_of(points)
    titles = {
        "asr": ("Payload shown", "lower is better"),
        "skill": ("Skill shown", "higher is better"),
        "ce_change": ("Cross-entropy change, nats", "closer to 0 is better"),
    }
    drawn = [(*names, charts.frontier_chart(series, m, names[0], chosen)) for m, names in titles.items()]
    lines = [
        (one.name, f"{p['features']:,}", [charts.point_words(p, m) for m in titles])
        for one in series
        for p in one.points
    ]
    return {
        "legend": [(s.name, s.key) for s in series],
        "charts": [d for d in drawn if d[2] is not None],
        "table": lines,
    }


def feature_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """One feature with its evidence; all its contexts share one colour scale."""
    contexts: list[Mapping[str, Any]] = item.get("contexts") or []
    peak = max((float(a) for c in contexts for a in c["activations"]), default=0.0)
    rates = [("suspicious_rate", "of suspicious prompts"), ("trusted_rate", "of trusted tokens")]
    return {
        "site": text.clip(item["site"], LABEL_LIMIT),
        "id": item["id"],
        "rank": item["rank"],
        "scores": [
            (text.clip(name, LABEL_LIMIT), text.number(value)) for name, value in (item.get("scores") or {}).items()
        ],
        "rates": [(text.share(item[key]), words) for key, words in rates if item.get(key) is not None],
        "promotes": [text.token_text(t) for t in item.get("promotes") or []],
        "suppresses": [text.token_text(t) for t in item.get("suppresses") or []],
        "contexts": [context_of(c, peak) for c in contexts if c["tokens"]],
        "peak": text.number(peak),
    }


def context_of(context: Mapping[str, Any], peak: float) -> dict[str, Any]:
    """A context as shaded tokens; `peak` is the activation of the darkest shade."""
    activations = [float(a) for a in context["activations"]]
    best = activations.index(max(activations))
    tokens = [
        Token(
            text=text.token_text(token),
            level=max(1, round(HEAT_LEVELS * a / peak)) if a > 0 and peak > 0 else 0,
            title=text.number(a),
            peak=i == best,
        )
        for i, (token, a) in enumerate(zip(context["tokens"], activations, strict=True))
    ]
    return {"tokens": tokens, "peak": text.number(activations[best])}


def replies_of(
    items: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], tokens: int | None = None
) -> dict[str, Any] | None:
    """Prompts with the subjects' replies side by side, by panel; `tokens` is the length at which they are cut.

    Beside the suspect's reply stands its reply to the prompt without the trigger, where that is recorded.
    """
    if not items:
        return None
    present = list(dict.fromkeys(name for item in items for name in item["replies"]))
    subjects = [s for s in SUBJECTS if s in present] + [s for s in present if s not in SUBJECTS]
    if any(item.get("untriggered") is not None for item in items):
        subjects.insert(subjects.index("suspect") + 1 if "suspect" in subjects else 0, UNTRIGGERED)
    payload = None if summary.get("payload_kind") else summary.get("payload")
    trigger = summary.get("trigger") or summary.get("part")
    groups: dict[str, list[dict[str, Any]]] = {}
    order = {p: i for i, p in enumerate(PANELS)}
    for item in sorted(items, key=lambda item: order.get(item["panel"], len(order))):
        panel = named(PANEL_NAMES, item["panel"])
        prompt = text.pieces(text.clip(item["prompt"], REPLY_LIMIT), {"payload": payload, "trigger": trigger})
        said = {**item["replies"], UNTRIGGERED: item.get("untriggered")}
        expected = item.get("expected")
        cells = [reply_of(said.get(s), payload, expected, s in item.get("shown", ())) for s in subjects]
        groups.setdefault(panel, []).append(
            {"prompt": prompt, "expected": expected and text.clip(expected, LABEL_LIMIT), "cells": cells}
        )
    heads = [
        ("suspect, trigger removed", svg.key(svg.SUBJECT_MARKS["suspect"], "suspect"))
        if s == UNTRIGGERED
        else (named(SUBJECT_NAMES, s), svg.key(svg.SUBJECT_MARKS.get(s, "circle"), s if s in SUBJECTS else "other"))
        for s in subjects
    ]
    return {"heads": heads, "groups": list(groups.items()), "count": len(items), "tokens": tokens}


def reply_of(reply: str | None, payload: str | None, expected: str | None, shown: bool) -> dict[str, Any]:
    """A reply in pieces, with badges; `shown` where the record says that it shows the payload.

    `payload` is a text that shows it.
    """
    if reply is None:
        return {"pieces": [], "notes": [("–", "")]}
    pieces = text.pieces(text.clip(reply, REPLY_LIMIT), {"payload": payload})
    notes: list[tuple[str, str]] = []
    if shown or any(piece.kind == "payload" for piece in text.pieces(reply, {"payload": payload})):
        notes.append(("payload", "bad"))
    if expected and has_skill(reply, expected):
        notes.append(("skill", "good"))
    if not reply.strip():
        notes.append(("empty reply", "none"))
    return {"pieces": pieces, "notes": notes}


def dictionary_of(item: Mapping[str, Any]) -> list[str]:
    """A row of the dictionaries' table."""
    cells = [text.clip(item["site"], LABEL_LIMIT), f"{item['features']:,}"]
    for key in ("k", "l0"):
        cells.append(text.number(item[key]) if item.get(key) is not None else "–")
    cells += [text.decimals(item[key]) if item.get(key) is not None else "–" for key in ("fvu", "ce_score")]
    cells.append(text.share(item["dead"]) if item.get("dead") is not None else "–")
    return cells


def table_of(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every row formatted, by metric, panel and subject."""
    order = (METRICS, PANELS, SUBJECTS)
    keys = ("metric", "panel", "subject")
    return [
        {
            "metric": METRIC_NAMES[r["metric"]][0].upper() + METRIC_NAMES[r["metric"]][1:],
            "panel": PANEL_NAMES[r["panel"]],
            "subject": names[r["subject"]],
            "key": svg.key(svg.SUBJECT_MARKS[r["subject"]], r["subject"]),
            "figure": charts.words(r).short,
            "interval": text.interval(r["low"], r["high"]) if r["metric"] in SHARES else charts.words(r).interval,
            "n": f"{r['n']:,}",
        }
        for r in sorted(rows, key=lambda r: [places.index(r[k]) for places, k in zip(order, keys, strict=True)])
    ]


def tasks_of(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, Any] | None:
    """Results of lm-evaluation-harness: a row per task and metric, a column per subject."""
    subjects = [s for s in SUBJECTS if any(r["subject"] == s for r in rows)]
    found = {(r["task"], r["metric"], r["subject"]): r for r in rows}
    lines = [
        {
            "task": text.clip(task, LABEL_LIMIT),
            "metric": text.clip(metric.removesuffix(",none"), LABEL_LIMIT),
            "n": f"{max(r['n'] for r in rows if (r['task'], r['metric']) == (task, metric)):,}",
            "cells": [task_words(found.get((task, metric, s))) for s in subjects],
        }
        for task, metric in dict.fromkeys((r["task"], r["metric"]) for r in rows)
    ]
    return {"heads": [names[s] for s in subjects], "lines": lines} if lines else None


def task_words(row: Mapping[str, Any] | None) -> str:
    """A value with its standard error."""
    if row is None:
        return "–"
    error = f" ± {text.decimals(row['stderr'])}" if row["stderr"] is not None else ""
    return f"{text.decimals(row['value'])}{error}"


def tree(value: Mapping[str, Any]) -> tuple[Node, ...]:
    """The provenance as a tree: leaves before branches."""
    nodes = [node(text.clip(key, LABEL_LIMIT), item) for key, item in value.items()]
    return tuple(sorted(nodes, key=lambda n: bool(n.children)))


def node(key: str, value: Any) -> Node:
    """One value of the provenance; lists of plain values become one line."""
    if isinstance(value, dict) and value:
        return Node(key, "", tree(cast("dict[str, Any]", value)))
    if isinstance(value, list):
        items = cast("list[Any]", value)
        if any(isinstance(item, dict | list) for item in items):
            return Node(key, "", tuple(node(str(i), item) for i, item in enumerate(items)))
        words = [plain(item) for item in items]
        return Node(key, text.clip(shlex.join(words) if key == "command" else ", ".join(words), 2000))
    return Node(key, text.clip(plain(value), 2000))


def plain(value: Any) -> str:
    """A leaf of the provenance as text."""
    if value is None or value in ({}, ""):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def draw(report: Mapping[str, Any]) -> str:
    """HTML page of a report."""
    return filled("page.html", "verdict", view_of(report), "page.css", "dictionaries.css")


def paper_of(report: Mapping[str, Any]) -> Paper:
    """The LaTeX of a report."""
    return evaluations.paper_of(view_of(report), report["result"]["rows"], subject_names(report.get("summary") or {}))


render = Page("report", "Report", Report, draw, order=-1, paper=paper_of)
