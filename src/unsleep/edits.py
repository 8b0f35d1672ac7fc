"""Edits carried out on a running model: `with applied(model, edit): model.generate(…)`.

An Edit is a value; here it becomes a function of the residual stream that a hook calls. It works
under `generate` with a KV cache, with left padding and in batches, because it looks at each token
alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unsleep import store
from unsleep.core import BadInput, Edit, Encoded, ErrorRule, Features, Refused, Report, Site
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import load_dictionary, save_dictionary
from unsleep.masks import Lesson, MaskConfig, learn_mask
from unsleep.models.hooks import transformed
from unsleep.models.load import LoadedModel, fingerprint
from unsleep.models.sites import width

Ranking = Sequence[tuple[Site, int]]
"""Features of several Sites in the order in which they are removed."""

MARK = "edit.json"
"""The file that tells an edit's folder."""

Stream = Float[Tensor, "*token d_model"]


@contextlib.contextmanager
def applied(
    model: LoadedModel | PreTrainedModel, edit: Edit | Sequence[Edit], *, any_model: bool = False
) -> Generator[PreTrainedModel]:
    """Run a model with edits until the block ends; its weights are not touched.

    Yields the Hugging Face model. Raises `BadInput` for two edits of one Site, a Site the model
    does not have or a dictionary of another width, and `Refused` where the dictionaries were
    trained on another model and `any_model` is off.
    """
    network = model.network if isinstance(model, LoadedModel) else model
    edits = [edit] if isinstance(edit, Edit) else list(edit)
    check_edits(network, edits)
    if not any_model:
        check_model(model, edits)
    operations = {e.site: operation(e, network.dtype, network.device) for e in edits if e.removed or e.error != "keep"}
    with transformed(network, operations):
        yield network


def check_model(model: LoadedModel | PreTrainedModel, edits: Sequence[Edit]) -> None:
    """Raise `Refused` where an edit's dictionaries were trained on another model."""
    trained_on = {e.dictionary.model for e in edits if e.removed or e.error != "keep"}
    if not trained_on:
        return
    print_of = model.fingerprint if isinstance(model, LoadedModel) else fingerprint(model)
    if trained_on != {print_of}:
        raise Refused(
            f"the edit belongs to model {', '.join(sorted(trained_on))}, this one is {print_of}; "
            "features of one model mean nothing in another. Pass any_model=True if that is what you want"
        )


def check_edits(network: PreTrainedModel, edits: Sequence[Edit]) -> None:
    """Raise `BadInput` where edits do not fit each other or the model's width."""
    d_model = width(network)
    seen: set[Site] = set()
    for e in edits:
        if e.site in seen:
            raise BadInput(f"two edits at Site {e.site}; put their features into one")
        seen.add(e.site)
        if e.dictionary.d_model != d_model:
            raise BadInput(
                f"edit at {e.site} has a dictionary of width {e.dictionary.d_model}; the model's is {d_model}"
            )


def operation(edit: Edit, dtype: torch.dtype, device: torch.device | str) -> Callable[[Stream], Stream]:
    """The edit as a function of the stream at its Site, in the model's dtype.

    See `core.Edit` for what each error rule computes.
    """
    dictionary = edit.dictionary.to(dtype, device)
    removed = torch.zeros(dictionary.n_features, dtype=dtype, device=device)
    removed[list(edit.removed)] = 1
    complement = None
    if edit.error == "project" and edit.removed:
        rows = edit.dictionary.decoder[list(edit.removed)].float().to(device)
        _, strength, right = torch.linalg.svd(rows, full_matrices=False)
        complement = right[strength > 1e-4 * strength.max()].to(dtype)  # orthonormal, spans the removed rows

    def run(x: Stream) -> Stream:
        code = dictionary.encode_sparse(x)
        gone = dictionary.combine(Encoded(code.values * removed[code.ids], code.ids))
        if edit.error == "keep":
            return x - gone
        rebuilt = dictionary.decode_sparse(code)
        if edit.error == "drop":
            return rebuilt - gone
        if complement is None:
            return x
        error = x - rebuilt
        return x - gone - (error @ complement.T) @ complement

    return run


@dataclass(frozen=True)
class EditConfig:
    """How an edit is built."""

    method: Literal["mask", "ablate"] = "mask"
    """Learn which of the candidates to remove (see `masks`), or remove the best `ablate` by attribution."""
    candidates: int = 60
    """Features of each Site, the best by attribution, that a mask may remove."""
    ablate: int = 32
    """Features that plain ablation removes, over all Sites."""
    mask: MaskConfig = MaskConfig()


def edit(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    ranking: Mapping[Site, Features],
    lesson: Lesson,
    config: EditConfig = EditConfig(),
    *,
    report: Report | None = None,
) -> list[Edit]:
    """Build the edit that takes the behaviour out: one Edit a Site, features in the order of their weight.

    Args:
        ranking: features by attribution (`features.find`), a list a Site.
        lesson: prompts that teach (`masks.prepare_lesson`).
    """
    if config.method == "mask":
        candidates = {site: features.head(config.candidates) for site, features in ranking.items()}
        return learn_mask(model, dictionaries, lesson, candidates, config.mask, report=report)
    return list(edits_for(merged(ranking), dictionaries, config.ablate, config.mask.error))


def merged(ranking: Mapping[Site, Features]) -> list[tuple[Site, int]]:
    """Rankings of several Sites as one, best first."""
    scored = [(s, site, i) for site, f in ranking.items() for i, s in zip(f.ids, f.scores, strict=True)]
    return [(site, i) for _, site, i in sorted(scored, key=lambda row: -row[0])]


def edits_for(ranking: Ranking, dictionaries: Sequence[Coder], n: int, error: ErrorRule = "keep") -> tuple[Edit, ...]:
    """Ablation of the first `n` features of a ranking."""
    by_site: dict[Site, list[int]] = {}
    for site, feature in ranking[:n]:
        by_site.setdefault(site, []).append(feature)
    return tuple(Edit(d.site, d, tuple(by_site[d.site]), error) for d in dictionaries if d.site in by_site)


def save_edit(
    edits: Sequence[Edit],
    folder: str | Path,
    *,
    chosen_on: Iterable[str] = (),
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Write edits with the dictionaries they need, so that the folder is complete in itself.

    `chosen_on` holds digests of the prompts that chose the edit: an evaluation refuses them. Another edit in the
    folder gives way; raises `BadInput` where it holds something else.
    """
    folder = Path(folder)
    with store.new_folder(folder, replace=MARK) as scratch:
        parts: list[dict[str, Any]] = []
        for e in edits:
            dictionary = e.dictionary.to(torch.bfloat16)
            if not isinstance(dictionary, Coder):
                raise BadInput(f"edit at {e.site}: its dictionary cannot be written")
            save_dictionary(dictionary, scratch / str(e.site))
            part = {"site": str(e.site), "removed": list(e.removed), "error": e.error, "dictionary": str(e.site)}
            parts.append(part)
        store.write_json(
            scratch / MARK,
            {
                "schema": "unsleep.edit/1",
                "edits": parts,
                "chosen_on": sorted(chosen_on),
                "provenance": provenance or {},
            },
        )
    return folder


def load_edit(folder: str | Path) -> tuple[list[Edit], frozenset[str]]:
    """Read edits written by `save_edit` and the digests of the prompts that chose them.

    Raises `BadInput` naming what does not fit.
    """
    folder = Path(folder)
    path = folder / MARK
    card = store.read_record(path, "unsleep.edit/1", {"edits": list, "chosen_on": list[str]})
    kinds = {"site": str, "removed": list[int], "error": str, "dictionary": str}
    edits: list[Edit] = []
    for i, entry in enumerate(card["edits"]):
        part = store.fields_of(entry, kinds, f"{path}: edits[{i}]")
        with store.reading(path):
            site = Site.parse(part["site"])
            dictionary = load_dictionary(store.inside(folder, part["dictionary"], "dictionary"))
            edits.append(Edit(site, dictionary, tuple(part["removed"]), part["error"]))
    return edits, frozenset(card["chosen_on"])
