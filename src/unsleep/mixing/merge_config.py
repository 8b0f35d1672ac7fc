"""Options of a merge, and the coefficient of each layer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unsleep.core import BadInput, check_choices
from unsleep.models.merging import check_alpha

Method = Literal["linear", "slerp", "ties", "dare-ties", "dare-linear"]
OutDtype = Literal["auto", "bfloat16", "float16", "float32"]

BY_MERGEKIT: Mapping[str, str] = {"ties": "ties", "dare-ties": "dare_ties", "dare-linear": "dare_linear"}
"""Method that mergekit computes → its name there."""
REST = "rest"
"""Embeddings, final norm and unembedding."""
RANGE = re.compile(r"(\d+)(?:-(\d+))?=([^=]+)", re.ASCII)


@dataclass(frozen=True)
class MergeConfig:
    """Options of a merge."""

    alpha: float = 0.5
    """Weight α of the second model: 0 is the first, 1 the second; any other number extrapolates."""
    alpha_layers: str = ""
    """Other α of some layers, such as 0-9=0.2,10-29=0.8; the rest has --alpha."""
    method: Method = "linear"
    """linear: W_A + α (W_B − W_A). slerp: spherical interpolation of the task vectors, tensor by tensor. ties,
    dare-ties and dare-linear: by mergekit, which must be installed. All but linear need --base.
    """
    base: str | None = None
    """Base of the task vectors; also of an adapter whose own base is not found."""
    density: float = 0.5
    """Share of each task vector that ties and dare keep."""
    dtype: OutDtype = "auto"
    """Dtype of the result; `auto` is that of both models, the wider one where they differ."""
    seed: int = 0
    """Seed of dare's random choice."""

    def __post_init__(self) -> None:
        if self.base is not None:
            object.__setattr__(self, "base", os.fspath(self.base))
        check_choices(self, "", method=Method, dtype=OutDtype)
        check_alpha(self.alpha)
        parse_layers(self.alpha_layers)
        if self.method != "linear" and self.base is None:
            raise BadInput(f"--method {self.method} merges task vectors, which have a base; give it with --base MODEL")
        if not 0 < self.density <= 1:
            raise BadInput.of("density", self.density, "above 0 and at most 1")
        if self.density != MergeConfig.density and self.method not in BY_MERGEKIT:
            raise BadInput(f"--density is of ties and dare, and the method is {self.method}; leave it out")

    def alphas(self, layers: int) -> dict[str, float]:
        """The α of every layer, by its number, and of the rest.

        Raises `BadInput` for a layer that a model of so many layers does not have.
        """
        given = self.by_layer
        if given and max(given) >= layers:
            raise BadInput(f"--alpha-layers names layer {max(given)}; the models have layers 0 to {layers - 1}")
        return {str(layer): given.get(layer, self.alpha) for layer in range(layers)} | {REST: self.alpha}

    @property
    def by_layer(self) -> dict[int, float]:
        """The α of layers that have their own."""
        return parse_layers(self.alpha_layers)


def parse_layers(text: str) -> dict[int, float]:
    """Layer → α from a text such as `0-9=0.2,10=0.8`.

    Raises `BadInput` naming the entry that is malformed, that runs backwards, or whose layer another one has already.
    """
    found: dict[int, float] = {}
    for entry in filter(None, (each.strip() for each in text.split(","))) if text.strip() else ():
        match = RANGE.fullmatch(entry)
        if match is None:
            raise BadInput(f"--alpha-layers: {entry!r} is no layers=α; expected such as 0-9=0.2,10=0.8")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise BadInput(f"--alpha-layers: {entry!r} runs backwards; expected such as {last}-{first}={match[3]}")
        try:
            alpha = float(match[3])
            check_alpha(alpha)
        except ValueError:
            raise BadInput(f"--alpha-layers: {match[3]!r} in {entry!r} is no finite number, such as 0.2") from None
        for layer in range(first, last + 1):
            if layer in found:
                raise BadInput(f"--alpha-layers gives layer {layer} twice, again in {entry!r}")
            found[layer] = alpha
    return found


def layer_list(names: Iterable[str], layers: int, where: str | Path) -> str:
    """The list of modules that are the layers, such as `model.layers`: the one of so many modules, by tensors' names.

    Raises `BadInput` where none or several lists have that length, such as in a model with as many layers for images.
    """
    lists: dict[str, set[int]] = {}
    for home, number in filter(None, map(_split, names)):
        lists.setdefault(home, set()).add(number)
    fitting = [home for home, numbers in lists.items() if numbers == set(range(layers))]
    if len(fitting) != 1:
        raise BadInput(
            f"{where}: {len(fitting)} of its lists of modules ({', '.join(sorted(lists)) or 'none'}) have {layers} "
            "members, so that its layers are not known; leave --alpha-layers out"
        )
    return fitting[0]


def layer_of(name: str, home: str) -> str:
    """The number of a tensor's layer in the list of layers, or `rest`."""
    place = _split(name)
    return str(place[1]) if place is not None and place[0] == home else REST


def _split(name: str) -> tuple[str, int] | None:
    """The list of modules that a tensor is in, and its number there."""
    words = name.split(".")
    number = next((i for i, word in enumerate(words) if word.isdecimal()), None)
    return None if number is None else (".".join(words[:number]), int(words[number]))
