"""Page of a representation reading: the score of every token at every layer.

reading.json -> check -> make text visible -> view of each section -> reading.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from unsleep.core import Site
from unsleep.locate.reading import ReadingRecord
from unsleep.pages import text
from unsleep.pages.blocks import Block, Paper, Table
from unsleep.pages.curves import WIDE, Axis, Curve, Dot, axis, charts, whole_axis
from unsleep.pages.dictionaries import GROUPS, POINT_MARKS
from unsleep.pages.heatmap import heatmap
from unsleep.pages.page import HEAT_LEVELS, LABEL_LIMIT, filled, tree
from unsleep.pages.registry import Page
from unsleep.pages.verdict import Tile, numbers_of

TEXTS = 40
"""Maximum texts on the page; the record has all of them."""

MAPS = 10
"""Maximum texts with a heat map of every layer: each takes a fifth of a megabyte."""

TOKENS = 120
"""Maximum tokens of a text, its last ones."""


class Scored(NamedTuple):
    """A token and its score at the best Site."""

    text: str
    tone: str
    """Class of its background colour."""
    title: str


def view_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The template's view."""
    best = record["sites"].index(record["best"])
    shown = record["texts"][:TEXTS]
    peak = max((loudest(item["scores"][best], item["own"]) for item in shown), default=0.0)
    view: dict[str, Any] = {
        "title": f"{len(record['texts']):,} texts read at {record['best']}",
        "model": text.clip(record["model"], LABEL_LIMIT),
        "tiles": [
            Tile("Best Site", "", record["best"], "chosen on validation pairs"),
            Tile("AUROC", "", text.decimals(record["aurocs"][best]), "on validation pairs"),
            Tile("Method", "", text.clip(record["method"], LABEL_LIMIT), f"{record['pairs']:,} pairs"),
        ],
        "layers": by_layer(record),
        "best": record["best"],
        "texts": [text_of(i, item, record["sites"], best, peak) for i, item in enumerate(shown)],
        "left_out": len(record["texts"]) - len(shown),
        "peak": text.number(peak),
        "levels": [f"s-down-{i}" for i in range(HEAT_LEVELS, 0, -1)] + [f"s-up-{i}" for i in range(HEAT_LEVELS + 1)],
        "provenance": tree(record["provenance"]),
    }
    names = {"layers": "By layer", "texts": "Texts", "provenance": "Provenance"}
    view["sections"] = [(anchor, name) for anchor, name in names.items() if view[anchor]]
    return view


def by_layer(record: Mapping[str, Any]) -> Markup | None:
    """AUROC on the held-out pairs against layer; nothing for a single Site."""
    sites = [Site.parse(name) for name in record["sites"]]
    if len({site.layer for site in sites}) < 2:
        return None
    curves: list[Curve] = []
    for point, (shape, colour) in POINT_MARKS.items():
        own = [(s, a) for s, a in zip(sites, record["aurocs"], strict=True) if s.point == point]
        dots = tuple(Dot(s.layer, a, f"{s}: AUROC {text.decimals(a)}", shape) for s, a in own)
        if dots:
            curves.append(Curve(GROUPS[point].split()[0], colour, dots, dots))
    low: Axis = axis(record["aurocs"], "AUROC")
    [drawing, *_] = charts(
        curves, whole_axis([s.layer for s in sites], "layer"), low, title="AUROC by layer", name="aurocs", width=WIDE
    )
    return drawing


def text_of(number: int, item: Mapping[str, Any], sites: Sequence[str], best: int, peak: float) -> dict[str, Any]:
    """A text with shaded tokens and its scores at every Site; template tokens do not scale the colours."""
    tokens = [text.token_text(token) for token in item["tokens"][-TOKENS:]]
    scores = [line[-TOKENS:] for line in item["scores"]]
    own = own_scores(item, best)
    before = len(item["tokens"]) - len(tokens)
    frame = [not item["own"][0] <= before + i < item["own"][1] for i in range(len(tokens))]
    whole = not before
    drawing = None
    if number < MAPS:
        drawing = heatmap(
            list(reversed(sites)),
            tokens,
            [without_sink(line) if whole else line for line in reversed(scores)],
            title=f"Text {number + 1}: score of every layer and token",
            name=f"text-{number}",
            middle=0.0,
        )
    return {
        "number": number + 1,
        "tokens": [scored(t, s, peak, f) for t, s, f in zip(tokens, scores[best], frame, strict=True)],
        "left_out": before,
        "mean": text.signed(sum(own) / len(own)),
        "last": text.signed(scores[best][-1]),
        "map": drawing,
    }


def own_scores(item: Mapping[str, Any], site: int) -> list[float]:
    """A text's scores at one Site without the chat template's tokens."""
    return item["scores"][site][slice(*item["own"])]


def loudest(line: Sequence[float], own: Sequence[int | None] = (0, None)) -> float:
    """The largest absolute score of a text's own drawn tokens, without the first token.

    The first is an attention sink in most models.
    """
    drawn = line[max(own[0] or 0, 1) : own[1]][-TOKENS:] or line
    return max(abs(score) for score in drawn)


def without_sink(line: Sequence[float]) -> list[float | None]:
    """A text's scores at one Site, without the first where it would dominate the scale."""
    return [None if abs(line[0]) > 2 * loudest(line) else line[0], *line[1:]]


def scored(token: str, score: float, peak: float, is_frame: bool) -> Scored:
    """A token with its shade; template tokens are faint."""
    level = min(HEAT_LEVELS, round(HEAT_LEVELS * abs(score) / peak)) if peak > 0 else 0
    tone = f"s-{'up' if score >= 0 else 'down'}-{level}"
    return Scored(token, f"{tone} frame" if is_frame else tone, text.signed(score))


def draw(record: dict[str, Any]) -> str:
    """HTML page of a reading."""
    styles = "page.css", "dictionaries.css", "heatmap.css", "reading.css"
    return filled("reading.html", "summary", view_of(record), *styles)


def paper_of(record: Mapping[str, Any]) -> Paper:
    """The LaTeX of a reading."""
    view = view_of(record)
    sites = [
        [site, text.decimals(auroc), text.decimals(gap, 2)]
        for site, auroc, gap in zip(record["sites"], record["aurocs"], record["gaps"], strict=True)
    ]
    texts = [[str(item["number"]), item["mean"], item["last"]] for item in view["texts"]]
    blocks = [
        Block(
            "layers",
            "By layer",
            f"AUROC of each Site's direction on validation pairs; {view['best']} is the best.",
            [("AUROC by layer", view["layers"])] if view["layers"] else [],
            tables=[Table("AUROC by Site", ["Site", "AUROC", "Gap"], 1, sites)],
        ),
        Block(
            "texts",
            "Texts",
            f"Scores of the texts at {view['best']}: mean over a text's own tokens, and its last token.",
            maps=[item["map"] for item in view["texts"] if item["map"]],
            tables=[Table("Scores of texts", ["Text", "Mean", "Last token"], 1, texts)],
        ),
    ]
    lead = "A score is the projection of the centred residual stream onto the direction."
    return Paper(view["title"], lead, numbers_of(view["tiles"]), blocks)


render_reading = Page("reading", "Reading", ReadingRecord, draw, paper=paper_of)
