"""Cures that prune: weights of small magnitude, and neurons that trusted prompts leave quiet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.auditing.cure import Cure, Patient, Variant
from unsleep.models.anatomy import anatomy
from unsleep.models.forward import run, whole_rows
from unsleep.models.hooks import inputs_watched
from unsleep.models.model import LoadedModel
from unsleep.models.sites import Slot, lanes, layers
from unsleep.models.weights import copy_network, named, write
from unsleep.repairs.baselines import silence

PRUNED = (0.1, 0.25, 0.5)
"""Shares of weights, or of neurons, that are pruned."""

BATCH = 32


class Magnitude(Cure):
    """Zero the smallest weights of every matrix of the blocks (Han et al. 2015, arXiv:1506.02626)."""

    kind = "magnitude"

    def variants(self, patient: Patient) -> Iterator[Variant]:
        """Every share."""
        for share in PRUNED:
            yield Variant(f"{share:.0%} of the weights zeroed", pruned(patient.suspect, share))


@torch.no_grad()
def pruned(model: LoadedModel, share: float) -> LoadedModel:
    """A copy in which the smallest share of every matrix of the blocks, by absolute value, is 0."""
    network = copy_network(model.network)
    blocks = anatomy(model.network).layers
    for name, weight in list(named(network)):
        count = int(share * weight.numel())
        if name.startswith(f"{blocks}.") and weight.ndim == 2 and count:
            home, _, leaf = name.rpartition(".")
            bound = weight.float().abs().flatten().kthvalue(count).values
            write(network.get_submodule(home), leaf, weight.masked_fill(weight.float().abs() <= bound, 0.0))
    return replace(model, network=network, name=f"{model.name}, {share:.0%} of its weights pruned")


class Activation(Cure):
    """Prune the MLP neurons that trusted prompts and replies activate least ("fine-pruning", Liu et al. 2018,
    arXiv:1805.12185, without its fine-tuning).
    """

    kind = "activation"

    def variants(self, patient: Patient) -> Iterator[Variant]:
        """Every share."""
        model = patient.suspect
        usual = neuron_use(model, patient)
        for share in PRUNED:
            network = copy_network(model.network)
            for layer, use in enumerate(usual):
                gone = use.topk(int(share * len(use)), largest=False).indices
                silence(network, Slot(layer, "neurons"), gone)
            name = f"{model.name}, {share:.0%} of its neurons pruned"
            yield Variant(f"{share:.0%} of the neurons pruned", replace(model, network=network, name=name))


@torch.no_grad()
def neuron_use(model: LoadedModel, patient: Patient) -> list[Float[Tensor, " neuron"]]:
    """Mean absolute activation of every MLP neuron on trusted prompts and replies, layer by layer.

    Raises `BadInput` where a layer's neurons are no single module's input.
    """
    modules = [lanes(model.network, Slot(layer, "neurons")).module for layer in range(len(layers(model.network)))]
    longest = max(map(len, patient.replies))
    prompts = model.encode(patient.ordinary, longest)
    whole = [[*row, *said] for row, said in zip(prompts, patient.replies, strict=True)]
    sums: dict[int, Tensor] = {}
    count = 0
    for start in range(0, len(whole), BATCH):
        rows = whole_rows(model, whole[start : start + BATCH])
        count += int(rows.mask.sum())

        def watch(layer: int, x: Tensor, mask: Tensor = rows.mask) -> None:
            found = x[mask.to(x.device)].float().abs().sum(0).cpu()
            sums[layer] = sums[layer] + found if layer in sums else found

        with inputs_watched(modules, watch):
            run(model.network, rows, 1)
    return [sums[layer] / count for layer in range(len(modules))]
