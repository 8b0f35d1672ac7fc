"""A model's weights wherever they are stored: read, written, hashed, copied, moved.

accelerate keeps offloaded weights in memory or on disk, and its hooks load them during a forward pass; outside of
it their parameters are empty (on the meta device). Code that needs the values of a weight reads them through this
module.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import Tensor, nn
from transformers import PreTrainedModel

from unsleep.base import store
from unsleep.models.anatomy import inherit

Dtypes = Mapping[str, torch.dtype]
"""Tensor name → dtype."""


def named(network: nn.Module, *, shared: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every weight once, by the first of its names, and every buffer that a checkpoint stores.

    With `shared`, a tied weight appears under each of its names.
    """
    kept = network.state_dict(keep_vars=True).keys()
    found = [
        *network.named_parameters(remove_duplicate=not shared),
        *((n, b) for n, b in network.named_buffers() if n in kept),
    ]
    for name, tensor in found:
        home, _, leaf = name.rpartition(".")
        yield name, read(network.get_submodule(home), leaf) if tensor.device.type == "meta" else tensor


def read(module: nn.Module, leaf: str = "weight") -> Tensor:
    """A weight of a module, also where it is offloaded."""
    tensor: Tensor = getattr(module, leaf)
    return _elsewhere(module)[leaf] if tensor.device.type == "meta" else tensor


@torch.no_grad()
def write(module: nn.Module, leaf: str, values: Tensor) -> None:
    """Overwrite a weight of a module, rounding to its dtype."""
    tensor: Tensor = getattr(module, leaf)
    if tensor.device.type != "meta":
        tensor.data.copy_(values)
        return
    kept = _elsewhere(module)
    kept.dataset.state_dict[f"{kept.prefix}{leaf}"] = values.to(tensor.dtype).cpu()


def _elsewhere(module: nn.Module) -> Any:
    """The offloaded weights of a module, by their names in it."""
    return cast("Any", module)._hf_hook.weights_map


def device_of(network: PreTrainedModel) -> torch.device:
    """Device of a model's inputs: that of its token embedding."""
    table: Any = network.get_input_embeddings()
    hook = getattr(table, "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    return table.weight.device if place is None else torch.device(place)


def is_spread(network: PreTrainedModel) -> bool:
    """True if parts of a model run on different devices."""
    places: dict[str, Any] = getattr(network, "hf_device_map", {})
    return len({str(p) for p in places.values()} - {"cpu", "disk"}) > 1


def is_offloaded(network: nn.Module) -> bool:
    """True if weights are offloaded."""
    return any(weight.device.type == "meta" for weight in network.parameters())


def spread(
    network: PreTrainedModel, device_map: str | Mapping[str, Any], max_memory: Mapping[Any, str], offload: str | None
) -> PreTrainedModel:
    """Spread a model's layers over several devices, as `from_pretrained` does with a device map.

    Raises `ValueError` as accelerate does for a map that omits a module, or uses the disk without a folder.
    """
    places = dict(device_map) if not isinstance(device_map, str) else None
    if places is None:
        whole = cast("Any", network)._no_split_modules
        kept: dict[str, Any] = {"max_memory": dict(max_memory) or None, "no_split_module_classes": list(whole or ())}
        if device_map != "sequential":
            kept["max_memory"] = get_balanced_memory(network, low_zero=device_map == "balanced_low_0", **kept)
        places = infer_auto_device_map(network, **kept)
    return cast("PreTrainedModel", dispatch_model(network, places, offload_dir=offload))


def fingerprint(network: PreTrainedModel) -> str:
    """Content hash of a model's weights, 16 hex digits.

    Equal exactly for equal weights, whatever the device and dtype, and whether or not an unembedding that equals the
    embedding is tied to it: each is hashed in the narrowest of bfloat16, float16 and float32 that represents all of
    its values exactly.
    """
    tensors = dict(named(network))
    ends = [(network.get_input_embeddings(), "in"), (network.get_output_embeddings(), "out")]
    names = {side: _name_of(network, end) for end, side in ends if end is not None}
    first, last = (tensors.get(f"{names.get(side)}.weight") for side in ("in", "out"))
    if first is not None and last is not None and first.shape == last.shape and torch.equal(first, last):
        del tensors[f"{names['out']}.weight"]
    return store.hash_tensors(tensors, _narrowest)


def _name_of(network: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in network.named_modules() if m is module)


def _narrowest(weight: Tensor) -> Tensor:
    if weight.is_floating_point():
        for dtype in (torch.bfloat16, torch.float16):
            narrow = weight.to(dtype)
            if weight.dtype == dtype or torch.equal(narrow.to(weight.dtype), weight):
                return narrow
    return weight


def dtypes(network: nn.Module) -> dict[str, torch.dtype]:
    """Dtypes of all tensors that a checkpoint stores."""
    return {name: t.dtype for name, t in network.state_dict(keep_vars=True).items() if t.is_floating_point()}


def moved(network: PreTrainedModel, to: torch.dtype | torch.device | str | Dtypes) -> PreTrainedModel:
    """The network in another dtype, in one dtype per tensor, or on another device.

    Only tensors that a checkpoint stores change dtype: `from_pretrained` computes rotary frequencies in
    float32 in any case. `network.to` would round them, and the model would differ from
    the one that its own checkpoint gives.
    """
    if isinstance(to, torch.device | str):
        return cast("Any", network).to(to)
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(to if isinstance(to, torch.dtype) else to.get(name, tensor.dtype))
    return network


def copy_network(network: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with its own weights; tied weights stay tied."""
    twin = copy.deepcopy(network)
    inherit(network, twin)
    return twin.eval().requires_grad_(False)
