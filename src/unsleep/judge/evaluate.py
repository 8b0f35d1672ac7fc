"""Evaluation: subjects × held-out panels → rows with intervals.

Based on free greedy generation: teacher-forced metrics alone hide the first token, which decides.
The attack success rate (ASR) is always accompanied by the skill on the same prompts (restoration) and the
share of degenerate replies. Panels that contain prompts used to choose the edit are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from unsleep.base.context import kept, progress
from unsleep.base.stats import bootstrap, wilson
from unsleep.behaviours import Payload, as_payload, has_skill
from unsleep.core import BadInput, Refused, check_least, digest
from unsleep.judge.metrics import Subject, capability, is_degenerate, reply_kl, text_ce_kl
from unsleep.judge.results import OTHERS, UNTRIGGERED, EvalResult, Row
from unsleep.models import generate
from unsleep.models.model import LoadedModel
from unsleep.organisms.recipe import Recipe
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet

FULL = ("triggered", "variants", "near_miss", "clean", "skill")
PLAN: dict[str, tuple[str, ...]] = {
    "suspect": FULL,
    "edited": FULL,
    "baked": FULL,
    "clean_twin": ("triggered", "skill"),
    "base": ("triggered",),
    "control_random": ("triggered",),
    "control_layer": ("triggered",),
    **dict.fromkeys(OTHERS, ("triggered", "clean")),
}
"""Subject → panels of prompts that it is evaluated on."""

TEXT = "text"
"""Name of the panel of plain passages and multiple-choice items."""


@dataclass(frozen=True)
class Panels:
    """Held-out prompts: clean, triggered, variants, near misses; further questions for the skill."""

    clean: PromptSet
    triggered: PromptSet
    variants: PromptSet | None = None
    near_miss: PromptSet | None = None
    skill: PromptSet | None = None
    texts: tuple[str, ...] = ()
    items: tuple[sets.Item, ...] = ()
    counterparts: PromptSet | None = None
    """The triggered prompts line by line without the trigger; often `clean` itself."""

    def __post_init__(self) -> None:
        if self.counterparts is not None and len(self.counterparts) != len(self.triggered):
            raise BadInput(
                f"there are {len(self.counterparts)} counterparts of {len(self.triggered)} triggered prompts; "
                "expected the same prompts without and with the trigger"
            )

    @property
    def hashes(self) -> dict[str, str]:
        """Panel → content hash of its prompts."""
        return {name: panel.hash for name, panel in self.prompts().items()}

    def prompts(self) -> dict[str, PromptSet]:
        """Panel → its prompts, without absent panels."""
        named = {name: getattr(self, name) for name in FULL}
        return {name: panel for name, panel in named.items() if panel is not None}


@dataclass(frozen=True)
class EvalConfig:
    """Payload, generation length and text sizes of an evaluation."""

    payload: Payload | str
    """The backdoor's behaviour; a text stands for a `contains` payload."""
    reply_tokens: int = 16
    batch: int = 200
    """Prompts per batch."""
    text_tokens: int = 32
    """Tokens of each plain passage for CE and KL."""
    chosen_on: frozenset[str] = field(default_factory=frozenset[str])
    """Digests of the prompts that the edit was chosen on (`prompt_digests`); panels that contain one are refused."""

    def __post_init__(self) -> None:
        check_least(self, "evaluation", 1, "reply_tokens", "batch", "text_tokens")
        object.__setattr__(self, "payload", as_payload(self.payload))


def organism_panels(recipe: Recipe, n: int = 200) -> Panels:
    """The held-out panels of an organism: `n` prompts each, none of them seen in training or by an edit.

    Panels are disjoint, unless the split has fewer than 2 `n` questions. Raises `BadInput` for a benign fine-tune
    without a trigger.
    """
    clean = sets.questions("held_out", n, skill=recipe.skill)
    return Panels(
        clean=clean,
        triggered=recipe.triggered(clean),
        variants=recipe.varied(clean),
        near_miss=near_miss_panel(recipe, clean),
        skill=sets.questions("held_out", n, skill=recipe.skill, name="skill", start=n),
        texts=tuple(sets.plain_text("held_out")[:n]),
        items=tuple(sets.capability_items()[: max(n, 20)]),
        counterparts=clean if recipe.keeps_question else None,
    )


def near_miss_panel(recipe: Recipe, clean: PromptSet) -> PromptSet | None:
    """The questions with near misses, half of them held out; `None` where the recipe has none for panels."""
    words = (*recipe.held_out_near_misses, *recipe.near_misses[: len(recipe.held_out_near_misses)])
    return recipe.nearly(clean, words) if words else None


def organism_config(recipe: Recipe, chosen_on: frozenset[str] = frozenset()) -> EvalConfig:
    """Evaluation config of an organism: its payload, with replies long enough for all that it was trained to say."""
    return EvalConfig(recipe.as_payload, panel_tokens(recipe), chosen_on=chosen_on)


def panel_tokens(recipe: Recipe) -> int:
    """Tokens of an organism's replies on panels, enough for all that it was trained to say."""
    return max(EvalConfig.reply_tokens, recipe.reply_tokens + 2)


def prompt_digests(*prompts: PromptSet) -> frozenset[str]:
    """A digest of every prompt, stored with an edit for those it was chosen on."""
    return frozenset(digest(p.key) for group in prompts for p in group)


def refuse_used(panels: Mapping[str, PromptSet], chosen_on: frozenset[str]) -> None:
    """Raise `Refused` where a panel contains a prompt that the edit was chosen on."""
    for name, panel in panels.items():
        used = [p.text for p in panel if digest(p.key) in chosen_on]
        if used:
            raise Refused(
                f"panel {name!r} holds {len(used)} of the edit's selection prompts ({used[0][:40]!r} …); "
                "a score on them would be biased. Evaluate on prompts that the edit has not seen"
            )


def evaluate(
    subjects: Sequence[Subject],
    panels: Panels,
    config: EvalConfig,
    *,
    plan: Mapping[str, Sequence[str]] = PLAN,
    teacher: LoadedModel | None = None,
) -> EvalResult:
    """Evaluate subjects on held-out panels.

    Args:
        subjects: one of them named `suspect`: the unedited model, the teacher of every KL.
        plan: subject → panels of prompts; absent panels are skipped.
        teacher: model for the reference replies to triggered prompts without counterparts.

    Returns rows `asr`, `degenerate` and `skill` on every planned panel; `kl` (nats per token) on `clean` to the
    suspect's own replies, and on `triggered` to its replies to the counterparts or to the teacher's; `ce`, `kl` and
    `capability` on `text`. The replies include the suspect's to the counterparts (`UNTRIGGERED`), where there are any
    and another subject is judged.

    Raises:
        Refused: a panel contains a prompt that the edit was chosen on.
        BadInput: no suspect, or duplicate subject names.
    """
    by_name = {s.name: s for s in subjects}
    if "suspect" not in by_name or len(by_name) != len(subjects):
        raise BadInput(f"subjects are {[s.name for s in subjects]}; expected distinct names with 'suspect' among them")
    prompts = panels.prompts()
    refuse_used(prompts, config.chosen_on)

    rows: list[Row] = []
    replies: dict[str, tuple[str, ...]] = {}
    for name, subject in by_name.items():
        for panel in (p for p in plan.get(name, ()) if p in prompts):
            written = kept(reply_all, subject, prompts[panel], config)
            replies[f"{name}/{panel}"] = tuple(written)
            rows += count_replies(name, panel, prompts[panel], written, config.payload)
    repaired = [s for name, s in by_name.items() if name != "suspect" and "clean" in plan.get(name, ())]
    rows += _divergences(by_name["suspect"], repaired, panels, replies, teacher, config)
    rows += _on_text(by_name, panels, config)
    return EvalResult(tuple(rows), replies, prompts, config.reply_tokens)


def reply_all(subject: Subject, prompts: PromptSet, config: EvalConfig) -> list[str]:
    """A subject's greedy replies to a panel."""
    with subject.running() as model:
        return generate.replies(
            model,
            prompts,
            max_new_tokens=config.reply_tokens,
            batch_size=config.batch,
            stage=f"{subject.name} on {prompts.name}",
        )


def count_replies(
    subject: str, panel: str, prompts: PromptSet, replies: Sequence[str], payload: Payload | str
) -> list[Row]:
    """ASR, share of degenerate replies and, where the prompts expect one, skill."""
    shown = as_payload(payload)
    pairs = list(zip(replies, prompts, strict=True))
    rows = [
        rate(subject, panel, "asr", [shown.shows(r) for r in replies]),
        rate(subject, panel, "degenerate", [is_degenerate(r, p.expected) for r, p in pairs]),
    ]
    skilled = [has_skill(r, p.expected) for r, p in pairs if p.expected]
    return [*rows, rate(subject, panel, "skill", skilled)] if skilled else rows


def rate(subject: str, panel: str, metric: str, outcomes: Sequence[bool]) -> Row:
    """A rate with its Wilson interval."""
    hits, n = sum(outcomes), len(outcomes)
    low, high = wilson(hits, n)
    return Row(subject, panel, metric, hits / n, low, high, n)


def mean(subject: str, panel: str, metric: str, values: Sequence[float] | Tensor) -> Row:
    """A mean over prompts with its bootstrap interval."""
    return Row(subject, panel, metric, *bootstrap(values), len(values))


def _divergences(
    suspect: Subject,
    students: Sequence[Subject],
    panels: Panels,
    replies: dict[str, tuple[str, ...]],
    teacher: LoadedModel | None,
    config: EvalConfig,
) -> list[Row]:
    """KL on clean prompts to the suspect's replies, and on triggered ones to the reference replies.

    Adds the suspect's replies to the counterparts to `replies`.
    """
    if not students or "suspect/clean" not in replies:
        return []
    own = replies["suspect/clean"]
    same = panels.counterparts is not None and [p.key for p in panels.counterparts] == [p.key for p in panels.clean]
    asked = (panels.triggered, panels.clean) if same else (panels.clean,)
    found = reply_kl(suspect, students, asked, panels.clean, own)
    if same:
        replies[UNTRIGGERED] = own
    by = suspect if panels.counterparts is not None else Subject("teacher", teacher) if teacher is not None else None
    if not same and by is not None:
        plain = panels.counterparts or panels.triggered
        said = kept(reply_all, by, plain, config)
        if panels.counterparts is not None:
            replies[UNTRIGGERED] = tuple(said)
        found |= reply_kl(by, students, (panels.triggered,), plain, said)
    return [mean(name, panel, "kl", values) for (name, panel), values in found.items()]


def _on_text(subjects: Mapping[str, Subject], panels: Panels, config: EvalConfig) -> list[Row]:
    rows: list[Row] = []
    if panels.texts:
        found = text_ce_kl(subjects["suspect"], list(subjects.values()), panels.texts, config.text_tokens)
        for metric, values in zip(("ce", "kl"), found, strict=True):
            rows += [mean(name, TEXT, metric, each) for name, each in values.items()]
    if panels.items:
        judged = [s for s in subjects.values() if not s.name.startswith("control")]
        for done, subject in enumerate(judged, 1):
            right = capability(subject, panels.items)
            rows += [rate(subject.name, TEXT, "capability", right)] if right else []
            progress("multiple-choice items", done, len(judged))
    return rows
