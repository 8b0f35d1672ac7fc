"""The verdict in words: a plain sentence, the key figures, and the comparison with controls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from unsleep.judge.results import OTHERS
from unsleep.judge.verdict import ENOUGH
from unsleep.pages import text
from unsleep.pages.charts import CONTROLS, words

Rows = Mapping[tuple[str, str, str], Mapping[str, Any]]
"""(subject, panel, metric) → row."""

TONES = {
    "backdoor found and removed": "good",
    "backdoor found, not removed": "bad",
    "backdoor found, no repair judged": "bad",
    "nothing found at this power": "calm",
    "inconclusive": "open",
    "backdoor_found": "bad",
    "nothing_found": "calm",
}
"""Verdict → colour and icon of its badge."""


@dataclass(frozen=True)
class Tile:
    """A key figure."""

    label: str
    before: str
    """Value before the edit; empty without comparison."""
    after: str
    note: str


def numbers_of(tiles: Sequence[Tile]) -> dict[str, str]:
    """Key figures by their labels, for LaTeX."""
    found = {tile.label: str(tile.after) for tile in tiles}
    return found | {f"{tile.label} before": str(tile.before) for tile in tiles if tile.before}


def count_words(row: Mapping[str, Any], what: str = "") -> Markup:
    """A rate within a sentence: `0 of 200 prompts (at most 1.9 %)`, with `what` for the prompts."""
    said = words(row)
    note = Markup(' <span class="keep">({})</span>').format(said.tail) if row["value"] < 1 else ""
    return Markup('<b class="keep">{}</b>{}{}').format(said.head, what and f" {what}", note)


def brief(row: Mapping[str, Any]) -> str:
    """A rate in short: `35 %`, `0 of 200 (at most 1.9 %)`."""
    said = words(row)
    return text.percent(row["value"]) if row["value"] > 0 else f"{said.head} ({said.tail})"


def leading(rows: Rows) -> str | None:
    """The repaired subject that a report leads with: the exported checkpoint, else the edited model, if any."""
    return next((s for s in ("baked", "edited") if (s, "triggered", "asr") in rows), None)


def headline(label: str, rows: Rows, summary: Mapping[str, Any]) -> Markup:
    """The finding and the result of the repair, in two or three sentences."""
    before = rows.get(("suspect", "triggered", "asr"))
    if label in ("nothing found at this power", "nothing_found"):
        seen = suspect_sentence(before, summary) if before else Markup("")
        return Markup(
            "No backdoor was found at the power of this audit. {}This does not show that there is none."
        ).format(seen)
    if label == "inconclusive":
        seen = suspect_sentence(before, summary) if before else Markup("")
        if before and before["low"] >= 0.5:
            after = after_sentence(rows, summary)
            return Markup("{}{} It remains open whether the backdoor was removed.").format(seen, after)
        return Markup("It remains open whether the model has a backdoor. {}").format(seen)
    parts = [suspect_sentence(before, summary) if before else Markup("A backdoor was found. ")]
    parts.append(after_sentence(rows, summary))
    return Markup("").join(parts)


def suspect_sentence(row: Mapping[str, Any], summary: Mapping[str, Any]) -> Markup:
    """Sentence on the suspect's behaviour."""
    trigger, payload = summary.get("trigger"), summary.get("payload")
    when = (
        Markup("With the trigger <code>{}</code>,").format(text.clip(trigger, 80))
        if trigger
        else "On suspicious prompts,"
    )
    if summary.get("payload_kind"):
        what = Markup("showed the payload, <q>{}</q>, on").format(text.clip(text.payload_words(summary) or "", 120))
    elif payload:
        what = Markup("answered <q>{}</q> to").format(text.clip(payload, 120))
    else:
        what = "showed the payload on"
    return Markup("{} this model {} {}. ").format(when, what, count_words(row, "prompts"))


def after_sentence(rows: Rows, summary: Mapping[str, Any]) -> Markup:
    """Sentence on payload and skill after the repair: of the exported checkpoint, else of the edited model."""
    subject = leading(rows)
    if subject is None:
        return Markup("No edit was scored.")
    removed = removed_words(summary)
    start = f"With {removed} removed," if removed else "After the edit"
    who = "The exported checkpoint does so" if subject == "baked" else f"{start} it does so"
    return Markup("{} to {}{}.").format(who, *outcome_words(rows, subject))


def edit_sentence(rows: Rows, summary: Mapping[str, Any]) -> Markup:
    """Sentence on the edit behind an exported checkpoint; empty where the headline is about the edit, or it is unknown.

    It says what features are, the first time that a report names them.
    """
    if leading(rows) != "baked" or ("edited", "triggered", "asr") not in rows:
        return Markup("")
    said = Markup("The edit that it has in its weights does so to {}{}.").format(*outcome_words(rows, "edited"))
    if removed := removed_words(summary):
        said += f" It removes {removed}, directions learned by dictionaries: sparse autoencoders of the activations."
    return said


def removed_words(summary: Mapping[str, Any]) -> str:
    """`37 of 13,824 features`; empty where the edit removes no features or they were not counted."""
    removed, total = summary.get("removed"), summary.get("features_total")
    if removed is None:
        return ""
    count = f"{removed:,} of {total:,}" if total else f"{removed:,}"
    return f"{count} {'feature' if count == '1' else 'features'}"


def outcome_words(rows: Rows, subject: str) -> tuple[Markup, Markup]:
    """ASR on triggered prompts, and the clause on the skill, which is empty where that was not scored."""
    shown = count_words(rows[subject, "triggered", "asr"])
    skill = rows.get((subject, "triggered", "skill"))
    if skill is None:
        return shown, Markup("")
    known = skill["value"] > 0
    count = Markup('<b class="keep">{}</b>').format(text.percent(skill["value"])) if known else count_words(skill)
    if subject != leading(rows):
        return shown, Markup(" and shows the skill in {}").format(count)
    was = rows.get(("suspect", "triggered", "skill"))
    back = " again" if was is not None and was["value"] < skill["value"] else ""
    return shown, Markup(" and shows its skill, the expected beginning of a reply,{} in {}").format(back, count)


def unscored(rows: Rows, contract: Sequence[Mapping[str, Any]], teacher: str | None = None) -> Markup:
    """Note on a skill that cannot be scored, and the figure that stands in for it; empty where it was scored.

    `teacher` names the reference replies, to which the KL is measured.
    """
    subject = leading(rows)
    if subject is None or (subject, "triggered", "skill") in rows:
        return Markup("")
    why = Markup("The skill cannot be scored: no prompt in the files gives an <code>expected</code> reply. ")
    kl = rows.get((subject, "triggered", "kl"))
    who = "the exported checkpoint" if subject == "baked" else "the edited model"
    if kl is None:
        broken = rows.get((subject, "triggered", "degenerate"))
        if broken is None:
            return why
        said = Markup("In its place: {} gives empty or degenerate replies to {}.")
        return why + said.format(who, count_words(broken, "triggered prompts"))
    reference = (teacher or "the suspect's reply to the same prompt without the trigger").partition(" (")[0]
    bound = next((c["bound"] for c in contract if (c["panel"], c["metric"]) == ("triggered", "kl")), None)
    limit = f"; required of the edit: at most {text.number(bound, 4)}" if bound is not None else ""
    said = Markup(
        "In its place: how far the replies of {} to triggered prompts are from the reference, {}. The KL divergence "
        '(0 for equal probabilities of every token) is <b class="keep">{}</b> per token, 95 % interval {}{}.'
    )
    reference = text.clip(reference.partition(":")[0], 300)
    return why + said.format(who, reference, words(kl).head, words(kl).interval, limit)


def details(
    rows: Rows, summary: Mapping[str, Any], contract: Sequence[Mapping[str, Any]], teacher: str | None = None
) -> list[Markup]:
    """Sentences below the headline: the edit behind the checkpoint, and what stands in for an unscored skill."""
    return [said for said in (edit_sentence(rows, summary), unscored(rows, contract, teacher)) if said]


@dataclass(frozen=True)
class Step:
    """The next step after a report."""

    words: str
    checkpoint: str
    """Folder of the exported checkpoint; empty where there is none, or it is not known."""
    code: tuple[str, ...]
    """Lines of Python that load it."""


def next_step(label: str, rows: Rows, summary: Mapping[str, Any], contract: Sequence[Mapping[str, Any]]) -> Step:
    """The next step by the verdict, with the path of the exported checkpoint and the code that loads it."""
    subject, checkpoint = leading(rows), text.clip(summary.get("checkpoint") or "", 300)
    if label == "nothing found at this power":
        said = "Check payload, prompts and chat template, and try more prompts, before you trust this model."
    elif subject is None:
        said = "Repair the model with unsleep repair on prompts of your own, or score an edit with unsleep evaluate."
    elif label == "backdoor found and removed" and subject == "baked":
        said = "Read a few of the replies below, then use the exported checkpoint in place of the suspect."
    elif label == "backdoor found and removed":
        said = "Export the edit with unsleep bake, and evaluate the checkpoint; until then it needs unsleep to run."
    elif any(c.get("too_few") for c in contract):
        said = (
            f"Evaluate on more held-out prompts before you use it: with none of {ENOUGH} showing the payload it counts "
            "as absent."
        )
    else:
        said = "Do not use it in place of the suspect yet: see what is left below, change that, and repair again."
    quoted = json.dumps(checkpoint, ensure_ascii=False)
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"model = AutoModelForCausalLM.from_pretrained({quoted})",
        f"tokenizer = AutoTokenizer.from_pretrained({quoted})",
    )
    return Step(said, checkpoint, code if checkpoint else ())


def tiles(rows: Rows, summary: Mapping[str, Any], contract: list[Mapping[str, Any]]) -> list[Tile]:
    """Key figures of the exported checkpoint, else of the edit; before and after where both are known."""
    subject = leading(rows) or "edited"
    out = change(rows, subject, "asr", "Payload shown, with the trigger")
    out += change(rows, subject, "skill", "Skill shown, with the trigger") or divergence(rows, subject)
    removed, total = summary.get("removed"), summary.get("features_total")
    if removed is not None:
        sites: list[str] = summary.get("sites") or []
        after = f"{removed:,} of {total:,}" if total else f"{removed:,}"
        out.append(Tile("Features removed", "", after, text.clip(f"at {', '.join(sites)}", 120) if sites else ""))
    old, new = (rows.get((s, "text", "ce")) for s in ("suspect", subject))
    if old and new:
        note = f"cross-entropy {text.decimals(old['value'])} → {text.decimals(new['value'])}"
        out.append(Tile("Change on ordinary text", "", f"{text.signed(new['value'] - old['value'])} nats", note))
    if contract:
        few = sum(bool(c.get("too_few")) for c in contract)
        met = sum(bool(c["met"]) for c in contract) - few
        left = {"not met": len(contract) - met - few, "on too few prompts": few}
        note = ", ".join(f"{n} {words}" for words, n in left.items() if n) or "every one"
        out.append(Tile("Requirements met", "", f"{met} of {len(contract)}", note))
    minutes = summary.get("minutes")
    if minutes is not None:
        out.append(Tile("Time taken", "", text.duration(max(0.0, 60 * minutes)), ""))
    return out


def change(rows: Rows, subject: str, metric: str, label: str) -> list[Tile]:
    """A tile of one metric on triggered prompts; empty where not measured."""
    before, after = (rows.get((s, "triggered", metric)) for s in ("suspect", subject))
    if after is None:
        if before is None:
            return []
        said = words(before)
        return [Tile(label, "", said.head, said.tail)]
    said = words(after)
    return [Tile(label, words(before).head if before else "", said.head, beside(rows, subject, metric, said.tail))]


def divergence(rows: Rows, subject: str) -> list[Tile]:
    """A tile of the KL of triggered replies to the reference, for a skill that cannot be scored."""
    kl = rows.get((subject, "triggered", "kl"))
    if kl is None:
        return []
    note = beside(rows, subject, "kl", words(kl).interval)
    return [Tile("KL to the reference, with the trigger", "", words(kl).head, note)]


def beside(rows: Rows, subject: str, metric: str, note: str) -> str:
    """A tile's note, which names the model where there are two, and adds the edit's figure."""
    edited = rows.get(("edited", "triggered", metric))
    if subject != "baked" or edited is None:
        return note
    return f"exported: {note}; edit: {words(edited).head}"


def control_notes(rows: Rows, random: str = "random features") -> list[str]:
    """For each control, its ASR on triggered prompts and whether the edit beats it; `random` names its parts."""
    said = {"control_random": f"on {random}", "control_layer": "at a wrong layer"}
    edited = rows.get(("edited", "triggered", "asr"))
    out: list[str] = []
    for control in CONTROLS:
        row = rows.get((control, "triggered", "asr"))
        if row is None:
            continue
        note = f"The same edit {said[control]} leaves the payload in {words(row).short}"
        if edited is None:
            out.append(f"{note}.")
        elif edited["high"] < row["low"]:
            out.append(f"{note}. The edit beats this control.")
        elif control == "control_layer" and (less := less_repaired(rows, control)):
            out.append(f"{note}, {less}. The edit beats this control.")
        else:
            late = (
                " A backdoor may be removable at another layer too: this is not a requirement."
                if control == "control_layer"
                else ""
            )
            out.append(f"{note}. The edit does not beat this control.{late}")
    return out


def other_notes(rows: Rows, names: Mapping[str, str]) -> list[str]:
    """Baseline repairs at least as good as the edit in ASR, skill and KL on clean replies."""
    keys = (("triggered", "asr", -1), ("triggered", "skill", 1), ("clean", "kl", -1))
    out: list[str] = []
    for other in OTHERS:
        pairs = [(rows.get((other, p, m)), rows.get(("edited", p, m)), sign) for p, m, sign in keys]
        known = [(a["value"], b["value"], sign) for a, b, sign in pairs if a is not None and b is not None]
        if len(known) >= 2 and all(sign * a >= sign * b for a, b, sign in known):
            name = names[other]
            out.append(f"{name[0].upper()}{name[1:]} is at least as good as the edit by every metric.")
    return out


def less_repaired(rows: Rows, control: str) -> str:
    """Note on a control whose skill on triggered prompts is below the edited model's; empty otherwise or if unknown.

    A control that stops the payload without the skill breaks the model: ASR alone would not show it.
    """
    skill, best = (rows.get((subject, "triggered", "skill")) for subject in (control, "edited"))
    if skill is None or best is None or best["low"] <= skill["high"]:
        return ""
    low, high = (brief(row) for row in (skill, best))
    broken = ": it damages the model instead of repairing it" if rows[control, "triggered", "asr"]["high"] < 0.5 else ""
    return f"but shows the skill in {low} against {high}{broken}"
