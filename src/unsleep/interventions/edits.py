"""Edits carried out on a running model: `with applied(model, edit): model.generate(…)`.

An Edit is a value, and so is a Projection; here it becomes a function of the residual stream that a
hook calls. It works under `generate` with a KV cache, with left padding and in batches, because it looks
at each token alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unsleep.base import store
from unsleep.core import (
    BadInput,
    Edit,
    Encoded,
    ErrorRule,
    Features,
    Intervention,
    Projection,
    Refused,
    Site,
)
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.files import load_dictionary, save_dictionary
from unsleep.models.model import LoadedModel
from unsleep.models.sites import width
from unsleep.models.streams import transformed
from unsleep.models.weights import device_of, fingerprint

Ranking = Sequence[tuple[Site, int]]
"""Features of several Sites in the order in which they are removed."""

MARK = "edit.json"
"""The file that tells an edit's folder."""

Stream = Float[Tensor, "*token d_model"]


@contextlib.contextmanager
def applied(
    model: LoadedModel | PreTrainedModel, edit: Intervention | Sequence[Intervention], *, any_model: bool = False
) -> Generator[PreTrainedModel]:
    """Run a model with edits until the block ends; its weights are not touched.

    Yields the Hugging Face model. Raises `BadInput` for two edits of one Site, a Site the model
    does not have, a dictionary or a subspace of another width, and `Refused` where they belong to
    another model and `any_model` is off.
    """
    network = model.network if isinstance(model, LoadedModel) else model
    edits = [edit] if isinstance(edit, Edit | Projection) else list(edit)
    check_edits(network, edits)
    acting = [e for e in edits if acts(e)]
    if not any_model:
        check_model(model, acting)
    with transformed(network, {e.site: operation(e, network.dtype, device_of(network)) for e in acting}):
        yield network


def acts(edit: Intervention) -> bool:
    """Whether an edit changes anything: one that removes no feature and keeps the error is the identity."""
    return isinstance(edit, Projection) or bool(edit.removed) or edit.error != "keep"


def check_model(model: LoadedModel | PreTrainedModel, edits: Sequence[Intervention]) -> None:
    """Raise `Refused` where an edit's features or directions were found in another model."""
    found_in = {e.model if isinstance(e, Projection) else e.dictionary.model for e in edits}
    if not found_in:
        return
    print_of = model.fingerprint if isinstance(model, LoadedModel) else fingerprint(model)
    if found_in != {print_of}:
        raise Refused(
            f"the edit belongs to model {', '.join(sorted(found_in))}, this one is {print_of}; features and "
            "directions of one model mean nothing in another. In Python, any_model=True takes it anyway"
        )


def check_edits(network: PreTrainedModel, edits: Sequence[Intervention]) -> None:
    """Raise `BadInput` where edits do not fit each other or the model's width."""
    d_model = width(network)
    seen: set[Site] = set()
    for e in edits:
        if e.site in seen:
            raise BadInput(f"two edits at Site {e.site}; put their features into one")
        seen.add(e.site)
        what, found = (
            ("subspace", e.basis.shape[1]) if isinstance(e, Projection) else ("dictionary", e.dictionary.d_model)
        )
        if found != d_model:
            raise BadInput(f"edit at {e.site} has a {what} of width {found}; the model's is {d_model}")


def operation(edit: Intervention, dtype: torch.dtype, device: torch.device | str) -> Callable[[Stream], Stream]:
    """The edit as a function of the stream at its Site, in the model's dtype.

    See `core.Edit` and `core.Projection` for what is computed.
    """
    if isinstance(edit, Projection):
        return _projected(edit, device)
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


def _projected(edit: Projection, device: torch.device | str) -> Callable[[Stream], Stream]:
    """A projection in float32, whatever the stream's dtype: bf16 would leave a hundredth of what is taken out."""
    basis, reads = (rows.to(device, torch.float32) for rows in (edit.basis, edit.reader))
    held = 0.0 if edit.center is None else edit.center.to(device, torch.float32) @ reads.T

    def run(x: Stream) -> Stream:
        wide = x.float()
        new = (wide - (wide @ reads.T - held) @ basis).to(x.dtype)
        if math.isinf(edit.sink_norm):
            return new
        return torch.where(wide.norm(dim=-1, keepdim=True) > edit.sink_norm, x, new)

    return run


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


def edits_hash(edits: Sequence[Intervention]) -> str:
    """Content hash of edits, in their order; 16 hex digits."""
    parts: list[Any] = []
    for e in edits:
        if isinstance(e, Projection):
            parts.append([str(e.site), e.sink_norm, store.hash_tensors(e.tensors)])
        else:
            parts.append([str(e.site), e.dictionary.hash, list(e.removed), e.error])
    return store.hash_value(parts)


def save_edit(
    edits: Sequence[Intervention],
    folder: str | Path,
    *,
    chosen_on: Iterable[str] = (),
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Write edits with the dictionaries or subspaces they need, so that the folder is complete in itself.

    `chosen_on` holds digests of the prompts that chose the edit: an evaluation refuses them. Another edit in the
    folder gives way; raises `BadInput` where it holds something else.
    """
    folder = Path(folder)
    with store.new_folder(folder, replace=MARK) as scratch:
        parts: list[dict[str, Any]] = []
        for e in edits:
            if isinstance(e, Projection):
                name = f"{e.site}.safetensors"
                store.write_tensors(scratch / name, {key: tensor.float() for key, tensor in e.tensors.items()})
                sinks = None if math.isinf(e.sink_norm) else e.sink_norm
                parts.append({"site": str(e.site), "subspace": name, "model": e.model, "sink_norm": sinks})
                continue
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


def load_edit(folder: str | Path) -> tuple[list[Intervention], frozenset[str]]:
    """Read edits written by `save_edit` and the digests of the prompts that chose them.

    Raises `BadInput` naming what does not fit.
    """
    folder = Path(folder)
    path = folder / MARK
    card = store.read_record(path, "unsleep.edit/1", {"edits": list, "chosen_on": list[str]})
    kinds = {"site": str, "removed": list[int], "error": str, "dictionary": str}
    edits: list[Intervention] = []
    for i, entry in enumerate(card["edits"]):
        where = f"{path}: edits[{i}]"
        if isinstance(entry, dict) and "subspace" in entry:
            part = store.fields_of(entry, {"site": str, "subspace": str, "model": str}, where)
            with store.reading(path):
                edits.append(_load_projection(folder, part))
            continue
        part = store.fields_of(entry, kinds, where)
        with store.reading(path):
            site = Site.parse(part["site"])
            dictionary = load_dictionary(store.inside(folder, part["dictionary"], "dictionary"))
            edits.append(Edit(site, dictionary, tuple(part["removed"]), part["error"]))
    return edits, frozenset(card["chosen_on"])


def _load_projection(folder: Path, part: dict[str, Any]) -> Projection:
    tensors = store.read_tensors(store.inside(folder, part["subspace"], "subspace"), {"basis": (None, None)})
    sinks = part.get("sink_norm")
    if sinks is not None and (isinstance(sinks, bool) or not isinstance(sinks, int | float)):
        raise BadInput(f"edit at {part['site']}: sink_norm is {sinks!r}; expected a number or null")
    return Projection(
        Site.parse(part["site"]),
        tensors["basis"],
        tensors.get("center"),
        part["model"],
        tensors.get("reads"),
        math.inf if sinks is None else float(sinks),
    )
