"""Data-parallel training under torchrun: each process takes a share of every batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable

import torch
from torch import Tensor, distributed


@contextlib.contextmanager
def joined(device: str) -> Generator[str]:
    """Join the process group where torchrun started this process; yields this process's device.

    gloo on CPUs, NCCL on GPUs. Without torchrun, a no-op.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def place() -> tuple[int, int]:
    """Rank of this process, and world size."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def average(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their means over all processes, in place."""
    _, size = place()
    if size > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)
            tensor /= size


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    _, size = place()
    if size > 1:
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
    return tensor
