"""Reads and replaces activations at Sites during a forward pass, and starts or stops it at a layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from unsleep.models import weights
from unsleep.models.anatomy import anatomy
from unsleep.models.hooks import RowShape, Transform, on_input, on_output, passed_over
from unsleep.models.sites import Place, Slot, lanes, layers, tap

At = TypeVar("At", bound=Place)
"""A Site or a Slot."""


class _Stop(Exception):
    """Stops a forward pass at the deepest requested Site."""


@contextlib.contextmanager
def transformed(model: PreTrainedModel, transforms: Mapping[Any, Transform]) -> Generator[PreTrainedModel]:
    """Replace the activation at each `Place` by its transform's result, until the block ends.

    A transform takes and returns `Float[Tensor, "prompt position width"]`, with width d_model at a Site and
    heads · d_head at a Slot, and must not modify its argument. An empty mapping registers no hook.
    """
    with contextlib.ExitStack() as stack:
        rows = RowShape()
        if weights.is_spread(model):
            transforms = {site: _brought(transform, weights.device_of(model)) for site, transform in transforms.items()}
        for site, transform in transforms.items():
            if isinstance(site, Slot):
                stack.callback(_slot_hook(model, site, transform, rows).remove)
                continue
            module, scale = tap(model, site)
            if site.point == "embed":
                handle = on_input(module, transform)
            else:
                handle = on_output(module, _scaled(transform, scale), rows)
                if site.point == "mlp":
                    stack.callback(rows.follow(layers(model)[site.layer]).remove)
            stack.callback(handle.remove)
        yield model


@contextlib.contextmanager
def watched(
    model: PreTrainedModel, watchers: Mapping[Any, Callable[[Tensor], None]], *, stop_after_last: bool = False
) -> Generator[PreTrainedModel]:
    """Call each watcher with the activation at its `Place`, until the block ends.

    The tensor is the model's own: a watcher must copy what it keeps, since some families overwrite
    it later. With `stop_after_last` the forward pass stops after the deepest Site;
    run it inside `stopping()`.
    """
    seen: set[Place] = set()

    def watch(site: Place, watcher: Callable[[Tensor], None]) -> Transform:
        def hook(x: Tensor) -> Tensor:
            watcher(x)
            seen.add(site)
            if stop_after_last and len(seen) == len(watchers):
                seen.clear()
                raise _Stop
            return x

        return hook

    with transformed(model, {site: watch(site, watcher) for site, watcher in watchers.items()}):
        yield model


def stopping() -> contextlib.suppress:
    """Context in which a forward pass may stop early (see `watched`)."""
    return contextlib.suppress(_Stop)


@contextlib.contextmanager
def capture(model: PreTrainedModel, sites: Sequence[At]) -> Generator[dict[At, Tensor]]:
    """Keep a copy of the activation at each Site or Slot from the block's last forward pass.

    Copies stay on the autograd graph where gradients are enabled.
    """
    found: dict[At, Tensor] = {}

    def keep(site: At) -> Callable[[Tensor], None]:
        return lambda x: found.__setitem__(site, x.clone())

    with watched(model, {site: keep(site) for site in sites}):
        yield found


@contextlib.contextmanager
def resumed_at(model: PreTrainedModel, layer: int, hidden: Callable[[], Tensor]) -> Generator[PreTrainedModel]:
    """Start every forward pass at the input of `layer`, from `hidden()` instead of the layers below.

    The blocks below are skipped; `hidden()` returns the residual stream that they would have
    produced, `Float[Tensor, "prompt position d_model"]`. Do not use a KV cache for the layers
    below.
    """
    blocks = layers(model)
    with contextlib.ExitStack() as stack:
        for block in blocks[:layer]:
            stack.enter_context(passed_over(block, anatomy(model).outputs))
        stack.callback(on_input(blocks[layer], lambda _: hidden()).remove)
        yield model


@contextlib.contextmanager
def truncated(model: PreTrainedModel, layer: int) -> Generator[PreTrainedModel]:
    """Skip every block above `layer` until the block ends: Sites up to it are exact, logits are meaningless."""
    with contextlib.ExitStack() as stack:
        for block in layers(model)[layer + 1 :]:
            stack.enter_context(passed_over(block, anatomy(model).outputs))
        yield model


def _brought(transform: Transform, device: torch.device) -> Transform:
    """The transform, run on `device` and returned to the device of its input."""

    def where_it_runs(x: Tensor) -> Tensor:
        here = x.to(device)
        new = transform(here)
        return x if new is here else new.to(x.device)

    return where_it_runs


def _scaled(transform: Transform, scale: float) -> Transform:
    """The transform of scale · x as a transform of x; unchanged values stay bit-identical."""
    if scale == 1.0:
        return transform

    def of_output(x: Tensor) -> Tensor:
        held = x * scale
        new = transform(held)
        return x if new is held else x + (new - held) / scale

    return of_output


def _slot_hook(model: PreTrainedModel, slot: Slot, transform: Transform, rows: RowShape) -> RemovableHandle:
    module, _, _, lane = lanes(model, slot)
    if slot.part in Slot.INPUTS:
        return on_input(module, transform)

    def within(x: Tensor) -> Tensor:
        if lane is None:
            return transform(x)
        at = lane.to(x.device)
        part = x[..., at]
        new = transform(part)
        return x if new is part else x.index_copy(-1, at, new)

    return on_output(module, within, rows)
