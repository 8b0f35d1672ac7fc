"""Proof of an edit on held-out prompts: payload rate, skill, KL, and the payload's log-odds beside their prediction.

The prediction is of a circuit: the sum of the effects of the features' nodes. The control is the same edit on random
features of similar firing rate and strength.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base.context import kept, progress
from unsleep.base.records import Count
from unsleep.base.stats import bootstrap
from unsleep.behaviours import Payload, as_payload, has_skill
from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.explorer.asked import Features
from unsleep.interventions.features import Edit, FeatureScaling
from unsleep.interventions.intervention import applied
from unsleep.judge.controls import Firing, matched_random
from unsleep.judge.evaluate import EvalConfig, Panels, evaluate
from unsleep.judge.metrics import Subject
from unsleep.judge.results import EvalResult, Row
from unsleep.locate.circuits.align import said_payload
from unsleep.locate.circuits.record import CircuitRecord
from unsleep.locate.circuits.run import CircuitConfig
from unsleep.locate.features import deciding_rows, reply_log_odds
from unsleep.models.forward import Rows, reply_logits
from unsleep.models.model import LoadedModel
from unsleep.pages.records import Replies

FeatureEdit = Edit | FeatureScaling

PLAN: dict[str, tuple[str, ...]] = dict.fromkeys(("suspect", "edited", "control_random"), ("triggered", "clean"))
"""Subject → panels of a proof."""

BATCH = 32
"""Prompts in one forward pass of the log-odds."""


@dataclass(frozen=True)
class LogOdds:
    """Mean change of the payload's log-odds by an edit, with its bootstrap interval over prompts."""

    payload_log_odds: float
    """In nats, summed over the payload's first tokens; negative where the edit makes it less likely."""
    low: float
    high: float
    n: Count
    """Held-out prompts whose reply shows the payload."""


@dataclass(frozen=True)
class Predicted:
    """Change of the payload's log-odds that a circuit predicts, to first order."""

    payload_log_odds: float
    nodes: Count
    """Nodes of the circuit that are among the features."""


@dataclass(frozen=True)
class Proof:
    """Measurements of an edit on held-out prompts."""

    SCHEMA: ClassVar = "unsleep.proof/1"

    features: Features
    rows: tuple[Row, ...]
    measured: LogOdds | None
    """None where no held-out reply shows the payload."""
    control: LogOdds | None
    """The same of as many random features; None where they are too many for a control."""
    predicted: Predicted | None
    """None without a circuit."""
    number: Count
    """Of this edit among those that were measured on these prompts, from 1: choosing among many favours chance."""
    notes: tuple[str, ...] = ()
    both: tuple[Replies, ...] = ()
    """Replies that show the payload and the skill, so that their prompt counts in both figures."""


class Measured(NamedTuple):
    """Measurements of an edit and of its random control."""

    rows: tuple[Row, ...]
    measured: LogOdds | None
    control: LogOdds | None
    both: tuple[Replies, ...]
    note: str
    """Reason why there is no change of the log-odds; empty otherwise."""


def prove(
    model: LoadedModel,
    edits: Sequence[FeatureEdit],
    controls: Sequence[FeatureEdit],
    panels: Panels,
    config: EvalConfig,
    tokens: int = CircuitConfig.payload_tokens,
) -> Measured:
    """Measure an edit and its random control on held-out panels.

    Args:
        controls: see `random_control`; empty for none.
        tokens: the payload's first tokens, whose log-odds are measured.

    Returns rows of `judge.evaluate`, the change of the log-odds by the edit and by the control, and the replies that
    count as payload and as skill. Raises `Refused` as `evaluate` does.
    """
    judged = replace(panels, variants=None, near_miss=None, skill=None, texts=(), items=())
    subjects = [Subject("suspect", model), Subject("edited", model, tuple(edits))]
    subjects += [Subject("control_random", model, tuple(controls))] if controls else []
    result = evaluate(subjects, judged, config, plan=PLAN)
    rows, both = result.rows, counted_twice(result, config.payload)
    try:
        forced = payload_rows(model, panels, config, tokens)
    except BadInput as error:
        return Measured(rows, None, None, both, str(error))
    before = log_odds(model, forced, ())
    after = [log_odds(model, forced, each) if each else None for each in (edits, controls)]
    edited, control = (
        None if values is None else LogOdds(*bootstrap(values - before), len(values)) for values in after
    )
    return Measured(rows, edited, control, both, "")


def counted_twice(result: EvalResult, payload: Payload | str) -> tuple[Replies, ...]:
    """Prompts with the replies of the subjects that show the payload and the skill in one reply."""
    shown, found = as_payload(payload), list[Replies]()
    for panel, prompts in result.prompts.items():
        subjects = [subject for subject in PLAN if f"{subject}/{panel}" in result.replies]
        for i, prompt in enumerate(prompts):
            said = {subject: result.replies[f"{subject}/{panel}"][i] for subject in subjects}
            both = {
                subject: reply
                for subject, reply in said.items()
                if prompt.expected and has_skill(reply, prompt.expected) and shown.shows(reply)
            }
            if both:
                found.append(Replies(panel, prompt.text, both, prompt.expected, tuple(both)))
    return tuple(found)


def payload_rows(model: LoadedModel, panels: Panels, config: EvalConfig, tokens: int) -> Rows:
    """Held-out triggered prompts with the model's own reply, forced up to the payload's first tokens.

    The payload begins where the replies to a prompt and to its counterpart differ. Raises `BadInput` as
    `said_payload` does.
    """
    asked, others = panels.triggered, panels.counterparts or panels.clean
    n = min(len(asked), len(others))
    asked, others, shown = asked.head(n), others.head(n), as_payload(config.payload)
    (begun, payload), chosen = kept(said_payload, model, asked, others, shown, tokens, config.reply_tokens)
    said = [[*before, *after] for before, after in zip(begun, payload, strict=True)]
    return deciding_rows(model, asked.at(chosen), said, [len(before) for before in begun], tokens).rows


@torch.no_grad()
def log_odds(model: LoadedModel, rows: Rows, edits: Sequence[FeatureEdit]) -> Float[Tensor, " row"]:
    """Log-odds of the forced payload on each row, in nats, under an edit."""
    found: list[Tensor] = []
    for start in range(0, len(rows.ids), BATCH):
        part = rows.at(slice(start, start + BATCH))
        with applied(model, edits) as network:
            found.append(reply_log_odds(reply_logits(network, part), part).cpu())
        progress("payload's log-odds", min(start + BATCH, len(rows.ids)), len(rows.ids))
    return torch.cat(found)


def random_control(edit: FeatureEdit, fires: Firing, seed: int = 0) -> FeatureEdit:
    """The edit on as many random features, matched in firing rate and strength, with the same factors.

    Raises `BadInput` as `matched_random` does.
    """
    if isinstance(edit, Edit):
        return matched_random(edit, fires, seed)
    drawn = matched_random(Edit(edit.site, edit.dictionary, tuple(edit.scales)), fires, seed)
    return replace(edit, scales=dict(zip(drawn.removed, edit.scales.values(), strict=True)))


def predicted(circuit: CircuitRecord, features: Features) -> Predicted:
    """−Σ (1 − s_j) effect(j) over the circuit's nodes of the features, summed over roles.

    A node's effect is the drop of the log-odds where it is as in the reference; at a feature that does not fire there,
    that is its ablation.
    """
    scales = {(f.site, f.id): f.scale for f in features}
    nodes = [node for node in circuit.nodes if node.kind == "feature"]
    found = [(node, scales.get((Site.parse(node.place), node.feature))) for node in nodes if node.feature is not None]
    drops = [(1 - scale) * node.effect for node, scale in found if scale is not None]
    return Predicted(-float(sum(drops)), len(drops))


def circuit_of(
    circuits: Sequence[CircuitRecord], model: LoadedModel, hashes: Mapping[Site, str]
) -> CircuitRecord | None:
    """The first circuit of this model with the same dictionaries at the same Sites; `None` where there is none."""
    used = {str(site): hash_ for site, hash_ in hashes.items()}

    def fits(circuit: CircuitRecord) -> bool:
        shared = circuit.dictionaries.keys() & used.keys()
        return bool(shared) and all(circuit.dictionaries[site] == used[site] for site in shared)

    return next((c for c in circuits if c.model.fingerprint == model.fingerprint and fits(c)), None)


def edits_of(features: Features, dictionaries: Mapping[Site, Coder]) -> list[FeatureEdit]:
    """One intervention per Site; features of factor 1 are left out, and factors of 0 alone are an `Edit`.

    Raises `BadInput` for a Site without a dictionary, and for a feature that its dictionary does not have.
    """
    by_site: dict[Site, dict[int, float]] = {}
    for feature in features:
        by_site.setdefault(feature.site, {})[feature.id] = feature.scale
    made: list[FeatureEdit] = []
    for site, scales in sorted(by_site.items()):
        scaling = FeatureScaling(site, dictionary_at(site, dictionaries), scales)  # refuses unknown features
        changed = {feature: scale for feature, scale in scaling.scales.items() if scale != 1}
        if any(changed.values()):
            made.append(replace(scaling, scales=changed))
        elif changed:
            made.append(Edit(site, scaling.dictionary, tuple(changed)))
    return made


def dictionary_at(site: Site, dictionaries: Mapping[Site, Coder]) -> Coder:
    """The dictionary of a Site; raises `BadInput` where there is none."""
    if site not in dictionaries:
        known = ", ".join(map(str, dictionaries)) or "none"
        raise BadInput(f"there is no dictionary of {site}; the dictionaries are of: {known}")
    return dictionaries[site]
