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
from typing import Any, NamedTuple, cast

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
        self._known: dict[int, Any] = {storage._cdata: None for storage in self._held}
        self._saved: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it creates."""
        if func is aten._local_scalar_dense.default and args[0].device.type == "meta":
            return _full_batch(args[0])
        found = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=found))
        elif func._overloadpacket is aten._grouped_mm:
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return found

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = cast("Any", storage)._cdata
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
        held = {cast("Any", storage)._cdata for storage in self._held}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            key = cast("Any", storage)._cdata
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


class FusedAttention(TorchFunctionMode):
    """Stands for the fused attention kernels of a GPU, which the meta device lacks.

    They save queries, keys, values, output and a log-sum-exp per query (Dao 2023, arXiv:2307.08691), never the scores.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace `scaled_dot_product_attention`, and run any other function."""
        if func is scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any):
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.to(query.dtype)  # the kernels add it to the scores
        return _Fused.apply(query, key, value, attn_mask, self._count)

    def _count(self, flops: int) -> None:
        self.ledger.flops += flops


class _Fused(torch.autograd.Function):
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
