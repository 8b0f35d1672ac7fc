"""Record of a merge, and the model card that goes with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from unsleep.base.records import Count

MARK = "merge.json"
"""File that marks a merge's folder."""
CARD = "README.md"
YAML = "mergekit_config.yml"


@dataclass(frozen=True)
class MergedModel:
    """A model of a merge."""

    name: str
    made_of: tuple[dict[str, Any], ...]
    """Name and commit of the base, then of the adapters."""
    sha256: dict[str, str]
    """Weight file → its SHA-256; files of several components are numbered."""


@dataclass(frozen=True)
class LayerRow:
    """A layer of a merge, or the `rest` of the model."""

    layer: str
    alpha: float
    elements: Count
    differing: Count
    """Elements in which the two models differ."""
    changed: Count
    """Elements in which the merge differs from the first model."""


@dataclass(frozen=True)
class MergeRecord:
    """merge.json."""

    SCHEMA: ClassVar = "unsleep.merge/1"

    form: Literal["weights", "adapter", "mergekit"]
    """Whole weights; an adapter over the base that both models share; weights that mergekit computed."""
    method: str
    alpha: float
    alpha_layers: str
    density: float | None
    """Density of ties and dare."""
    dtype: str
    models: tuple[MergedModel, ...]
    """The first, the second and the base, where one was given."""
    layers: tuple[LayerRow, ...]
    """Counts of elements; none for an adapter and for mergekit."""
    notes: tuple[str, ...]
    mergekit: str
    """The same merge as a configuration of mergekit."""
    provenance: dict[str, Any]

    @property
    def counts(self) -> LayerRow:
        """The counts of all layers together."""
        sums = (sum(getattr(row, name) for row in self.layers) for name in ("elements", "differing", "changed"))
        return LayerRow("all", self.alpha, *sums)

    @property
    def formula(self) -> str:
        """The merge in symbols."""
        return FORMULAS[self.method]


FORMULAS = {
    "linear": "W = W_A + α (W_B − W_A)",
    "slerp": "W = W_base + slerp(W_A − W_base, W_B − W_base; α), tensor by tensor",
    "ties": "TIES of W_A − W_base with weight 1 − α and W_B − W_base with weight α",
    "dare-ties": "DARE and TIES of W_A − W_base with weight 1 − α and W_B − W_base with weight α",
    "dare-linear": "DARE of W_A − W_base with weight 1 − α and W_B − W_base with weight α",
}


def shares(record: MergeRecord) -> list[str]:
    """Sentences on what changed."""
    if record.form == "adapter":
        return ["Both models have the same base: the result is an adapter over it, and nothing is rounded in the base."]
    if record.form == "mergekit":
        return ["Computed by mergekit."]
    found = record.counts
    apart = f"{found.differing / max(1, found.elements):.2%} of {found.elements:,} elements differ between the models"
    moved = f"{found.changed / max(1, found.elements):.2%} of them changed from the first model"
    return [f"{apart}; {moved}, after rounding to {record.dtype}."]


def card(record: MergeRecord) -> str:
    """Markdown for the model's page."""
    names = [model.name for model in record.models]
    hub = [name for model in record.models[:2] if (name := _hub_name(model)) is not None]
    head = ["---", "tags: [merge, unsleep]", "base_model_relation: merge"]
    head += ["base_model:", *(f"- {name}" for name in hub)] if len(hub) == 2 else []
    alphas = f"α = {record.alpha:g}" + (f", by layer {record.alpha_layers}" if record.alpha_layers else "")
    lines = [
        *(*head, "---", "# A merge by unsleep", ""),
        f"`{record.formula}` with {alphas}.",
        "",
        *(f"- {role}: `{name}`" for role, name in zip(("A", "B", "Base"), names, strict=False)),
        *("", *shares(record)),
        *("", *(f"- {note}" for note in record.notes)),
        *_table(record.layers),
        *("", f"`{MARK}` beside this file holds the record: models and hashes, counts, versions.", ""),
    ]
    return "\n".join(lines)


def _table(rows: Sequence[LayerRow]) -> list[str]:
    if not rows:
        return []
    head = ["", "| layer | α | elements | differ between A and B | changed from A |", "|---|---|---|---|---|"]
    return head + [
        f"| {row.layer} | {row.alpha:g} | {row.elements:,} | {row.differing / max(1, row.elements):.2%} "
        f"| {row.changed / max(1, row.elements):.2%} |"
        for row in rows
    ]


def _hub_name(model: MergedModel) -> str | None:
    """The hub id of a model that was loaded from the hub; others have no commit."""
    *_, last = model.made_of
    return str(last["name"]).partition("@")[0] if last.get("commit") else None
