"""Section on the history of a repair: reference replies, the Site scan, and every attempt."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from unsleep.pages import curves, text
from unsleep.pages.curves import Curve, Dot


def repair_of(item: Mapping[str, Any] | None, names: Mapping[str, str]) -> dict[str, Any] | None:
    """The section's view, with the page's `names` of subjects; `None` where the edit was given."""
    if not item:
        return None
    used = {site for a in item["attempts"] if a["kept"] for site, n in a["removed"].items() if n}
    return {
        "teacher": text.clip(item["teacher"], 400),
        "notes": [text.clip(note, 400) for note in item["notes"]],
        "used": sites_of(s for s in item["sites"] if s in used),
        "spare": sites_of(s for s in item["sites"] if s not in used),
        "look": look_of(item["look"], used),
        "baselines": [(names[b["subject"]], text.clip(b["what"], 300)) for b in item.get("baselines") or []],
        "attempts": [attempt_of(i, a) for i, a in enumerate(item["attempts"], 1)],
    }


def sites_of(sites: Iterable[str]) -> str:
    """Sites as a phrase."""
    return ", ".join(text.clip(site, 80) for site in sites)


def attempt_of(number: int, item: Mapping[str, Any]) -> dict[str, Any]:
    """An attempt's row."""
    removed = ", ".join(f"{text.clip(site, 80)} {n:,}" for site, n in item["removed"].items())
    return {
        "number": number,
        "kept": item["kept"],
        "what": text.clip(item["what"], 300),
        "removed": f"{sum(item['removed'].values()):,}",
        "where": removed,
        "shown": f"{item['shown']:,} of {item['n']:,}",
        "degenerate": text.share(max(0.0, item["degenerate"])),
        "followed": text.share(item["followed"]),
        "kl": f"{text.decimals(item['kl'])} nats",
        "time": text.duration(item["seconds"]),
    }


def look_of(rows: Sequence[Mapping[str, Any]], used: Container[str]) -> list[tuple[str, str, Markup]]:
    """Two charts over the layers, each with its name and direction; chosen Sites are highlighted."""
    if len(rows) < 2:
        return []
    x = curves.whole_axis([r["layer"] for r in rows], "layer")
    drawn: list[tuple[str, str, Markup]] = []
    for key, title, better, words in (
        ("restored", "Reference reply restored", "higher is better", "share of the divergence removed"),
        ("moved", "Change of trusted replies", "lower is better", "KL, nats per token"),
    ):
        values = [max(0.0, r[key]) for r in rows]
        dots: list[Dot] = []
        for row, value in zip(rows, values, strict=True):
            chosen = f"resid.{row['layer']}" in used
            said = f"layer {row['layer']}: {text.decimals(row[key])}{', edited' if chosen else ''}"
            dots.append(Dot(row["layer"], value, said, "diamond" if chosen else "circle"))
        line = Curve("", "c-edited", tuple(dots), tuple(dots))
        y = curves.axis(values, words)
        [chart] = curves.charts([line], x, y, title=f"{title}, by layer", name=f"look-{key}", width=curves.WIDE)
        drawn.append((title, better, chart))
    return drawn
