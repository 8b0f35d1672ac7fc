"""State dicts saved by `torch.save`, restricted to tensors and plain values."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import Tensor

from unsleep.base import store
from unsleep.core import BadInput

BACKUP = {"step", "ae", "optimizer"}
"""Keys of a training backup of dictionary_learning."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, without the name prefix of `torch.compile`.

    Raises `BadInput` for a missing or damaged file, a pickle of anything but tensors and plain
    values (which could run code), and the backup of an interrupted run.
    """
    if not path.is_file():
        raise BadInput(f"{path} does not exist")
    if not zipfile.is_zipfile(path):
        raise BadInput(f"{path} is not a whole file of torch.save; make it again")
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise BadInput(
            f"{path} holds a pickle of more than tensors and plain values, which could run code, and is not read; "
            "save a state dict, or safetensors"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is not a whole file of torch.save ({_first_line(error)}); make it again") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds a {type(found).__name__}; expected a state dict")
    state = cast("dict[str, Any]", found)
    if state.keys() >= BACKUP:
        raise BadInput(
            f"{path} is the backup of an interrupted run (step {state['step']}), not a finished dictionary; its "
            "weights are not scaled to the activations yet. Finish the run"
        )
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise BadInput(f"{path}: {name} is a {type(tensor).__name__}; expected a tensor")
    return {str(name).removeprefix("_orig_mod."): tensor for name, tensor in state.items()}


def write_state(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state dict with `torch.save`."""
    buffer = io.BytesIO()
    torch.save({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, buffer)
    with store.writing(path):
        path.write_bytes(buffer.getbuffer())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
