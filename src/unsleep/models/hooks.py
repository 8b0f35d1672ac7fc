"""The only module that registers hooks.

Plain PyTorch hooks on the Hugging Face model. They never write in place, they are removed when
the block ends, by an exception too, and without an Edit no hook is registered, so the logits are
bit-identical to the bare model's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from unsleep.models import weights
from unsleep.models.anatomy import anatomy
from unsleep.models.sites import Place, Slot, lanes, layers, tap

Transform = Callable[[Float[Tensor, "prompt position width"]], Float[Tensor, "prompt position width"]]


_IN_PREFIX: ContextVar[bool] = ContextVar("in_prefix", default=False)


class Call(NamedTuple):
    """What a forward pass of the whole model is called with."""

    rows: int
    length: int
    """Positions of each row, those in the cache not counted."""
    mask: Tensor | None
    """The attention mask as given."""
    cache: Any
    """Keys and values of what went before, or `None`."""
    is_prefix: bool
    """Whether it runs what several rows begin with, and not rows (see `prefix_running`)."""


At = TypeVar("At", bound=Place)
"""A Site or a Slot."""


class _Stop(Exception):
    """Ends a forward pass at the deepest Site that was asked for."""


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, value: Tensor) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value


@contextlib.contextmanager
def transformed(model: PreTrainedModel, transforms: Mapping[Any, Transform]) -> Generator[PreTrainedModel]:
    """Replace what flows through each `Place` by its transform's result, until the block ends.

    A transform takes and returns `Float[Tensor, "prompt position width"]`, the width d_model at a Site and that of
    all heads side by side at a Slot, and must not write into its argument. An empty mapping registers nothing.
    """
    with contextlib.ExitStack() as stack:
        rows = _Rows()
        if weights.is_spread(model):
            transforms = {site: _brought(transform, weights.device_of(model)) for site, transform in transforms.items()}
        for site, transform in transforms.items():
            if isinstance(site, Slot):
                stack.callback(_slot_hook(model, site, transform, rows).remove)
                continue
            module, scale = tap(model, site)
            if site.point == "embed":
                handle = module.register_forward_pre_hook(_input_hook(transform), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_output_hook(_scaled(transform, scale), rows))
                if site.point == "mlp":
                    stack.callback(
                        layers(model)[site.layer].register_forward_pre_hook(rows.note, with_kwargs=True).remove
                    )
            stack.callback(handle.remove)
        yield model


@contextlib.contextmanager
def watched(
    model: PreTrainedModel, watchers: Mapping[Any, Callable[[Tensor], None]], *, stop_after_last: bool = False
) -> Generator[PreTrainedModel]:
    """Call each watcher with the tensor that flows through its `Place`, until the block ends.

    The tensor is the model's own: a watcher that keeps it must copy it, for some families write
    over it later. With `stop_after_last` the forward pass ends once the deepest Site was seen;
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
    """A context in which a forward pass may end early (see `watched`)."""
    return contextlib.suppress(_Stop)


@contextlib.contextmanager
def capture(model: PreTrainedModel, sites: Sequence[At]) -> Generator[dict[At, Tensor]]:
    """Keep a copy of what flows through each Site or Slot in the block's last forward pass.

    Copies stay on the autograd graph where gradients are enabled.
    """
    found: dict[At, Tensor] = {}

    def keep(site: At) -> Callable[[Tensor], None]:
        return lambda x: found.__setitem__(site, x.clone())

    with watched(model, {site: keep(site) for site in sites}):
        yield found


@contextlib.contextmanager
def calls_watched(model: PreTrainedModel, watcher: Callable[[Call], None]) -> Generator[None]:
    """Call the watcher before every forward pass of the whole model, until the block ends."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        x = cast("Tensor", next(t for t in given if t is not None))
        cache = kwargs.get("past_key_values")
        watcher(Call(x.shape[0], x.shape[1], kwargs.get("attention_mask"), cache, _IN_PREFIX.get()))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def prefix_running() -> Generator[None]:
    """Mark the forward passes of the block as passes over what several rows begin with."""
    token = _IN_PREFIX.set(True)
    try:
        yield
    finally:
        _IN_PREFIX.reset(token)


@contextlib.contextmanager
def inputs_watched(modules: Sequence[nn.Module], watcher: Callable[[int, Tensor], None]) -> Generator[None]:
    """Call `watcher(i, input)` whenever the i-th module runs, until the block ends."""
    with contextlib.ExitStack() as stack:
        for i, module in enumerate(modules):

            def hook(_: nn.Module, args: tuple[Any, ...], i: int = i) -> None:
                watcher(i, args[0])

            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


@contextlib.contextmanager
def observed(
    watchers: Iterable[tuple[nn.Module, Callable[..., None] | None, Callable[..., None] | None]],
) -> Generator[None]:
    """Call `before(args, kwargs)` and `after(output)` of each (module, before, after) when the module runs."""
    with contextlib.ExitStack() as stack:
        for module, before, after in watchers:
            if before is not None:
                hook = lambda _, args, kwargs, before=before: before(args, kwargs)  # noqa: E731
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if after is not None:
                stack.callback(module.register_forward_hook(lambda _, args, out, after=after: after(out)).remove)
        yield


@contextlib.contextmanager
def resumed_at(model: PreTrainedModel, layer: int, hidden: Callable[[], Tensor]) -> Generator[PreTrainedModel]:
    """Start every forward pass at the input of `layer`, from `hidden()` instead of the layers below.

    The blocks below are passed over; `hidden()` gives the residual stream that they would have
    produced, `Float[Tensor, "prompt position d_model"]`. Use it without a KV cache for the layers
    below.
    """
    blocks = layers(model)
    with contextlib.ExitStack() as stack:
        for block in blocks[:layer]:
            stack.enter_context(_passed_over(block, anatomy(model).outputs))
        replace = _input_hook(lambda _: hidden())
        stack.callback(blocks[layer].register_forward_pre_hook(replace, with_kwargs=True).remove)
        yield model


@contextlib.contextmanager
def truncated(model: PreTrainedModel, layer: int) -> Generator[PreTrainedModel]:
    """Pass over every block above `layer` until the block ends: Sites up to it are exact, logits mean nothing."""
    with contextlib.ExitStack() as stack:
        for block in layers(model)[layer + 1 :]:
            stack.enter_context(_passed_over(block, anatomy(model).outputs))
        yield model


@contextlib.contextmanager
def contiguous_head(network: PreTrainedModel) -> Generator[None]:
    """Give the unembedding contiguous input while the block runs; the logits are the same.

    A slice of the last positions is not contiguous, and PyTorch then multiplies it by a copy of the
    unembedding for every row: seconds instead of milliseconds for a batch of 100.
    """
    head = cast("nn.Module", network.get_output_embeddings())
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _passed_over(block: nn.Module, outputs: int) -> Generator[None]:
    """Let a block hand on its input, in a tuple of so many members where it gives one."""

    def identity(*args: Any, **kwargs: Any) -> Any:
        x = _input(args, kwargs)
        return (x, *[None] * (outputs - 1)) if outputs else x

    shadowed = vars(block).get("forward")  # of a block whose weights are moved in and out by hooks of accelerate
    block.forward = identity
    try:
        yield
    finally:
        if shadowed is None:
            del block.forward
        else:
            block.forward = shadowed


def _brought(transform: Transform, device: torch.device) -> Transform:
    """A transform of what is brought to a device first, as a layer on another one takes and gives it."""

    def where_it_runs(x: Tensor) -> Tensor:
        here = x.to(device)
        new = transform(here)
        return x if new is here else new.to(x.device)

    return where_it_runs


def _scaled(transform: Transform, scale: float) -> Transform:
    """A transform of scale · x as one of x; what it leaves alone stays bit for bit."""
    if scale == 1.0:
        return transform

    def of_output(x: Tensor) -> Tensor:
        held = x * scale
        new = transform(held)
        return x if new is held else x + (new - held) / scale

    return of_output


def _slot_hook(model: PreTrainedModel, slot: Slot, transform: Transform, rows: _Rows) -> RemovableHandle:
    module, _, _, lane = lanes(model, slot)
    if slot.part in Slot.INPUTS:
        return module.register_forward_pre_hook(_input_hook(transform), with_kwargs=True)

    def within(x: Tensor) -> Tensor:
        if lane is None:
            return transform(x)
        at = lane.to(x.device)
        part = x[..., at]
        new = transform(part)
        return x if new is part else x.index_copy(-1, at, new)

    return module.register_forward_hook(_output_hook(within, rows))


class _Rows:
    """Remembers [prompt, position] of the running block, for modules that see it flattened (OPT)."""

    shape: torch.Size | None = None

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.shape = _input(args, kwargs).shape[:2]


def _output_hook(transform: Transform, rows: _Rows) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x = _first(output)
        new = transform(x) if x.ndim == 3 else transform(x.unflatten(0, rows.shape or (1, -1))).flatten(0, 1)
        return None if new is x else _with_first(output, new)

    return hook


def _input_hook(transform: Transform) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = _input(args, kwargs)
        new = transform(x)
        if new is x:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return hook


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
