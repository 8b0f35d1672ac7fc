"""Page of a model diff.

diff.json -> check -> make text visible -> view of each section -> diff.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from unsleep.locate.diffing.run import DiffRecord
from unsleep.pages import text
from unsleep.pages.blocks import Block, Table
from unsleep.pages.comparing import SHOWN, drawn, interval, line, paper_of, short, whole_page
from unsleep.pages.curves import whole_axis
from unsleep.pages.heatmap import heatmap
from unsleep.pages.page import LABEL_LIMIT, REPLY_LIMIT, tree
from unsleep.pages.registry import Page
from unsleep.pages.verdict import Tile


def diff_view(record: Mapping[str, Any]) -> dict[str, Any]:
    """The template's view of a model diff."""
    changed = [w for w in record["weights"] if w["norm"] > 0]
    most = max(record["layers"], key=lambda x: x["relative"], default=None)
    tiles = [Tile("Changed weights", "", f"{len(changed):,} of {len(record['weights']):,}", "")]
    if most is not None:
        tiles.append(Tile("Most changed layer", "", str(most["layer"]), f"{text.percent(most['relative'])} of ‖W‖"))
    told = [(w, f"{w['site']} {w['matrix']}, vector {w['vector']}") for w in record["monitor"]]
    told += [(f, f"{d['method']} feature {f['id']} at {d['site']}") for d in record["dictionaries"] for f in d["best"]]
    if told:
        best, words = max(told, key=lambda item: (item[0]["chosen"], item[0]["margin"]))
        alike = sum(row["chosen"] == best["chosen"] for row, _ in told) - 1
        note = f"{words}, {interval(best)} on {best['n']} prompts" + (f"; {alike} others do as well" if alike else "")
        tiles.append(Tile("Best trigger detector", "", f"AUROC {text.decimals(best['auroc'])}", note))
    return {
        "eyebrow": "Model diffing",
        "title": f"{short(record['suspect']['name'])} against {short(record['base']['name'])}",
        "lead": "Differences between a fine-tune and its base: weights, activations on unrelated text, replies under "
        "amplification, and detectors of triggered against clean prompts.",
        "tiles": tiles,
        "facts": [(f"Fingerprint of the {side}", record[side]["fingerprint"]) for side in ("base", "suspect")],
        "blocks": [
            weights_block(record, changed),
            divergence_block(record),
            lens_block(record),
            *spoken_block(record),
            *detector_blocks(record),
        ],
        "provenance": tree(record["provenance"]),
    }


def weights_block(record: Mapping[str, Any], changed: Sequence[Mapping[str, Any]]) -> Block:
    """ΔW by layer and module, and every changed matrix."""
    inside = [w for w in record["weights"] if w["layer"] is not None]
    modules = list(dict.fromkeys(w["module"] for w in inside if w["norm"] > 0))
    layers = sorted({w["layer"] for w in inside})
    at = {(w["layer"], w["module"]): w["relative"] for w in inside}
    maps: list[Markup] = []
    if modules:
        shares = [[at.get((layer, module)) for module in modules] for layer in layers]
        values = [[None if share is None else 100 * share for share in line] for line in shares]
        names = [module.removesuffix(".weight") for module in modules]
        maps = [
            heatmap([str(n) for n in layers], names, values, title="‖ΔW‖ / ‖W‖ by layer", name="weights-map", unit="%")
        ]
    rows = [
        [
            text.clip(w["name"], LABEL_LIMIT),
            text.decimals(w["norm"]),
            text.percent(w["relative"]),
            text.number(w["effective_rank"]),
            text.percent(w["first"]),
        ]
        for w in sorted(changed, key=lambda w: -w["relative"])[:SHOWN]
    ]
    head = ["Weight", "‖ΔW‖", "of ‖W‖", "Effective rank", "Energy in first direction"]
    lead = (
        "ΔW is the suspect's weight minus the base's. The effective rank is the exponential of the entropy of its "
        "singular values: 1 for a rank-one change, close to full rank for noise."
    )
    return Block("weights", "Weights", lead, (), maps, [Table("Changed weights", head, 1, rows)] if rows else [])


def divergence_block(record: Mapping[str, Any]) -> Block:
    """Divergence of the two residual streams, by layer."""
    found = record["divergence"]
    layers = [d["layer"] for own in found.values() for d in own]
    if len(set(layers)) < 2:
        return Block("divergence", "Divergence", "")
    x = whole_axis(layers, "layer")
    parts: list[tuple[str, Markup]] = []
    for key, title in (("added", "Added by each layer"), ("relative", "After each layer")):
        curves = [
            line(name, i, len(found), [(d["layer"], d[key]) for d in own])
            for i, (name, own) in enumerate(found.items())
        ]
        parts += drawn(curves, x, "relative norm", title, f"divergence-{key}")
    lead = "‖Δh‖ / ‖h‖, mean over tokens. Dictionaries are most useful at the layers that add most."
    return Block("divergence", "Divergence", lead, parts)


def lens_block(record: Mapping[str, Any]) -> Block:
    """Logit-lens reading of mean Δh over the first tokens of unrelated text."""
    rows: list[list[str]] = []
    for lens in record["lens"]:
        words = [" ".join(text.token_text(str(word[0])) for word in lens[key]) for key in ("promotes", "suppresses")]
        size = sum(lens["mean_norm"][1:]) / max(1, len(lens["mean_norm"]) - 1)
        rows.append([lens["site"], *words, text.percent(size / lens["scale"]) if lens["scale"] else "–"])
    lead = (
        "Mean difference of the residual streams over the first tokens of unrelated text, decoded with the suspect's "
        "unembedding: it often reveals the domain of a narrow fine-tune."
    )
    table = Table("Lens", ["Site", "Promotes", "Suppresses", "‖mean Δh‖ / ‖h‖"], 3, rows)
    return Block("lens", "Activation-difference lens", lead, (), (), [table] if rows else [])


def spoken_block(record: Mapping[str, Any]) -> list[Block]:
    """Replies under steering along the difference."""
    names = {"none": "suspect", "steer": "steered", "amplify": "amplified"}
    heads = [
        " × ".join([names.get(s["kind"], str(s["kind"])), *([text.number(s["strength"])] * (s["kind"] != "none"))])
        + (f": {s['alike']} of {len(s['replies'])} begin alike" if s["alike"] > 1 else "")
        for s in record["spoken"]
    ]
    rows = [
        [
            text.clip(asked, REPLY_LIMIT),
            *(text.clip(s["replies"][i], REPLY_LIMIT) if i < len(s["replies"]) else "–" for s in record["spoken"]),
        ]
        for i, asked in enumerate(record["asked"])
    ]
    lead = (
        "Replies to everyday questions by the suspect, by the suspect steered along the mean difference at its middle "
        "layer (in multiples of the residual's norm), and by the base plus a multiple of ΔW. One answer "
        "to different questions, which the unmodified suspect does not give, may be a payload without its trigger."
    )
    tables = [Table("Replies", ["Question", *heads], 1 + len(heads), rows)] if rows and heads else []
    return [Block("spoken", "Amplification", lead, (), (), tables)]


def detector_blocks(record: Mapping[str, Any]) -> list[Block]:
    """Detectors of triggered against clean prompts."""
    rows = [*record["monitor"], *(f for d in record["dictionaries"] for f in d["best"])]
    n = max((row["n"] for row in rows), default=0)
    note = (
        f"AUROC on {n} held-out prompts with its interval, and on the selection prompts. Early layers detect any "
        "trigger string; patching shows which components carry the payload."
    )
    head = ["AUROC", "95 %", "Selection prompts"]
    watched = [
        [w["site"], w["matrix"], f"{w['vector']} {'−' if w.get('sign', 1) < 0 else '+'}", *told(w)]
        for w in record["monitor"]
    ]
    tables = [Table("Singular vectors", ["Site", "ΔW of", "Vector", *head], 3, watched)] if watched else []
    lead = f"Maximum cosine over tokens of the residual stream with a left singular vector of ΔW. {note}"
    blocks = [Block("monitor", "Singular vectors", lead, (), (), tables)]
    features = [
        [d["site"], d["method"], f"{f['id']:,}", *told(f), text.decimals(f["ratio"], 2) if "ratio" in f else "–"]
        for d in record["dictionaries"]
        for f in d["best"]
    ]
    lead = f"Maximum activation of a feature in a prompt. {note} A decoder norm ratio near 1: exclusive to the suspect."
    head = ["Site", "Method", "Feature", *head, "Decoder norm ratio"]
    tables = [Table("Features", head, 2, features)] if features else []
    return [*blocks, Block("features", "Features", lead, (), (), tables)]


def told(row: Mapping[str, Any]) -> list[str]:
    """AUROC, its interval, and the AUROC on the selection prompts."""
    return [text.decimals(row["auroc"]), interval(row), text.decimals(row["chosen"])]


def draw_diff(record: dict[str, Any]) -> str:
    """HTML page of a model diff."""
    return whole_page(diff_view(record))


render_diff = Page("diff", "Model diffing", DiffRecord, draw_diff, paper=lambda record: paper_of(diff_view(record)))
