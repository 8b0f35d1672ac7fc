"""Pairs of models to merge, and what mergekit makes of the same merge."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

import unsleep
from support.checkpoints import save_base
from unsleep import MergeConfig
from unsleep.mixing.merge_kit import check_installed
from unsleep.mixing.merge_record import YAML


def pair(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A model and another that differs in all but its norms."""
    first, second = save_base(folder / "first", family, dtype), folder / "second"
    return first, another(first, second)


def another(model: Path, place: Path, seed: int = 0) -> Path:
    """A copy of a model that differs in all but its norms."""
    shutil.copytree(model, place)
    change(place, lambda name, weight: weight if "norm" in name else moved(name, weight, seed))
    return place


def moved(name: str, weight: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A weight with noise."""
    random = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    return (weight.float() + 0.05 * torch.randn(weight.shape, generator=random)).to(weight.dtype)


def change(folder: Path, new: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Change the weights of a checkpoint; `None` leaves one out."""
    path = folder / "model.safetensors"
    found = {name: new(name, weight) for name, weight in load_file(path).items()}
    save_file({name: weight for name, weight in found.items() if weight is not None}, path, {"format": "pt"})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of floats as whole numbers."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


class Agreement(NamedTuple):
    """Two merges of the same models, element by element."""

    elements: int
    identical: float
    """Share of elements with the same bytes."""
    ulps: float
    """Largest distance, in units in the last place; where a sum cancels, in units of its terms' rounding in float32."""


def agreement(folder: Path, family: str, config: MergeConfig) -> Agreement:
    """A merge of two small bfloat16 models of a family by unsleep and by mergekit, from the YAML that unsleep wrote."""
    pair(folder, family, torch.bfloat16)
    if config.base is not None:
        another(folder / "first", folder / "base", seed=7)
    unsleep.merge(folder / "first", folder / "second", folder / "merged", config)
    command = [check_installed("linear"), str(folder / "merged" / YAML), str(folder / "theirs"), "--quiet"]
    subprocess.run(command, check=True, capture_output=True)
    ours, theirs = weights(folder / "merged"), weights(folder / "theirs")
    assert ours.keys() == theirs.keys()
    models = [weights(folder / name) for name in ("first", "second", "base") if (folder / name).is_dir()]
    apart = torch.cat([ulps(ours[name], theirs[name], [each[name] for each in models]) for name in ours])
    return Agreement(apart.numel(), float((apart == 0).double().mean()), float(apart.max()))


def ulps(one: torch.Tensor, other: torch.Tensor, terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The distance of two sums of the same terms, element by element (see `Agreement`)."""
    larger = torch.maximum(one.abs(), other.abs()).double()
    place = torch.finfo(one.dtype).eps * 2.0 ** larger.clamp(min=1e-38).log2().floor()
    rounding = CANCELLED * torch.stack([term.double().abs() for term in terms]).amax(0)
    return ((one.double() - other.double()).abs() / torch.maximum(place, rounding)).flatten()


CANCELLED = 2.0**-21
"""Rounding of a sum in float32, relative to its largest term: a few units in the last place."""
