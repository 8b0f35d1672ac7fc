"""Memory and arithmetic of code that runs on the meta device: storages alive, storages saved by autograd, FLOPs.

On the meta device tensors have shapes and storages, and no numbers. A storage counts once, however many tensors view
it, from the operation that creates it until nothing refers to it, as in a caching allocator.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class Mark(NamedTuple):
    """State of a ledger at a point of the run."""

    what: str
    block: int
    """Number of the block that the point is of, or −1."""
    live: int
    """Bytes alive."""
    high: int
    """Most bytes alive since the previous mark."""
    saved: int
    """Bytes that autograd has saved so far."""
    flops: int
    """Floating-point operations of matrix products so far."""


def key_of(storage: Any) -> int:
    """Identity of a storage, shared by all tensors that are views of it."""
    return storage._cdata


class Ledger(TorchDispatchMode):
    """Counts the storages that operations of a block of code create, on any device.

    Args:
        held: tensors that exist before, such as weights; they are not counted.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.high = self.saved = self.flops = 0
        self.marks: list[Mark] = []
        self._held = [tensor.untyped_storage() for tensor in held]
        self._known: dict[int, Any] = {key_of(storage): None for storage in self._held}
        self._saved: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it creates."""
        if func is aten._local_scalar_dense.default and args[0].device.type == "meta":
            return _full_batch(args[0])
        found = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=found))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return found

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = key_of(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, partial(self._gone, key, size))
        self.live += size
        self.high = max(self.high, self.live)

    def _gone(self, key: int, size: int, _: object) -> None:
        del self._known[key]
        self._saved.discard(key)
        self.live -= size

    @contextlib.contextmanager
    def saving(self) -> Generator[None]:
        """Count the storages that autograd saves in the block, without those that were held before."""
        held = {key_of(storage) for storage in self._held}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            key = key_of(storage)
            if key not in held and key not in self._saved:
                self._saved.add(key)
                self.saved += storage.nbytes()
            return tensor.detach()

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def mark(self, what: str, block: int = -1) -> None:
        """Note the state, and begin a new search for the most bytes alive."""
        self.marks.append(Mark(what, block, self.live, self.high, self.saved, self.flops))
        self.high = self.live


def _full_batch(condition: Tensor) -> bool:
    """The answer to a question about the numbers in a tensor: rows are whole, neither padded nor packed.

    Raises `NotImplementedError` for any question but a yes or no.
    """
    if condition.dtype != torch.bool:
        raise NotImplementedError("memory that depends on the numbers in a tensor")
    return True


class Kernels(TorchFunctionMode):
    """Stands for kernels of a GPU that the meta device lacks: fused attention, and the grouped products of experts.

    Fused attention saves queries, keys, values, output and a log-sum-exp per query (Dao 2023, arXiv:2307.08691), never
    the scores. Attention that no fused kernel takes runs as written.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace what a kernel does, and run any other function."""
        given: dict[str, Any] = kwargs or {}
        if func is scaled_dot_product_attention and _is_fused(*args[:3], **given):
            mask = given.get("attn_mask", args[3] if len(args) > 3 else None)
            if mask is not None and mask.dtype == torch.bool:
                mask = mask.to(args[0].dtype)  # the kernels add it to the scores
            return _Attention.apply(*args[:3], mask, self._count)
        if func in GROUPED and args[0].ndim == 2:
            return _Grouped.apply(*args[:2], self._count)
        return func(*args, **given)

    def _count(self, flops: int) -> None:
        self.ledger.flops += flops


GROUPED: set[Any] = {getattr(torch.nn.functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None)}
"""Functions for the products of a mixture's experts, tokens sorted by expert."""

WIDEST = 256
"""Largest width of a head that fused kernels take."""


def _is_fused(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool = False, **_: Any) -> bool:
    """True if a fused kernel takes these heads."""
    return (enable_gqa or query.shape[-3] == key.shape[-3]) and max(query.shape[-1], value.shape[-1]) <= WIDEST


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, count: Callable[[int], None]):
        *rows, heads, length, width = query.shape
        out = query.new_empty(*rows, length, heads, value.shape[-1]).transpose(-2, -3)
        sums = query.new_empty(*rows, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, *(() if mask is None else (mask,)))
        ctx.count = count
        count(2 * math.prod(rows) * heads * length * key.shape[-2] * (width + value.shape[-1]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        *rows, heads, length, width = query.shape
        of_query = torch.empty_like(query)
        sums = query.new_empty(query.shape, dtype=torch.float32)  # the gradient of the queries, summed in float32
        whole = [x.new_empty(*rows, heads, *x.shape[-2:]) for x in (key, value)]  # one per query head
        # The scores are computed again: five products instead of two.
        ctx.count(2 * math.prod(rows) * heads * length * key.shape[-2] * (3 * width + 2 * value.shape[-1]))
        of_key, of_value = whole if key.shape[-3] == heads else (torch.empty_like(key), torch.empty_like(value))
        del sums, whole
        return of_query, of_key, of_value, None, None


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor, count: Callable[[int], None]) -> Tensor:
        ctx.save_for_backward(tokens, weights)
        ctx.count = count
        count(2 * tokens.numel() * weights.shape[-1])
        return tokens.new_empty(len(tokens), weights.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weights = ctx.saved_tensors
        found = [
            torch.empty_like(x) if need else None
            for x, need in zip((tokens, weights), ctx.needs_input_grad, strict=False)
        ]
        ctx.count(2 * tokens.numel() * weights.shape[-1] * sum(x is not None for x in found))
        return *found, None
