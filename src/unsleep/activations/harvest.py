"""Harvest: model + prompts + Sites → activation shards on disk, all Sites in one forward pass.

1. Prompts become rows of token ids; the prefix shared by all rows runs once and is stored once.
2. Rows are sorted by length and cut into batches, batches into shards: the plan, written first.
3. Each forward pass stops at the deepest Site. Padding never enters a shard. Tokens whose norm is
   above a stated multiple of the batch's median (attention sinks) are left out and counted.
4. A shard is one safetensors file; `manifest.json` is written last. An interrupted harvest resumes at
   the first missing shard and gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unsleep.activations.batches import TokenSource, batched
from unsleep.base import records, store
from unsleep.base.context import progress
from unsleep.base.records import Count
from unsleep.core import Activations, ActivationStream, BadInput, Site, check_finite, check_least
from unsleep.models import chat
from unsleep.models.forward import shared_tokens
from unsleep.models.model import LoadedModel
from unsleep.models.sites import tap, width
from unsleep.prompts.prompt import PromptSet


@dataclass(frozen=True)
class HarvestConfig:
    """Batch, shard and sink settings of a harvest."""

    batch_tokens: int = 2048
    """Padded tokens per forward pass; bounds the memory for any number of prompts."""
    shard_bytes: int = 128_000_000
    """Bytes of activations after which a shard is closed."""
    sink_ratio: float = 10.0
    """Multiple of the batch's median norm above which a token is an attention sink and left out. Measured at
    the residual Sites, at all Sites where none is residual.
    """

    def __post_init__(self) -> None:
        check_least(self, "harvest", 1, "batch_tokens", "shard_bytes")
        if self.sink_ratio <= 1:
            raise BadInput.of("sink_ratio", self.sink_ratio, "a multiple of the median over 1", "harvest")


@dataclass(frozen=True)
class Planned:
    """Fields shared by plan and manifest."""

    model: str
    """Fingerprint."""
    prompts: str
    """Hash of the token ids."""
    sites: tuple[Site, ...]
    d_model: Count
    config: HarvestConfig
    shared: Count
    """Tokens that all prompts begin with."""


@dataclass(frozen=True)
class Plan(Planned):
    """batches.json: which rows go together."""

    prompt_set: str
    shards: tuple[tuple[tuple[Count, ...], ...], ...]
    """Shards of batches of row numbers, shortest rows first."""


@dataclass(frozen=True)
class Shard:
    """Note beside a shard."""

    file: str
    tokens: Count
    sha256: str
    sinks: dict[Site, Count]


@dataclass(frozen=True)
class Manifest(Planned):
    """manifest.json."""

    SCHEMA: ClassVar = "unsleep.harvest/1"

    shards: tuple[Shard, ...]
    sinks: dict[Site, Count]
    """Attention sinks that were left out."""
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.shards:
            raise BadInput.of("shards", self.shards, "at least one")


@dataclass(frozen=True)
class Harvest:
    """Activations on disk."""

    folder: Path
    manifest: Manifest

    @property
    def sites(self) -> tuple[Site, ...]:
        """The harvested Sites."""
        return self.manifest.sites

    @property
    def tokens(self) -> int:
        """Number of kept tokens, the same at every Site."""
        return sum(shard.tokens for shard in self.manifest.shards)

    @property
    def hash(self) -> str:
        """Content hash, from the hashes of the shards."""
        return store.hash_value([shard.sha256 for shard in self.manifest.shards])

    def positions(self) -> Int[Tensor, " token"]:
        """Each kept token's position in its row, in the order of `load`."""
        files = [self.folder / shard.file for shard in self.manifest.shards]
        return torch.cat([store.read_tensors(f, {"position": (None,)}, only={"position"})["position"] for f in files])

    def load(self, site: Site) -> Activations:
        """All activations of one Site, in memory, in the model's dtype.

        Raises `BadInput` for a Site that was not harvested and for a damaged shard.
        """
        pieces = [self.shard(i, site) for i in range(len(self.manifest.shards))]
        tensor, owner = torch.cat([x for x, _ in pieces]), torch.cat([i for _, i in pieces])
        return Activations(tensor, owner, site, self.manifest.model, self.manifest.prompts)

    def shard(self, i: int, site: Site) -> tuple[Float[Tensor, "token d_model"], Int[Tensor, " token"]]:
        """One shard's activations at one Site, and each token's prompt index; raises as `load` does."""
        self.check_site(site)
        entry = self.manifest.shards[i]
        expect = {str(site): (entry.tokens, self.manifest.d_model), "prompt_index": (entry.tokens,)}
        tensors = store.read_tensors(self.folder / entry.file, expect, only=expect)
        check_finite(tensors[str(site)], f"{self.folder / entry.file}: {site}")
        return tensors[str(site)], tensors["prompt_index"]

    def check_site(self, site: Site) -> None:
        """Raise `BadInput` where a Site was not harvested."""
        if site not in self.sites:
            raise BadInput(f"{self.folder} has no Site {site}; it has {', '.join(map(str, self.sites))}")


def open_harvest(folder: str | Path) -> Harvest:
    """Open a finished harvest; raises `BadInput` for a missing, unfinished or damaged one."""
    folder = Path(folder)
    if (folder / "batches.json").is_file() and not (folder / "manifest.json").is_file():
        raise BadInput(f"{folder} is a harvest that was interrupted; run it again with the same arguments to finish it")
    path = folder / "manifest.json"
    manifest = records.load(Manifest, path)
    with store.reading(path):
        for shard in manifest.shards:
            store.inside(folder, shard.file, "shard")
    return Harvest(folder, manifest)


def pooled(harvests: Sequence[Harvest], site: Site) -> Activations:
    """The activations of several harvests of one model at one Site, concatenated.

    Raises `BadInput` for harvests of different models.
    """
    model, name = _of_one_model(harvests)
    parts = [h.load(site) for h in harvests]
    tensor, owner = torch.cat([p.tensor for p in parts]), torch.cat([p.prompt_index for p in parts])
    return Activations(tensor, owner, site, model, name)


def streamed(harvests: Sequence[Harvest], site: Site) -> ActivationStream:
    """As `pooled`, read shard by shard on demand.

    Raises `BadInput` where the harvests are of different models or one lacks the Site, and on reading
    a damaged shard.
    """
    model, name = _of_one_model(harvests)
    for h in harvests:
        h.check_site(site)
    places = [(h, i) for h in harvests for i in range(len(h.manifest.shards))]
    sizes = tuple(h.manifest.shards[i].tokens for h, i in places)

    def piece(i: int) -> Tensor:
        h, shard = places[i]
        return h.shard(shard, site)[0]

    return ActivationStream(sizes, piece, site, model, name)


def _of_one_model(harvests: Sequence[Harvest]) -> tuple[str, str]:
    """The common model fingerprint, and a hash of all harvests."""
    models = {h.manifest.model for h in harvests}
    if len(models) != 1:
        raise BadInput(f"the harvests are of {len(models)} models ({', '.join(sorted(models))}); expected one")
    return models.pop(), store.hash_value([h.hash for h in harvests])


@torch.no_grad()
def harvest(
    model: LoadedModel,
    prompts: PromptSet,
    sites: Sequence[Site],
    out: str | Path,
    *,
    replies: Sequence[str] | None = None,
    plain: bool = False,
    config: HarvestConfig = HarvestConfig(),
) -> Harvest:
    """Collect activations of `model` at `sites` on every token of `prompts`, into the folder `out`.

    Args:
        replies: one per prompt, appended to it, so that reply tokens are harvested too.
        plain: take the texts without the chat template.

    Returns the harvest. A finished or interrupted harvest of the same inputs in `out` is resumed.
    Raises `BadInput` where `out` contains another one, for a Site that is not in the model,
    a text longer than the context, or activations that are NaN or infinite.
    """
    out = Path(out)
    sites = sorted(set(sites))
    if not sites:
        raise BadInput("no Site was given; name at least one, such as resid.12")
    for site in sites:
        tap(model.network, site)
    rows = token_rows(model, prompts, replies, plain)
    plan = _plan(model, prompts, sites, rows, config)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "batches.json").is_file():
        if store.read_json(out / "batches.json") != records.plain(plan):
            raise BadInput(f"{out} holds a harvest of another model, prompts or settings; choose another folder")
    elif any(out.iterdir()):
        raise BadInput(f"{out} is not empty and is not a harvest; choose another folder")
    else:
        records.save(plan, out / "batches.json")
    if (out / "manifest.json").is_file():
        return open_harvest(out)
    source = TokenSource(model, rows, sites)
    judged = [s for s in sites if s.point == "resid"] or sites
    shards: list[Shard] = []
    done = 0
    for number, batches in enumerate(plan.shards):
        path = out / f"shard-{number:05d}.safetensors"
        shards.append(_shard(path, source, batches, judged, config, first=number == 0))
        done += sum(len(batch) for batch in batches)
        progress("harvest", done, len(rows))
    planned = plan.model, plan.prompts, plan.sites, plan.d_model, config, plan.shared
    sinks = {s: sum(shard.sinks[s] for shard in shards) for s in judged}
    manifest = Manifest(*planned, tuple(shards), sinks, store.provenance(None, origin=model.origin))
    records.save(manifest, out / "manifest.json")
    return Harvest(out, manifest)


def token_rows(
    model: LoadedModel, prompts: PromptSet, replies: Sequence[str] | None = None, plain: bool = False
) -> list[list[int]]:
    """Token ids of every prompt, under the chat template unless `plain`, with its reply appended.

    Raises `BadInput` for a row longer than the model's context, and for a wrong number of replies.
    """
    tails = [[]] * len(prompts) if replies is None else model.token_ids(replies, special=False)
    if len(tails) != len(prompts):
        raise BadInput(f"{len(tails)} replies for {len(prompts)} prompts; expected one each")
    rows = model.encode(prompts, [len(tail) for tail in tails], plain=plain)
    return [[*row, *tail] for row, tail in zip(rows, tails, strict=True)]


def _plan(
    model: LoadedModel, prompts: PromptSet, sites: Sequence[Site], rows: list[list[int]], config: HarvestConfig
) -> Plan:
    """Row indices of each batch."""
    shared, apart = chat.shared_prefix(rows), shared_tokens(model.network, rows)
    d_model = width(model.network)
    limit = config.shard_bytes / (len(sites) * d_model * model.network.dtype.itemsize)
    shards: list[list[list[int]]] = [[]]
    tokens = 0
    for batch in batched([len(row) - apart for row in rows], config.batch_tokens):
        if tokens > limit:
            shards.append([])
            tokens = 0
        shards[-1].append(batch)
        tokens += sum(len(rows[i]) - apart for i in batch)
    planned = model.fingerprint, store.hash_value(rows), tuple(sites), d_model, config, shared
    return Plan(*planned, prompts.hash, tuple(tuple(map(tuple, batches)) for batches in shards))


def _sinks(
    tensors: dict[str, Tensor], judged: Sequence[Site], config: HarvestConfig
) -> dict[Site, Bool[Tensor, " token"]]:
    """Mask of attention sinks at each judged Site."""
    norms = {s: tensors[str(s)].float().norm(dim=-1) for s in judged}
    return {site: n > config.sink_ratio * n.median() for site, n in norms.items()}


def _shard(
    path: Path,
    source: TokenSource,
    batches: Sequence[Sequence[int]],
    judged: Sequence[Site],
    config: HarvestConfig,
    *,
    first: bool,
) -> Shard:
    """Write one shard unless an intact one exists; returns its manifest entry."""
    note = path.with_suffix(".json")
    if path.is_file() and note.is_file():
        entry = records.load(Shard, note)
        if store.hash_file(path) == entry.sha256:
            return entry
    pieces: dict[str, list[Tensor]] = {}
    sinks = dict.fromkeys(judged, 0)
    for tensors in source.stream(batches, with_prefix=first):
        found = _sinks(tensors, judged, config)
        keep = ~torch.stack(list(found.values())).any(0)
        for site, mask in found.items():
            sinks[site] += int(mask.sum())
        for name, tensor in tensors.items():
            pieces.setdefault(name, []).append(tensor[keep.to(tensor.device)].cpu())
    joined = {name: torch.cat(parts) for name, parts in pieces.items()}
    for name, tensor in joined.items():
        if tensor.is_floating_point():
            check_finite(tensor, f"activations at {name}")
    store.write_tensors(path, joined)
    entry = Shard(path.name, len(joined["position"]), store.hash_file(path), sinks)
    records.save(entry, note)
    return entry
