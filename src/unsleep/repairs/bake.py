"""Bakes an edit into plain weights: a checkpoint that loads without unsleep.

Closed form, layer by layer upwards. With A the inputs of the linear layers that write the edited
block's update (attention output and MLP output projections), on suspicious and trusted tokens, and
D = the edited model's activation at the Site − that of the model baked so far:

    ΔW = argmin ‖A ΔWᵀ − D‖² + λ·mean(diag AᵀA)·‖ΔW‖²

Trusted tokens, where D is near 0, act as the penalty that protects other behaviour (as in
Meng et al. 2023, "Mass-editing memory in a transformer", arXiv:2210.07229, section 4.2). The residual error
of an earlier layer is part of the next one's D.

Projections are exact at an attention or MLP output, and where one subspace is
ablated everywhere (`models.sites.everywhere`): every matrix that writes there is made orthogonal
to the subspace (as in Arditi et al. 2024, "Refusal in language models is mediated by a single direction",
arXiv:2406.11717, section 4.1), with the centre as a bias; a tied unembedding is untied and keeps its weights.

Families that write through a norm have no such closed form; they are distilled: the same weights
are trained until the baked logits match the edited ones. Either way a baked model that is
not faithful to the edited one is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unsleep.base import records, store
from unsleep.base.context import progress
from unsleep.core import BadInput, Refused, Site
from unsleep.interventions.features import Edit
from unsleep.interventions.intervention import (
    Intervention,
    check_model,
    check_widths,
    transforms_of,
)
from unsleep.interventions.subspaces import Projection
from unsleep.models import weights
from unsleep.models.forward import Rows, kl, reply_logits, run
from unsleep.models.hooks import inputs_watched
from unsleep.models.load import save_plain
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Writer, embedding, everywhere, layers, width, writers, writes_linearly
from unsleep.models.streams import capture, transformed, truncated
from unsleep.pages.records import Result

MARK = "unsleep.json"
"""File that marks a baked checkpoint's folder."""


Bakeable = Edit | Projection
"""Interventions that can be baked into weights."""


@dataclass(frozen=True)
class BakeConfig:
    """Options of baking."""

    ridge: float = 1e-3
    """λ, the ridge penalty relative to the inputs' mean square."""
    tolerance: float = 0.1
    """Maximum mean KL(edited ‖ baked) on held-back rows, in nats per token."""
    held_back: int = 5
    """Every n-th row is not fitted but held back to measure faithfulness."""
    distil_steps: int = 80
    """Steps of distillation, where needed."""
    learning_rate: float = 2e-4
    """Learning rate of Adam in distillation."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ridge < 0 or self.tolerance <= 0 or self.held_back < 2:
            raise BadInput(f"bake settings {self}; expected ridge ≥ 0, tolerance > 0 and held_back ≥ 2")


@dataclass(frozen=True)
class BakedRecord:
    """unsleep.json of a checkpoint that nothing has judged yet."""

    SCHEMA: ClassVar = "unsleep.baked/1"

    method: str
    kl: float
    fingerprint: str
    provenance: dict[str, Any]


class Baked(NamedTuple):
    """A plain model with the edit in its weights."""

    model: LoadedModel
    kl: float
    """Mean KL(edited ‖ baked) on held-back rows, nats per token."""
    method: str
    """`exact`, `ridge` or `distil`."""

    def record(self, **made_from: Any) -> BakedRecord:
        """Its record before any evaluation."""
        return BakedRecord(self.method, self.kl, self.model.fingerprint, store.provenance(**made_from))


def bake(
    model: LoadedModel, edits: Sequence[Intervention], rows: Sequence[Rows], config: BakeConfig = BakeConfig()
) -> Baked:
    """Bake edits of residual Sites, and projections at any Site, into the weights of a copy of `model`.

    Args:
        rows: suspicious and trusted rows with replies, such as a `masks.Lesson`'s.

    Raises:
        BadInput: an edit at a Site that is not residual, or a projection that no weight can carry.
        Refused: the edit belongs to another model, or the baked model is not faithful to the edited one; nothing
            is returned.
    """
    edits = _bakeable(model, edits)
    exact = _exact(model.network, edits)
    fitted_edits = [e for e in edits if e not in exact]
    for e in fitted_edits:
        if e.site.point != "resid":
            raise BadInput(
                f"a projection at {e.site} cannot be baked; expected residual Sites, or one subspace without attention "
                "sinks at the embedding and every attention output and residual Site"
            )
    network, kept = weights.copy_network(model.network), model.stored_dtype
    fitted = [_take(group, config.held_back, fit=True) for group in rows]
    judged = [_take(group, config.held_back, fit=False) for group in rows]
    linear = all(writes_linearly(network, e.site.layer) for e in fitted_edits)
    method = "exact" if exact and not fitted_edits else "ridge" if linear else "distil"
    if not edits:
        return Baked(replace(model, network=network, name=f"{model.name} (baked)"), 0.0, method)
    _project_writers(model.network, network, exact, kept)
    if method == "ridge":
        _bake_closed_form(model.network, network, edits, fitted_edits, fitted, config, kept)
    elif method == "distil":
        _distil(model.network, network, edits, fitted, config, kept)
    divergence = faithfulness(model.network, network, edits, judged)
    if not divergence <= config.tolerance:
        raise Refused(
            f"the baked model is not faithful to the edited one: KL {divergence:.3f} nats per token on held-out rows, "
            f"allowed {config.tolerance}. Give more suspicious prompts, or ship the model with the edit applied"
        )
    return Baked(replace(model, network=network, name=f"{model.name} (baked)"), divergence, method)


def unbakeable(edits: Sequence[Intervention]) -> list[Site]:
    """The Sites of edits of features that no weights can carry: all but residual ones."""
    return sorted({e.site for e in edits if isinstance(e, Edit) and e.acts and e.site.point != "resid"})


def check_bakeable(edits: Sequence[Intervention]) -> None:
    """Raise `BadInput` for interventions that no model's weights can carry."""
    for each in edits:
        if not isinstance(each, Edit | Projection):
            raise BadInput(f"a {type(each).__name__.lower()} cannot be baked; expected edits and projections")
    if sites := unbakeable(edits):
        raise BadInput(
            f"features at {named(sites)} cannot be baked; expected residual Sites. In `unsleep veto`, --points resid "
            "leaves out the others"
        )


def named(sites: Sequence[Site], most: int = 4) -> str:
    """Some Sites in words, the others counted."""
    words = [*map(str, sites[:most]), *([f"{len(sites) - most} more"] if len(sites) > most else [])]
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def save_baked(baked: Baked, folder: str | Path, *, card: str, record: BakedRecord | Result) -> Path:
    """Write the checkpoint with its model card and `unsleep.json`, atomically.

    An earlier baked checkpoint is replaced; raises `BadInput` where the folder contains something else.
    """
    folder = Path(folder)
    with store.new_folder(folder, replace=MARK) as scratch:
        save_plain(baked.model, scratch)
        store.write_text(scratch / "README.md", card)
        records.save(record, scratch / MARK)
    return folder


@torch.no_grad()
def faithfulness(
    edited: PreTrainedModel, baked: PreTrainedModel, edits: Sequence[Bakeable], rows: Sequence[Rows]
) -> float:
    """Mean KL(edited ‖ baked) over the reply tokens of rows, in nats per token."""
    total = count = 0.0
    for piece in _pieces(rows):
        with transformed(edited, transforms_of(edits, edited)):
            target = reply_logits(edited, piece)[piece.reply]
        each = kl(target, reply_logits(baked, piece)[piece.reply])
        total, count = total + float(each.sum()), count + len(each)
    return total / max(count, 1)


def _bakeable(model: LoadedModel, edits: Sequence[Intervention]) -> list[Bakeable]:
    """The interventions with an effect, in forward order; raises as `bake` does for ones that weights cannot carry."""
    check_bakeable(edits)
    acting = [each for each in edits if isinstance(each, Edit | Projection) and each.acts]
    check_widths(model.network, acting)
    check_model(model, acting)
    sites = [each.site for each in acting]
    if twice := [site for site in sites if sites.count(site) > 1]:
        raise BadInput(f"two edits at Site {twice[0]} cannot be baked; merge their features into one edit")
    return sorted(acting, key=lambda e: e.site)


def _take(rows: Rows, every: int, *, fit: bool) -> Rows:
    index = torch.arange(len(rows.ids))
    return rows.select(index[(index % every != 0) == fit])


def _pieces(rows: Sequence[Rows], size: int = 32) -> list[Rows]:
    return [group.select(slice(i, i + size)) for group in rows for i in range(0, len(group.ids), size)]


def _exact(network: PreTrainedModel, edits: Sequence[Bakeable]) -> list[Projection]:
    """The projections that weights can carry exactly."""
    projections = [e for e in edits if isinstance(e, Projection) and math.isinf(e.sink_norm)]
    at = {p.site: p for p in projections if p.site.point != "mlp"}
    first = at.get(Site(0, "embed"))
    if first is not None and at.keys() == set(everywhere(network)):
        added = replace(first, center=None)  # attention adds to a stream that already has the centre
        if all(_alike(p, added if p.site.point == "attn" else first) for p in at.values()):
            return projections
    return [p for p in projections if p.site.point in ("attn", "mlp")]


def _alike(one: Projection, other: Projection) -> bool:
    """True if two projections are equal."""
    both = [p.reader.double().T @ p.basis.double() for p in (one, other)]
    pairs = zip((one, other), both, strict=True)
    held = [torch.zeros(()) if p.center is None else p.center.double() @ m for p, m in pairs]
    scale = max(1.0, *(float(h.abs().max()) for h in held))
    return bool((both[0] - both[1]).abs().max() < 1e-4 and (held[0] - held[1]).abs().max() < 1e-4 * scale)


@torch.no_grad()
def _project_writers(
    source: PreTrainedModel, network: PreTrainedModel, projections: Sequence[Projection], kept: torch.dtype
) -> None:
    """Make the matrices that write at the projections' Sites orthogonal to their subspaces.

    Raises `BadInput` where no linear layer writes there, or an embedding passes through more than a scale before the
    first layer.
    """
    for p in (p for p in projections if p.site.point in ("attn", "mlp")):
        at = [w for w in writers(network, p.site.layer) if w.point == p.site.point]
        if not at:
            raise BadInput(
                f"{network.config.model_type} writes {p.site} through a norm or a mixture of experts, not through a "
                "linear layer; a projection there cannot be baked. Take it out at residual Sites"
            )
        _project_linear(at[0], p, p.center, kept)
    common = next((p for p in projections if p.site.point == "embed"), None)
    if common is None:
        return
    for layer in range(len(layers(network))):
        if not writes_linearly(network, layer):
            raise BadInput(
                f"layer {layer} of {network.config.model_type} writes to the residual stream through a norm or a "
                "mixture of experts, where weights alone do not decide; take the subspace out at residual Sites only"
            )
        for writer in writers(network, layer):
            _project_linear(writer, common, None, kept)
    _project_embeddings(network, common, kept)
    ids = torch.arange(min(64, len(embedding(network))), device=weights.device_of(network))[None]
    here = Site(0, "embed")
    with capture(network, [here]) as found:
        network(input_ids=ids, use_cache=False)
    with transformed(source, transforms_of([common], source)), capture(source, [here]) as wanted:
        source(input_ids=ids, use_cache=False)
    error = (found[here].float() - wanted[here].float()).abs().max() / wanted[here].float().abs().max()
    if not error < 0.02:
        raise BadInput(
            f"{network.config.model_type} changes its embeddings before the first layer; a projection at embed cannot "
            "be baked. Take it out at residual Sites only"
        )


def _project_linear(writer: Writer, p: Projection, center: Tensor | None, kept: torch.dtype) -> None:
    """W ← (1 − BᵀR) W and b ← (1 − BᵀR) b + BᵀR center / scale, rounded to the checkpoint's dtype."""
    linear, rows, reads = writer.linear, p.basis.float(), p.reader.float()
    w = _plain(linear).float()
    gone = (w @ reads.T) @ rows if isinstance(linear, Conv1D) else rows.T @ (reads @ w)
    weights.write(linear, "weight", (w - gone).to(kept))
    bias: Tensor | None = linear.bias  # type: ignore[assignment]
    held = torch.zeros(rows.shape[1], device=rows.device)
    if center is not None:
        held = center.float() @ reads.T @ rows / writer.scale
    if bias is None:
        if bool(held.any()):
            raise BadInput("a projection with a centre cannot be baked where the model's layer has no bias; give none")
        return
    b = weights.values(linear, "bias").float()
    weights.write(linear, "bias", (b - (b @ reads.T) @ rows + held).to(kept))


def _project_embeddings(network: PreTrainedModel, p: Projection, kept: torch.dtype) -> None:
    """Project every embedding table; the token table gets the centre. The unembedding is unchanged."""
    tokens: Any = network.get_input_embeddings()
    rows, reads = p.basis.float(), p.reader.float()
    head = network.get_output_embeddings()
    assert head is not None
    if head.weight is tokens.weight:
        head.weight = nn.Parameter(tokens.weight.detach().clone(), requires_grad=False)
        network.config.tie_word_embeddings = False
    inside = {m for block in layers(network) for m in block.modules()}
    for table in network.modules():
        if isinstance(table, nn.Embedding) and table not in inside and table.embedding_dim == width(network):
            e = weights.values(table).float()
            e = e - (e @ reads.T) @ rows
            if table is tokens and p.center is not None:
                e = e + (p.center.float() @ reads.T @ rows) / float(getattr(table, "embed_scale", 1.0))
            weights.write(table, "weight", e.to(kept))


@torch.no_grad()
def _bake_closed_form(
    source: PreTrainedModel,
    network: PreTrainedModel,
    edits: Sequence[Bakeable],
    fitted: Sequence[Bakeable],
    rows: Sequence[Rows],
    config: BakeConfig,
    kept: torch.dtype,
) -> None:
    """Fit the writers of every edit of `fitted` to the activations with all of `edits`."""
    pieces = _pieces(rows)
    operations = transforms_of(edits, source)
    targets = [_streams(source, piece, [e.site for e in fitted], operations) for piece in pieces]
    for done, e in enumerate(fitted, 1):
        through = writers(network, e.site.layer)
        gram: Tensor | None = None
        cross: Tensor | None = None
        for piece, target in zip(pieces, targets, strict=True):
            held, inputs = _stream_and_inputs(network, piece, e.site, through)
            a, d = inputs.float(), target[e.site].float() - held.float()
            gram = a.T @ a if gram is None else gram.addmm_(a.T, a)
            cross = a.T @ d if cross is None else cross.addmm_(a.T, d)
        assert gram is not None
        assert cross is not None
        gram.diagonal().add_(config.ridge * gram.diagonal().mean())
        change = torch.linalg.solve(gram, cross)
        start = 0
        for linear in (writer.linear for writer in through):
            width = linear.weight.shape[0] if isinstance(linear, Conv1D) else linear.weight.shape[1]  # pyright: ignore
            add_to(linear, change[start : start + width], kept)
            start += width
        progress("bake", done, len(fitted))


def add_to(linear: nn.Module, change: Float[Tensor, "d_in d_out"], kept: torch.dtype) -> None:
    """Add ΔWᵀ to a linear layer's weight in either storage order, rounded to a dtype."""
    weight, step = _plain(linear), change if isinstance(linear, Conv1D) else change.T
    weights.write(linear, "weight", (weight.float() + step.to(weight.device)).to(kept))


def _plain(linear: nn.Module) -> Tensor:
    """A linear layer's weight; raises `BadInput` where it is quantised."""
    weight = weights.values(linear)
    if not weight.is_floating_point():
        raise BadInput(
            "the model's weights are quantized, and no edit can be baked into them; load it with --quantize none"
        )
    return weight


def _streams(
    network: PreTrainedModel, piece: Rows, sites: Sequence[Site], operations: dict[Site, Any]
) -> dict[Site, Tensor]:
    """The edited model's activations at the Sites, after each edit; one row per token without padding."""
    with truncated(network, max(sites).layer), transformed(network, operations), capture(network, sites) as found:
        run(network, piece, 1)
    return {s: x[piece.mask] for s, x in found.items()}


def _stream_and_inputs(
    network: PreTrainedModel, piece: Rows, site: Site, through: Sequence[Writer]
) -> tuple[Float[Tensor, "token d_model"], Float[Tensor, "token d_in"]]:
    """Activations at a Site and the scaled inputs of its writers; one row per token without padding."""
    inputs: dict[int, Tensor] = {}
    shape = piece.mask.shape
    with (
        truncated(network, site.layer),
        inputs_watched([writer.linear for writer in through], inputs.__setitem__),
        capture(network, [site]) as held,
    ):
        run(network, piece, 1)
    each = [inputs[i].reshape(*shape, -1)[piece.mask] * writer.scale for i, writer in enumerate(through)]
    return held[site][piece.mask], torch.cat(each, dim=-1)


def _distil(
    source: PreTrainedModel,
    network: PreTrainedModel,
    edits: Sequence[Bakeable],
    rows: Sequence[Rows],
    config: BakeConfig,
    kept: torch.dtype,
) -> None:
    """Train the edited blocks' weights until the baked logits match the edited ones."""
    if weights.is_offloaded(network) or any(not w.is_floating_point() for w in network.parameters()):
        raise BadInput(
            "this family is baked by distillation, which needs plain weights where they are used; load the model "
            "without offloading and with --quantize none"
        )
    masters: dict[nn.Parameter, Tensor] = {}
    for e in edits:
        for weight in layers(network)[e.site.layer].parameters():
            weight.requires_grad_(True)
            masters[weight] = weight.detach().float().clone()
    optimizer = torch.optim.Adam(list(masters.values()), lr=config.learning_rate)
    pieces = _pieces(rows, 12)
    generator = torch.Generator().manual_seed(config.seed)
    order: list[int] = []
    for step in range(config.distil_steps):
        order = order or torch.randperm(len(pieces), generator=generator).tolist()
        piece = pieces[order.pop()]
        with torch.no_grad(), transformed(source, transforms_of(edits, source)):
            target = reply_logits(source, piece)[piece.reply]
        kl(target, reply_logits(network, piece)[piece.reply]).mean().backward()
        for weight, master in masters.items():
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        optimizer.step()
        with torch.no_grad():
            for weight, master in masters.items():
                weight.copy_(master.to(kept))
        progress("bake by distillation", step + 1, config.distil_steps)
    network.requires_grad_(False)
