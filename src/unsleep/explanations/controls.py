"""Controls of explanations: features of random directions, and of a model with random weights.

Explanations of random features score nearly as well as those of trained ones (Heap et al. 2025, arXiv:2501.17727;
2602.14111): a score means something only beside theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from unsleep.core import BadInput, Site
from unsleep.dictionaries.architectures.jumprelu import JumpReLU
from unsleep.dictionaries.coders import Coder
from unsleep.explanations.streaming import StatisticsConfig, pieces
from unsleep.explanations.text import Source, read_text
from unsleep.models.model import LoadedModel

CALIBRATED = 4096
"""Tokens on which densities are matched."""


def randomised(model: LoadedModel, seed: int = 0) -> LoadedModel:
    """A copy of a model, every weight matrix replaced by Gaussian noise of its mean and standard deviation.

    The re-randomised transformer of Heap et al. 2025, arXiv:2501.17727. Raises `BadInput` for quantised weights.
    """
    network = copy.deepcopy(model.network)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if not weight.is_floating_point():
                raise BadInput(
                    f"{model.name} has quantised weights ({name}), which cannot be drawn anew; leave controls out or "
                    "load it unquantised"
                )
            if weight.ndim > 1:
                noise = torch.randn(weight.shape, generator=draw) * weight.float().std().cpu()
                weight.copy_(noise + weight.float().mean().cpu())
    return LoadedModel(network, model.tokenizer, f"{model.name} with random weights", chat=model.chat)


@torch.no_grad()
def calibration(
    model: LoadedModel, sources: Sequence[Source], sites: Sequence[Site], config: StatisticsConfig
) -> dict[Site, Float[Tensor, "token d_model"]]:
    """Activations of about `CALIBRATED` tokens of random texts, on the model's device."""
    chosen = iter(read_text(model, sources).text.chosen(CALIBRATED, config.seed).tolist())
    some: list[Source] = []
    for source in sources:
        places = [i for i in range(len(source.prompts)) if next(chosen)]
        if places:
            replies = None if source.replies is None else tuple(source.replies[i] for i in places)
            some.append(Source(source.prompts.at(places), source.plain, replies))
    read = read_text(model, some)
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for piece in pieces(model, read, sites, config.batch_tokens, read.text.chosen(0, 0)):
        for site, x in piece.activations.items():
            found[site].append(x)
    return {site: torch.cat(parts) for site, parts in found.items()}


def frozen(
    dictionary: Coder, features: Int[Tensor, " chosen"], x: Float[Tensor, "token d_model"], seed: int = 0
) -> JumpReLU:
    """A dictionary of random unit directions, one per chosen feature, each as dense as that feature is on `x`.

    Directions are isotropic, around the mean of `x`. Every feature has a threshold of its own and fires whatever the
    others do, so that some of them stand for a frozen dictionary of any size.
    """
    draw = torch.Generator().manual_seed(seed)
    rows = normalize(torch.randn(len(features), dictionary.d_model, generator=draw), dim=1)
    ordinary = x[~dictionary.sinks(x)[:, 0]]
    made = matched(dictionary, rows, densities(dictionary, x)[features.to(x.device)], ordinary)
    return replace(made, sink_norm=dictionary.sink_norm)


def densities(dictionary: Coder, x: Float[Tensor, "token d_model"]) -> Int[Tensor, " feature"]:
    """Number of tokens at which each feature fires."""
    found = torch.zeros(dictionary.n_features, dtype=torch.long, device=x.device)
    placed = dictionary.to(dictionary.decoder.dtype, x.device)
    for part in x.split(CALIBRATED):
        code = placed.encode_sparse(part.to(placed.decoder))
        found += torch.bincount(code.ids[code.values > 0], minlength=dictionary.n_features)
    return found


def matched(
    dictionary: Coder,
    rows: Float[Tensor, "chosen d_model"],
    fires: Int[Tensor, " chosen"],
    x: Float[Tensor, "token d_model"],
    model: str | None = None,
) -> JumpReLU:
    """A dictionary at the same Site with given encoder directions, each above its threshold at `fires` tokens of `x`.

    A threshold is at least 0. `model` is the fingerprint of the model that `x` is of; the dictionary's where `None`.
    """
    x, rows = x.float(), rows.to(x.device).float()
    centre = x.mean(0)
    pre = ((x - centre) @ rows.T).sort(0, descending=True).values
    last = fires.to(x.device).clamp(0, len(x) - 1)
    over, under = pre.gather(0, (last - 1).clamp_min(0)[None])[0], pre.gather(0, last[None])[0]
    threshold = torch.where(last > 0, (over + under) / 2, over).clamp_min(0).cpu()
    site, silent = dictionary.site, torch.zeros(len(rows))
    weights = rows.T.contiguous().cpu(), silent, rows.cpu(), centre.cpu()
    return JumpReLU(site, model or dictionary.model, *weights, threshold=threshold)
