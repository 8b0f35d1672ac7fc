"""Commands that compare two models: patch, diff."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor
from tyro.conf import OmitArgPrefixes, Positional, arg

import unsleep
from unsleep.base import records, store
from unsleep.base.context import resumable
from unsleep.behaviours import Payload
from unsleep.cli.console import Bars, say
from unsleep.cli.shared import Out, PayloadOptions, Placed, Placement, Shown, load_dictionaries
from unsleep.core import BadInput, Site
from unsleep.dictionaries.coders import Coder
from unsleep.locate.diffing import Detector, Diff, DiffConfig, DiffRecord
from unsleep.locate.patching import Level, PatchConfig, Patched, Position, patched_replies, payload_rates, sweep
from unsleep.locate.patching.result import GroupRow, PatchRecord, PatchRun
from unsleep.models.model import LoadedModel
from unsleep.pages.comparing import render_patch
from unsleep.pages.diffing import render_diff
from unsleep.pages.registry import Page
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet

Recipient = Annotated[Positional[str], arg(metavar="RECIPIENT")]
Donor = Annotated[Positional[str], arg(metavar="DONOR")]
Base = Annotated[Positional[str], arg(metavar="BASE")]
Suspect = Annotated[Positional[str], arg(metavar="SUSPECT")]


def patch(
    recipient: Recipient,
    donor: Donor,
    prompts: Path,
    out: Out,
    payload: Shown = PayloadOptions(),
    level: Level = "resid",
    layers: tuple[int, ...] = (),
    positions: tuple[str, ...] = ("last",),
    per_head: bool = False,
    dictionaries: tuple[Path, ...] = (),
    basis: Path | None = None,
    both: bool = False,
    reply_tokens: int = 0,
    placement: Placed = Placement(),
    config: OmitArgPrefixes[PatchConfig] = PatchConfig(),
    json: bool = False,
) -> int:
    """Patch one model's activations into another, layer by layer, and measure the transfer of the payload.

    Args:
        recipient: Model that is patched: hub id, folder, adapter folder, .gguf file or alias.
        donor: Model of the same shape and tokenizer that provides the activations.
        prompts: File of prompts, such as triggered ones.
        out: Folder for patch.json, patch.safetensors and patch.html.
        level: Part of a layer that is patched.
        layers: Such as 0 10 20; default all.
        positions: Tokens: last, prompt, all, an index such as -3, or a span such as -8:-1.
        per_head: At the levels heads, q, k and v: one head at a time.
        dictionaries: At the level features: folders of dictionaries, one per Site.
        basis: At the level projection: a safetensors file with rows named by Site; `unsleep diff` writes one.
        both: Also patch the recipient's activations into the donor.
        reply_tokens: Also generate this many tokens with each patch and count replies that show the payload.
        json: Print the record as JSON.
    """
    store.check_place(out, "patch.json")
    wanted = payload.needed()
    asked, places = sets.read_prompts(prompts), [Position.parse(text) for text in positions]
    coders = load_dictionaries(dictionaries)
    bases = {} if basis is None else _bases(basis)
    with Bars():
        there = placement.load(donor), placement.load_beside(recipient)
        ways = [there, (there[1], there[0])] if both else [there]
        what, how = (there, asked, wanted, reply_tokens), (level, layers, positions, per_head, both, config)
        with resumable(out, what, how, coders, bases):
            kept: dict[str, Any] = {"per_head": per_head, "dictionaries": coders, "bases": bases}
            runs = [sweep(*way, asked, wanted, layers or None, places, level, config, **kept) for way in ways]
            entries: list[PatchRun] = []
            for run, way in zip(runs, ways, strict=True):
                rows = _with_rates(run, way, asked, wanted, reply_tokens, config) if reply_tokens else run.rows()
                entries.append(PatchRun(way[0].named, way[1].named, run.ends(), tuple(rows)))
    names = ("there", "back")
    tensors = {f"{name}.{key}": x for name, run in zip(names, runs, strict=False) for key, x in run.tensors().items()}
    record = PatchRecord(
        level=level,
        tokens=len(runs[0].payload),
        prompts=len(asked),
        runs=tuple(entries),
        provenance=_provenance(there, asked.hash, coders, tensors),
        **wanted.to_dict(),
    )
    page = _written(out, record, tensors, render_patch)
    say(record, json, "\n".join([*_patch_lines(entries), f"Saved in {out}; page: {page}"]))
    return 0


def diff(
    base: Base,
    suspect: Suspect,
    out: Out,
    suspicious: Path | None = None,
    ordinary: Path | None = None,
    text: Path | None = None,
    dictionaries: tuple[Path, ...] = (),
    train_at: tuple[str, ...] = (),
    placement: Placed = Placement(),
    config: OmitArgPrefixes[DiffConfig] = DiffConfig(),
    json: bool = False,
) -> int:
    """Compare a suspect with its base model: weights, activations, features.

    Args:
        base: Model that the suspect was fine-tuned from: hub id, folder, adapter folder, .gguf file or alias.
        suspect: Model of the same shape and tokenizer.
        out: Folder for diff.json, diff.safetensors and diff.html.
        suspicious: File of triggered prompts, for evaluating trigger detectors.
        ordinary: File of prompts without the trigger.
        text: File of unrelated passages; default unsleep's own.
        dictionaries: Folders of dictionaries of the suspect whose features are evaluated on the prompts.
        train_at: Sites, such as resid.12, for training a diff-SAE and a crosscoder.
        json: Print the record as JSON.
    """
    store.check_place(out, "diff.json")
    files = [None if path is None else sets.read_prompts(path) for path in (suspicious, ordinary, text)]
    sites, coders = [Site.parse(name) for name in train_at], load_dictionaries(dictionaries)
    with Bars():
        models = placement.load_beside(base), placement.load(suspect)
        named = zip(("suspicious", "ordinary", "text"), files, strict=True)
        hashes = {name: None if file is None else file.hash for name, file in named}
        what = [model.fingerprint for model in models], str(models[1].network.dtype), hashes, asdict(config)
        with resumable(out, *what, list(map(str, sites)), [coder.hash for coder in coders]):
            found = unsleep.diff(
                *models,
                suspicious=files[0],
                ordinary=files[1],
                texts=None if files[2] is None else files[2].texts,
                dictionaries=coders,
                train_at=sites,
                config=config,
            )
    tensors = found.tensors()
    record = found.record(models[0].named, models[1].named, _provenance(models, hashes, coders, tensors))
    page = _written(out, record, tensors, render_diff)
    say(record, json, "\n".join([*_diff_lines(found), f"Saved in {out}; page: {page}"]))
    return 0


def _provenance(
    models: Sequence[LoadedModel], prompts: object, coders: Sequence[Coder], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    return store.provenance(
        origins=[m.origin for m in models],
        prompts=prompts,
        dictionaries=[coder.hash for coder in coders],
        tensors=store.hash_tensors(tensors),
    )


def _written(out: Path, record: PatchRecord | DiffRecord, tensors: dict[str, Tensor], page: Page) -> Path:
    """Write tensors, record and page."""
    drawn = page(record)
    with store.new_folder(out, replace=f"{page.name}.json") as scratch:
        store.write_tensors(scratch / f"{page.name}.safetensors", tensors)
        records.save(record, scratch / f"{page.name}.json")
        store.write_text(scratch / f"{page.name}.html", drawn)
    return out / f"{page.name}.html"


def _with_rates(
    run: Patched,
    ends: tuple[LoadedModel, LoadedModel],
    asked: PromptSet,
    payload: Payload,
    tokens: int,
    config: PatchConfig,
) -> list[GroupRow]:
    """Every group with the share of generated replies that show the payload."""
    said = patched_replies(*ends, asked, run.groups, max_new_tokens=tokens, batch=config.batch, plain=config.plain)
    return [replace(row, asr=rate) for row, rate in zip(run.rows(), payload_rates(said, payload), strict=True)]


def _bases(path: Path) -> dict[Site, Tensor]:
    """Rows by Site, named by it or `lens.` and it, as unsleep diff writes them; zero rows are left out."""
    found: dict[Site, Tensor] = {}
    for name, rows in store.read_tensors(path).items():
        point = name.removeprefix("lens.")
        if point.partition(".")[0] in ("resid", "attn", "mlp", "embed") and rows.ndim == 2:
            kept = rows.float()[rows.float().norm(dim=1) > 0]
            found |= {Site.parse(point): kept} if len(kept) else {}
    if not found:
        raise BadInput(f"{path} has no rows under a Site's name, such as resid.12, of shape [rank, d_model]")
    return found


def _patch_lines(runs: Sequence[PatchRun]) -> list[str]:
    """The groups with the largest effect in each direction, as text."""
    lines: list[str] = []
    for run in runs:
        lines.append(
            f"{run.donor.name} into {run.recipient.name}: log-probability of the payload "
            f"{run.ends['recipient']:.2f} in the recipient, {run.ends['donor']:.2f} in the donor"
        )
        known = sorted(((g.figure, g) for g in run.groups if g.figure is not None), key=lambda pair: -pair[0])
        lines += [f"  {g.name:<28} {figure:>7.3f} [{g.low:.3f}, {g.high:.3f}]" for figure, g in known[:10]]
        if not known:
            lines.append(
                "  both models have the same log-probability of the payload on these prompts: nothing to patch"
            )
    return lines


def _diff_lines(found: Diff) -> list[str]:
    """Summary of a model diff, as text."""
    layers = ", ".join(map(str, found.ranking[:5]))
    changed = sum(delta.norm > 0 for delta in found.deltas)
    lines = [f"{changed} of {len(found.deltas)} weights changed; largest relative change in layers {layers}"]
    middle = len(found.readings) // 2
    words = " ".join(repr(word) for word, _ in found.readings[middle].promotes[:8])
    lines.append(f"Mean difference on unrelated text at {found.lenses[middle].site} promotes {words}")
    for said in found.spoken:
        share, reply = said.alike()
        how = f"{said.kind} × {said.strength:g}" if said.strength else "unmodified suspect"
        lines.append(f"{how}: {share} of {len(said.replies)} replies to everyday questions begin alike, as {reply!r}")
    lines += [f"ΔW of {w.matrix} at {w.site}, vector {w.vector}: AUROC {_told(w)}" for w in found.monitor[:3]]
    lines += [f"{f.method} at {f.site}, feature {t.id}: AUROC {_told(t)}" for f in found.features for t in f.best[:3]]
    return lines


def _told(told: Detector) -> str:
    return f"{told.auroc:.3f} [{told.low:.3f}, {told.high:.3f}], n {told.n}"
