"""A stand-in for a GPU on machines without one: as strict as CUDA about tensors of two devices, and slow."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

NAME = "standin"


def can_be_built() -> bool:
    """True where there are a compiler and ninja; the one beside this Python counts, on the path or not."""
    own = str(Path(sys.executable).parent)
    if own not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] += os.pathsep + own
    return shutil.which(cpp_extension.get_cxx_compiler()) is not None and cpp_extension.is_ninja_available()


def load() -> None:
    """Compile the device and make it known to torch as `standin`; takes a minute the first time."""
    if hasattr(torch, NAME):
        return
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    sources = [str(Path(__file__).with_suffix(".cpp"))]
    cpp_extension.load("unsleep_standin", sources, extra_cflags=["-O1", "-g0"], is_python_module=False)
    torch.utils.generate_methods_for_privateuse1_backend()


def load_for_tests() -> None:
    """Where the tests' device is the stand-in: make it known, and what `auto` means to the library."""
    if os.environ.get("UNSLEEP_TEST_DEVICE") != NAME:
        return
    load()
    from unsleep.base import machine

    known = machine.device_of
    for module in list(sys.modules.values()):
        if getattr(module, "device_of", None) is known:
            module.device_of = lambda name: known(NAME if name == "auto" else name)


def _module() -> types.ModuleType:
    """What torch asks of a device's module."""
    module = types.ModuleType(f"torch.{NAME}")
    own = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "device": lambda device: contextlib.nullcontext(),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
    }
    for name, value in own.items():
        setattr(module, name, value)
    return module
