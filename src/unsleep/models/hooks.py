"""The only module that registers hooks.

Plain PyTorch hooks on the Hugging Face model. They never write in place and are removed when
the block ends, also by an exception. Without an Edit no hook is registered, so that the logits are
bit-identical to the bare model's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from unsleep.models.members import members_of

Transform = Callable[[Float[Tensor, "prompt position width"]], Float[Tensor, "prompt position width"]]

_IN_PREFIX: ContextVar[bool] = ContextVar("in_prefix", default=False)


class Call(NamedTuple):
    """Arguments of a forward pass of the whole model."""

    rows: int
    length: int
    """Positions per row, excluding the cache."""
    mask: Tensor | None
    """The attention mask as given."""
    cache: Any
    """KV cache of the preceding positions, or `None`."""
    is_prefix: bool
    """True if the pass computes a shared prefix, not rows (see `prefix_running`)."""


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, value: Tensor) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value


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
    """Mark the forward passes of the block as computing a shared prefix."""
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
def passes_watched(blocks: Sequence[nn.Module], watcher: Callable[[str, int], None]) -> Generator[None]:
    """Call `watcher(what, i)` at the ends of the i-th block's passes, until the block of code ends.

    `what` is "enter" and "leave" for the forward pass, "back" when the gradient of its output is known and "done" when
    that of its input is: the ends of its backward pass. "done" is missing where the input has no gradient.
    """

    def on_gradient(x: Any, what: str, i: int) -> None:
        if isinstance(x, Tensor) and x.requires_grad:
            x.register_hook(lambda _: watcher(what, i))

    with contextlib.ExitStack() as stack:
        for i, block in enumerate(blocks):

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], i: int = i) -> None:
                on_gradient(_input(args, kwargs), "done", i)
                watcher("enter", i)

            def after(_: nn.Module, args: Any, output: Any, i: int = i) -> None:
                on_gradient(_first(output), "back", i)
                watcher("leave", i)

            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after).remove)
        yield


@contextlib.contextmanager
def outputs_of_inputs(
    replaced: Iterable[tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]],
) -> Generator[None]:
    """Replace each module's output by a function of its input and its output, until the block ends."""
    with contextlib.ExitStack() as stack:
        for module, make in replaced:

            def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor, make: Any = make) -> Tensor:
                return make(_input(args, kwargs), output)

            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextlib.contextmanager
def contiguous_head(network: PreTrainedModel) -> Generator[None]:
    """Make the unembedding's input contiguous during the block; the logits are unchanged.

    A slice of the last positions is not contiguous, and PyTorch then multiplies it by a copy of the
    unembedding for every row: seconds instead of milliseconds for a batch of 100.
    """
    with contextlib.ExitStack() as stack:
        for each in members_of(network):
            head = cast("nn.Module", each.get_output_embeddings())
            stack.callback(head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),)).remove)
        yield


@contextlib.contextmanager
def passed_over(block: nn.Module, outputs: int) -> Generator[None]:
    """Make a block return its input, in a tuple of `outputs` members where it returns one."""

    def identity(*args: Any, **kwargs: Any) -> Any:
        x = _input(args, kwargs)
        return (x, *[None] * (outputs - 1)) if outputs else x

    shadowed = vars(block).get("forward")  # set by accelerate on offloaded blocks
    block.forward = identity
    try:
        yield
    finally:
        if shadowed is None:
            del block.forward
        else:
            block.forward = shadowed


class RowShape:
    """The [prompt, position] shape of a running block, for modules whose input is flattened (OPT)."""

    shape: torch.Size | None = None

    def follow(self, block: nn.Module) -> RemovableHandle:
        """Record the shape from a block's input."""

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.shape = _input(args, kwargs).shape[:2]

        return block.register_forward_pre_hook(note, with_kwargs=True)


def on_output(module: nn.Module, transform: Transform, rows: RowShape) -> RemovableHandle:
    """Replace a module's output, or the first member of its tuple, by its transform."""

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        x = _first(output)
        new = transform(x) if x.ndim == 3 else transform(x.unflatten(0, rows.shape or (1, -1))).flatten(0, 1)
        return None if new is x else _with_first(output, new)

    return module.register_forward_hook(hook)


def on_input(module: nn.Module, transform: Transform) -> RemovableHandle:
    """Replace a module's input by its transform."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = _input(args, kwargs)
        new = transform(x)
        if new is x:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
