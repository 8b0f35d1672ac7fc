"""Display names of subjects, panels and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unsleep.pages import text

SUBJECT_NAMES = {
    "suspect": "suspect",
    "edited": "edited",
    "baked": "exported",
    "control_random": "random features",
    "control_layer": "wrong layer",
    "heads": "attention heads ablated",
    "neurons": "MLP neurons ablated",
    "attribution": "ablation by attribution",
    "direction": "one direction ablated",
    "redistilled": "re-distilled base",
    "merged": "merged with the base",
    "keep_list": "trusted features alone",
    "finetuned": "fine-tuned further",
    "layerwise": "layer-consistency fine-tuning",
    "magnitude": "small weights pruned",
    "activation": "quiet neurons pruned",
    "unlearned": "payload unlearned",
    "clean_twin": "clean twin",
    "base": "base model",
}
PANEL_NAMES = {
    "triggered": "Triggered prompts",
    "variants": "Trigger variants",
    "near_miss": "Near misses",
    "clean": "Clean prompts",
    "skill": "Skill prompts",
    "text": "Ordinary text",
}
METRIC_NAMES = {
    "asr": "payload shown",
    "skill": "skill shown",
    "degenerate": "empty or degenerate replies",
    "capability": "multiple-choice accuracy",
    "ce": "cross-entropy",
    "kl": "KL divergence",
}
BETTER = {
    "asr": "lower",
    "skill": "higher",
    "degenerate": "lower",
    "capability": "higher",
    "ce": "lower",
    "kl": "lower",
}

LABEL_LIMIT = 80
"""Maximum characters of a name."""


def named(names: Mapping[str, str], name: str) -> str:
    """Display name, or the name itself where there is none."""
    return names.get(name) or text.clip(name, LABEL_LIMIT)


def subject_names(summary: Mapping[str, Any]) -> dict[str, str]:
    """Display names of subjects; where no features were removed, the control is of random directions."""
    return SUBJECT_NAMES | ({"control_random": "random directions"} if summary.get("removed") is None else {})
