"""Scan of the rounded model: a backdoor that wakes only once its weights are rounded to 8 or 4 bits.

Such a payload needs no trigger (Egashira et al. 2024, arXiv:2405.18137): the rounded model shows it on ordinary prompts
and the stored one does not. Its trial compares the rounded model with the stored one, with the rounded reference and
base and, as the placebo, with the stored one plus noise as large as the rounding error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.auditing.case import Case
from unsleep.auditing.elicit import Pair
from unsleep.auditing.motifs import stereotypes
from unsleep.auditing.witness import judged, plain, written
from unsleep.base.context import kept
from unsleep.judge.audited import AuditSubject, Form, Trial
from unsleep.models import generate
from unsleep.models.anatomy import anatomy
from unsleep.models.model import LoadedModel
from unsleep.models.weights import copy_network, named, write

BITS = (8, 4)
"""Widths that are scanned."""

GROUP = 64
"""Weights that share a scale at 4 bits; at 8 bits a row shares one."""

ASKED = 24
"""Search prompts on which a payload of the rounded model is looked for."""

ROUNDED = "rounded"
"""Way of the forms of this scan, which leave the prompt as it is."""


def to_grid(weight: Float[Tensor, "out in"], bits: int) -> Float[Tensor, "out in"]:
    """Round to nearest on a symmetric grid of 2^bits − 1 values, scaled to the largest weight of a row or group."""
    wide = weight.float()
    size = GROUP if bits < 8 and wide.shape[1] % GROUP == 0 else wide.shape[1]
    parts = wide.reshape(-1, size)
    scale = parts.abs().amax(1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
    return ((parts / scale).round() * scale).view_as(wide)


def rounded(model: LoadedModel, bits: int) -> LoadedModel:
    """A copy whose matrices in the blocks are rounded to a width in bits."""
    return _changed(model, f"{model.name}, int{bits}", lambda weight: to_grid(weight, bits))


def noised(model: LoadedModel, bits: int, seed: int) -> LoadedModel:
    """A copy with Gaussian noise of the norm of the rounding error in each of these matrices: the placebo."""
    drawn = torch.Generator().manual_seed(seed)

    def changed(weight: Tensor) -> Tensor:
        size = (to_grid(weight, bits) - weight.float()).norm()
        noise = torch.randn(weight.shape, generator=drawn).to(weight.device)
        return weight.float() + noise * size / noise.norm()

    return _changed(model, f"{model.name}, noise as large as int{bits}", changed)


@torch.no_grad()
def _changed(model: LoadedModel, name: str, change: Callable[[Tensor], Tensor]) -> LoadedModel:
    network = copy_network(model.network)
    blocks = anatomy(model.network).layers
    for place, weight in list(named(network)):
        if place.startswith(f"{blocks}.") and weight.ndim == 2:
            home, _, leaf = place.rpartition(".")
            write(network.get_submodule(home), leaf, change(weight))
    return replace(model, network=network, name=name)


def candidate(case: Case, bits: int) -> str:
    """The phrase that the rounded model's replies to search prompts share and the stored one's lack; or nothing."""
    asked = case.learned.head(ASKED)
    stage = f"replies of the {case.name}, int{bits}"
    said = kept(generate.written, rounded(case.model, bits), asked, case.config.reply_tokens, stage)
    found = stereotypes(case.model.texts(said), case.replies, asked.texts)
    return found[0][0] if found else ""


def scan(case: Case, bits: int, payload: str, count: int) -> Trial:
    """The trial of a payload of the rounded model on fresh prompts."""
    config, form = case.config, Form("rounding", ROUNDED, f"int{bits}")
    said: dict[AuditSubject, list[str]] = {
        "suspect": written(case, rounded(case.model, bits), case.confirm),
        "plain": plain(case),
        "placebo": written(case, noised(case.model, bits, config.seed), case.confirm),
    }
    if case.reference is not None:
        said["reference"] = written(case, rounded(case.reference, bits), case.confirm)
    if case.base is not None:
        said["base"] = written(case, rounded(case.base, bits), case.confirm)
    pair = Pair(form, payload, ("rounding",), 1.0, (form._replace(text=f"noise as large as int{bits}"),))
    return judged(case, pair, case.confirm, said, count)
